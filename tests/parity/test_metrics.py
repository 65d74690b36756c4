"""The figures, against sums written out and against cases whose answer is known."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from megrez_parity.metrics import Comparison, Metrics

Array = NDArray[np.float64]


def compare(reference: Array, candidate: Array, tokens: NDArray[Any]) -> Metrics:
    comparison = Comparison()
    comparison.add(reference, candidate, tokens)
    return comparison.result()


def random_window(seed: int, length: int = 101, vocabulary: int = 50) -> tuple[Array, NDArray[Any]]:
    draw = np.random.default_rng(seed)
    return draw.normal(0, 2, (length, vocabulary)), draw.integers(0, vocabulary, length)


def by_hand(p_logits: Array, q_logits: Array, tokens: NDArray[Any]) -> dict[str, float]:
    """llama-perplexity's statistics as its source words them, a position at a time."""
    kld, same, nll, nll_base = [], 0, [], []
    first = len(tokens) // 2
    for i in range(first, len(tokens) - 1):
        p = [math.exp(x) for x in p_logits[i]]
        q = [math.exp(x) for x in q_logits[i]]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kld.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        same += p.index(max(p)) == q.index(max(q))
        nll.append(-math.log(q[tokens[i + 1]]))
        nll_base.append(-math.log(p[tokens[i + 1]]))
    kld.sort()
    place = 0.99 * (len(kld) - 1)
    low = int(place)
    return {
        "mean_kld": sum(kld) / len(kld),
        "kld_99": kld[low] + (place - low) * (kld[min(low + 1, len(kld) - 1)] - kld[low]),
        "max_kld": kld[-1],
        "same_top_p": same / len(kld),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "reference_perplexity": math.exp(sum(nll_base) / len(nll)),
        "perplexity_ratio": math.exp((sum(nll) - sum(nll_base)) / len(nll)),
        "positions": len(kld),
    }


@pytest.mark.parametrize("length", [3, 4, 33, 64, 101])
def test_figures_by_hand(length: int) -> None:
    p, tokens = random_window(0, length)
    q = p + np.random.default_rng(1).normal(0, 0.5, p.shape)
    metrics = compare(p, q, tokens)
    for name, expected in by_hand(p, q, tokens).items():
        assert getattr(metrics, name) == pytest.approx(expected, rel=1e-10), name
    assert metrics.nmse == pytest.approx(((p - q) ** 2).mean() / (p**2).mean())


def test_windows_count_alike() -> None:
    comparison = Comparison()
    total: dict[str, float] = {}
    for seed in range(3):
        p, tokens = random_window(seed)
        q = p + np.random.default_rng(seed + 9).normal(0, 0.5, p.shape)
        comparison.add(p, q, tokens)
        for name, figure in by_hand(p, q, tokens).items():
            total[name] = total.get(name, 0) + figure
    assert comparison.result().mean_kld == pytest.approx(total["mean_kld"] / 3)
    assert comparison.result().positions == total["positions"]


def test_equal_models() -> None:
    p, tokens = random_window(0)
    metrics = compare(p, p, tokens)
    assert (metrics.nmse, metrics.mean_kld, metrics.max_kld) == (0, 0, 0)
    assert (metrics.same_top_p, metrics.perplexity_ratio) == (1, 1)


def test_a_shift_of_all_logits_is_an_error_and_no_divergence() -> None:
    p, tokens = random_window(0)
    metrics = compare(p, p + 1, tokens)
    assert metrics.nmse == pytest.approx(1 / (p**2).mean())
    assert metrics.mean_kld == pytest.approx(0, abs=1e-15)


def test_tiny_divergences_do_not_drown_in_rounding() -> None:
    # To second order the divergence is half the variance of the difference under p.
    p, tokens = random_window(0, vocabulary=5000)
    d = np.random.default_rng(1).normal(0, 1e-10, p.shape)
    prob = np.exp(p - np.log(np.exp(p).sum(-1, keepdims=True)))
    mean = (prob * d).sum(-1, keepdims=True)
    expected = (prob * (d - mean) ** 2).sum(-1)[50:100].mean() / 2
    assert compare(p, p + d, tokens).mean_kld == pytest.approx(expected, rel=1e-3, abs=0)


def test_huge_logits_do_not_overflow() -> None:
    p, tokens = random_window(0)
    metrics = compare(p * 1000 + 1e6, p * 1000 + 1e6, tokens)
    assert (metrics.mean_kld, metrics.perplexity_ratio) == (0, 1)
    opposite = compare(p * 1000, p * -1000, tokens)
    # Both are certain, so the divergence is what the candidate's certainty costs.
    cost = np.mean([-x.min() + x.max() for x in p[50:100]]) * 1000
    assert opposite.mean_kld == pytest.approx(cost, rel=1e-3)


def test_a_broken_candidate_is_never_good() -> None:
    p, tokens = random_window(0)
    q = p.copy()
    q[70, 3] = math.nan
    metrics = compare(p, q, tokens)
    assert math.isnan(metrics.nmse)
    assert math.isnan(metrics.mean_kld)


def test_shapes_must_match() -> None:
    p, tokens = random_window(0)
    with pytest.raises(ValueError, match="do not match"):
        compare(p, p[:, :-1], tokens)
    with pytest.raises(ValueError, match="do not match"):
        compare(p, p, tokens[:-1])
    with pytest.raises(ValueError, match="nothing was compared"):
        Comparison().result()
