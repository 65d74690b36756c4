"""Commands that make, check and describe files: convert, quantize, verify, inspect."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from megrez_cli import console, options


def convert(
    checkpoint: options.Checkpoint,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", parser=options.output, help="Output file.  [default: NAME-TYPE.gguf]"
        ),
    ] = None,
    outtype: Annotated[
        str,
        typer.Option(help="Level, e.g. q8_0 or q4_k_m; auto keeps the checkpoint's own type."),
    ] = "auto",
    imatrix: options.Imatrix = None,
    recipe: options.Recipe = None,
    split_max_size: options.Split = None,
    force: options.Force = False,
    clamp: Annotated[
        bool,
        typer.Option(
            "--clamp", help="Clip weights that the type cannot hold, which is refused otherwise."
        ),
    ] = False,
    allow_zeros: options.AllowZeros = False,
    revision: options.Revision = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Convert a checkpoint to GGUF, at any level in one pass.

    Norms, routers and biases are always F32. Quantized levels need the patched llama-cpp-python,
    and give byte for byte what llama-quantize gives. The output appears whole or not at all.

    \b
    Examples:
      megrez-gguf convert Megrez2-3x7B-A3B
      megrez-gguf convert Megrez2-3x7B-A3B -o megrez2.gguf --outtype q4_k_m --imatrix m.imatrix
      megrez-gguf convert Megrez2-3x7B-A3B --outtype q8_0 --split-max-size 2G
      megrez-gguf convert Infinigence/Megrez2-3x7B-A3B --outtype q4_k_m
    """
    from megrez_gguf.conversion import convert as run

    if dry_run:
        plan = run.plan_convert(
            checkpoint,
            out,
            outtype=outtype,
            imatrix=imatrix,
            recipe=recipe,
            split_max_size=split_max_size,
            revision=revision,
            say=console.say,
        )
        console.tell_plan(plan, as_json)
        return
    with console.progress("Converting") as progress:
        result = run.convert(
            checkpoint,
            out,
            outtype=outtype,
            force=force,
            clamp=clamp,
            allow_zeros=allow_zeros,
            progress=progress,
            imatrix=imatrix,
            recipe=recipe,
            split_max_size=split_max_size,
            revision=revision,
            say=console.say,
        )
    console.tell_result(result, as_json)


def quantize(
    source: Annotated[
        Path, typer.Argument(parser=options.path, help="GGUF file in f32, bf16 or f16.")
    ],
    out: Annotated[Path, typer.Argument(parser=options.output, help="Output file.")],
    level: Annotated[
        str, typer.Argument(help="Level, e.g. q4_k_m; leave it out with --recipe.")
    ] = "auto",
    force: options.Force = False,
    allow_zeros: options.AllowZeros = False,
    imatrix: options.Imatrix = None,
    recipe: options.Recipe = None,
    split_max_size: options.Split = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Quantize a GGUF file, tensor for tensor as llama-quantize does.

    \b
    Examples:
      megrez-gguf quantize megrez2-bf16.gguf megrez2-q4.gguf q4_k_m
      megrez-gguf quantize megrez2-bf16.gguf mine.gguf --recipe mine.toml
    """
    from megrez_gguf.conversion import convert as run

    if dry_run:
        plan = run.plan_quantize(
            source,
            out,
            outtype=level,
            imatrix=imatrix,
            recipe=recipe,
            split_max_size=split_max_size,
        )
        console.tell_plan(plan, as_json)
        return
    with console.progress("Quantizing") as progress:
        result = run.quantize(
            source,
            out,
            outtype=level,
            force=force,
            allow_zeros=allow_zeros,
            progress=progress,
            imatrix=imatrix,
            recipe=recipe,
            split_max_size=split_max_size,
        )
    console.tell_result(result, as_json)


def verify(
    path: Annotated[
        Path,
        typer.Argument(parser=options.path, help="GGUF file, or the first part of a split one."),
    ],
    checkpoint: Annotated[
        str | None, typer.Argument(parser=options.name, help=options.CHECKPOINT_HELP)
    ] = None,
    imatrix: options.Imatrix = None,
    revision: options.Revision = None,
    as_json: options.Json = False,
) -> None:
    """Check every tensor of a file against its recorded hash and its checkpoint.

    Without CHECKPOINT it finds damage since the file was written. With it, every tensor is encoded
    again and compared byte for byte, whatever program made the file. Exits 1 if anything differs.

    \b
    Examples:
      megrez-gguf verify megrez2-q4.gguf
      megrez-gguf verify megrez2-q4.gguf Megrez2-3x7B-A3B
      megrez-gguf verify theirs.gguf Infinigence/Megrez2-3x7B-A3B --revision main
    """
    from megrez_gguf.examination.verification import verify as run

    with console.progress("Verifying") as progress:
        result = run(
            path,
            checkpoint,
            imatrix=imatrix,
            progress=progress,
            revision=revision,
            say=console.say,
        )
    for note in result.notes:
        console.say(f"warning: {note}")
    if as_json:
        console.tell_json(dataclasses.asdict(result))
    else:
        for failure in result.failures:
            console.tell(failure)
        console.tell(
            f"{result.tensors} tensors: {result.hashed} held against their recorded hash, "
            f"{result.compared} against the checkpoint; {len(result.failures)} differences"
        )
    if result.failures:
        raise typer.Exit(1)


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            parser=options.name,
            help="A GGUF file or a checkpoint: a folder, owner/name or modelscope:owner/name.",
        ),
    ],
    revision: options.Revision = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
    scan: Annotated[
        bool,
        typer.Option("--scan/--no-scan", help="Read all weights, to count those at risk."),
    ] = True,
) -> None:
    """Show hyper-parameters, expert groups, tensors and weights at risk.

    At risk are weights that F16 would turn into infinity or into zero.

    \b
    Examples:
      megrez-gguf inspect Megrez2-3x7B-A3B
      megrez-gguf inspect megrez2.gguf --json --no-scan
    """
    from megrez_gguf.examination.inspection import inspect as run
    from megrez_gguf.examination.inspection import render

    with console.progress("Reading") as progress:
        report = run(path, scan=scan, progress=progress, revision=revision, say=console.say)
    if as_json:
        console.tell_json(dataclasses.asdict(report))
        return
    for line in render(report).split("\n"):
        console.tell(line)
