"""Interpolated modified Kneser-Ney trigram over token ids: the bar the pocket model must clear.

S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling"
(TR-10-98), section 4.1: raw counts at the highest order, continuation counts below, three
discounts an order from counts of counts, and a uniform distribution under the unigrams.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
SHIFT = 20  # bits a token id takes in an n-gram's key


class Order:
    """Discounted counts of one order: keys are (context, token), both packed into an int64."""

    def __init__(self, keys: Ids, counts: Ids) -> None:
        self.keys, self.counts = keys, counts
        frequencies = [max(int((counts == n).sum()), 1) for n in range(1, 5)]
        n1, n2, n3, n4 = frequencies
        y = n1 / (n1 + 2 * n2)
        self.discounts = np.array(
            [0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        )
        self.contexts, starts = np.unique(keys >> SHIFT, return_index=True)
        self.totals = np.add.reduceat(counts, starts)
        # What the discounts took from a context is what the lower order may give out.
        taken = self.discounts[np.minimum(counts, 3)]
        self.spared = np.add.reduceat(taken, starts) / self.totals

    def probability(
        self, context: Ids, token: Ids, lower: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """P(token | context) `[n]`, interpolated with the lower order's `lower` `[n]`."""
        at, known = _find(self.contexts, context)
        where, seen = _find(self.keys, context << SHIFT | token)
        count = np.where(seen, self.counts[where], 0)
        own = (count - self.discounts[np.minimum(count, 3)]) / self.totals[at]
        return np.where(known, own + self.spared[at] * lower, lower)


class Trigram:
    def __init__(self, tokens: Ids, vocabulary: int) -> None:
        """Counts over one stream of token ids `[n]`, each in [0, vocabulary), at most 2^20."""
        self.vocabulary = vocabulary
        tokens = tokens.astype(np.int64)
        a, b, c = tokens[:-2], tokens[1:-1], tokens[2:]
        keys, counts = np.unique(a << 2 * SHIFT | b << SHIFT | c, return_counts=True)
        self.orders = [Order(keys, counts)]
        for _ in range(2):
            # The key without its first token; how many different tokens stood before it.
            width = SHIFT * (3 - len(self.orders))
            keys, counts = np.unique(keys & ((1 << width) - 1), return_counts=True)
            self.orders.insert(0, Order(keys, counts))

    def bits(self, tokens: Ids) -> NDArray[np.float64]:
        """-log2 P of every token from the third on, `[n - 2]`, each given the two before it."""
        tokens = tokens.astype(np.int64)
        a, b, c = tokens[:-2], tokens[1:-1], tokens[2:]
        p = np.full(len(c), 1 / self.vocabulary)
        for order, context in zip(self.orders, (b * 0, b, a << SHIFT | b), strict=True):
            p = order.probability(context, c, p)
        bits: NDArray[np.float64] = -np.log2(p)
        return bits


def _find(table: Ids, wanted: Ids) -> tuple[Ids, NDArray[np.bool_]]:
    """Index of each of `wanted` in sorted `table`, and whether it is there at all."""
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] == wanted
