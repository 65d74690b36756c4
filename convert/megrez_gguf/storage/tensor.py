"""Tensors where they lie in files, checkpoint or GGUF, not yet read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megrez_gguf.errors import CheckpointError
from megrez_gguf.storage.shard import Shard

# Bytes read at once: few enough to stay in the processor's cache through all that is done to them.
CHUNK = 4 << 20

# What numpy reads a weight as; it has no bfloat16, so those travel as their bit patterns.
RAW_DTYPE: dict[str, npt.DTypeLike] = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a shard: `nbytes` bytes at file offset `begin`, not yet read.

    `dtype` is safetensors' name of its type, e.g. "BF16", or ggml's in upper case, e.g. "Q4_K".
    `shape` is in numpy's order, slowest axis first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Shard
    begin: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def chunks(self, multiple: int = 1, limit: int = CHUNK) -> Iterator[npt.NDArray[Any]]:
        """Read the values in order, flat, as float32, float16 or (for bfloat16) uint16 bits.

        Every chunk but the last holds a multiple of `multiple` elements. The array is reused: its
        content is only valid until the next one is asked for.

        Raises CheckpointError: the type is none of F32, F16, BF16, or the file cannot be read or
        ends early.
        """
        if self.dtype not in RAW_DTYPE:
            raise CheckpointError(
                f"{self.shard.path}: tensor {self.name}: stored as {self.dtype}; "
                f"expected one of {', '.join(RAW_DTYPE)}"
            )
        dtype = np.dtype(RAW_DTYPE[self.dtype])
        step = max(limit // dtype.itemsize // multiple, 1) * multiple * dtype.itemsize
        buffer = memoryview(bytearray(min(step, self.nbytes)))
        try:
            with self.shard.path.open("rb", buffering=0) as file:
                file.seek(self.begin)
                for done in range(0, self.nbytes, step):
                    part = buffer[: min(step, self.nbytes - done)]
                    _read_exactly(file, part, self)
                    yield np.frombuffer(part, dtype=dtype)
        except OSError as e:
            raise unreadable(self, e) from None


def ended_early(tensor: Tensor) -> CheckpointError:
    return CheckpointError(
        f"{tensor.shard.path}: tensor {tensor.name}: the file ended early; "
        "it shrank while it was read"
    )


def unreadable(tensor: Tensor, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{tensor.shard.path}: tensor {tensor.name}: cannot be read: {error.strerror or error}"
    )


def _read_exactly(file: Any, part: memoryview, tensor: Tensor) -> None:
    while part:
        count = file.readinto(part)
        if not count:
            raise ended_early(tensor)
        part = part[count:]
