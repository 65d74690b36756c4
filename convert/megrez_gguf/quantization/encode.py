"""Weights as they are stored -> weights as they are written, and what was lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megrez_gguf.errors import ConfigError
from megrez_gguf.quantization import feedback
from megrez_gguf.quantization.feedback import Entering, with_zeros
from megrez_llama import quantizer

Array = npt.NDArray[Any]

# The largest magnitude that does not round to infinity: 65520 would.
F16_LIMIT = float(np.nextafter(np.float32(65520), np.float32(0)))
# Half the smallest F16: up to here, rounding to nearest even gives zero.
F16_FLUSH = 2.0**-25
BF16_LIMIT = float(np.array(0x7F7F7FFF, dtype="<u4").view("<f4"))

# Bit patterns whose exponent is all ones: NaN and the infinities.
_EXPONENT = {2: {"<u2": 0x7F80, "<f2": 0x7C00}, 4: {"<f4": 0x7F800000}}


Weighing = npt.NDArray[np.float32] | Entering


@dataclass(slots=True)
class Loss:
    """What narrowing did to the values of one tensor or of many."""

    overflow: int = 0
    """Finite values beyond the type's range."""
    flushed: int = 0
    """Values other than zero that become zero."""

    def __iadd__(self, other: Loss) -> Loss:
        self.overflow += other.overflow
        self.flushed += other.flushed
        return self


@dataclass(frozen=True, slots=True)
class Encoding:
    """A type weights are written in.

    `block` elements become `block_bytes` bytes; `number` is ggml's number of the type. Magnitudes
    over `limit` become infinite, those up to `flush` become zero. `encode` takes finite rows
    `[rows, columns]`, and the importance of the columns `[columns]`, or what enters the matrix, by
    which it is rounded by feedback, or None. Columns beyond those that either tells of are zeros,
    which nothing enters.
    """

    name: str
    number: int
    block: int
    block_bytes: int
    limit: float
    flush: float
    encode: Callable[[npt.NDArray[np.float32], Weighing | None], Array]

    def nbytes(self, size: int) -> int:
        """Bytes that `size` elements take; `size` is a multiple of `block`."""
        return size // self.block * self.block_bytes


def first_non_finite(values: Array) -> int | None:
    """Position of the first NaN or infinity in a chunk of raw values; None if all are finite."""
    bits = values.view(f"<u{values.itemsize}")
    mask = bits.dtype.type(_EXPONENT[values.itemsize][values.dtype.str])
    exponents = bits & mask
    # The largest tells it all, in half the time of a comparison of each.
    if not exponents.size or exponents.max() != mask:
        return None
    return int((exponents == mask).argmax())


def to_f32(values: Array) -> npt.NDArray[np.float32]:
    """Widen raw values (bfloat16 as uint16 bits); exact."""
    if values.dtype == np.dtype("<u2"):
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32, copy=False)


def count_loss(values: npt.NDArray[np.float32], encoding: Encoding) -> Loss:
    """Count what writing these finite values as `encoding` overflows and flushes to zero."""
    loss = Loss()
    if encoding.limit == float("inf") and not encoding.flush:
        return loss
    magnitude = np.abs(values)
    if magnitude.size and magnitude.max() > encoding.limit:
        loss.overflow = int(np.count_nonzero(magnitude > encoding.limit))
    if encoding.flush:
        loss.flushed = int(np.count_nonzero(magnitude <= encoding.flush))
        loss.flushed -= magnitude.size - int(np.count_nonzero(magnitude))
    return loss


def _bf16(values: npt.NDArray[np.float32]) -> Array:
    """Round to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def _f16(values: npt.NDArray[np.float32]) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


FLOATS = {
    e.name: e
    for e in (
        Encoding("F32", 0, 1, 4, float("inf"), 0.0, lambda v, _: v),
        Encoding("F16", 1, 1, 2, F16_LIMIT, F16_FLUSH, lambda v, _: _f16(v)),
        Encoding("BF16", 30, 1, 2, BF16_LIMIT, 0.0, lambda v, _: _bf16(v)),
    )
}


@cache
def type_numbers() -> Mapping[str, int]:
    from gguf import GGMLQuantizationType

    return {kind.name: int(kind) for kind in GGMLQuantizationType}


def type_number(name: str) -> int:
    """ggml's number of a type named as ggml or gguf name it ("q4_K"). Raises ConfigError."""
    number = type_numbers().get(name.upper())
    if number is None:
        raise ConfigError(f"type {name!r}: expected one of {', '.join(sorted(type_numbers()))}")
    return number


def type_size(name: str) -> tuple[int, int]:
    """Elements of a block of a type, and the bytes they take. Raises ConfigError."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number(name))]
    return block, nbytes


@cache
def encoding(name: str) -> Encoding:
    """How tensors of the type `name`, e.g. "Q4_K", are written.

    Encoding raises OverflowError where weights are beyond the type's range, and
    RuntimeUnavailableError without the patched llama_cpp. ggml quantizes rows independently of one
    another, so that it does not matter how many are encoded at once.
    """
    if name in FLOATS:
        return FLOATS[name]
    number, (block, nbytes) = type_number(name), type_size(name)

    def quantize(
        values: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
    ) -> Array:
        return quantizer.quantize(number, values, importance, values.size // block * nbytes)

    def by(values: npt.NDArray[np.float32], weighing: Weighing | None) -> Array:
        if isinstance(weighing, Entering):
            return feedback.encode(name, values, weighing, quantize, block)
        if weighing is not None:
            weighing = with_zeros(weighing, values.shape[1])
        return quantize(values, weighing)

    return Encoding(name, number, block, nbytes, float("inf"), 0.0, by)
