"""Rounding by feedback: each weight is rounded so as to make up for the errors before it.

What a matrix gives is a sum over its columns. Once a column is rounded, the columns after it take
over what its error does to that sum, as far as what enters them goes along with what entered it.
How far that is, the products of activations tell: see `Imatrix.products`. E. Frantar et al.,
"GPTQ", arXiv 2210.17323, with ggml's own choice of scales for each block, of the weights as they
are by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megrez_gguf.quantization import codes
from megrez_gguf.quantization.codes import Bytes, Floats

# Of the mean square, added to all squares: columns that nothing entered take over no errors.
_DAMPING = 0.01

Plain = Callable[[Floats, Floats | None], Bytes]
"""Encodes rows, given the importance of their columns."""


def with_zeros(values: Floats, columns: int) -> Floats:
    """`values` `[..., n]` with zeros after them, `[..., columns]`."""
    missing = columns - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing else values


class Products:
    """Sums of products of the columns that enter a matrix, `[columns, width]`.

    See `Imatrix.products`.
    """

    def __init__(self, sums: Floats) -> None:
        self._sums = sums

    @cached_property
    def factors(self) -> list[Floats]:
        """Of each group of columns, the upper Cholesky factor of the inverse."""
        columns, width = self._sums.shape
        found = []
        for begin in range(0, columns, width):
            size = min(width, columns - begin)
            part = self._sums[begin : begin + size, :size].astype(np.float64)
            part[np.diag_indices(size)] += _DAMPING * (part.diagonal().mean() or 1.0)
            found.append(np.linalg.cholesky(np.linalg.inv(part)).T.astype(np.float32))
        return found

    def factors_for(self, columns: int) -> list[Floats]:
        """`factors` for a matrix of so many columns, of which the last ones may be zeros."""
        missing = columns - len(self._sums)
        if not missing:
            return self.factors
        *others, last = self.factors
        # Nothing goes along with what is not there.
        wide = np.eye(len(last) + missing, dtype=np.float32)
        wide[: len(last), : len(last)] = last
        return [*others, wide]


@dataclass(frozen=True, eq=False)
class Entering:
    """What enters one matrix: mean squares `means` `[columns]`, and products."""

    means: Floats
    products: Products


class Pool(Sequence[Entering]):
    """What enters each matrix of a tensor: `means` `[matrices, columns]`.

    `products` are `[matrices, columns, width]`, or `[1, columns, width]` for all of them.
    """

    def __init__(self, means: Floats, products: Floats) -> None:
        self._means, self._products = means, products
        self._last: tuple[int, Products] | None = None

    def __len__(self) -> int:
        return len(self._means)

    def __getitem__(self, matrix: int) -> Entering:  # type: ignore[override]
        last, at = self._last, matrix if len(self._products) > 1 else 0
        # The pieces of a matrix come one after the other, and share its factors.
        if last is None or last[0] != at:
            last = self._last = at, Products(self._products[at])
        return Entering(self._means[matrix], last[1])


def encode(kind: str, values: Floats, entering: Entering, plain: Plain, block: int) -> Bytes:
    """Rows `values` `[rows, columns]` in the type `kind`, `block` weights a block, as flat bytes.

    `plain` is how the type is encoded without feedback: it chooses the scales. Types that have no
    code for each weight are left to it. Columns beyond those of `entering` are zeros, which nothing
    enters.
    """
    rows, columns = values.shape
    means = with_zeros(entering.means, columns)
    if not codes.fields(kind):
        return plain(values, means)
    wanted = np.array(values, np.float32)
    done = []
    end = 0
    for factor in entering.products.factors_for(columns):
        begin, end = end, end + len(factor)
        for at in range(begin, end, block):
            part = wanted[:, at : at + block]
            blocks = plain(part, means[at : at + block]).reshape(rows, -1)
            grid = codes.grid(kind, blocks)
            chosen = np.empty((rows, block), np.int64)
            errors = np.empty((rows, block), np.float32)
            local = factor[at - begin : at - begin + block]
            for i in range(block):
                place = at - begin + i
                chosen[:, i], found = grid.nearest(i, part[:, i])
                errors[:, i] = (part[:, i] - found) / local[i, place]
                part[:, i + 1 :] -= np.outer(errors[:, i], local[i, place + 1 : place + block - i])
            wanted[:, at + block : end] -= errors @ local[:, at - begin + block :]
            done.append(codes.with_codes(kind, blocks, chosen))
    flat: Bytes = np.stack(done, 1).reshape(-1)
    return flat
