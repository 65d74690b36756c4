"""A safetensors checkpoint: its shards, its index, and lazily read tensors.

Everything structural is checked when the checkpoint is opened, before one weight is read: headers
are untrusted input, and a damaged or hostile one must end in a message, not in a crash or in a
model that is quietly wrong.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megrez_gguf.checkpoint import hub
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import INDEX, Documents
from megrez_gguf.checkpoint.json_file import load_json
from megrez_gguf.checkpoint.location import Location
from megrez_gguf.checkpoint.shard_set import Index, choose
from megrez_gguf.errors import CheckpointError
from megrez_gguf.storage.opening import opened
from megrez_gguf.storage.shard import Shard
from megrez_gguf.storage.tensor import Tensor
from megrez_gguf.text import Say, clip, silent

# The format's own limit on the JSON header.
MAX_HEADER = 100_000_000

# Bits an element, for every type the format defines.
_BITS = {
    name: bits
    for bits, names in {
        64: "F64 I64 U64 C64",
        32: "F32 I32 U32",
        16: "F16 BF16 I16 U16",
        8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        6: "F6_E2M3 F6_E3M2",
        4: "F4",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: its configuration, and all that its shards hold."""

    place: Location
    documents: Documents
    config: ModelConfig
    tensors: tuple[Tensor, ...]
    """As they are stored: a name may be there in two shards."""
    shards: tuple[Shard, ...]
    index: Index | None = None
    """None without one, or with one that is of other files."""
    notes: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return self.place.path

    @classmethod
    def open(cls, place: Location | Path) -> Checkpoint:
        """Read the configuration, the index and every shard's header.

        Raises ConfigError and CheckpointError as `Documents.read` and `ModelConfig.of` do, and
        CheckpointError as `Index.of`, `shard_set.choose` and `read_header` do.
        """
        place = Location(place) if isinstance(place, Path) else place
        documents = Documents.read(place.path)
        config = ModelConfig.of(documents)
        chosen = choose(place.path, _present(place.path), Index.of(documents))
        read = [read_header(place.path / name) for name in chosen.files]
        tensors = tuple(tensor for _, content in read for tensor in content)
        shards = tuple(shard for shard, _ in read)
        notes, total = [*chosen.notes], sum(t.nbytes for t in tensors)
        announced = chosen.index.total_size if chosen.index else None
        if announced not in (None, total):
            notes.append(f"{INDEX} says the weights take {announced} bytes; they take {total}")
        return cls(place, documents, config, tensors, shards, chosen.index, tuple(notes))

    @classmethod
    def find(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        say: Say = silent,
    ) -> Checkpoint:
        """`open` what `source` names, fetched first if it is a repository: see `hub.resolve`."""
        return cls.open(hub.resolve(source, announced_shards, revision=revision, say=say))


def announced_shards(folder: Path, present: Collection[str]) -> tuple[tuple[str, ...], int | None]:
    """The shards among the files `present` in a repository, and their size in all if it is known.

    `folder` holds its small files. Raises ConfigError and CheckpointError for what tells of another
    kind of model, and as `shard_set.choose` does.
    """
    documents = Documents.read(folder)
    ModelConfig.of(documents)
    chosen = choose(folder, present, Index.of(documents))
    return chosen.files, chosen.index.total_size if chosen.index else None


def _present(folder: Path) -> list[str]:
    try:
        return sorted(p.name for p in folder.iterdir())
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be listed: {e.strerror}") from None


# --- one shard ---------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[Shard, list[Tensor]]:
    """Parse and validate one shard's header; tensors come in file order.

    Raises CheckpointError: not a regular file, truncated, a header that is too long, not JSON, has
    duplicate keys, or whose tensors overlap, leave gaps, or do not fill the file exactly.
    """
    with opened(path, CheckpointError) as (file, shard):
        raw, begin = _read_header_json(file, shard)
    tensors = [_parse_entry(shard, name, entry, begin) for name, entry in raw.items()]
    tensors.sort(key=lambda t: (t.begin, t.nbytes))
    _check_layout(shard, tensors, begin)
    return shard, tensors


def _read_header_json(file: BinaryIO, shard: Shard) -> tuple[dict[str, Any], int]:
    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{shard.path}: {reason}")

    if shard.size < 8:
        fail(f"{shard.size} bytes long, too short to be a safetensors file")
    start = file.read(8)
    if start.startswith(b"GGUF"):
        fail("a GGUF file, not safetensors; it is converted already: give the file itself")
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER:
        fail(
            f"announces a header of {length} bytes; the format allows {MAX_HEADER}: "
            "not a safetensors file, or damaged"
        )
    if length > shard.size - 8:
        fail(f"announces a header of {length} bytes and has {shard.size - 8} left: truncated")
    text = file.read(length)
    if len(text) != length:
        fail(f"header: read {len(text)} bytes of {length}: truncated")
    try:
        raw = load_json(text)
    except (ValueError, RecursionError) as e:
        fail(f"header: cannot be read as JSON: {e}")
    if not isinstance(raw, dict):
        fail(f"header: expected a JSON object, found {type(raw).__name__}")
    metadata = raw.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail(f"header: __metadata__: expected an object of strings, found {clip(metadata)}")
    for name in (*raw, *metadata, *metadata.values()):
        if any("\ud800" <= c <= "\udfff" for c in name):
            fail(f"header: {clip(name)} is half of a character, which no other reader takes")
    return raw, 8 + length


def _parse_entry(shard: Shard, name: str, entry: Any, base: int) -> Tensor:
    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{shard.path}: tensor {name}: {reason}")

    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        fail("expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        fail(f"unknown dtype {clip(dtype)}")
    if not _is_counts(shape):
        fail(f"shape: expected integers that are not negative, found {clip(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2:
        fail(f"data_offsets: expected two integers that are not negative, found {clip(offsets)}")
    begin, end = offsets
    available = shard.size - base
    if begin > end:
        fail(f"data_offsets: begins at {begin}, after its end at {end}")
    if end > available:
        fail(f"data_offsets: ends at byte {end} of the data; the file holds {available}: truncated")
    size = 1
    for dimension in shape:
        size *= dimension
        if size >= 2**64:  # also where a 0 follows: other readers stop here
            fail(f"shape: {clip(shape)} has more elements than any file")
    if size * _BITS[dtype] != (end - begin) * 8:
        expected = -(-size * _BITS[dtype] // 8)
        fail(f"{dtype} {clip(shape)} takes {expected} bytes; data_offsets span {end - begin}")
    return Tensor(name, dtype, tuple(shape), shard, base + begin, end - begin)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**64 for v in value)


def _check_layout(shard: Shard, tensors: list[Tensor], base: int) -> None:
    """The data must be filled exactly: no byte in two tensors, none in no tensor."""
    position, previous = base, "the header"
    for tensor in tensors:
        if tensor.begin < position:
            raise CheckpointError(
                f"{shard.path}: tensor {tensor.name} overlaps {previous} "
                f"by {position - tensor.begin} bytes"
            )
        if tensor.begin > position:
            raise CheckpointError(
                f"{shard.path}: {tensor.begin - position} bytes between {previous} and tensor "
                f"{tensor.name} belong to no tensor"
            )
        position, previous = tensor.begin + tensor.nbytes, f"tensor {tensor.name}"
    if position != shard.size:
        raise CheckpointError(
            f"{shard.path}: {shard.size - position} bytes after {previous} belong to no tensor"
        )
