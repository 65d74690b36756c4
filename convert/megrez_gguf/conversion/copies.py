"""One parameter stored more than once: compared, and kept once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from megrez_gguf.errors import CheckpointError
from megrez_gguf.machine import available_cpus
from megrez_gguf.quantization.encode import to_f32
from megrez_gguf.storage.tensor import CHUNK, RAW_DTYPE, Tensor
from megrez_gguf.text import Say, format_size, silent

# Bytes whose comparison takes so long that one wonders.
_LONG = 1 << 30


@dataclass(frozen=True, slots=True)
class Copy:
    """`tensor` must hold what `kept` holds, which is what the model is made of."""

    tensor: Tensor
    kept: Tensor
    why: str
    """What says that they are one parameter."""


def check(copies: Sequence[Copy], say: Say = silent) -> None:
    """Read all copies and compare them with what is kept, a few megabytes of each at a time.

    Equal are the same values, whatever float types they are stored in. `say` is told how much is
    compared. Raises CheckpointError naming two that differ, or what `Tensor.chunks` raises.
    """
    size = sum(c.tensor.nbytes for c in copies)
    if size >= _LONG:
        say(f"comparing {format_size(size)} that is stored more than once")
    with ThreadPoolExecutor(available_cpus()) as pool:
        try:
            for copy, same in zip(copies, pool.map(_same, copies), strict=True):
                if not same:
                    raise _differs(copy)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _same(copy: Copy) -> bool:
    return _equal(copy.tensor, copy.kept)


def _equal(one: Tensor, two: Tensor) -> bool:
    count = CHUNK // 4
    chunks = (t.chunks(limit=count * np.dtype(RAW_DTYPE[t.dtype]).itemsize) for t in (one, two))
    widen = one.dtype != two.dtype
    for pair in zip(*chunks, strict=True):
        a, b = (to_f32(values) if widen else values for values in pair)
        if not np.array_equal(a.view(np.uint8), b.view(np.uint8)):
            return False
    return True


def _differs(copy: Copy) -> CheckpointError:
    tensor, kept = copy.tensor, copy.kept
    return CheckpointError(
        f"{tensor.shard.path}: tensor {tensor.name} differs from {kept.name} in "
        f"{kept.shard.path.name}, and {copy.why}: one of them is wrong"
    )
