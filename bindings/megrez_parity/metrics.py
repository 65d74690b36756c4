"""How far a model's logits are from a reference's: the figures of `llama-perplexity`, in float64.

Definitions follow llama.cpp's `--kl-divergence`, window by window: all positions of the second half
of a window but its last are scored, so that each has context and a next token. Differences, all
towards exactness: the reference keeps full precision instead of 16 bits, and its small
probabilities count. NMSE, which that tool does not have, covers every position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.floating[Any]]

_ROWS = 16  # positions upcast at a time: 16 MB of float64 each, at a vocabulary of 128,880


@dataclass(frozen=True, slots=True)
class Metrics:
    """Figures of one comparison. KLD is in nats, of the candidate from the reference."""

    nmse: float  # mean squared error of the logits over the mean square of the reference's
    mean_kld: float
    kld_99: float  # 99th percentile over positions, interpolated
    max_kld: float
    same_top_p: float  # share of positions where both rank the same token first, 0 to 1
    perplexity: float  # of the candidate, on the text
    reference_perplexity: float
    perplexity_ratio: float  # candidate's over reference's
    positions: int  # positions scored


@dataclass(slots=True)
class Comparison:
    """Collects windows of logits; `result()` gives the figures over all of them."""

    _error: float = 0.0
    _power: float = 0.0
    _kld: list[float] = field(default_factory=list)
    _nll: list[float] = field(default_factory=list)
    _reference_nll: list[float] = field(default_factory=list)
    _same_top: int = 0

    def add(self, reference: Logits, candidate: Logits, tokens: NDArray[np.integer[Any]]) -> None:
        """Take in one window: logits `[S, V]` of both models for its token ids `tokens` `[S]`.

        Raises ValueError when the shapes do not belong together.
        """
        length = len(tokens)
        if reference.shape != candidate.shape or len(reference) != length or length < 3:
            raise ValueError(
                f"logits {reference.shape} and {candidate.shape} for {length} tokens do not match"
            )
        for start in range(0, length, _ROWS):
            p = reference[start : start + _ROWS].astype(np.float64)  # [rows, V]
            q = candidate[start : start + _ROWS].astype(np.float64)
            self._error += float(np.square(q - p).sum())
            self._power += float(np.square(p).sum())
            rows = slice(max(length // 2 - start, 0), length - 1 - start)
            if len(p[rows]):
                self._score(p[rows], q[rows], tokens[start + 1 : start + 1 + _ROWS][rows])

    def _score(
        self, p: NDArray[np.float64], q: NDArray[np.float64], targets: NDArray[np.integer[Any]]
    ) -> None:
        """Score rows `[rows, V]` whose next tokens are `targets` `[rows]`."""
        self._same_top += int((p.argmax(-1) == q.argmax(-1)).sum())
        p, q = log_softmax(p), log_softmax(q)
        # Each term p log(p / q) + q - p is at least 0 and the terms sum to the divergence, so close
        # distributions do not cancel to noise as sum(p log(p / q)) does.
        delta, prob = q - p, np.exp(p)
        close = prob * (np.expm1(np.minimum(delta, 1)) - delta)
        far = np.exp(q) - prob - prob * delta  # where exp(delta) might overflow
        self._kld += np.where(delta < 1, close, far).sum(-1).tolist()
        pick = (np.arange(len(targets)), targets)
        self._nll += (-q[pick]).tolist()
        self._reference_nll += (-p[pick]).tolist()

    def result(self) -> Metrics:
        """The figures. Raises ValueError before the first window."""
        if not self._kld:
            raise ValueError("nothing was compared")
        kld = np.array(self._kld)
        nll, reference_nll = np.mean(self._nll), np.mean(self._reference_nll)
        with np.errstate(over="ignore"):  # a perplexity beyond float64 is infinite
            perplexities = np.exp([nll, reference_nll, nll - reference_nll]).tolist()
        return Metrics(
            nmse=self._error / self._power if self._power else float("nan"),
            mean_kld=float(kld.mean()),
            kld_99=float(np.percentile(kld, 99)),
            max_kld=float(kld.max()),
            same_top_p=self._same_top / len(kld),
            perplexity=perplexities[0],
            reference_perplexity=perplexities[1],
            perplexity_ratio=perplexities[2],
            positions=len(kld),
        )


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log-probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    normalised: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return normalised
