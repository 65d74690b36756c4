"""Options that several commands have: spelled, parsed and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megrez_gguf.text import parse_size

CHECKPOINT_HELP = "A folder, or owner/name on Hugging Face, or modelscope:owner/name."


def size(text: str) -> int:
    """A size as people write it, in bytes."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def said(prompt: str | None) -> str | None:
    """A prompt that says something, if there is one."""
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty")
    return prompt


def _ram(text: str) -> int | str:
    return text if text in ("auto", "off") else size(text)


Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
Model = Annotated[Path, typer.Argument(help="GGUF file.")]
AllowZeros = Annotated[
    bool,
    typer.Option(
        "--allow-zeros",
        help="Accept long runs of zeros, which a part of a file has that was never written.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", help="Importance matrix, from `imatrix` or llama-imatrix."),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="Mix of types in place of a level: megrez-q3, megrez-q4, megrez-q5 or a TOML file.",
    ),
]
Split = Annotated[
    int | None,
    typer.Option(
        "--split-max-size",
        parser=size,
        metavar="SIZE",
        help="Split into files of this size at most, e.g. 2G.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Show types, sizes, fallbacks and time; write nothing."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit to fetch.")]
Json = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that compute.  [default: all CPUs]")
]
Ram = Annotated[
    Any,
    typer.Option(
        "--ram",
        parser=_ram,
        metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB; experts that do not fit stay in the file. "
        "auto takes what is free, off keeps everything in memory.",
    ),
]
ExpertCache = Annotated[
    int | None,
    typer.Option(
        "--expert-cache",
        parser=size,
        metavar="SIZE",
        help="Memory for the experts alone, e.g. 1GiB, in place of --ram.",
    ),
]
