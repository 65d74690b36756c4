"""Collects importance matrices: runs a model over texts as llama.cpp's own llama-imatrix does.

The file is `megrez_gguf.quantization.imatrix`'s.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.format.model_check import open_checked
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.machine import available_cpus
from megrez_gguf.quantization.imatrix import GROUP, Imatrix, load
from megrez_gguf.quantization.imatrix import merge as merged
from megrez_gguf.storage.output import OutputFiles
from megrez_gguf.text import Progress, Say, read_text, silent
from megrez_llama import nodes
from megrez_llama.engine import Engine
from megrez_llama.ggml import Tensor, read

Tokens = NDArray[np.int32]
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Rows added up in float32, which is four times as fast, before float64 takes over.
_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Collected:
    """What `calibrate` has written.

    `unseen` counts the experts no token reached, of every pool's matrix.
    """

    path: Path
    chunks: int
    tokens: int
    tensors: int
    unseen: dict[str, int]
    seconds: float


def calibrate(
    model: Path | None,
    texts: Sequence[Path],
    out: Path,
    *,
    merge: Sequence[Path] = (),
    n_chunks: int | None = None,
    n_ctx: int = 512,
    parse_special: bool = False,
    process_output: bool = False,
    products: bool = False,
    force: bool = False,
    progress: Progress | None = None,
    say: Say = silent,
) -> Collected:
    """Write the importance matrix of the GGUF file `model` over `texts` to the file `out`.

    Each text is cut as llama-imatrix does it: into chunks of `n_ctx` tokens from its start, at most
    `n_chunks`; the tail is left out, and BOS, if the file asks for one, takes the place of each
    chunk's first token. Several texts give what merging the matrix of each would. The files `merge`
    are added to it, as if their texts had come first; without texts, to each other, and `model`, if
    there is one, is only what they must be of. `parse_special`, off as in llama-imatrix, reads
    special tokens in the texts; `process_output`, off as well, includes the output matrix.
    `products` collects those, too, which rounding by feedback needs: see `Imatrix`. `force`
    replaces an existing `out`, which appears whole or not at all. `say` is told of the texts, and
    of experts that no token reached.

    Raises ConfigError: no or unreadable text, one that is too short, numbers below 1, or a matrix
    of another model or chunk size. OutputError: `out` exists or cannot be written. And what
    `collect` and `imatrix.load` raise.
    """
    start = time.perf_counter()
    if not (texts or merge) or not 0 < n_ctx < 1 << 31 or (n_chunks is not None and n_chunks < 1):
        raise ConfigError(
            f"{len(texts)} texts, {len(merge)} matrices, {n_chunks} chunks of {n_ctx} tokens: "
            "expected at least 1 text or matrix, and 1 of the others"
        )
    # Without one line break at the end, as llama.cpp's programs read texts.
    contents = [read_text(path).removesuffix(b"\n") for path in texts]
    inputs = (*([model] if model else ()), *texts, *merge)
    # All that can be refused is, before an hour of computing.
    with OutputFiles([out], force=force, inputs=inputs) as file:
        parts = _earlier(merge, model, n_ctx if texts else None, say)
        if texts:
            if model is None:
                raise ConfigError(f"{texts[0]}: no model to run over it")
            named = list(zip(texts, contents, strict=True))
            with _Collector(
                model, n_ctx, process_output=process_output, products=products
            ) as collector:
                collector.add(_windows(collector, named, n_chunks, parse_special, say), progress)
                names = [os.fsencode(path).decode("utf-8", "replace") for path in texts]
                parts.append(collector.imatrix(names))
        found = merged(parts)
        file.start(0)
        for piece in found.pieces():
            file.write(piece)
    for line in _describe_unseen(found):
        say(line)
    return Collected(
        out,
        found.chunk_count,
        found.chunk_count * found.chunk_size,
        len(found.sums),
        {name: int((count == 0).sum()) for name, count in found.counts.items() if count.size > 1},
        round(time.perf_counter() - start, 3),
    )


def _earlier(
    paths: Sequence[Path], model: Path | None, n_ctx: int | None, say: Say
) -> list[Imatrix]:
    """The matrices to merge, held against each other, the model, and what else is to come."""
    parts = [load(path) for path in paths]
    if not parts:
        return []
    merged(parts)
    tensors = GGUFFile.open(model).tensors if model else None
    for part in parts:
        if tensors:
            part.means_for(tensors)
        if n_ctx not in (None, part.chunk_size):
            raise ConfigError(
                f"{part.path}: chunks of {part.chunk_size} tokens, and the texts would be cut into "
                f"chunks of {n_ctx}",
                option="n_ctx",
                value=part.chunk_size,
            )
        say(f"{part.path}: {part.chunk_count} chunks of {part.chunk_size}, merged")
    return parts


def _windows(
    collector: _Collector,
    texts: Iterable[tuple[Path, bytes]],
    n_chunks: int | None,
    parse_special: bool,
    say: Say,
) -> list[Tokens]:
    """The chunks of all texts."""
    windows: list[Tokens] = []
    for path, content in texts:
        ids = collector.encode(content, parse_special)
        cut = collector.cut(ids)[:n_chunks]
        if not cut:
            raise ConfigError(
                f"{path}: {len(ids)} tokens, and one chunk takes {collector.context}; give a "
                "longer text, or shorter chunks",
                option="n_ctx",
            )
        say(f"{path}: {len(ids)} tokens, {len(cut)} chunks of {collector.context}")
        windows += cut
    return windows


def collect(
    path: Path,
    windows: Iterable[Tokens],
    *,
    n_ctx: int,
    process_output: bool = False,
    products: bool = False,
) -> Imatrix:
    """Run the GGUF file `path` over `windows`, each of at most `n_ctx` tokens.

    The embedding is left out, as llama-imatrix does, and the output matrix without
    `process_output`. A pool of experts gathers from all layers that use it. `products` are those of
    `Imatrix`. Raises what `Engine` raises, and GGUFError when
    activations are not finite.
    """
    with _Collector(path, n_ctx, process_output=process_output, products=products) as collector:
        collector.add(list(windows))
        return collector.imatrix()


class _Enough(Exception):
    """Ends the evaluation of a window where nothing more is looked at."""


class _Collector(Engine):
    """Adds up the squares of what enters each matrix, and the products of its columns if asked."""

    def __init__(
        self, path: Path, n_ctx: int, *, process_output: bool = False, products: bool = False
    ) -> None:
        if path.is_file():
            open_checked(path)
        super().__init__(path, n_ctx, n_threads=available_cpus())
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._chunks = 0
        self._process_output = process_output
        # By the first of the matrices that the same state enters, and which that is.
        self._products: dict[str, NDArray[np.float32]] | None = {} if products else None
        self._first: dict[str, str] = {}
        # Of the window that is being evaluated: what enters the matrices, by its address and that
        # of the experts' ids; the matrices it enters; and its sums.
        self._entered: dict[tuple[int, int], list[str]] = {}
        self._added: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.int64]]] = {}
        # Activations that the patches rescale to keep them in F16's range, by what comes out.
        self._unscaled: dict[int, NDArray[np.float32]] = {}

    def __enter__(self) -> _Collector:
        return self

    def encode(self, text: bytes, parse_special: bool) -> Tokens:
        """Token ids of a whole text, with BOS if the file asks for one."""
        room = len(text) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(
            self._vocab, text, len(text), ids, room, False, parse_special
        )
        if count < 0:
            raise GGUFError(f"{self.path}: its tokenizer needs more tokens than a text has bytes")
        start = [] if self.bos is None else [self.bos]
        return np.array([*start, *ids[:count]], dtype=np.int32)

    def cut(self, ids: Tokens) -> list[Tokens]:
        """All whole windows of a text's tokens."""
        windows = ids[: len(ids) // self.context * self.context].reshape(-1, self.context).copy()
        if self.bos is not None:
            windows[:, 0] = self.bos
        return list(windows)

    def add(self, windows: Sequence[Tokens], progress: Progress | None = None) -> None:
        """Run over `windows`; GGUFError when activations are not finite."""
        for done, window in enumerate(windows, 1):
            self._entered, self._added, self._unscaled = {}, {}, {}
            with suppress(_Enough):
                self.observe(window, 0, self._look)
            self._chunks += 1
            for key, (sums, counts) in self._added.items():
                for name in self._entered[key]:
                    self._add(name, sums, counts)
                    self._first[name] = self._entered[key][0]
            if progress:
                progress(done, len(windows))

    def _add(self, name: str, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        if name in self._sums:
            self._sums[name] += sums
            self._counts[name] += counts
        else:
            self._sums[name], self._counts[name] = sums.copy(), counts.copy()
        # Not a number compares false.
        if not (self._sums[name] <= _FLOAT32_MAX).all():
            raise GGUFError(f"{self.path}: activations entering {name} are not finite")

    def imatrix(self, datasets: Sequence[str] = ()) -> Imatrix:
        """Of all windows so far."""
        sums = {name: total.astype(np.float32) for name, total in self._sums.items()}
        products = {}
        if self._products is not None:
            products = {name: self._products[first] for name, first in self._first.items()}
        return Imatrix(
            sums, self._counts, tuple(datasets), self._chunks, self.context, products=products
        )

    def _look(self, node: Tensor, ask: bool) -> bool:
        if nodes.name_of(node)[0] == nodes.LAST_BEFORE_OUTPUT and not self._process_output:
            # The output matrix alone is a tenth of the evaluation, and its logits would be copied.
            raise _Enough
        if (unscaled := nodes.before_rescaling(node)) is not None:
            if not ask:
                self._unscaled[ctypes.addressof(node)] = read(unscaled)
            return True
        product = nodes.product(node)
        if product is None:
            return False
        of_ids = ctypes.addressof(product.ids) if product.ids is not None else 0
        key = ctypes.addressof(product.inputs), of_ids
        if ask:
            # What enters several matrices is looked at once.
            names = self._entered.setdefault(key, [])
            names.append(product.name)
            return len(names) == 1
        ids = read(product.ids)[0, 0] if product.ids is not None else None  # [rows, K]
        x = self._unscaled.pop(key[0], None)
        x = read(product.inputs)[..., : product.columns] if x is None else x
        with np.errstate(over="ignore"):  # `_add` complains
            self._added[key] = _squares(x[0], ids, product.weight.ne[2])
            if self._products is not None:
                # Added up at once: those of all layers would not fit into memory together.
                _multiply(self._products, product.name, x[0], ids, product.weight.ne[2])
        return True


def _squares(
    x: NDArray[np.float32], ids: NDArray[np.int32] | None, pool: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums of squares `[M, D]` and rows added up `[M]`.

    `x` is `[rows, 1 or K, D]` where the experts `ids` `[rows, K]` of `pool` run, otherwise
    `[1, rows, D]`.
    """
    rows = x.reshape(-1, x.shape[2])
    if ids is None:
        sums = np.zeros((1, x.shape[2]))
        for begin in range(0, len(rows), _BLOCK):
            part = rows[begin : begin + _BLOCK]
            sums[0] += np.einsum("ij,ij->j", part, part)
        return sums, np.array([len(rows)])
    chosen = ids.ravel()
    shared = chosen.size // len(rows)  # K where all experts of a token read the same row
    order = np.argsort(chosen, kind="stable") // shared
    counts = np.bincount(chosen, minlength=pool)
    sums = np.zeros((pool, x.shape[2]))
    buffer = np.empty((min(int(counts.max()), _BLOCK), x.shape[2]), np.float32)
    first = 0
    for expert, count in enumerate(counts.tolist()):
        for begin in range(first, first + count, _BLOCK):
            of_expert = order[begin : min(begin + _BLOCK, first + count)]
            # Checked indices ("raise") would take a second copy.
            part = np.take(rows, of_expert, 0, out=buffer[: len(of_expert)], mode="clip")
            sums[expert] += np.einsum("ij,ij->j", part, part)
        first += count
    return sums, counts


def _multiply(
    totals: dict[str, NDArray[np.float32]],
    name: str,
    x: NDArray[np.float32],
    ids: NDArray[np.int32] | None,
    pool: int,
) -> None:
    """Add to `totals[name]` `[M, D, width]` the products of the columns of `x`, as `_squares` has.

    M is 1 where all experts of a token read the same row, and `pool` where each has its own.
    """
    rows = x.reshape(-1, x.shape[2])
    each = ids is not None and x.shape[1] > 1
    columns = rows.shape[1]
    width = min(columns, GROUP)
    if name not in totals:
        totals[name] = np.zeros((pool if each else 1, columns, width), np.float32)
    chosen = ids.ravel() if ids is not None and each else np.zeros(len(rows), np.int32)
    for matrix in np.unique(chosen):
        mine = rows[chosen == matrix] if each else rows
        for begin in range(0, columns, width):
            part = mine[:, begin : begin + width]
            totals[name][matrix, begin : begin + width, : part.shape[1]] += part.T @ part


def _describe_unseen(found: Imatrix) -> list[str]:
    """One line for each pool with experts that no token reached: its matrices lack the same."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, experts in found.unseen().items():
        layer = ".".join(name.split(".")[:2])
        names.setdefault((layer, *map(str, experts)), []).append(name)
    return [
        f"warning: {', '.join(same)}: no token reached {len(experts)} of the "
        f"{found.counts[same[0]].size} experts ({', '.join(experts)}): their weights are rounded "
        "as without an importance matrix; give more text"
        for (_, *experts), same in names.items()
    ]
