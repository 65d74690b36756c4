"""Differences: what counts, and from when on they show anything."""

from __future__ import annotations

import math

import pytest

from megrez_eval.statistics import bits, flips, score


def test_wilsons_interval() -> None:
    # Wilson 1927; the figures of scipy's documentation and of statsmodels agree to these digits.
    found = score([1] * 8 + [0] * 2)
    assert (found.value, found.n) == (0.8, 10)
    assert (found.low, found.high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


def test_a_mean_of_other_values_has_the_normal_interval() -> None:
    found = score([0.25, 0.75, 0.25, 0.75])
    assert found.high - found.value == pytest.approx(1.96 * math.sqrt(1 / 12) / 2)


@pytest.mark.parametrize(
    ("lost", "won", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (10, 2, 0.03857421875)]
)
def test_mcnemars_exact_test(lost: int, won: int, p: float) -> None:
    first = [1] * lost + [0] * won + [1] * 20
    second = [0] * lost + [1] * won + [1] * 20
    found = flips(first, second)
    assert (found.lost, found.won, found.n) == (lost, won, 20 + lost + won)
    assert found.p == pytest.approx(p)


@pytest.mark.parametrize("count", range(61))
def test_the_least_difference_is_just_significant(count: int) -> None:
    found = flips([1] * count + [0] * 40, [0] * 40 + [0] * count)
    least = round(found.least * found.n)
    total = max(count, 6)
    lost = (total + least) // 2
    assert flips([1] * lost + [0] * (total - lost), [0] * lost + [1] * (total - lost)).p < 0.05
    lost -= 1
    assert flips([1] * lost + [0] * (total - lost), [0] * lost + [1] * (total - lost)).p >= 0.05


def test_answers_that_are_neither_right_nor_wrong_do_not_flip() -> None:
    with pytest.raises(ValueError, match="neither"):
        flips([0.5], [1])


def test_bits_are_of_all_texts_together() -> None:
    found = bits([(-10 * math.log(2), 10), (-90 * math.log(2), 30)])
    assert found.value == pytest.approx(100 / 40)
    assert 1 <= found.low <= found.value <= found.high <= 3
