"""What the commands print: results on stdout, messages and a progress bar on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from megrez_gguf.errors import MegrezError

if TYPE_CHECKING:
    from megrez_gguf.conversion.plan import Conversion, ConvertResult

# What to type where an error names the keyword argument that would help.
_HINTS = {
    "allow_zeros": "; if the model is meant to have zeros there, --allow-zeros",
    "clamp": "; use --outtype bf16 or f32, or --clamp to limit them (`megrez-gguf inspect` counts "
    "them in all tensors)",
    "force": "; use --force to replace it",
    "imatrix": " (--imatrix FILE; `megrez-gguf imatrix` makes one)",
    "n_ctx": " (--ctx)",
    "n_windows": "; give a longer --text FILE, or fewer --windows",
    "texts": " with --text FILE",
}


def tell_result(result: ConvertResult, as_json: bool) -> None:
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(
        f"{result.tensors} tensors, {result.parameters:,} parameters as {result.outtype}, "
        f"{result.nbytes:,} bytes in {result.seconds:.1f} s"
    )
    typer.echo(json.dumps(dataclasses.asdict(result), default=str) if as_json else str(result.path))


def tell_plan(plan: Conversion, as_json: bool) -> None:
    from megrez_gguf.conversion import estimate

    seconds = estimate.seconds(plan.items, plan.importance)
    for warning in plan.warnings:
        say(f"warning: {warning}")
    if as_json:
        report = {
            "parts": list(map(str, plan.paths)),
            "level": plan.level,
            "nbytes": plan.nbytes,
            "parameters": plan.parameters,
            "types": plan.types(),
            "fallbacks": [dataclasses.asdict(fallback) for fallback in plan.fallbacks],
            "tensors": {
                item.name: {"type": item.encoding.name, "nbytes": item.nbytes}
                for item in plan.items
            },
            "seconds": round(seconds, 3),
        }
        typer.echo(json.dumps(report))
        return
    for item in plan.items:
        shape = " x ".join(map(str, item.shape))
        typer.echo(f"{item.name:<32} {item.encoding.name:<8} {shape:<20} {item.nbytes:>14,}")
    for name, nbytes in plan.types().items():
        typer.echo(f"{name:<8} {nbytes:>14,} bytes")
    for fallback in plan.fallbacks:
        typer.echo(
            f"{fallback.tensor}: {fallback.got} instead of {fallback.wanted}, "
            f"{fallback.extra_bytes:+,} bytes"
        )
    typer.echo(f"{plan.paths[0]}: {plan.nbytes:,} bytes in {len(plan.paths)} files")
    typer.echo(f"about {seconds:.0f} s to read and encode on this machine")


@contextmanager
def progress(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr; nothing when stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount: tuple[ProgressColumn, ...] = (DownloadColumn(), TransferSpeedColumn())
    if unit != "bytes":
        amount = (TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),)
    columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def say(text: str) -> None:
    typer.echo(text, err=True)


def hint(error: MegrezError) -> str:
    """What to type against `error`, as the end of its message; "" where it says all itself."""
    if error.option == "n_ctx" and error.value is not None:
        return f": give --ctx {error.value}"
    return _HINTS[error.option] if error.option else ""
