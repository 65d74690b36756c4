"""Importance matrices: how large the activations are that meet each column of a weight matrix.

Quantizers weigh rounding errors by them. Collected as llama.cpp's own llama-imatrix does it; the
file that tool writes can be read instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.errors import GGUFError
from megrez_gguf.gguf_file import GGUFFile, GGUFTensor
from megrez_parity.engine import Engine
from megrez_parity.ggml import F32, Tensor, op_name, read


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Importance of every column of every matrix, by GGUF tensor name.

    `means` are mean squares, float32 `[M, columns]`, M being the experts of a pool, otherwise 1;
    `counts` `[M]` the rows averaged over. An expert that no token reached has neutral means of 1.
    """

    means: dict[str, NDArray[np.float32]]
    counts: dict[str, NDArray[np.int64]]

    @classmethod
    def from_sums(
        cls, sums: dict[str, NDArray[Any]], counts: dict[str, NDArray[np.int64]]
    ) -> Imatrix:
        """From sums of squares `[M, columns]` over `counts` `[M]` rows, by tensor name."""
        means = {}
        for name, total in sums.items():
            n = counts[name][:, None]
            means[name] = np.where(n > 0, total / np.maximum(n, 1), 1).astype(np.float32)
        return cls(means, counts)


def collect(path: Path, windows: Iterable[NDArray[np.int32]], context: int) -> Imatrix:
    """Run the GGUF file `path` over `windows`, each of at most `context` tokens.

    Matrices outside the layers (embedding, output) are left out, as llama-imatrix does. A pool of
    experts gathers from all layers that use it. Raises what `Engine` raises, and GGUFError when
    activations are not finite.
    """
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, NDArray[np.int64]] = {}

    def watch(node: Tensor, ask: bool) -> bool:
        kind = op_name(node.op)
        if kind not in ("MUL_MAT", "MUL_MAT_ID"):
            return False
        weight, inputs = node.source(0), node.source(1)
        if not weight.name.startswith(b"blk.") or inputs.type != F32:
            return False
        if not ask:
            name, pool = weight.name.decode(), weight.ne[2] if kind == "MUL_MAT_ID" else 1
            if name not in sums:
                sums[name] = np.zeros((pool, weight.ne[0]))
                counts[name] = np.zeros(pool, np.int64)
            x = read(inputs)[0].astype(np.float64)  # [1, rows, D], or [rows, 1 or K, D]
            if kind == "MUL_MAT":
                ids = np.zeros(math.prod(x.shape[:2]), np.int64)
            else:
                chosen = read(node.source(2))[0, 0]  # [rows, K]
                x, ids = np.broadcast_to(x, (*chosen.shape, x.shape[2])), chosen.ravel()
            rows = x.reshape(-1, x.shape[2])
            counts[name] += np.bincount(ids, minlength=pool)
            for matrix in np.unique(ids):
                sums[name][matrix] += np.square(rows[ids == matrix]).sum(0)
            if not np.isfinite(sums[name]).all():
                raise GGUFError(f"{path}: activations entering {name} are not finite")
        return True

    with Engine(path, context) as engine:
        for window in windows:
            engine.observe(window, 0, watch)
    return Imatrix.from_sums(dict(sums), counts)


def load(path: Path) -> Imatrix:
    """Read the GGUF file that llama-imatrix writes. Raises GGUFError when `path` is none."""
    file = GGUFFile.open(path)
    keys = {f"imatrix.{key}" for key in ("datasets", "chunk_count", "chunk_size")}
    if file.values.get("general.type") != "imatrix" or not keys <= file.values.keys():
        raise GGUFError(f"{path}: not an importance matrix as llama-imatrix writes them")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    sums: dict[str, NDArray[Any]] = {}
    counts = {}
    for tensor in file.tensors:
        name, _, half = tensor.name.rpartition(".")
        pair = [tensors.get(f"{name}.{suffix}") for suffix in ("in_sum2", "counts")]
        if tensor not in pair or not all(t is not None and t.type == "F32" for t in pair):
            raise GGUFError(f"{path}: {tensor.name} is no half of a pair of sums and counts in F32")
        if half == "counts":
            counts[name] = _values(path, tensor).round().astype(np.int64)
        else:
            sums[name] = _values(path, tensor)
    for name, n in counts.items():
        if not n.size or sums[name].size % n.size:
            raise GGUFError(f"{path}: {sums[name].size} sums of {n.size} matrices {name}")
        sums[name] = sums[name].reshape(n.size, -1)
    return Imatrix.from_sums(sums, counts)


def _values(path: Path, tensor: GGUFTensor) -> NDArray[np.float32]:
    return np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.begin)
