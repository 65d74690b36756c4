"""A conversion, planned: every name, shape and type is settled before anything is written."""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from megrez_gguf.conversion.metadata import FEEDBACK, HASHES, RECIPE, ROUNDING, file_stem
from megrez_gguf.conversion.padding import padded as with_padded_rows
from megrez_gguf.conversion.source import StoredModel
from megrez_gguf.conversion.stream import Importance, Item, Outcome, stream
from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.format.reader import SPLIT, RawValue, part_path, split_prefix
from megrez_gguf.format.writer import KeyValues, header, padded
from megrez_gguf.quantization import encode, imatrix, levels, recipe
from megrez_gguf.quantization.encode import encoding
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.recipe import Recipe
from megrez_gguf.quantization.types import Fallback, Types, choose_types
from megrez_gguf.storage.output import OutputFiles
from megrez_gguf.storage.tensor import RAW_DTYPE
from megrez_gguf.text import Progress, few


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What was written, and what the user should know about it."""

    path: Path
    """The file; of a split one, the first part."""
    outtype: str
    tensors: int
    parameters: int
    nbytes: int
    """Size of the file, or of all parts."""
    flushed: int = 0
    """Values other than zero that the type stores as zero."""
    clamped: int = 0
    """Values beyond the type's range, stored as its largest (only with `clamp`)."""
    fallbacks: tuple[Fallback, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    """Bytes in tensors of each type, the largest first."""
    parts: tuple[Path, ...] = ()
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A conversion, planned: every name, shape and type is settled, and nothing is written yet."""

    source: StoredModel
    level: str
    path: Path
    items: tuple[Item, ...]
    values: KeyValues
    fallbacks: tuple[Fallback, ...] = ()
    importance: Importance = field(default_factory=dict)
    split_max_size: int | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def parts(self) -> list[list[Item]]:
        """The tensors of each file: as many as fit into `split_max_size`, one at least."""
        parts: list[list[Item]] = [[]]
        size = 0
        for item in self.items:
            if parts[-1] and self.split_max_size and size + item.nbytes > self.split_max_size:
                parts.append([])
                size = 0
            parts[-1].append(item)
            size += padded(item.nbytes)
        return parts

    @cached_property
    def paths(self) -> list[Path]:
        """The files, the one to load first."""
        if self.split_max_size is None:
            return [self.path]
        count, prefix = len(self.parts), split_prefix(self.path)
        return [part_path(prefix, number, count) for number in range(count)]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(map(len, self.headers())) + sum(padded(item.nbytes) for item in self.items)

    @property
    def parameters(self) -> int:
        return sum(item.size for item in self.items)

    def types(self) -> dict[str, int]:
        """Bytes in tensors of each type, the largest first."""
        sizes: Counter[str] = Counter()
        for item in self.items:
            sizes[item.encoding.name] += item.nbytes
        return dict(sizes.most_common())

    def headers(self, hashes: Sequence[str] = ()) -> list[bytes]:
        """What comes before the tensors in each file; its size does not depend on the hashes."""
        hashes = hashes or ["0" * 64] * len(self.items)
        record = [
            f"{item.name} {item.encoding.name} {digest}"
            for item, digest in zip(self.items, hashes, strict=True)
        ]
        values = {**self.values, HASHES: record}
        heads = []
        for number, part in enumerate(self.parts):
            infos = [item.info for item in part]
            split: KeyValues = {}
            if self.split_max_size is not None:
                split = _split_values(number, len(self.parts), len(self.items))
            heads.append(header({**(values if number == 0 else {}), **split}, infos))
        return heads

    def run(
        self,
        *,
        force: bool = False,
        clamp: bool = False,
        allow_zeros: bool = False,
        n_threads: int | None = None,
        progress: Progress | None = None,
    ) -> ConvertResult:
        """Write the files. Raises OutputError, CheckpointError and what `stream` raises."""
        began = time.perf_counter()
        with OutputFiles(
            self.paths, force=force, inputs=[s.path for s in self.source.shards]
        ) as files:
            heads = self.headers()
            files.reserve(self.nbytes)
            sink = _Writer(files, {p[0].name: (n, heads[n]) for n, p in enumerate(self.parts)})
            options: dict[str, Any] = {
                "importance": self.importance,
                "clamp": clamp,
                "allow_zeros": allow_zeros,
                "n_threads": n_threads,
            }
            done = stream(self.items, sink, progress=progress, **options)
            for number, head in enumerate(self.headers(done.sha256)):
                files.rewrite(number, head)
            self.source.check_unchanged(self.items, done, **options)
            self.source.check_consumed(done.consumed)
        return ConvertResult(
            path=self.paths[0],
            outtype=self.level.upper(),
            tensors=len(self.items),
            parameters=self.parameters,
            nbytes=self.nbytes,
            flushed=done.loss.flushed,
            clamped=done.loss.overflow,
            fallbacks=self.fallbacks,
            types=self.types(),
            parts=tuple(self.paths),
            seconds=time.perf_counter() - began,
            warnings=(*self.warnings, *_lost(done)),
        )


class _Writer:
    """Puts items into files; `starts` has the number and head of the file each first item opens."""

    def __init__(self, files: OutputFiles, starts: Mapping[str, tuple[int, bytes]]) -> None:
        self._files, self._starts = files, starts
        self.write = files.write

    def begin(self, item: Item) -> None:
        if item.name in self._starts:
            number, head = self._starts[item.name]
            self._files.start(number)
            self._files.write(head)

    def end(self, item: Item) -> None:
        self._files.write(bytes(padded(item.nbytes) - item.nbytes))


def wanted(outtype: str, mix: str | os.PathLike[str] | Recipe | None) -> Recipe | None:
    """What is asked for; None for the model's own type.

    Raises ConfigError: an unknown level, a level beside a recipe, and what `recipe.load` raises.
    """
    if mix is not None:
        if outtype != "auto":
            raise ConfigError(f"a recipe has its own level; leave {outtype!r} out")
        return mix if isinstance(mix, Recipe) else recipe.load(mix)
    if outtype == "auto":
        return None
    level = levels.canonical(outtype)
    return Recipe(level, level)


def plan(
    source: StoredModel,
    out: str | os.PathLike[str] | None,
    mix: Recipe | None,
    *,
    weights: str | os.PathLike[str] | Imatrix | None,
    split_max_size: int | None,
    ask_llama_cpp: bool,
) -> Conversion:
    """`source` to the file `out`, at `mix` or in its own type, rounded by `weights`.

    Float levels need no llama.cpp: all is of that type, unless `ask_llama_cpp`. Raises ConfigError,
    GGUFError for tensors that are quantized already, OutputError and RuntimeUnavailableError.
    """
    if mix is None:
        mix = Recipe(source.own_type, source.own_type)
    level = mix.level
    levels.check_weighted(level, weights is not None)
    if weights is not None and not isinstance(weights, Imatrix):
        weights = imatrix.load(Path(weights))
    values = {**source.values, "general.file_type": levels.file_type(level)}
    # llama.cpp's levels stay its own, byte for byte.
    by_feedback = bool(mix.types and weights and weights.products)
    if mix.types:
        values[RECIPE] = mix.name
    if by_feedback:
        values[ROUNDING] = FEEDBACK
    if weights is not None:
        values |= weights.key_values()
    tensors = source.tensors
    if ask_llama_cpp or level not in levels.FLOATS:
        options: dict[str, Any] = {"weighted": weights is not None, "overrides": mix.types}
        types = choose_types(values, [i.info for i in tensors], level, **options)
        if mix.pad_rows:
            lacking = {fallback.tensor for fallback in types.fallbacks}
            tensors = tuple(with_padded_rows(i) if i.name in lacking else i for i in tensors)
            types = choose_types(values, [i.info for i in tensors], level, **options)
    else:
        types = Types({i.name: level.upper() for i in tensors})
    items = tuple(
        replace(i, encoding=encoding("F32" if i.name in source.f32 else types.chosen[i.name]))
        for i in tensors
    )
    mix.check_matches(i.name for i in items if i.encoding.name not in encode.FLOATS)
    _check_requantized(items)
    name = mix.name if mix.types else level.upper()
    return Conversion(
        source=source,
        level=level,
        path=Path(out) if out is not None else Path(f"{file_stem(source.name)}-{name}.gguf"),
        items=items,
        values=values,
        fallbacks=types.fallbacks,
        importance=weights.weighing_for(source.tensors, by_feedback=by_feedback) if weights else {},
        split_max_size=split_max_size,
        warnings=(*source.warnings, *_fallback_remark(types.fallbacks)),
    )


def _check_requantized(items: Sequence[Item]) -> None:
    for item in items:
        for tensor in item.sources:
            if tensor.dtype not in RAW_DTYPE and tensor.dtype != item.encoding.name:
                raise GGUFError(
                    f"{tensor.shard.path}: tensor {tensor.name} is {tensor.dtype} already; to "
                    f"quantize it once more to {item.encoding.name} would add to its error. Start "
                    "from an f32, bf16 or f16 file, or from the checkpoint"
                )


def _fallback_remark(fallbacks: Sequence[Fallback]) -> Iterator[str]:
    if fallbacks:
        kinds = sorted({f"{f.wanted} -> {f.got}" for f in fallbacks})
        yield (
            f"{len(fallbacks)} tensors have rows that do not fill the blocks of their type "
            f"({', '.join(kinds)}): {few([f.tensor for f in fallbacks])}"
        )


def _lost(done: Outcome) -> Iterator[str]:
    if done.loss.flushed:
        yield f"{done.loss.flushed} weights are too small for F16 and became zero"
    if done.loss.overflow:
        yield f"{done.loss.overflow} weights were beyond the range of the type and were limited"
    if done.zeros:
        yield (
            f"{len(done.zeros)} tensors have long runs of zeros, as parts of a file do that were "
            f"never written: {few(done.zeros)}"
        )


def _split_values(number: int, count: int, tensors: int) -> KeyValues:
    """In the types that llama.cpp reads them in: two uint16 and an int32."""
    packed = (("<IH", 2, number), ("<IH", 2, count), ("<Ii", 5, tensors))
    return {key: RawValue(struct.pack(*value)) for key, value in zip(SPLIT, packed, strict=True)}
