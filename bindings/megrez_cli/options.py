"""Options that several commands have: spelled, parsed and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megrez_gguf.text import parse_size

CHECKPOINT_HELP = "Folder, or owner/name on Hugging Face, or modelscope:owner/name."


def size(text: str) -> int:
    """A size as people write it, in bytes."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def _ram(text: str) -> int | str:
    return text if text in ("auto", "off") else size(text)


Checkpoint = Annotated[str, typer.Argument(help=CHECKPOINT_HELP)]
Model = Annotated[Path, typer.Argument(help="GGUF file.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Imatrix = Annotated[
    Path | None, typer.Option("--imatrix", help="Importance matrix, as llama-imatrix writes it.")
]
Recipe = Annotated[
    str | None,
    typer.Option("--recipe", help="megrez-q4, or TOML with a level and the types that differ."),
]
Split = Annotated[
    int | None,
    typer.Option("--split-max-size", parser=size, metavar="SIZE", help="Split, e.g. by 2G."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Tell sizes, types, fallbacks and about how long; no output."),
]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of the repository.")
]
Json = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]
Threads = Annotated[int | None, typer.Option(min=1, help="[default: all CPUs]")]
Ram = Annotated[
    Any,
    typer.Option(
        "--ram",
        parser=_ram,
        metavar="SIZE",
        help="Memory for the whole process, e.g. 2GiB: experts beyond it stay in the file. "
        "auto: what is free; off: everything in memory.",
    ),
]
ExpertCache = Annotated[
    int | None,
    typer.Option(
        "--expert-cache", parser=size, metavar="SIZE", help="Memory for experts, e.g. 1GiB."
    ),
]
