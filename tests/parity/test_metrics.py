"""The figures, against sums written out and against cases whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megrez_parity.metrics import Comparison
from megrez_parity.results import Metrics

Array = NDArray[np.float64]


def compare(reference: Array, candidate: Array, targets: NDArray[Any]) -> Metrics:
    comparison = Comparison()
    comparison.add(reference, candidate, targets)
    return comparison.result()


def values(metrics: Metrics) -> dict[str, float]:
    figures = {name: getattr(metrics, name) for name in Metrics.__dataclass_fields__}
    return {name: getattr(figure, "value", figure) for name, figure in figures.items()}


def random_window(seed: int, rows: int = 50, vocabulary: int = 50) -> tuple[Array, NDArray[Any]]:
    draw = np.random.default_rng(seed)
    return draw.normal(0, 2, (rows, vocabulary)), draw.integers(0, vocabulary, rows)


def by_hand(p_logits: Array, q_logits: Array, targets: NDArray[Any]) -> dict[str, float]:
    """llama-perplexity's statistics as its source words them, a position at a time."""
    kld, same, nll, nll_base, delta = [], 0, [], [], []
    for i, target in enumerate(targets):
        p = [math.exp(x) for x in p_logits[i]]
        q = [math.exp(x) for x in q_logits[i]]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kld.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same += p.index(max(p)) == q.index(max(q))
        nll.append(-math.log(q[target]))
        nll_base.append(-math.log(p[target]))
        delta.append(q[target] - p[target])
    kld.sort()

    def percentile(fraction: float) -> float:
        place = fraction * (len(kld) - 1)
        low = int(place)
        return kld[low] + (place - low) * (kld[min(low + 1, len(kld) - 1)] - kld[low])

    middle = len(kld) // 2
    return {
        "nmse": ((p_logits - q_logits) ** 2).sum() / (p_logits**2).sum(),
        "mean_kld": sum(kld) / len(kld),
        "median_kld": kld[middle] if len(kld) % 2 else (kld[middle] + kld[middle - 1]) / 2,
        "kld_90": percentile(0.9),
        "kld_99": percentile(0.99),
        "kld_999": percentile(0.999),
        "max_kld": kld[-1],
        "mean_delta_p": sum(delta) / len(delta),
        "rms_delta_p": math.sqrt(sum(x * x for x in delta) / len(delta)),
        "same_top_p": same / len(kld),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "reference_perplexity": math.exp(sum(nll_base) / len(nll)),
        "perplexity_ratio": math.exp((sum(nll) - sum(nll_base)) / len(nll)),
        "positions": len(kld),
    }


@pytest.mark.parametrize("rows", [1, 2, 33, 64, 1500])
def test_figures_by_hand(rows: int) -> None:
    p, targets = random_window(0, rows)
    q = p + np.random.default_rng(1).normal(0, 0.5, p.shape)
    assert values(compare(p, q, targets)) == pytest.approx(by_hand(p, q, targets), rel=1e-9)


def test_windows_and_domains_count_alike() -> None:
    comparison = Comparison()
    p, targets = random_window(0, 90)
    q = p + np.random.default_rng(9).normal(0, 0.5, p.shape)
    for part, domain in ((slice(30), "en"), (slice(30, 70), "zh"), (slice(70, 90), "en")):
        comparison.add(p[part], q[part], targets[part], domain)
    assert values(comparison.result()) == pytest.approx(by_hand(p, q, targets), rel=1e-9)
    part = slice(30, 70)
    expected = by_hand(p[part], q[part], targets[part])
    assert values(comparison.result("zh")) == pytest.approx(expected, rel=1e-9)


def test_percentiles() -> None:
    p, targets = random_window(0)
    comparison = Comparison()
    comparison.add(p, p + np.random.default_rng(1).normal(0, 0.5, p.shape), targets)
    percentiles, metrics = comparison.kld_percentiles(), comparison.result()
    assert len(percentiles) == 101
    assert percentiles == sorted(percentiles)
    assert (percentiles[50], percentiles[90]) == (metrics.median_kld.value, metrics.kld_90.value)
    assert percentiles[100] == metrics.max_kld.value


def test_equal_models() -> None:
    p, targets = random_window(0)
    found = values(compare(p, p, targets))
    ones = ("same_top_p", "perplexity_ratio")
    zeros = ("nmse", "mean_kld", "kld_999", "max_kld", "mean_delta_p", "rms_delta_p")
    assert [found[name] for name in ones] == [1] * len(ones)
    assert [found[name] for name in zeros] == [0] * len(zeros)


def test_a_shift_of_all_logits_is_an_error_and_no_divergence() -> None:
    p, targets = random_window(0)
    metrics = compare(p, p + 1, targets)
    assert metrics.nmse.value == pytest.approx(1 / (p**2).mean())
    assert metrics.mean_kld.value == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("size", [1e-10, 1e-6, 1e-3])
def test_small_divergences_do_not_drown_in_rounding(size: float) -> None:
    # To second order the divergence is half the variance of the difference under p. A shift of all
    # logits adds nothing.
    p, targets = random_window(0, vocabulary=5000)
    d = np.random.default_rng(1).normal(0, size, p.shape)
    prob = np.exp(p - np.log(np.exp(p).sum(-1, keepdims=True)))
    mean = (prob * d).sum(-1, keepdims=True)
    expected = (prob * (d - mean) ** 2).sum(-1).mean() / 2
    for shift in (0, 3):
        found = compare(p, p + d + shift, targets).mean_kld.value
        assert found == pytest.approx(expected, rel=1e-3, abs=0)


def test_huge_logits_do_not_overflow() -> None:
    p, targets = random_window(0)
    found = values(compare(p * 1000 + 1e6, p * 1000 + 1e6, targets))
    assert (found["mean_kld"], found["perplexity_ratio"]) == (0, 1)
    opposite = compare(p * 1000, p * -1000, targets)
    # Both are certain, so the divergence is what the candidate's certainty costs.
    cost = np.mean([-x.min() + x.max() for x in p]) * 1000
    assert opposite.mean_kld.value == pytest.approx(cost, rel=1e-3)
    assert opposite.same_top_p.value == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_candidate_is_never_good(bad: float) -> None:
    p, targets = random_window(0)
    q = p.copy()
    q[20, 3] = bad
    metrics = compare(p, q, targets)
    for name in ("nmse", "mean_kld", "max_kld"):
        assert not math.isfinite(getattr(metrics, name).value), name


def test_a_read_only_reference_is_left_alone() -> None:
    p, targets = random_window(0)
    p.flags.writeable = False
    q = (p + 0.1).astype(np.float32)
    kept = q.copy()
    compare(p, q, targets)  # type: ignore[arg-type]  # float32, as llama.cpp gives it
    assert np.array_equal(q, kept)


def test_shapes_must_match() -> None:
    p, targets = random_window(0)
    with pytest.raises(ValueError, match="do not match"):
        compare(p, p[:, :-1], targets)
    with pytest.raises(ValueError, match="do not match"):
        compare(p, p, targets[:-1])
    with pytest.raises(ValueError, match="do not match"):
        compare(p[:0], p[:0], targets[:0])
    with pytest.raises(ValueError, match="nothing was compared"):
        Comparison().result()
    comparison = Comparison()
    comparison.add(p, p, targets, "en")
    with pytest.raises(ValueError, match="nothing was compared"):
        comparison.result("zh")
