"""Options that several commands have: spelled, parsed and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megrez_gguf.text import parse_size

# What llama.cpp can hold in a number: a greater one would become another, without a word.
INT, FLOAT = 2**31 - 1, 3.4e38

CHECKPOINT_HELP = "A folder, or owner/name on Hugging Face, or modelscope:owner/name."


def name(text: str) -> str:
    """What is not empty: a variable that a script forgot to set is no current folder."""
    if not text:
        raise typer.BadParameter("the name is empty")
    return text


def path(text: str) -> Path:
    """A path that means what its author sees."""
    home, _, rest = name(text).partition("/")
    if home.startswith("~") and not Path(home).exists():
        raise typer.BadParameter(
            f"{text!r}: the shell left ~ as it is, which it replaces where a word begins; "
            f"write $HOME/{rest}"
        )
    return Path(text)


def output(text: str) -> Path:
    """The path of a file to write."""
    found = path(text)
    if text == "-" or text.startswith(("/dev/", "/proc/self/fd/")):
        raise typer.BadParameter(
            f"{text!r}: expected the name of a file; a GGUF file cannot be streamed, since its "
            "header is written last"
        )
    if text.endswith("/"):
        raise typer.BadParameter(f"{text!r} names a folder; give the name of a file")
    return found


def size(text: str) -> int:
    """A size as people write it, in bytes."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise typer.BadParameter(str(e)) from None


def margins(text: str) -> list[float]:
    """Margins for experts in memory, with commas between them."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= margin <= FLOAT for margin in found):
        raise typer.BadParameter(f"{text!r}: expected numbers of 0 or more, with commas")
    return found


def said(prompt: str | None) -> str | None:
    """A prompt that says something, if there is one."""
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("the prompt is empty")
    return prompt


def _ram(text: str) -> int | str:
    return text if text in ("auto", "off") else size(text)


Checkpoint = Annotated[str, typer.Argument(parser=name, help=CHECKPOINT_HELP)]
Model = Annotated[Path, typer.Argument(parser=path, help="GGUF file.")]
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
    typer.Option(
        "--imatrix", parser=path, help="Importance matrix, from `imatrix` or llama-imatrix."
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        parser=name,
        help="Mix of types in place of a level: megrez-4g, megrez-3.5g, megrez-3g, megrez-2.5g, "
        "megrez-q3, megrez-q4, megrez-q5 or a TOML file.",
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
Revision = Annotated[
    str | None, typer.Option("--revision", parser=name, help="Branch, tag or commit to fetch.")
]
Json = Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads that compute.  [default: all CPUs]")
]
GpuLayers = Annotated[int, typer.Option(min=-1, max=INT, help="Layers on the GPU; -1 is all.")]
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
ExpertMargin = Annotated[
    float,
    typer.Option(
        "--expert-margin",
        min=0.0,
        max=FLOAT,
        help="Where experts stay in the file: prefer one in memory to one whose router score is "
        "higher by less than this. Faster, and another text; 0 is exact.",
    ),
]
