"""Importance matrices: how large the activations are that meet each column of a weight matrix.

Quantizers weigh rounding errors by them. Read and written as llama.cpp's llama-imatrix does it;
`megrez_runtime.calibration` collects them.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.format.reader import MAGIC, GGUFFile, RawValue
from megrez_gguf.format.writer import KeyValues, TensorInfo, header, padded
from megrez_gguf.quantization.feedback import Pool
from megrez_gguf.quantization.imatrix_legacy import read_legacy
from megrez_gguf.storage.output import OutputFiles
from megrez_gguf.storage.tensor import Tensor

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_PRODUCTS = ".in_products"  # ours: llama.cpp leaves out what it does not know
# Columns whose products with each other are kept; those further apart count as unrelated.
GROUP = 2048
_DATASETS = "imatrix.datasets"
_CHUNK_COUNT, _CHUNK_SIZE = "imatrix.chunk_count", "imatrix.chunk_size"
_F32 = 0
_NO_STRINGS = RawValue(struct.pack("<IIQ", 9, 8, 0))
# A text in the key-values that llama-quantize overrides is one of at most this many bytes.
_OVERRIDE_BYTES = 127


class Shaped(Protocol):
    """A tensor of a model; `shape` is in numpy's order, slowest axis first."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Squares of the activations that enter each matrix, added up, by GGUF tensor name.

    `sums` are float32 `[M, columns]`, M being the experts of a pool, otherwise 1; `counts` int64
    `[M]`, the rows added up. A matrix without counts has means for sums, and M is 1 for pools, too:
    that is all files in llama-imatrix's old format tell. `datasets` name the texts of `chunk_count`
    chunks of `chunk_size` tokens; `path` is the file they were read from.

    `products`, of a matrix or none, tell which columns go along: sums of the products of a column's
    activations with those of all columns of its group, float32 `[M, columns, width]`. Groups are of
    `width` = min(columns, GROUP) columns, the last may be narrower and has zeros then. M is 1 where
    the experts of a pool read the same state.
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Counts]
    datasets: tuple[str, ...] = ()
    chunk_count: int = 0
    chunk_size: int = 0
    path: Path | None = None
    products: Mapping[str, Floats] = field(default_factory=dict)

    @cached_property
    def means(self) -> dict[str, Floats]:
        """Mean squares `[M, columns]`, float32, exactly those llama-quantize weighs errors by.

        An expert that no token reached has neutral ones. `.reshape(-1, columns)` gives a row an
        expert whatever the file's format.
        """
        means = {}
        for name, sums in self.sums.items():
            if name not in self.counts:
                means[name] = sums
                continue
            count = self.counts[name][:, None].astype(np.float32)
            mean = sums / np.maximum(count, 1, dtype=np.float32)
            means[name] = np.where(count > 0, mean, np.float32(1))
        return means

    def unseen(self) -> dict[str, list[int]]:
        """The experts that no token reached, of each matrix that has such."""
        found = {name: np.flatnonzero(count == 0).tolist() for name, count in self.counts.items()}
        return {name: experts for name, experts in found.items() if experts}

    def means_for(self, tensors: Iterable[Shaped]) -> dict[str, Floats]:
        """The `means` of a model's matrices, `[matrices, columns]` as its `tensors` have them.

        Raises ConfigError unless this is of that model: every matrix of its layers that llama.cpp
        quantizes must be here in its size, and nothing of other layers. llama.cpp itself goes on
        without what it misses, and ignores the rest.
        """
        model = {tensor.name: tensor.shape for tensor in tensors}
        for name in self.sums:
            if name.startswith("blk.") and name not in model:
                self._foreign(f"it has {name}, which the model lacks")
        means = {}
        for name, shape in model.items():
            if name not in self.sums:
                if _is_weighed(name, shape):
                    self._foreign(f"it has nothing for {name}")
                continue
            expected = (math.prod(shape[:-2]), shape[-1])
            if self.sums[name].size != math.prod(expected):
                self._foreign(f"for {name} it has {self.sums[name].shape}, expected {expected}")
            means[name] = self.means[name].reshape(expected)
        return means

    def weighing_for(
        self, tensors: Sequence[Shaped], *, by_feedback: bool
    ) -> dict[str, Floats | Pool]:
        """`means_for`, or what rounding `by_feedback` needs of the matrices that have products.

        Raises ConfigError as that does, and where there are no products at all.
        """
        means = self.means_for(tensors)
        if by_feedback and not self.products:
            raise ConfigError(
                f"{self.path or 'the importance matrix'}: has no products, which rounding by "
                "feedback needs: `megrez-gguf imatrix --products` collects them",
                option="imatrix",
            )
        pools = {
            name: Pool(means[name], self.products[name])
            for name in self.products.keys() & means.keys()
            if by_feedback
        }
        return {**means, **pools}

    def _foreign(self, reason: str) -> NoReturn:
        what = f"{self.path}: " if self.path else ""
        raise ConfigError(f"{what}the importance matrix is of another model: {reason}")

    def key_values(self) -> dict[str, str | int]:
        """What llama-quantize notes in the files it makes with this: strings and uint32."""
        values: dict[str, str | int] = {}
        if self.path:
            values["quantize.imatrix.file"] = _override(os.fsencode(self.path))
        if self.datasets:
            values["quantize.imatrix.dataset"] = _override(self.datasets[0].encode())
        values["quantize.imatrix.entries_count"] = len(self.sums)
        if self.chunk_count:
            values["quantize.imatrix.chunks_count"] = self.chunk_count
        return values

    def to_bytes(self) -> bytes:
        """The GGUF file that llama-imatrix would write, byte for byte, and `products` with it.

        Raises ConfigError: there are no counts to write.
        """
        return b"".join(self.pieces())

    def pieces(self) -> Iterator[bytes]:
        """`to_bytes` in pieces, one for each tensor: products may be gigabytes."""
        self._check_counted()
        infos: list[TensorInfo] = []
        data: list[npt.NDArray[Any]] = []
        for name in sorted(self.sums):
            tensors: dict[str, npt.NDArray[Any]] = {
                _SUMS: self.sums[name],
                _COUNTS: self.counts[name][:, None],
            }
            if name in self.products:
                tensors[_PRODUCTS] = self.products[name]
            for suffix, values in tensors.items():
                # ggml does not write a slow axis of one.
                shape = values.shape if len(values) > 1 else values.shape[1:]
                infos.append(TensorInfo(name + suffix, shape, _F32, 4 * values.size))
                data.append(values)
        keys: KeyValues = {
            "general.type": "imatrix",
            _DATASETS: list(self.datasets) or _NO_STRINGS,
            _CHUNK_COUNT: self.chunk_count,
            _CHUNK_SIZE: self.chunk_size,
        }
        yield header(keys, infos)
        for values in data:
            raw = values.astype("<f4").tobytes()
            yield raw + bytes(padded(len(raw)) - len(raw))

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write `to_bytes` as the file `path`, all of it or nothing.

        `force` replaces an existing file. Raises OutputError: it exists or cannot be written; and
        what `to_bytes` does.
        """
        self._check_counted()
        with OutputFiles([path], force=force) as file:
            file.start(0)
            for piece in self.pieces():
                file.write(piece)

    def _check_counted(self) -> None:
        if self.sums.keys() != self.counts.keys():
            raise ConfigError(
                f"{self.path}: in llama-imatrix's old format, which tells means without the number "
                "of tokens behind them: it can be used as it is, but neither merged nor rewritten"
            )


def merge(parts: Sequence[Imatrix]) -> Imatrix:
    """All `parts` as if collected at once; sums and counts add up.

    Raises ConfigError: no counts, different models, chunks of different sizes, or more chunks than
    a file can tell.
    """
    sums: dict[str, Floats] = {}
    counts: dict[str, Counts] = {}
    products: dict[str, Floats] = {}
    first: dict[str, Imatrix] = {}
    for part in parts:
        part._check_counted()
        if part.chunk_size != parts[0].chunk_size:
            raise ConfigError(
                f"{part.path}: chunks of {part.chunk_size} tokens, but {parts[0].path} has chunks "
                f"of {parts[0].chunk_size}: collect both with the same context"
            )
        for name, values in part.sums.items():
            if name not in first:
                first[name], sums[name], counts[name] = part, values, part.counts[name]
                if name in part.products:
                    products[name] = part.products[name]
                continue
            if values.shape != sums[name].shape:
                raise ConfigError(
                    f"{part.path}: for {name} it has {values.shape}, and {first[name].path} "
                    f"{sums[name].shape}: they are of different models"
                )
            with np.errstate(over="ignore"):
                sums[name] = sums[name] + values
            if not np.isfinite(sums[name]).all():
                raise ConfigError(f"{part.path}: the sums of {name} exceed float32's range")
            counts[name] = counts[name] + part.counts[name]
            if (name in products) != (name in part.products):
                raise ConfigError(
                    f"{part.path} and {first[name].path}: one has products and the other has not"
                )
            if name in products:
                products[name] = products[name] + part.products[name]
    datasets = tuple(name for part in parts for name in part.datasets)
    chunks = sum(part.chunk_count for part in parts)
    if not _is_u32(chunks):
        raise ConfigError(
            f"{max(parts, key=lambda part: part.chunk_count).path}: with it they say to be of "
            f"{chunks} chunks, more than a file can tell: damaged"
        )
    return Imatrix(sums, counts, datasets, chunks, parts[0].chunk_size, products=products)


def _is_weighed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes this matrix, and an importance matrix has to cover it."""
    return (
        name.startswith("blk.")
        and name.endswith(".weight")
        and not name.endswith((".ffn_gate_inp.weight", "_norm.weight"))
        and len(shape) > 1
    )


def _override(text: bytes) -> str:
    return text[:_OVERRIDE_BYTES].decode("utf-8", "ignore")


# --- reading -----------------------------------------------------------------------------------


def load(path: Path) -> Imatrix:
    """Read a file that llama-imatrix writes, GGUF or its old format.

    Raises GGUFError: it is none, damaged, or holds numbers that cannot be sums of squares.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                file.seek(0)
                means, dataset, chunks = read_legacy(path, file)
                for name, values in means.items():
                    _check(values, path, name)
                return Imatrix(means, {}, (dataset,) if dataset else (), chunks, 0, path)
    except OSError as e:
        raise GGUFError(f"{path}: cannot be read: {e.strerror or e}") from None
    return _load_gguf(path)


def _load_gguf(path: Path) -> Imatrix:
    file = GGUFFile.open(path)
    datasets = file.values.get(_DATASETS)
    chunk_count, chunk_size = file.values.get(_CHUNK_COUNT), file.values.get(_CHUNK_SIZE)
    if (
        file.values.get("general.type") != "imatrix"
        or not isinstance(datasets, list)
        or not all(isinstance(name, str) for name in datasets)
        or not _is_u32(chunk_count)
        or not _is_u32(chunk_size)
        or not file.tensors
    ):
        raise GGUFError(f"{path}: not an importance matrix as llama-imatrix writes them")
    tensors = {tensor.name: tensor for tensor in file.tensors}
    sums: dict[str, Floats] = {}
    counts: dict[str, Counts] = {}
    products: dict[str, Floats] = {}
    for tensor in file.tensors:
        if tensor.name.endswith(_PRODUCTS):
            products[tensor.name.removesuffix(_PRODUCTS)] = _products(tensor)
            continue
        name, _, half = tensor.name.rpartition(".")
        pair = [tensors.get(name + suffix) for suffix in (_SUMS, _COUNTS)]
        if tensor not in pair or not all(t is not None and t.dtype == "F32" for t in pair):
            raise GGUFError(f"{path}: {tensor.name} is no half of a pair of sums and counts in F32")
        values = _values(tensor)
        if half == "counts":
            if values.max(initial=0) >= 1 << 62:
                raise GGUFError(f"{path}: {tensor.name} holds {values.max()}: damaged")
            # As C's lround: halves go up.
            counts[name] = np.floor(values.astype(np.float64) + 0.5).astype(np.int64)
        else:
            sums[name] = values
    for name, count in counts.items():
        total = sums[name].size
        if not count.size or not total or total % count.size:
            raise GGUFError(f"{path}: {total} sums of {count.size} matrices {name}")
        sums[name] = sums[name].reshape(count.size, -1)
    for name, values in products.items():
        columns = sums[name].shape[1] if name in sums else 0
        if values.shape[0] not in (1, len(sums.get(name, ()))) or values.shape[1:] != (
            columns,
            min(columns, GROUP),
        ):
            raise GGUFError(f"{path}: products of {name} are {values.shape}: damaged")
    return Imatrix(sums, counts, tuple(datasets), chunk_count, chunk_size, path, products=products)


def _is_u32(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 1 << 32


def _values(tensor: Tensor) -> Floats:
    path, size = tensor.shard.path, math.prod(tensor.shape)
    try:
        values = np.fromfile(path, "<f4", size, offset=tensor.begin)
    except OSError as e:
        raise GGUFError(f"{path}: {tensor.name} cannot be read: {e.strerror or e}") from None
    if values.size != size:
        raise GGUFError(f"{path}: {tensor.name}: the file shrank while it was read")
    _check(values, path, tensor.name)
    return values


def _products(tensor: Tensor) -> Floats:
    """Mapped and not read: they may be larger than memory."""
    if tensor.dtype != "F32" or len(tensor.shape) not in (2, 3):
        raise GGUFError(f"{tensor.shard.path}: {tensor.name} is {tensor.dtype} {tensor.shape}")
    shape = tensor.shape if len(tensor.shape) == 3 else (1, *tensor.shape)
    try:
        return np.memmap(tensor.shard.path, "<f4", "r", tensor.begin, shape)
    except (OSError, ValueError) as e:
        raise GGUFError(f"{tensor.shard.path}: {tensor.name} cannot be read: {e}") from None


def _check(values: Floats, path: Path, name: str) -> None:
    if not (np.isfinite(values) & (values >= 0)).all():
        raise GGUFError(f"{path}: {name} holds numbers that are negative or not finite: damaged")
