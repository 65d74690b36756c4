"""Where the codes of weights lie in the blocks of ggml's types.

A block has scales, and for each weight a code of a few bits. With the scales given, a weight of
code k is `base + k * step`, or, in types with a codebook, one of 16 values. Codes can be replaced
one by one, which is what rounding by feedback does: see `feedback`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Field:
    """`width` bits of each weight's code, from bit `low` of it on.

    `byte` and `shift`, both `[block]`, are where they lie in a block.
    """

    byte: Ints
    shift: Ints
    width: int
    low: int = 0


@cache
def fields(kind: str) -> tuple[Field, ...]:
    """The parts of a code in the type `kind`, e.g. "Q4_K"; none for types that have no such codes.

    As ggml-quants.c lays them out.
    """
    i, e = np.arange(32), np.arange(256)
    if kind in _OFFSETS:
        offset = _OFFSETS[kind]
        low = Field(offset + i % 16, 4 * (i // 16), 4)
        if kind.startswith("Q5"):
            return low, Field(offset - 4 + i // 8, i % 8, 1, 4)
        return (low,)
    if kind == "IQ4_XS":
        return (Field(8 + e // 32 * 16 + e % 16, e % 32 // 16 * 4, 4),)
    if kind == "Q2_K":
        return (Field(16 + e // 128 * 32 + e % 32, e % 128 // 32 * 2, 2),)
    if kind == "Q3_K":
        return (
            Field(32 + e // 128 * 32 + e % 32, e % 128 // 32 * 2, 2),
            Field(e % 32, e // 32, 1, 2),
        )
    if kind in ("Q4_K", "Q5_K"):
        offset = 16 if kind == "Q4_K" else 48
        low = Field(offset + e // 64 * 32 + e % 32, e % 64 // 32 * 4, 4)
        return (low,) if kind == "Q4_K" else (low, Field(16 + e % 32, e // 32, 1, 4))
    if kind == "Q6_K":
        half = e % 128
        return (
            Field(e // 128 * 64 + half % 64, half // 64 * 4, 4),
            Field(128 + e // 128 * 32 + half % 32, half // 32 * 2, 2, 4),
        )
    return ()


# Blocks of 32: where the 16 bytes with two codes each begin.
_OFFSETS = {"Q4_0": 2, "IQ4_NL": 2, "Q4_1": 4, "Q5_0": 6, "Q5_1": 8}
_CODEBOOK = ("IQ4_NL", "IQ4_XS")


def with_codes(kind: str, blocks: Bytes, codes: Ints) -> Bytes:
    """`blocks` `[n, bytes]` with other codes `[n, block]` and the same scales."""
    out = blocks.copy()
    for field in fields(kind):
        mask = (1 << field.width) - 1
        for shift in np.unique(field.shift):  # no two of one shift share a byte
            mine = np.flatnonzero(field.shift == shift)
            part = (codes[:, mine] >> field.low & mask) << shift
            out[:, field.byte[mine]] &= np.uint8(~(mask << shift) & 0xFF)
            out[:, field.byte[mine]] |= part.astype(np.uint8)
    return out


@dataclass(frozen=True, slots=True)
class Grid:
    """The values that weights of some blocks can have: `base + code * step`, or of `table`.

    `base` and `step` are `[n, block]`, `table` is `[n, block, 16]`; `top` is the largest code.
    """

    base: Floats
    step: Floats
    top: int
    table: Floats | None = None

    def nearest(self, column: int, wanted: Floats) -> tuple[Ints, Floats]:
        """Codes and values `[n]` that are nearest to `wanted` `[n]` in a column of the blocks."""
        if self.table is not None:
            values = self.table[:, column]
            codes = np.abs(values - wanted[:, None]).argmin(1)
            return codes, values[np.arange(len(codes)), codes]
        base, step = self.base[:, column], self.step[:, column]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.where(step != 0, (wanted - base) / step, 0)
        # A step may be so small that the quotient is beyond all integers.
        codes = np.clip(np.rint(steps), 0, self.top).astype(np.int64)
        return codes, base + codes.astype(np.float32) * step


def grid(kind: str, blocks: Bytes) -> Grid:
    """The values that the scales of `blocks` `[n, bytes]` leave to their weights."""
    parts = fields(kind)
    n, block = len(blocks), parts[0].byte.size
    top = (1 << sum(part.width for part in parts)) - 1

    def values(code: int) -> Floats:
        return _values(kind, with_codes(kind, blocks, np.full((n, block), code)))

    base = values(0)
    if kind not in _CODEBOOK:
        return Grid(base, values(1) - base, top)
    return Grid(base, base, top, np.stack([base, *map(values, range(1, top + 1))], -1))


def _values(kind: str, blocks: Bytes) -> Floats:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found: Floats = dequantize(blocks, GGMLQuantizationType[kind])
    return found
