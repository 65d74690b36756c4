"""How far a model's logits are from a reference's: the figures of `llama-perplexity`, in float64.

Definitions are those of llama.cpp's `--kl-divergence` (tools/perplexity/perplexity.cpp), over the
positions that tool scores: the second half of a window but its last, so that each has context and a
next token. Percentiles are interpolated between neighbours, RMS delta-p is not centred, and the
perplexity ratio is exp of the mean difference of log-probabilities. Differences, all towards
exactness: the reference keeps full precision instead of 16 bits, and its small probabilities count.
NMSE, which that tool does not have, covers the same positions.

Exactness. All arithmetic is float64, and a divergence is a sum of terms that cannot be negative, so
it keeps its digits however small it is: with a float64 reference 1e-12 is a measurement. A float32
reference is itself off by rounding, which reads as a divergence where none is: 4e-13 on the pocket
checkpoint, more in a deeper model. Within a few times that, a figure says that both are float32.

Intervals. Each figure has a 95% interval from a block bootstrap. Blocks of 64 neighbouring
positions (an eighth of them where a domain has under 512) are drawn with replacement from each
domain's positions, taken as a ring, until there are about as many as it has; the figure is computed
from them, 1000 times; the interval spans the middle of what results, widened as Student's t is
wider than the normal distribution for so few blocks. Blocks, because neighbouring positions share
context and so their errors: llama-perplexity's "±" is one standard error of single, independent
positions; on the pocket checkpoint, blocks make up to 1.5 times as much of it. The draws are
seeded: equal positions have equal intervals. Limits:

* An interval speaks of more text like this text, from the same sources. It knows nothing of other
  domains, and cannot see dependence beyond a block, such as a whole document that is hard.
* From 1000 positions on, intervals of means and shares cover the truth about 95% of the time, also
  of correlated positions (tests/parity/test_intervals.py); from 250 correlated ones, about 90%.
* Far percentiles hang on a few positions: the 99th covers about 85% to 95% for 1000 positions, and
  the 99.9th needs some 10,000.
* A maximum has no such interval: no draw exceeds the largest position seen, so the interval ends at
  the value, and more text will go beyond it.
* Where all positions agree on the first token no draw differs. The interval then starts at the
  share that would still give full agreement, of independent positions, 2.5% of the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from megrez_parity.results import Figure, Metrics

Logits = NDArray[np.floating[Any]]
Array = NDArray[np.float64]

_VALUES = 1 << 16  # logits upcast at a time, unless one row has more: 0.5 MB stays in cache
_RESAMPLES = 1000
_BLOCK = 64
_DRAWN = 1 << 16  # positions drawn at a time
_TAIL = 0.025

# What is kept of a position, as columns; `same` is 1 where both rank the same token first.
_COLUMNS = ("error", "power", "kld", "delta_p", "squared", "same", "nll", "reference_nll", "worse")
_ERROR, _POWER, _KLD, _DELTA_P, _SQUARED, _SAME, _NLL, _REFERENCE_NLL, _WORSE = range(9)
# Of `Metrics`, in its order.
_FIGURES = [name for name in Metrics.__dataclass_fields__ if name != "positions"]


@dataclass(slots=True)
class Comparison:
    """Collects windows of logits; `result()` gives the figures over all of them."""

    _windows: dict[str, list[Array]] = field(default_factory=dict)  # domain -> [R, columns] each

    def add(
        self,
        reference: Logits,
        candidate: Logits,
        targets: NDArray[np.integer[Any]],
        domain: str = "",
    ) -> None:
        """Take in one window: logits `[R, V]` of both models where `targets` `[R]` comes next.

        Raises ValueError when the shapes do not belong together.
        """
        if reference.shape != candidate.shape or not 0 < len(targets) == len(reference):
            raise ValueError(
                f"logits {reference.shape} and {candidate.shape} for {len(targets)} targets do not "
                "match"
            )
        rows, vocabulary = reference.shape
        step = min(rows, max(1, _VALUES // vocabulary))
        room = np.empty((3, step, vocabulary))  # made once: fresh memory costs more than the sums
        parts = [slice(start, start + step) for start in range(0, rows, step)]
        with np.errstate(all="ignore"):  # a broken candidate gives NaN or infinity, not a warning
            kept = [_score(reference[part], candidate[part], targets[part], room) for part in parts]
        self._windows.setdefault(domain, []).append(np.concatenate(kept))

    def result(self, domain: str | None = None) -> Metrics:
        """The figures of one domain, or of all. Raises ValueError where nothing was compared."""
        groups = self._groups(domain)
        rows = np.concatenate(groups)
        with np.errstate(all="ignore"):  # a perplexity beyond float64 is infinite
            values = _figures(rows.mean(0), rows[:, _KLD])
            low, high = _intervals(groups)
        if rows[:, _SAME].all():
            low[_FIGURES.index("same_top_p")] = _TAIL ** (1 / len(rows))
        low, high = np.minimum(low, values), np.maximum(high, values)
        figures = zip(values.tolist(), low.tolist(), high.tolist(), strict=True)
        named = dict(zip(_FIGURES, (Figure(*figure) for figure in figures), strict=True))
        return Metrics(**named, positions=len(rows))

    def mean_kld(self) -> float:
        """The mean KLD over all positions, in nats, without the time an interval takes."""
        return float(np.concatenate(self._groups(None))[:, _KLD].mean())

    def kld_percentiles(self) -> list[float]:
        """The 0th, 1st, ... 100th percentile of the KLD over all positions, in nats."""
        kld = np.concatenate(self._groups(None))[:, _KLD]
        percentiles: list[float] = np.percentile(kld, np.arange(101)).tolist()
        return percentiles

    def _groups(self, domain: str | None) -> list[Array]:
        """The rows `[n, columns]` of each domain asked for, in text order."""
        names = list(self._windows) if domain is None else [domain]
        groups = [np.concatenate(self._windows[name]) for name in names if name in self._windows]
        if not groups:
            raise ValueError("nothing was compared")
        return groups


def _score(
    reference: Logits, candidate: Logits, targets: NDArray[np.integer[Any]], room: Array
) -> Array:
    """What is kept of rows `[r, V]`: `[r, columns]`. Works in `room` `[3, at least r, V]`.

    With d the difference of the logits, p the reference's probabilities, c = sum(p d) and
    x = d - c, the divergence is log(sum(p exp(x))) = log1p(sum(p (exp(x) - 1 - x))): close
    distributions do not cancel to noise as sum(p log(p / q)) does.
    """
    p, d, terms = room[:, : len(targets)]
    np.copyto(p, reference)
    np.copyto(d, candidate)
    out = np.empty((len(p), len(_COLUMNS)))
    pick = (np.arange(len(p)), targets)
    top = p.argmax(-1)
    out[:, _SAME] = top == d.argmax(-1)
    np.subtract(d, p, out=d)
    # einsum, not a product of BLAS, whose threads cost more than they do here.
    out[:, _ERROR] = np.einsum("rv,rv->r", d, d)
    out[:, _POWER] = np.einsum("rv,rv->r", p, p)
    most = p[np.arange(len(p)), top, None]
    p -= most
    log_p = p[pick]
    np.exp(p, out=p)
    total = p.sum(-1)
    log_p -= np.log(total)
    c = np.einsum("rv,rv->r", p, d) / total
    d -= c[:, None]
    x = d[pick]
    np.expm1(d, out=terms)
    terms -= d
    kld = np.log1p(np.einsum("rv,rv->r", p, terms) / total)
    if not np.isfinite(kld).all():  # exp(x) overflows
        far = _log_sum(candidate.astype(np.float64)) - (most[:, 0] + np.log(total)) - c
        kld = np.where(np.isfinite(kld), kld, far)
    out[:, _KLD] = kld
    better = x - kld  # log of the candidate's probability of the target over the reference's
    out[:, _DELTA_P] = np.exp(log_p) * np.expm1(better)
    out[:, _SQUARED] = np.square(out[:, _DELTA_P])
    out[:, _NLL] = -better - log_p
    out[:, _REFERENCE_NLL] = -log_p
    out[:, _WORSE] = -better
    return out


def _log_sum(logits: Array) -> Array:
    """log(sum(exp(logits))) along the last axis."""
    most = logits.max(-1, keepdims=True)
    total: Array = most[..., 0] + np.log(np.exp(logits - most).sum(-1))
    return total


def _figures(mean: Array, kld: Array) -> Array:
    """The figures `[..., len(_FIGURES)]` from means `[..., columns]` and divergences `[..., n]`."""
    columns = [
        mean[..., _ERROR] / mean[..., _POWER],
        mean[..., _KLD],
        *np.percentile(kld, [50, 90, 99, 99.9, 100], axis=-1),
        mean[..., _DELTA_P],
        np.sqrt(mean[..., _SQUARED]),
        mean[..., _SAME],
        np.exp(mean[..., _NLL]),
        np.exp(mean[..., _REFERENCE_NLL]),
        np.exp(mean[..., _WORSE]),
    ]
    return np.stack(columns, -1)


def _intervals(groups: list[Array]) -> tuple[Array, Array]:
    """Both ends of every figure's 95% interval, from the positions `[n, columns]` of each domain.

    The widening is the "expanded percentile interval" of Hesterberg, "What teachers should know
    about the bootstrap" (2015).
    """
    draw = np.random.default_rng(0)
    positions = sum(map(len, groups))
    blocks = 0
    means = np.zeros((_RESAMPLES, len(_COLUMNS)))
    drawn = []  # the divergences of each domain
    for rows in groups:
        length = max(1, min(_BLOCK, len(rows) // 8))
        count = round(len(rows) / length)
        starts = draw.integers(0, len(rows), (_RESAMPLES, count))
        ring = np.concatenate([rows, rows[: length - 1]])
        block = sliding_window_view(ring, length, axis=0)  # [n, columns, length]
        means += block.mean(-1)[starts].mean(1) * (len(rows) / positions)
        drawn.append((block[:, _KLD].copy(), starts))
        blocks += count
    step = max(1, _DRAWN // positions)
    figures = []
    for part in (slice(i, i + step) for i in range(0, _RESAMPLES, step)):
        kld = [block[starts[part]].reshape(len(starts[part]), -1) for block, starts in drawn]
        figures.append(_figures(means[part], np.concatenate(kld, 1)))
    resampled = np.concatenate(figures)  # [resamples, figures]
    freedom = max(1, blocks - len(groups))
    normal = NormalDist()
    wide = _student(normal.inv_cdf(1 - _TAIL), freedom) * math.sqrt(1 + 1 / freedom)
    tail = normal.cdf(-wide)
    # No interpolation: it would turn an infinite perplexity into NaN.
    low = np.quantile(resampled, tail, axis=0, method="lower")
    high = np.quantile(resampled, 1 - tail, axis=0, method="higher")
    return low, high


def _student(z: float, freedom: float) -> float:
    """Student's quantile from the normal one `z` (Abramowitz and Stegun 26.7.5, three terms)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
