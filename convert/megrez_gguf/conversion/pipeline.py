"""Checkpoint or GGUF -> GGUF at any level: plan everything, stream the weights once, commit.

Nothing is written before every header, name, shape and type has been checked; nothing appears
under the output's name before the last byte is on disk.
"""

from __future__ import annotations

import os
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megrez_gguf.checkpoint import hub
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer import read_vocabulary
from megrez_gguf.conversion import layout, metadata
from megrez_gguf.conversion.layout import Plan
from megrez_gguf.conversion.stream import Importance, Item, Outcome, stream
from megrez_gguf.errors import CheckpointError, ConfigError, GGUFError
from megrez_gguf.format.reader import SPLIT, GGUFFile, RawValue, part_path, split_prefix
from megrez_gguf.format.writer import KeyValues, TensorInfo, header, padded
from megrez_gguf.quantization import encode, imatrix, levels, recipe
from megrez_gguf.quantization.encode import encoding, type_number
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.recipe import Recipe
from megrez_gguf.quantization.types import choose_types
from megrez_gguf.storage.output import OutputFiles
from megrez_gguf.storage.tensor import RAW_DTYPE, Tensor
from megrez_gguf.text import Progress, Say, few, silent

# "NAME TYPE SHA256" of every tensor. The type tells a record that another program's quantizer has
# copied from the file it read.
HASHES = f"{metadata.OURS}.sha256"
RECIPE = f"{metadata.OURS}.recipe"


@dataclass(frozen=True, slots=True)
class Fallback:
    """A tensor whose rows do not fill the blocks of the type its level asks for."""

    tensor: str
    wanted: str
    got: str
    nbytes: int
    extra_bytes: int
    """Bytes more than the type wanted would take, were its blocks divisible."""


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


@dataclass(frozen=True, slots=True)
class Source:
    """A model as it is stored: what a conversion starts from."""

    name: str
    tensors: tuple[Item, ...]  # as they are, in the types of their sources
    f32: frozenset[str]
    values: KeyValues
    inputs: tuple[Path, ...]
    check: Callable[[Sequence[str] | None], None]
    """Raises if the files changed while they were read; or, given the names of all tensors that
    were, if those are not each of them once."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """A conversion, planned: every name, shape and type is settled, and nothing is written yet."""

    source: Source
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
        return sum(t.size for item in self.items for t in item.sources)

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
            infos = [TensorInfo(i.name, i.shape, i.encoding.number, i.nbytes) for i in part]
            split: KeyValues = {}
            if self.split_max_size is not None:
                split = _split_values(number, len(self.parts), len(self.items))
            heads.append(header({**(values if number == 0 else {}), **split}, infos))
        return heads

    def run(
        self,
        force: bool = False,
        clamp: bool = False,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> ConvertResult:
        """Write the files. Raises OutputError, CheckpointError and what `stream` raises."""
        began = time.perf_counter()
        with OutputFiles(self.paths, force, self.source.inputs) as files:
            heads = self.headers()
            files.reserve(self.nbytes)
            sink = _Writer(files, {p[0].name: (n, heads[n]) for n, p in enumerate(self.parts)})
            done = stream(self.items, sink, self.importance, clamp, threads, progress)
            for number, head in enumerate(self.headers(done.sha256)):
                files.rewrite(number, head)
            self.source.check(done.consumed)
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


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    force: bool = False,
    clamp: bool = False,
    progress: Progress | None = None,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    threads: int | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> ConvertResult:
    """Convert the checkpoint folder `checkpoint` to the GGUF file `out`, in one pass.

    A text that names no folder may name a repository, which is fetched first: see `hub.resolve`,
    to which `revision` and `say` go. `out` defaults to NAME-TYPE.gguf in the current folder.
    `outtype` is a level, e.g. "q4_k_m", or "auto", the checkpoint's own type; a `recipe`, from a
    TOML file, has its own level. Norms, routers and biases are always F32. Levels that quantize
    need the patched llama-cpp-python, and give what its llama-quantize gives; `imatrix` is the file
    of an importance matrix. `force`
    replaces an existing file. Weights beyond a float type's range are refused, or limited to it
    with `clamp`. With `split_max_size` (bytes) the output is split between tensors into
    OUT-00001-of-0000N.gguf.

    Raises MegrezError: ConfigError, CheckpointError, TokenizerError, OutputError, or
    RuntimeUnavailableError, each naming the file and tensor. Whatever happens, nothing incomplete
    is left behind.
    """
    plan = plan_convert(checkpoint, out, outtype, imatrix, recipe, split_max_size, revision, say)
    return plan.run(force, clamp, threads, progress)


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    level: str,
    force: bool = False,
    progress: Progress | None = None,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    threads: int | None = None,
) -> ConvertResult:
    """Write the unquantized GGUF file `source` at `level` as `out`; the rest is as in `convert`."""
    plan = plan_quantize(source, out, level, imatrix, recipe, split_max_size)
    return plan.run(force, threads=threads, progress=progress)


def plan_convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> Conversion:
    """All of `convert` but reading and writing the weights. Raises as it does."""
    mix = _recipe(outtype, recipe)
    source = read_checkpoint(hub.resolve(checkpoint, revision, say))
    if mix is None:
        mix = _own_level(source)
    needs_llama_cpp = mix.level not in levels.FLOATS
    return _plan(source, out, mix, imatrix, split_max_size, needs_llama_cpp)


def plan_quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    level: str,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
) -> Conversion:
    """All of `quantize` but reading and writing the weights. Raises as it does."""
    mix = _recipe(level, recipe)
    model = _gguf(Path(source))
    return _plan(model, out, mix or _own_level(model), imatrix, split_max_size, True)


# --- sources -----------------------------------------------------------------------------------


def read_checkpoint(place: hub.Source) -> Source:
    """The model in a checkpoint folder. Raises as `convert` does."""
    folder = place.path
    config = ModelConfig.from_folder(folder)
    source = Checkpoint.open(folder)
    plan = layout.plan(config, source)
    vocabulary = read_vocabulary(folder, config.vocab_size)
    if plan.tied_copy:
        _check_equal(*plan.tied_copy)
    parameters = sum(t.size for t in plan.targets)
    generation = read_object(folder / "generation_config.json", ConfigError) or {}
    general = metadata.general(
        place, config, read_object(folder / "config.json", ConfigError) or {}, parameters
    )
    values = {
        **general,
        **metadata.architecture(config),
        **metadata.sampling(generation),
        **vocabulary.key_values(),
    }

    def check(consumed: Sequence[str] | None) -> None:
        source.check_unchanged()
        if consumed is not None:
            layout.check_ledger(source, plan, consumed)

    return Source(
        str(general["general.name"]),
        tuple(
            Item(t.name, t.shape, t.sources, encoding(_commonest(t.sources))) for t in plan.targets
        ),
        frozenset(t.name for t in plan.targets if t.f32),
        values,
        tuple(shard.path for shard in source.shards),
        check,
        (*source.notes, *vocabulary.warnings, *_remarks(config, plan, vocabulary.padding)),
    )


def _gguf(path: Path) -> Source:
    file = GGUFFile.open_model(path)
    dropped = {*SPLIT, HASHES, "general.alignment"}
    items = tuple(Item(t.name, t.shape, (t,), encoding(t.dtype)) for t in file.tensors)

    def check(consumed: Sequence[str] | None) -> None:
        for shard in file.shards:
            shard.check_unchanged()

    return Source(
        str(file.values.get("general.name") or path.stem),
        items,
        frozenset(),
        {key: value for key, value in file.raw.items() if key not in dropped},
        tuple(shard.path for shard in file.shards),
        check,
    )


def _commonest(tensors: Sequence[Tensor]) -> str:
    return Counter(t.dtype for t in tensors).most_common(1)[0][0]


def _own_level(source: Source) -> Recipe:
    """The type most of the matrices' elements are stored in."""
    count: Counter[str] = Counter()
    for item in source.tensors:
        if item.name not in source.f32:
            for tensor in item.sources:
                count[tensor.dtype] += tensor.size
    level = count.most_common(1)[0][0].lower()
    return Recipe(level, level)


def _remarks(config: ModelConfig, plan: Plan, padding: int) -> Iterator[str]:
    if config.unknown_fields:
        yield f"config.json has fields nobody here knows: {', '.join(config.unknown_fields)}"
    if padding:
        yield f"the vocabulary was padded by {padding} unused tokens to vocab_size"
    for reason, count in Counter(plan.skipped.values()).items():
        yield f"{count} tensors left out: {reason}"


def _check_equal(head: Tensor, embeddings: Tensor) -> None:
    """A tied `lm_head` may be stored as well, if it says the same."""
    same = head.dtype == embeddings.dtype and all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(head.chunks(), embeddings.chunks(), strict=True)
    )
    if not same:
        raise CheckpointError(
            f"{head.shard.path}: tensor {head.name} differs from {embeddings.name}, and "
            "config.json says tie_word_embeddings: one of them is wrong"
        )


# --- planning ----------------------------------------------------------------------------------


def _recipe(outtype: str, mix: str | os.PathLike[str] | Recipe | None) -> Recipe | None:
    """What is asked for; None for the source's own type."""
    if mix is not None:
        if outtype != "auto":
            raise ConfigError(f"a recipe has its own level; leave {outtype!r} out")
        return mix if isinstance(mix, Recipe) else recipe.load(mix)
    if outtype == "auto":
        return None
    level = levels.canonical(outtype)
    return Recipe(level, level)


def _plan(
    source: Source,
    out: str | os.PathLike[str] | None,
    mix: Recipe,
    weights: str | os.PathLike[str] | Imatrix | None,
    split_max_size: int | None,
    ask_llama_cpp: bool,
) -> Conversion:
    level = mix.level
    levels.check_weighted(level, weights is not None)
    if weights is not None and not isinstance(weights, Imatrix):
        weights = imatrix.load(Path(weights))
    values = {**source.values, "general.file_type": levels.file_type(level)}
    if mix.types:
        values[RECIPE] = mix.name
    if weights is not None:
        values |= weights.key_values()
    if ask_llama_cpp:
        infos = [TensorInfo(i.name, i.shape, i.encoding.number, i.nbytes) for i in source.tensors]
        types = choose_types(values, infos, level, weights is not None, mix.types)
        chosen, wanted = types.chosen, types.wanted
    else:
        chosen, wanted = {i.name: level.upper() for i in source.tensors}, {}
    items = tuple(
        replace(i, encoding=encoding("F32" if i.name in source.f32 else chosen[i.name]))
        for i in source.tensors
    )
    quantized = [i for i in items if i.encoding.name not in encode.FLOATS]
    mix.check_matches(i.name for i in quantized)
    _check_requantized(items)
    importance = weights.means_for(items) if weights else {}
    fallbacks = tuple(_fallback(i, wanted[i.name]) for i in items if i.name in wanted)
    name = mix.name if mix.types else level.upper()
    path = Path(out) if out is not None else Path(f"{source.name}-{name}.gguf")
    return Conversion(
        source, level, path, items, values, fallbacks, importance, split_max_size,
        (*source.warnings, *_fallback_remark(fallbacks)),
    )  # fmt: skip


def _check_requantized(items: Sequence[Item]) -> None:
    for item in items:
        for tensor in item.sources:
            if tensor.dtype not in RAW_DTYPE and tensor.dtype != item.encoding.name:
                raise GGUFError(
                    f"{tensor.shard.path}: tensor {tensor.name} is {tensor.dtype} already; to "
                    f"quantize it once more to {item.encoding.name} would add to its error. Start "
                    "from an f32, bf16 or f16 file, or from the checkpoint"
                )


def _fallback(item: Item, wanted: str) -> Fallback:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_number(wanted))]
    size = sum(t.size for t in item.sources)
    extra = item.nbytes - round(size / block * nbytes)
    return Fallback(item.name, wanted, item.encoding.name, item.nbytes, extra)


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


def _split_values(number: int, count: int, tensors: int) -> KeyValues:
    """In the types that llama.cpp reads them in: two uint16 and an int32."""
    packed = (("<IH", 2, number), ("<IH", 2, count), ("<Ii", 5, tensors))
    return {key: RawValue(struct.pack(*value)) for key, value in zip(SPLIT, packed, strict=True)}
