"""Checkpoint -> GGUF: plan everything, stream the weights once, commit atomically.

Nothing is written before every header, name, shape and type has been checked; nothing appears
under the output's name before the last byte is on disk.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from megrez_gguf import encode, layout, metadata
from megrez_gguf.checkpoint import Checkpoint, Tensor
from megrez_gguf.config import ModelConfig
from megrez_gguf.encode import ENCODINGS, Encoding, Loss
from megrez_gguf.errors import CheckpointError, ConfigError, OutputError
from megrez_gguf.json_file import read_object
from megrez_gguf.layout import Plan, Target
from megrez_gguf.tokenizer import read_vocabulary

OutType = Literal["auto", "f32", "bf16", "f16", "q8_0"]
OUT_TYPES: tuple[OutType, ...] = ("auto", "f32", "bf16", "f16", "q8_0")

ALIGNMENT = 32

Progress = Callable[[int, int], None]
"""Called with bytes written so far and in all."""


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """What `convert` wrote, and what the user should know about it."""

    path: Path
    outtype: str
    tensors: int
    parameters: int
    nbytes: int
    flushed: int = 0
    """Values other than zero that the type stores as zero."""
    clamped: int = 0
    """Values beyond the type's range, stored as its largest (only with `clamp`)."""
    fallbacks: tuple[str, ...] = ()
    """Tensors whose rows the type cannot hold, stored as F16."""
    warnings: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class _Written:
    """One tensor of the output, its type decided."""

    target: Target
    encoding: Encoding

    @property
    def nbytes(self) -> int:
        return self.encoding.nbytes(self.target.size)


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    outtype: OutType = "auto",
    force: bool = False,
    clamp: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Convert the checkpoint folder `checkpoint` to the GGUF file `out`.

    `out` defaults to NAME-TYPE.gguf in the current folder. `outtype` is the type of the matrices:
    "auto" takes the checkpoint's own; norms, routers and biases are always F32. `force` replaces an
    existing file. Weights beyond the type's range are refused, or limited to it with `clamp`.

    Raises MegrezError: ConfigError, CheckpointError, TokenizerError or OutputError, each naming
    the file and tensor. Whatever happens, nothing incomplete is left behind.
    """
    folder = Path(checkpoint)
    if outtype not in OUT_TYPES:
        raise ConfigError(f"outtype {outtype!r}: expected one of {', '.join(OUT_TYPES)}")
    config = ModelConfig.from_folder(folder)
    source = Checkpoint.open(folder)
    plan = layout.plan(config, source)
    main = ENCODINGS[_own_type(plan) if outtype == "auto" else outtype.upper()]
    vocabulary = read_vocabulary(folder, config.vocab_size)
    written = [_Written(t, _encoding(t, main)) for t in plan.targets]

    parameters = sum(w.target.size for w in written)
    raw_config = read_object(folder / "config.json", ConfigError) or {}
    generation = read_object(folder / "generation_config.json", ConfigError) or {}
    values = {
        **metadata.general(folder, config, raw_config, parameters, main.file_type),
        **metadata.architecture(config),
        **metadata.sampling(generation),
        **vocabulary.key_values(),
    }
    path = Path(out) if out is not None else Path(f"{values['general.name']}-{main.name}.gguf")
    _check_output(path, force, source)
    if plan.tied_copy:
        _check_equal(*plan.tied_copy)

    writer = _Writer(source, plan, written, clamp, progress)
    with _atomic(path, force) as temporary:
        header = _write_header(temporary, values, written)
        _check_space(path, header, writer.total)
        with temporary.open("ab") as file:
            writer.run(file)
        source.check_unchanged()
        layout.check_ledger(source, plan, writer.consumed)
        nbytes = temporary.stat().st_size

    fallbacks = tuple(w.target.name for w in written if not w.target.f32 and w.encoding != main)
    warnings = [*source.notes, *vocabulary.warnings]
    warnings += _remarks(config, plan, vocabulary.padding, main, writer, fallbacks)
    return ConvertResult(
        path, main.name, len(written), parameters, nbytes, writer.loss.flushed,
        writer.loss.overflow, fallbacks, tuple(warnings),
    )  # fmt: skip


# --- planning ----------------------------------------------------------------------------------


def _own_type(plan: Plan) -> str:
    """The type most of the matrices' elements are stored in."""
    count: Counter[str] = Counter()
    for target in plan.targets:
        if not target.f32:
            for tensor in target.sources:
                count[tensor.dtype] += tensor.size
    return count.most_common(1)[0][0]


def _encoding(target: Target, main: Encoding) -> Encoding:
    if target.f32:
        return ENCODINGS["F32"]
    if target.shape[-1] % main.block:
        return ENCODINGS["F16"]
    return main


def _remarks(
    config: ModelConfig,
    plan: Plan,
    padding: int,
    main: Encoding,
    writer: _Writer,
    fallbacks: tuple[str, ...],
) -> Iterator[str]:
    if config.unknown_fields:
        yield f"config.json has fields nobody here knows: {', '.join(config.unknown_fields)}"
    if padding:
        yield f"the vocabulary was padded by {padding} unused tokens to vocab_size"
    for reason, count in Counter(plan.skipped.values()).items():
        yield f"{count} tensors left out: {reason}"
    if fallbacks:
        yield (
            f"{len(fallbacks)} tensors have rows that are no multiple of {main.block} and are "
            f"stored as F16: {', '.join(fallbacks[:3])}{', ...' if len(fallbacks) > 3 else ''}"
        )
    if writer.loss.flushed:
        yield f"{writer.loss.flushed} weights are too small for F16 and became zero"
    if writer.loss.overflow:
        yield f"{writer.loss.overflow} weights were beyond the range of the type and were limited"


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


# --- writing -----------------------------------------------------------------------------------


def _write_header(path: Path, values: metadata.KeyValues, written: list[_Written]) -> int:
    """Write magic, key-values and tensor table, padded to the first tensor; return the size."""
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    kinds = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32}
    kinds |= {float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    writer = GGUFWriter(path, metadata.ARCH)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    for item in written:
        writer.add_tensor_info(
            item.target.name,
            item.target.shape,
            np.dtype(np.float32),
            item.nbytes,
            GGMLQuantizationType(item.encoding.number),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        return file.tell()


class _Writer:
    """Streams every tensor once, chunk by chunk."""

    def __init__(
        self,
        source: Checkpoint,
        plan: Plan,
        written: list[_Written],
        clamp: bool,
        progress: Progress | None,
    ) -> None:
        self.written, self.clamp, self.progress = written, clamp, progress
        self.total = sum(-(-w.nbytes // ALIGNMENT) * ALIGNMENT for w in written)
        self.done = 0
        self.loss = Loss()
        self.consumed: list[str] = []

    def run(self, file: BinaryIO) -> None:
        for item in self.written:
            loss = Loss()
            for tensor in item.target.sources:
                self._stream(file, tensor, item.encoding, loss)
                self.consumed.append(tensor.name)
            self._put(file, bytes(-item.nbytes % ALIGNMENT))
            if loss.overflow and not self.clamp:
                name = item.encoding.name
                raise CheckpointError(
                    f"tensor {item.target.name}: {loss.overflow} weights are beyond the range of "
                    f"{name} and would become infinite; use --outtype bf16 or f32, or --clamp to "
                    f"limit them (`megrez-gguf inspect` counts them in all tensors)"
                )
            self.loss += loss

    def _stream(self, file: BinaryIO, tensor: Tensor, encoding: Encoding, loss: Loss) -> None:
        position = 0
        for raw in tensor.chunks(multiple=encoding.block):
            bad = encode.first_non_finite(raw)
            if bad is not None:
                index = tuple(int(i) for i in np.unravel_index(position + bad, tensor.shape))
                raise CheckpointError(
                    f"{tensor.shard.path}: tensor {tensor.name}: "
                    f"{float(encode.to_f32(raw)[bad])} at {list(index)}; weights must be finite"
                )
            position += raw.size
            if tensor.dtype == encoding.name:
                self._put(file, raw)
                continue
            values = encode.to_f32(raw)
            if tensor.dtype != "F16":
                lost = encode.count_loss(values, encoding)
                if lost.overflow:
                    values = np.clip(values, -encoding.limit, encoding.limit)
                loss += lost
            self._put(file, encoding.encode(values))

    def _put(self, file: BinaryIO, data: Any) -> None:
        file.write(data)
        self.done += memoryview(data).nbytes
        if self.progress:
            self.progress(self.done, self.total)


def _check_output(path: Path, force: bool, source: Checkpoint) -> None:
    # os.path, because pathlib raises for names the system cannot have.
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not os.path.lexists(path):
        return
    if not force:
        raise OutputError(f"{path}: exists; use --force to replace it")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is not a regular file")
    if path.exists() and any(path.samefile(shard.path) for shard in source.shards):
        raise OutputError(f"{path}: is part of the checkpoint; choose another output")


def _check_space(path: Path, header: int, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise OutputError(
            f"{path}: needs {header + needed} bytes and the disk has {free + header} left"
        )


@contextmanager
def _atomic(path: Path, force: bool) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name at the end, or vanishes."""
    try:
        handle, name = tempfile.mkstemp(prefix=".megrez-gguf-", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror}") from None
    temporary = Path(name)
    try:
        yield temporary
        _commit(temporary, path, force)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(f"{path}: the disk is full; nothing was left behind") from None
        raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _commit(temporary: Path, path: Path, force: bool) -> None:
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    # mkstemp makes files for the owner only; the output gets the permissions of any new file.
    umask = os.umask(0)
    os.umask(umask)
    temporary.chmod(0o666 & ~umask)
    if force:
        temporary.replace(path)
    else:
        try:
            # Unlike a rename, a link never replaces a file that appeared in the meantime.
            os.link(temporary, path)
        except FileExistsError:
            raise OutputError(f"{path}: exists; use --force to replace it") from None
        except OSError:
            if path.exists():
                raise OutputError(f"{path}: exists; use --force to replace it") from None
            temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            os.fsync(folder)
        os.close(folder)
