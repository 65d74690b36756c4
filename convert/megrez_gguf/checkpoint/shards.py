"""A safetensors checkpoint: its shards, its index, and lazily read tensors.

Everything structural is checked when the checkpoint is opened, before one weight is read: headers
are untrusted input, and a damaged or hostile one must end in a message, not in a crash or in a
model that is quietly wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megrez_gguf.checkpoint import hub
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import INDEX, Documents
from megrez_gguf.checkpoint.json_file import load_json
from megrez_gguf.checkpoint.location import Location
from megrez_gguf.errors import CheckpointError
from megrez_gguf.storage.opening import opened
from megrez_gguf.storage.tensor import Shard, Tensor
from megrez_gguf.text import Say, clip, few, silent

SINGLE = "model.safetensors"
_SUFFIX = ".safetensors"

# The format's own limit on the JSON header.
MAX_HEADER = 100_000_000

# Bytes an element, for every type the format defines with whole bytes.
ITEM_SIZE = {
    name: size
    for size, names in {
        8: "F64 I64 U64 C64",
        4: "F32 I32 U32",
        2: "F16 BF16 I16 U16",
        1: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0",
    }.items()
    for name in names.split()
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder: its configuration, and all its tensors by published name."""

    place: Location
    documents: Documents
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def folder(self) -> Path:
        return self.place.path

    @classmethod
    def open(cls, place: Location | Path) -> Checkpoint:
        """Read the configuration, the index and every shard's header.

        Raises ConfigError and CheckpointError as `Documents.read` and `ModelConfig.of` do, and
        CheckpointError: no safetensors file, a shard missing, damaged or hostile, a
        tensor in two shards, or an index that disagrees with the shards in either direction.
        """
        place = Location(place) if isinstance(place, Path) else place
        documents = Documents.read(place.path)
        config, index = ModelConfig.of(documents), Index.of(documents)
        folder = place.path
        names = _shard_names(folder, index)
        tensors: dict[str, Tensor] = {}
        shards = []
        for name in names:
            shard, content = read_header(folder / name)
            shards.append(shard)
            for tensor in content:
                other = tensors.setdefault(tensor.name, tensor)
                if other is not tensor:
                    raise CheckpointError(
                        f"{folder}: tensor {tensor.name} is in two shards: "
                        f"{other.shard.path.name} and {name}"
                    )
        notes: tuple[str, ...] = ()
        if index is not None:
            _compare_index(folder / INDEX, index.weight_map, tensors)
            total = sum(t.nbytes for t in tensors.values())
            if index.total_size not in (None, total):
                notes = (
                    f"{INDEX} says the weights take {index.total_size} bytes; they take {total}",
                )
        return cls(place, documents, config, tensors, tuple(shards), notes)

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


# --- the index ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Index:
    """What `model.safetensors.index.json` says: the shard of each tensor, and their size in all."""

    weight_map: Mapping[str, str]
    total_size: int | None

    @classmethod
    def of(cls, documents: Documents) -> Index | None:
        """The index of a checkpoint, None without one.

        Raises CheckpointError: it names no tensor, or what cannot be a shard.
        """
        if documents.index is None:
            return None
        path, entries = documents.folder / INDEX, documents.index.get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise CheckpointError(
                f"{path}: expected an object `weight_map` naming at least one tensor"
            )
        for tensor, name in entries.items():
            # A name from a downloaded file must not reach outside the folder.
            if not isinstance(name, str) or not name.endswith(_SUFFIX) or not _is_plain(name):
                raise CheckpointError(
                    f"{path}: tensor {tensor}: {name!r} is not the name of a {_SUFFIX} file in "
                    "this folder"
                )
        meta = documents.index.get("metadata")
        total = meta.get("total_size") if isinstance(meta, dict) else None
        return cls(entries, total if type(total) is int else None)


def announced_shards(folder: Path) -> tuple[list[str], int | None]:
    """The shards a folder that lacks them should have, and their size in all if it is known.

    Raises ConfigError and CheckpointError for what tells of another kind of model, or no index.
    """
    documents = Documents.read(folder)
    ModelConfig.of(documents)
    index = Index.of(documents)
    if index is None:
        return [SINGLE], None
    return sorted(set(index.weight_map.values())), index.total_size


def _is_plain(name: str) -> bool:
    return not any(c in name for c in "/\\\0") and name not in (".", "..")


def _shard_names(folder: Path, index: Index | None) -> list[str]:
    try:
        present = sorted(p.name for p in folder.iterdir() if p.name.endswith(".safetensors"))
    except OSError as e:
        raise CheckpointError(f"{folder}: cannot be listed: {e.strerror}") from None
    if index is None:
        return [_single_shard(folder, present)]
    named = sorted(set(index.weight_map.values()))
    if missing := [n for n in named if n not in present]:
        raise CheckpointError(
            f"{folder}: {INDEX} names {few(missing)}, missing from this folder; "
            "is the download complete?"
        )
    # Adapters and the like may lie beside a model; another set of its shards may not.
    if stray := [n for n in present if n not in named and n.startswith("model")]:
        raise CheckpointError(
            f"{folder}: {few(stray)} lies in this folder and {INDEX} does not name it; "
            "move it away if it belongs to another download"
        )
    return named


def _single_shard(folder: Path, present: list[str]) -> str:
    if SINGLE in present:
        present = [n for n in present if n == SINGLE or n.startswith("model")]
    if len(present) == 1:
        return present[0]
    if present:
        raise CheckpointError(
            f"{folder}: {len(present)} .safetensors files and no {INDEX} that says which "
            "belong together"
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: PyTorch files only; save the model as safetensors first "
            "(model.save_pretrained(..., safe_serialization=True))"
        )
    raise CheckpointError(f"{folder}: no .safetensors file in this folder")


def _compare_index(
    path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    if absent := [n for n in weight_map if n not in tensors]:
        raise CheckpointError(
            f"{path}: names {few(absent)}, and no shard holds "
            f"{'it' if len(absent) == 1 else 'them'}; {weight_map[absent[0]]} should"
        )
    if unlisted := [n for n in tensors if n not in weight_map]:
        raise CheckpointError(
            f"{tensors[unlisted[0]].shard.path}: holds {few(unlisted)}, which {INDEX} does not name"
        )
    for name, shard in weight_map.items():
        found = tensors[name].shard.path.name
        if found != shard:
            raise CheckpointError(f"{path}: says tensor {name} is in {shard}; it is in {found}")


# --- one shard ---------------------------------------------------------------------------------


def read_header(path: Path) -> tuple[Shard, list[Tensor]]:
    """Parse and validate one shard's header; tensors come in file order.

    Raises CheckpointError: not a regular file, truncated, a header that is too long, not JSON, has
    duplicate keys, or whose tensors overlap, leave gaps, or do not fill the file exactly.
    """
    with opened(path, CheckpointError) as (file, shard):
        raw, begin = _read_header_json(file, shard)
    tensors = [
        _parse_entry(shard, name, entry, begin)
        for name, entry in raw.items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda t: (t.begin, t.nbytes))
    _check_layout(shard, tensors, begin)
    return shard, tensors


def _read_header_json(file: BinaryIO, shard: Shard) -> tuple[dict[str, Any], int]:
    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{shard.path}: {reason}")

    if shard.size < 8:
        fail(f"{shard.size} bytes long, too short to be a safetensors file")
    length = int.from_bytes(file.read(8), "little")
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
    return raw, 8 + length


def _parse_entry(shard: Shard, name: str, entry: Any, base: int) -> Tensor:
    def fail(reason: str) -> NoReturn:
        raise CheckpointError(f"{shard.path}: tensor {name}: {reason}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("expected an object with exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        fail(f"unknown dtype {dtype!r}")
    if not _is_counts(shape) or len(shape) > 8:
        fail(f"shape: expected up to 8 integers that are not negative, found {clip(shape)}")
    if not _is_counts(offsets) or len(offsets) != 2:
        fail(f"data_offsets: expected two integers that are not negative, found {clip(offsets)}")
    begin, end = offsets
    available = shard.size - base
    if begin > end:
        fail(f"data_offsets: begins at {begin}, after its end at {end}")
    if end > available:
        fail(f"data_offsets: ends at byte {end} of the data; the file holds {available}: truncated")
    expected = math.prod(shape) * ITEM_SIZE[dtype]
    if end - begin != expected:
        fail(f"{dtype} {list(shape)} takes {expected} bytes; data_offsets span {end - begin}")
    return Tensor(name, dtype, tuple(shape), shard, base + begin, expected)


def _is_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


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
