"""The 95% intervals: on series whose true figures are known, and what holds for any."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from megrez_parity import metrics
from megrez_parity.metrics import Comparison
from megrez_parity.results import Figure, Metrics

Array = NDArray[np.float64]

POSITIONS, TRIALS, SPREAD = 1020, 200, 0.5


def series(draw: np.random.Generator, correlation: float) -> Array:
    """Normal numbers `[TRIALS, POSITIONS]`, each row's neighbours correlated."""
    x = draw.normal(0, 1, (POSITIONS, TRIALS))
    for i in range(1, POSITIONS):
        x[i] = correlation * x[i - 1] + math.sqrt(1 - correlation**2) * x[i]
    return x.T


def true_figures() -> dict[str, float]:
    """Of a reference that finds two tokens equally likely, and a candidate that is SPREAD off."""
    normal, count = NormalDist(0, SPREAD), 20_000
    a = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])

    def percentile(share: float) -> float:
        return math.log(math.cosh(normal.inv_cdf((1 + share) / 2)))

    return {
        "nmse": SPREAD**2,
        "mean_kld": float(np.log(np.cosh(a)).mean()),
        "median_kld": percentile(0.5),
        "kld_90": percentile(0.9),
        "kld_99": percentile(0.99),
        "mean_delta_p": 0,
        "rms_delta_p": float(np.sqrt(np.square(np.tanh(a) / 2).mean())),
        "same_top_p": 0.5,
        "perplexity_ratio": math.exp(np.log1p(np.exp(-2 * a)).mean()) / 2,
    }


def coverage(correlation: float) -> dict[str, float]:
    """Share of trials in which each interval holds the true figure."""
    draw = np.random.default_rng(0)
    error, text = SPREAD * series(draw, correlation), series(draw, correlation) > 0
    true, hits = true_figures(), dict.fromkeys(true_figures(), 0)
    for a, targets in zip(error, text.astype(np.int64), strict=True):
        comparison = Comparison()
        reference = np.ones((POSITIONS, 2))
        comparison.add(reference, reference + np.stack([a, -a], 1), targets)
        result = comparison.result()
        for name, value in true.items():
            figure: Figure = getattr(result, name)
            hits[name] += figure.low <= value <= figure.high
    return {name: count / TRIALS for name, count in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("correlation", [0, 0.8])
def test_the_truth_is_inside_as_often_as_promised(correlation: float) -> None:
    shares = coverage(correlation)
    assert shares.pop("kld_99") > 0.8  # some ten positions decide it
    for name, share in shares.items():
        assert 0.91 <= share <= 0.99, f"{name}: {shares}"


@pytest.mark.slow
def test_short_blocks_would_promise_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", 2)
    assert coverage(0.8)["mean_kld"] < 0.85


def compared(windows: int, domains: int = 1) -> Comparison:
    comparison = Comparison()
    draw = np.random.default_rng(0)
    for i in range(windows):
        p = draw.normal(0, 2, (60, 40))
        q = p + draw.normal(0, 0.3, p.shape)
        comparison.add(p, q, draw.integers(0, 40, 60), f"domain {i % domains}")
    return comparison


def figures(result: Metrics) -> dict[str, Figure]:
    return {name: getattr(result, name) for name in Metrics.__slots__ if name != "positions"}


def width(figure: Figure) -> float:
    return figure.high - figure.low


@pytest.mark.parametrize("domains", [1, 4])
def test_every_interval_holds_its_value(domains: int) -> None:
    result = compared(8, domains).result()
    for name, figure in figures(result).items():
        assert figure.low <= figure.value <= figure.high, name
        assert width(figure) > 0, name
    assert result.max_kld.high == result.max_kld.value
    assert result == compared(8, domains).result()


def test_more_positions_narrow_it() -> None:
    few, many = compared(4).result(), compared(64).result()
    # As the square root of their number, by and large.
    for name in ("mean_kld", "nmse", "perplexity"):
        assert 2.5 < width(getattr(few, name)) / width(getattr(many, name)) < 6.5, name


def test_domains_are_not_drawn_against_each_other() -> None:
    # Each constant in itself: how they differ is no uncertainty.
    comparison = Comparison()
    for domain, error, count in (("easy", 0.01, 100), ("hard", 1.0, 300)):
        p = np.zeros((count, 2))
        comparison.add(p, p + np.array([error, -error]), np.zeros(count, dtype=np.int64), domain)
    assert width(comparison.result().mean_kld) == pytest.approx(0, abs=1e-12)


def test_full_agreement_is_not_certainty() -> None:
    comparison = Comparison()
    p = np.random.default_rng(0).normal(0, 2, (100, 40))
    comparison.add(p, p, np.zeros(100, dtype=np.int64))
    same = comparison.result().same_top_p
    assert same == Figure(1, same.low, 1)
    assert same.low == pytest.approx(0.025**0.01)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_of_a_broken_candidate_it_is_not_finite(bad: float) -> None:
    comparison = compared(8)
    q = np.zeros((60, 40))
    q[3, 7] = bad
    comparison.add(np.zeros((60, 40)), q, np.full(60, 7))
    assert not math.isfinite(comparison.result().mean_kld.high)
    assert not math.isfinite(comparison.result().perplexity.high)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    comparison = Comparison()
    p = np.random.default_rng(0).normal(0, 2, (100, 40))
    comparison.add(p, p * -1000, p.argmax(-1))
    assert comparison.result().perplexity == Figure(math.inf, math.inf, math.inf)
