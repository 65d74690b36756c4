"""Weights from where they are stored to where they are wanted, each read once, on all cores.

    worker threads   read a piece, check that it is finite, encode it
    calling thread   hand the pieces to the sink, in order
    hashing thread   SHA-256 of each tensor as it is written, and as it was read where it is known

Tensors that keep their type take the same way, in larger pieces: to copy them inside the kernel and
to read them once more for their check and hash was slower than to go past the system's cache, when
measured (scripts/benchmarks/README.md).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from megrez_gguf.errors import CheckpointError
from megrez_gguf.format.writer import TensorInfo
from megrez_gguf.machine import available_cpus
from megrez_gguf.quantization import encode
from megrez_gguf.quantization.encode import Array, Encoding, Loss
from megrez_gguf.quantization.feedback import Pool, with_zeros
from megrez_gguf.storage.open_shards import OpenShards
from megrez_gguf.storage.opening import AGAIN
from megrez_gguf.storage.tensor import RAW_DTYPE, Tensor
from megrez_gguf.storage.zeros import Run, joined, least, unwritten, zero_runs
from megrez_gguf.text import Progress
from megrez_llama.threads import thread_count

# Elements encoded at once: some megabytes, so that memory stays small and cores share the work.
PIECE = 1 << 20
# Bytes checked at once: small enough to stay in a core's cache.
_BLOCK = 1 << 20
# Bytes at once of what keeps its type: large enough for a disk to be at its best.
_COPY = 8 << 20
# Pieces written and not yet hashed, at most.
_UNHASHED = 4


@dataclass(frozen=True, slots=True)
class _Worked:
    """A piece as it was read, where that is hashed; its zeros; what it became; what was lost."""

    raw: Array | None
    zeros: Sequence[Run]
    data: Array
    loss: Loss


Importance = Mapping[str, npt.NDArray[np.float32] | Pool]
"""By tensor name, the importance of columns `[matrices, columns]`, or what enters each matrix."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor to be written: the stack of `sources` along its first axis, as `encoding`.

    `shape` is in numpy's order. A source holds one matrix `[rows, columns]` or several; where its
    rows are shorter than those of `shape`, zeros come after them. `sha256` is what the bytes of the
    sources must have, where that is known. Rows of a source from `known_rows` on may be zero; see
    `zeros.unwritten`.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    encoding: Encoding
    sha256: str | None = None
    known_rows: int | None = None

    @property
    def size(self) -> int:
        """Number of elements, without zeros after rows."""
        return sum(t.size for t in self.sources)

    @property
    def nbytes(self) -> int:
        """Size as written."""
        return self.encoding.nbytes(math.prod(self.shape))

    @property
    def info(self) -> TensorInfo:
        """Its entry in a GGUF's tensor table."""
        return TensorInfo(self.name, self.shape, self.encoding.number, self.nbytes)


class Sink(Protocol):
    """Takes the items in order, each as pieces of its bytes."""

    def begin(self, item: Item) -> None: ...
    def write(self, data: Array) -> None: ...
    def end(self, item: Item) -> None: ...


class Nowhere:
    """A `Sink` that drops what it takes."""

    def begin(self, item: Item) -> None: ...
    def write(self, data: Array) -> None: ...
    def end(self, item: Item) -> None: ...


@dataclass(slots=True)
class Outcome:
    """What `stream` has done: the hash of each item's bytes as written, and what was lost."""

    sha256: list[str] = field(default_factory=list)
    loss: Loss = field(default_factory=Loss)
    consumed: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    """Tensors whose long runs of zeros were allowed."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of one source of an item: `rows` of matrix `matrix`, or 0 `rows` to keep as it is."""

    item: Item
    source: Tensor
    offset: int
    nbytes: int
    rows: int
    matrix: int

    @property
    def first(self) -> bool:
        """Whether the item begins with it."""
        return self.source is self.item.sources[0] and self.offset == 0

    @property
    def ends_source(self) -> bool:
        return self.offset + self.nbytes == self.source.nbytes

    @property
    def last(self) -> bool:
        """Whether the item ends with it."""
        return self.source is self.item.sources[-1] and self.ends_source


def _pieces(item: Item) -> Iterator[_Piece]:
    rows = item.shape[-2] if len(item.shape) > 1 else 1
    matrix = 0
    for source in item.sources:
        if source.dtype == item.encoding.name:
            for offset in range(0, source.nbytes, _COPY):
                yield _Piece(item, source, offset, min(_COPY, source.nbytes - offset), 0, 0)
            continue
        size = source.nbytes // source.size * source.shape[-1]  # bytes of a row
        step = max(PIECE // item.shape[-1], 1)
        # No piece reaches into the next matrix: each has its own importance.
        for begin in range(0, source.nbytes, rows * size):
            for row in range(0, rows, step):
                count = min(step, rows - row)
                yield _Piece(item, source, begin + row * size, count * size, count, matrix)
            matrix += 1


def stream(
    items: Sequence[Item],
    sink: Sink,
    *,
    importance: Importance | None = None,
    clamp: bool = False,
    allow_zeros: bool = False,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Encode `items` into `sink`, in order.

    Values beyond a float type's range are limited to it with `clamp`, and refused without. Long
    runs of zeros, which a part of a file has that was never written, are refused without
    `allow_zeros`, unless `Item.sha256` tells that they are meant.
    Raises CheckpointError, naming shard and tensor: values that are not finite or beyond the range
    of their type, bytes that have another hash than `Item.sha256`, a file that cannot be read or
    ends early; and what `sink` and `thread_count` raise.
    """
    with OpenShards() as files:
        return _Stream(files, sink, importance or {}, clamp, allow_zeros, progress).run(
            items, thread_count(n_threads, available_cpus())
        )


class _Stream:
    def __init__(
        self,
        files: OpenShards,
        sink: Sink,
        importance: Importance,
        clamp: bool,
        allow_zeros: bool,
        progress: Progress | None,
    ) -> None:
        self.files, self.sink, self.importance = files, sink, importance
        self.clamp, self.allow_zeros, self.progress = clamp, allow_zeros, progress
        self.zeros: list[Run] = []  # of the source that is being worked on
        self.outcome = Outcome()
        self.local = threading.local()
        self.done = self.total = 0
        self.item_loss = Loss()
        self.hasher = ThreadPoolExecutor(1)
        self.hashing: deque[Future[None]] = deque()
        self.read_digest, self.digest = hashlib.sha256(), hashlib.sha256()

    def run(self, items: Sequence[Item], threads: int) -> Outcome:
        self.total = sum(t.nbytes for item in items for t in item.sources)
        waiting: deque[tuple[_Piece, Future[_Worked]]] = deque()
        with ThreadPoolExecutor(threads) as workers, self.hasher:
            try:
                for piece in (piece for item in items for piece in _pieces(item)):
                    waiting.append((piece, workers.submit(self.work, piece)))
                    if len(waiting) > 2 * threads + 2:
                        self.finish(*waiting.popleft())
                while waiting:
                    self.finish(*waiting.popleft())
                for job in self.hashing:
                    job.result()
            finally:
                # Where something failed, what is not begun is not needed.
                workers.shutdown(wait=False, cancel_futures=True)
                self.hasher.shutdown(wait=False, cancel_futures=True)
        return self.outcome

    # --- in the worker threads

    def work(self, piece: _Piece) -> _Worked:
        if not piece.rows:
            raw = self.read(piece, np.empty(piece.nbytes, np.uint8))
            return _Worked(raw, self.find_zeros(piece, raw), raw, Loss())
        hashed = piece.item.sha256 is not None
        buffer = np.empty(piece.nbytes, np.uint8) if hashed else self.buffer()[: piece.nbytes]
        raw = self.read(piece, buffer)
        data, loss = self.encode(piece, raw.view(RAW_DTYPE[piece.source.dtype]))
        return _Worked(raw if hashed else None, self.find_zeros(piece, raw), data, loss)

    @staticmethod
    def find_zeros(piece: _Piece, raw: npt.NDArray[np.uint8]) -> Sequence[Run]:
        source = piece.source
        return zero_runs(raw, least(source)) if source.dtype in RAW_DTYPE else ()

    def buffer(self) -> npt.NDArray[np.uint8]:
        """A buffer of this thread's, kept for its next pieces."""
        kept: npt.NDArray[np.uint8] | None = getattr(self.local, "buffer", None)
        if kept is None:
            kept = self.local.buffer = np.empty(PIECE * 4, np.uint8)
        return kept

    def read(self, piece: _Piece, into: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The bytes of a piece, all of them finite weights or none of them weights."""
        self.files.read(piece.source, piece.offset, into.data)
        dtype = RAW_DTYPE.get(piece.source.dtype)
        if dtype is not None:
            for begin in range(0, piece.nbytes, _BLOCK):
                self.check_finite(
                    piece, into[begin : begin + _BLOCK].view(dtype), piece.offset + begin
                )
        return into

    @staticmethod
    def check_finite(piece: _Piece, values: Array, offset: int) -> None:
        bad = encode.first_non_finite(values)
        if bad is not None:
            tensor = piece.source
            position = offset // values.itemsize + bad
            index = [int(i) for i in np.unravel_index(position, tensor.shape)]
            raise CheckpointError(
                f"{tensor.shard.path}: tensor {tensor.name}: {float(encode.to_f32(values)[bad])} "
                f"at {index}; weights must be finite"
            )

    def encode(self, piece: _Piece, raw: Array) -> tuple[Array, Loss]:
        encoding, loss = piece.item.encoding, Loss()
        values = encode.to_f32(raw)
        if raw.dtype != np.float16:  # every other type holds all of its values
            loss = encode.count_loss(values, encoding)
            if loss.overflow:
                values = np.clip(values, -encoding.limit, encoding.limit)
        importance = self.importance.get(piece.item.name)
        weights = None if importance is None else importance[piece.matrix]
        try:
            rows = with_zeros(values.reshape(piece.rows, -1), piece.item.shape[-1])
            return encoding.encode(rows, weights), loss
        except OverflowError:
            raise CheckpointError(
                f"{piece.source.shard.path}: tensor {piece.source.name}: has weights beyond the "
                f"range of {encoding.name}; use bf16 or f32 for it"
            ) from None

    # --- in the calling thread

    def finish(self, piece: _Piece, work: Future[_Worked]) -> None:
        done = work.result()
        self.zeros = joined(self.zeros, done.zeros, piece.offset)
        if piece.first:
            self.sink.begin(piece.item)
            self.item_loss = Loss()
        self.sink.write(done.data)
        self.hashing.append(self.hasher.submit(self.hash, piece, done.raw, done.data))
        if len(self.hashing) > _UNHASHED:
            self.hashing.popleft().result()
        self.item_loss += done.loss
        if piece.ends_source:
            self.check_zeros(piece.item, piece.source)
            self.outcome.consumed.append(piece.source.name)
        if piece.last:
            self.end(piece.item)
        self.done += piece.nbytes
        if self.progress:
            self.progress(self.done, self.total)

    def check_zeros(self, item: Item, source: Tensor) -> None:
        run, self.zeros = unwritten(source, self.zeros, item.known_rows), []
        if run is None or item.sha256:
            return
        if self.allow_zeros:
            self.outcome.zeros.append(source.name)
            return
        raise CheckpointError(
            f"{source.shard.path}: tensor {source.name}: {run[1] - run[0]} of its {source.nbytes} "
            f"bytes, from byte {source.begin + run[0]} of the file on, are zero: that part was "
            f"never written, or has been lost; {AGAIN}",
            option="allow_zeros",
        )

    def end(self, item: Item) -> None:
        if self.item_loss.overflow and not self.clamp:
            name = item.encoding.name
            raise CheckpointError(
                f"tensor {item.name}: {self.item_loss.overflow} weights are beyond the range of "
                f"{name} and would become infinite",
                option="clamp",
            )
        self.outcome.loss += self.item_loss
        self.sink.end(item)

    # --- in the hashing thread

    def hash(self, piece: _Piece, raw: Array | None, data: Array) -> None:
        self.digest.update(data.reshape(-1).view(np.uint8).data)
        if raw is not None and raw is not data:
            self.read_digest.update(raw.data)
        if not piece.last:
            return
        written = self.digest.hexdigest()
        self.outcome.sha256.append(written)
        found = written if raw is data else self.read_digest.hexdigest()
        if piece.item.sha256 not in (None, found):
            source = piece.source
            raise CheckpointError(
                f"{source.shard.path}: tensor {source.name}: its bytes are not those whose hash "
                "the file records: damaged since it was written; copy or convert it again "
                "(`megrez-gguf verify` checks all of its tensors)"
            )
        self.read_digest, self.digest = hashlib.sha256(), hashlib.sha256()
