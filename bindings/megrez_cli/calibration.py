"""The command that looks at what a model computes: imatrix."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from megrez_cli import console, options


def imatrix(
    out: Annotated[Path, typer.Option("--out", "-o", help="Output file.")],
    model: Annotated[Path | None, typer.Argument(help="GGUF file to run.")] = None,
    text: Annotated[list[Path] | None, typer.Argument(help="UTF-8 texts to run it over.")] = None,
    merge: Annotated[
        list[Path] | None,
        typer.Option(
            "--merge", help="Add this importance matrix; repeatable. Then TEXT may be left out."
        ),
    ] = None,
    chunks: Annotated[
        int | None, typer.Option(min=1, help="Chunks to take of each text.  [default: all]")
    ] = None,
    ctx: Annotated[int, typer.Option(min=1, help="Tokens in a chunk.")] = 512,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Treat special tokens in the texts as special.")
    ] = False,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Include the output matrix.")
    ] = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Collect an importance matrix, in llama-imatrix's format.

    It tells `convert` and `quantize` which weights matter most. A pool of experts gathers from all
    layers that share it. Experts that no token reached are named.

    \b
    Examples:
      megrez-gguf imatrix megrez2-q8_0.gguf calibration.txt -o megrez2.imatrix.gguf
      megrez-gguf imatrix --merge one.imatrix.gguf --merge two.imatrix.gguf -o both.imatrix.gguf
    """
    from megrez_runtime.calibration import calibrate

    with console.progress("Collecting", "chunks") as progress:
        result = calibrate(
            model, text or (), out,
            merge=merge or (), n_chunks=chunks, n_ctx=ctx, parse_special=parse_special,
            process_output=process_output, force=force, progress=progress, say=console.say,
        )  # fmt: skip
    typer.echo(json.dumps(dataclasses.asdict(result), default=str) if as_json else str(result.path))
