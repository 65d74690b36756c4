"""Is a GGUF file what its own record, and its checkpoint, say it is?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion import metadata
from megrez_gguf.conversion.padding import padded
from megrez_gguf.conversion.record import recorded
from megrez_gguf.conversion.source import from_checkpoint
from megrez_gguf.conversion.stream import Importance, Item, stream
from megrez_gguf.errors import ConfigError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.machine import available_cpus
from megrez_gguf.quantization.encode import Array, encoding
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.imatrix import load as load_imatrix
from megrez_gguf.storage.open_shards import OpenShards
from megrez_gguf.text import Progress, Say, clip, silent

_BLOCK = 4 << 20

# How the file was made, and how it is named; not what it computes.
_FREE = ("general.", "quantize.", f"{metadata.OURS}.", "split.")


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found. Empty `failures` means that everything compared is as it should be."""

    path: Path
    tensors: int
    hashed: int
    """Tensors held against the hash recorded when the file was written."""
    compared: int
    """Tensors held against the checkpoint, byte for byte."""
    failures: tuple[str, ...]
    notes: tuple[str, ...] = ()


def verify(
    path: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> Verification:
    """Check every tensor of the GGUF file `path`, whatever program wrote it.

    Against the hashes recorded in it, which tells damage since it was written; and against
    `checkpoint`, whose tensors are encoded anew, in the types the file has, and compared byte for
    byte, as are the key-values that decide what the model computes. A file made with an importance
    matrix needs the same `imatrix`. A checkpoint that names no folder may name a repository, which
    is fetched first: see `hub.resolve`, to which `revision` and `say` go.

    Raises what opening the file, the checkpoint and the matrix raises, and ConfigError when there
    is nothing to compare with, or no importance matrix where the file was made with one. What
    differs is in the result, not raised.
    """
    path = Path(path)
    file = GGUFFile.open(path)
    hashes, stale = recorded(file)
    if not hashes and checkpoint is None:
        raise ConfigError(f"{path}: has no hashes of its own; give the checkpoint to compare with")
    if checkpoint is None and revision is not None:
        raise ConfigError(f"revision {revision!r}: of which repository? give the checkpoint, too")
    origin = None
    if checkpoint is not None:
        origin = Checkpoint.find(checkpoint, revision=revision, say=say)
    notes = []
    if stale:
        notes.append(
            f"{stale} recorded hashes are of other types than the tensors have: another program "
            "wrote this file from the one that was hashed; they were left out"
        )
    failures = [*_check_hashes(file, hashes, progress if origin is None else None)]
    compared = 0
    if origin is not None:
        damaged = {failure.split(":", 1)[0] for failure in failures}
        sound = hashes.keys() - damaged
        source = from_checkpoint(origin, say)
        failures += _compare_values(file, source.values)
        failures += _compare_names(file, source.tensors)
        items = [*_alike(file, source.tensors)]
        importance = _importance(file, imatrix, source.tensors)
        with _Comparison(file, sound) as sink:
            # What the file has of either kind is told by comparing.
            options: dict[str, Any] = {
                "importance": importance, "clamp": True, "allow_zeros": True
            }  # fmt: skip
            done = stream(items, sink, progress=progress, **options)
        source.check_unchanged(items, done, **options)
        failures += sink.failures
        compared = len(items)
    return Verification(
        path, len(file.tensors), len(hashes), compared, tuple(failures), tuple(notes)
    )


def _check_hashes(
    file: GGUFFile, hashes: dict[str, str], progress: Progress | None
) -> Iterator[str]:
    tensors = [t for t in file.tensors if t.name in hashes]
    total, done = sum(t.nbytes for t in tensors), 0
    with OpenShards() as shards, ThreadPoolExecutor(available_cpus()) as pool:

        def digest(number: int) -> str:
            t = tensors[number]
            found, buffer = hashlib.sha256(), bytearray(min(_BLOCK, t.nbytes))
            for begin in range(0, t.nbytes, _BLOCK):
                part = memoryview(buffer)[: min(_BLOCK, t.nbytes - begin)]
                shards.read(t, begin, part)
                found.update(part)
            return found.hexdigest()

        for tensor, found in zip(tensors, pool.map(digest, range(len(tensors))), strict=True):
            done += tensor.nbytes
            if progress:
                progress(done, total)
            if found != hashes[tensor.name]:
                yield f"{tensor.name}: its bytes are not those that were written: damaged since"


def _compare_values(file: GGUFFile, expected: KeyValues) -> Iterator[str]:
    for key, value in expected.items():
        if key.startswith(_FREE):
            continue
        found = file.values.get(key)
        if key not in file.values:
            yield f"key {key}: missing from the file; expected {clip(value)}"
        elif found != (float(np.float32(value)) if isinstance(value, float) else value):
            yield f"key {key}: is {clip(found)}; the checkpoint says {clip(value)}"


def _compare_names(file: GGUFFile, expected: Sequence[Item]) -> Iterator[str]:
    found, wanted = {t.name: t for t in file.tensors}, {i.name: i for i in expected}
    for name in sorted(found.keys() ^ wanted.keys()):
        where = "the checkpoint has no such tensor" if name in found else "missing from the file"
        yield f"{name}: {where}"
    for name in sorted(found.keys() & wanted.keys()):
        if found[name].shape not in _shapes(wanted[name]):
            yield (
                f"{name}: has shape {list(found[name].shape)}; the checkpoint's is "
                f"{list(wanted[name].shape)}"
            )


def _alike(file: GGUFFile, expected: Sequence[Item]) -> Iterator[Item]:
    """The checkpoint's tensors in the types of the file, where names and shapes agree."""
    found = {t.name: t for t in file.tensors}
    for item in expected:
        tensor = found.get(item.name)
        if tensor and tensor.shape in _shapes(item):
            yield replace(item, shape=tensor.shape, encoding=encoding(tensor.dtype))


def _shapes(item: Item) -> tuple[tuple[int, ...], ...]:
    """Those that a file may have it in."""
    return item.shape, padded(item).shape


def _importance(
    file: GGUFFile, imatrix: str | os.PathLike[str] | Imatrix | None, tensors: Sequence[Item]
) -> Importance:
    weighted = "quantize.imatrix.entries_count" in file.values
    if imatrix is None:
        if weighted:
            raise ConfigError(
                f"{file.shards[0].path}: made with an importance matrix "
                f"({file.values.get('quantize.imatrix.file', 'its file is not named')}); give the "
                "same one",
                option="imatrix",
            )
        return {}
    if not weighted:
        raise ConfigError(f"{file.shards[0].path}: made without an importance matrix; leave it out")
    weights = imatrix if isinstance(imatrix, Imatrix) else load_imatrix(Path(imatrix))
    by_feedback = file.values.get(metadata.ROUNDING) == metadata.FEEDBACK
    return weights.weighing_for(tensors, by_feedback=by_feedback)


class _Comparison:
    """Holds what the checkpoint gives against what lies in the file."""

    def __init__(self, file: GGUFFile, sound: set[str]) -> None:
        self._tensors = {t.name: t for t in file.tensors}
        self._sound = sound
        self._shards = OpenShards()
        self.failures: list[str] = []

    def __enter__(self) -> _Comparison:
        return self

    def __exit__(self, *error: object) -> None:
        self._shards.close()

    def begin(self, item: Item) -> None:
        self._tensor = self._tensors[item.name]
        self._position = 0
        self._different: int | None = None

    def write(self, data: Array) -> None:
        expected = data.reshape(-1).view(np.uint8)
        found = np.empty_like(expected)
        self._shards.read(self._tensor, self._position, found.data)
        if self._different is None and not np.array_equal(found, expected):
            self._different = self._position + int((found != expected).argmax())
        self._position += expected.size

    def end(self, item: Item) -> None:
        if self._different is None:
            return
        row = self._different // (item.nbytes // (np.prod(item.shape, dtype=int) // item.shape[-1]))
        index = [int(i) for i in np.unravel_index(row, item.shape[:-1])] if item.shape[1:] else []
        why = "the file differs from the checkpoint"
        if item.name in self._sound:
            why = (
                "written so, and not what this checkpoint gives: other weights, another importance "
                "matrix, quantized by another version, or rounded by feedback on another processor"
            )
        self.failures.append(f"{item.name}: differs from row {index} on: {why}")
