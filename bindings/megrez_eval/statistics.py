"""What a score can show, and what a difference between two: so that noise is not read as loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom, binomtest

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """A mean over `n` questions, with its 95% interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Flips:
    """Two models on the same `n` questions, each right or wrong.

    `p` is McNemar's exact test: how likely so uneven a split of the flips is, if both are equally
    good. `least` is the smallest difference of scores that this many flips could show at 95%.
    """

    n: int
    lost: int  # right in the first, wrong in the second
    won: int
    p: float
    least: float


def score(values: Sequence[float]) -> Score:
    """Wilson's interval where all `values` are 0 or 1, else the normal one of the mean."""
    n, mean = len(values), float(np.mean(values))
    if set(values) <= {0, 1}:
        interval = binomtest(round(sum(values)), n).proportion_ci(CONFIDENCE, "wilson")
        return Score(mean, float(interval.low), float(interval.high), n)
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Score(mean, mean - half, mean + half, n)


def bits(parts: Sequence[tuple[float, float]]) -> Score:
    """Bits a unit from (log-likelihood, units) of each text; the interval by drawing texts anew."""
    table = np.array(parts, np.float64)
    drawn = np.random.default_rng(0).integers(0, len(table), (2000, len(table)))
    sums = table[drawn].sum(1)  # [draws, 2]
    again = -sums[:, 0] / sums[:, 1] / math.log(2)
    low, high = np.quantile(again, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    total = table.sum(0)
    return Score(float(-total[0] / total[1] / math.log(2)), float(low), float(high), len(table))


def flips(first: Sequence[float], second: Sequence[float]) -> Flips:
    """Compare right (1) and wrong (0) answers to the same questions, in the same order.

    Raises ValueError: other values, or not as many.
    """
    pairs = list(zip(first, second, strict=True))
    if not all(value in (0, 1) for pair in pairs for value in pair):
        raise ValueError("answers that are neither right nor wrong cannot flip")
    lost = sum(a > b for a, b in pairs)
    won = sum(a < b for a, b in pairs)
    p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Flips(len(pairs), lost, won, p, _least(lost + won) / len(pairs))


def _least(count: int) -> int:
    """By how many more flips one way than the other `count` of them are uneven at 95%.

    Six are the fewest that can be, all one way: 2 / 2^6 < 0.05. Of fewer none can be told apart.
    """
    count = max(count, 6)
    fewer = int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5))
    while fewer >= 0 and binomtest(fewer, count).pvalue > 1 - CONFIDENCE:
        fewer -= 1
    return count - 2 * fewer
