"""Checkpoint or GGUF -> GGUF at any level: plan everything, stream the weights once, commit.

Nothing is written before every header, name, shape and type has been checked; nothing appears
under the output's name before the last byte is on disk.
"""

from __future__ import annotations

import os
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion.plan import Conversion, ConvertResult, plan, wanted
from megrez_gguf.conversion.source import from_checkpoint, from_gguf
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.recipe import Recipe
from megrez_gguf.text import Progress, Say, silent


def convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    outtype: str = "auto",
    force: bool = False,
    clamp: bool = False,
    allow_zeros: bool = False,
    progress: Progress | None = None,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    n_threads: int | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> ConvertResult:
    """Convert the checkpoint folder `checkpoint` to the GGUF file `out`, in one pass.

    A text that names no folder may name a repository, which is fetched first: see `hub.resolve`,
    to which `revision` and `say` go. `out` defaults to NAME-TYPE.gguf in the current folder.
    `outtype` is a level, e.g. "q4_k_m", or "auto", the checkpoint's own type; a `recipe`, from a
    TOML file, has its own level. Norms, routers and biases are always F32. Levels that quantize
    need the patched llama-cpp-python, and give what its llama-quantize gives; `imatrix` is the file
    of an importance matrix. `force` replaces an existing file. Weights beyond a float type's range
    are refused, or limited to it with `clamp`. Long runs of zeros, which parts of a file have that
    were never written, are refused unless `allow_zeros` says that they are meant. With
    `split_max_size` (bytes) the output is split between tensors into OUT-00001-of-0000N.gguf.

    Raises MegrezError: ConfigError, CheckpointError, TokenizerError, OutputError, or
    RuntimeUnavailableError, each naming the file and tensor. Whatever happens, nothing incomplete
    is left behind.
    """
    conversion = plan_convert(
        checkpoint,
        out,
        outtype=outtype,
        imatrix=imatrix,
        recipe=recipe,
        split_max_size=split_max_size,
        revision=revision,
        say=say,
    )
    return conversion.run(
        force=force,
        clamp=clamp,
        allow_zeros=allow_zeros,
        n_threads=n_threads,
        progress=progress,
    )


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    outtype: str = "auto",
    force: bool = False,
    allow_zeros: bool = False,
    progress: Progress | None = None,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    n_threads: int | None = None,
) -> ConvertResult:
    """Write the unquantized GGUF file `source` as `out`, with the options of `convert`.

    Raises GGUFError for a file that is damaged, no Megrez2 model, or quantized already, and
    MegrezError as `convert` does.
    """
    conversion = plan_quantize(
        source,
        out,
        outtype=outtype,
        imatrix=imatrix,
        recipe=recipe,
        split_max_size=split_max_size,
    )
    return conversion.run(
        force=force, allow_zeros=allow_zeros, n_threads=n_threads, progress=progress
    )


def plan_convert(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    outtype: str = "auto",
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
    revision: str | None = None,
    say: Say = silent,
) -> Conversion:
    """All of `convert` but reading and writing the weights. Raises as it does."""
    mix = wanted(outtype, recipe)
    found = Checkpoint.find(checkpoint, revision=revision, say=say)
    model = from_checkpoint(found, say)
    return plan(
        model,
        out,
        mix,
        weights=imatrix,
        split_max_size=split_max_size,
        ask_llama_cpp=False,
    )


def plan_quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None,
    *,
    outtype: str = "auto",
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    recipe: str | os.PathLike[str] | Recipe | None = None,
    split_max_size: int | None = None,
) -> Conversion:
    """All of `quantize` but reading and writing the weights. Raises as it does."""
    mix = wanted(outtype, recipe)
    model = from_gguf(Path(source))
    return plan(
        model,
        out,
        mix,
        weights=imatrix,
        split_max_size=split_max_size,
        ask_llama_cpp=True,
    )
