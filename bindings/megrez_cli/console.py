"""What the commands print: results on stdout, messages and a progress bar on stderr.

What is for people holds nothing that could drive a terminal, wherever it goes. JSON is ASCII, and
the name of a file that was made goes to a pipe or a file byte for byte.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megrez_gguf.errors import MegrezError
from megrez_gguf.text import printable

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
    "n_threads": " (--threads)",
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
    tell_made(result.path, result, as_json)


def tell_made(path: Path, result: Any, as_json: bool) -> None:
    """Print the name of the file that was made, or the dataclass `result` as JSON."""
    if as_json:
        tell_json(dataclasses.asdict(result))
    elif sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        tell(str(path))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(path) + b"\n")
        sys.stdout.flush()


def tell_json(value: Any) -> None:
    print(json.dumps(value, default=str).replace("\x7f", r"\u007f"), flush=True)


def tell(line: str) -> None:
    """Print a line of the result, for people."""
    print(printable(line, keep="\t"), flush=True)


def say(line: str, dim: bool = False) -> None:
    """Print a line of talk. Nothing depends on whether it can be printed."""
    text = printable(line, keep="\t")
    if dim and is_styled(sys.stderr):
        text = f"\033[2m{text}\033[0m"
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


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
        tell_json(report)
        return
    for item in plan.items:
        shape = " x ".join(map(str, item.shape))
        tell(f"{item.name:<32} {item.encoding.name:<8} {shape:<20} {item.nbytes:>14,}")
    for name, nbytes in plan.types().items():
        tell(f"{name:<8} {nbytes:>14,} bytes")
    for fallback in plan.fallbacks:
        tell(
            f"{fallback.tensor}: {fallback.got} instead of {fallback.wanted}, "
            f"{fallback.extra_bytes:+,} bytes"
        )
    tell(f"{plan.paths[0]}: {plan.nbytes:,} bytes in {len(plan.paths)} files")
    tell(f"about {seconds:.0f} s to read and encode on this machine")


@contextmanager
def progress(what: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr; nothing where that is no terminal, or one that only prints."""
    if not is_smart(sys.stderr):
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


def is_smart(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that can do more than print one character after another."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def is_styled(stream: IO[str]) -> bool:
    """Whether to write in colours or dim: https://no-color.org, and what else is in use."""
    if os.environ.get("NO_COLOR") or os.environ.get("CLICOLOR") == "0":
        return False
    forced = os.environ.get("FORCE_COLOR") or os.environ.get("CLICOLOR_FORCE", "0") != "0"
    return bool(forced) or is_smart(stream)


def hint(error: MegrezError) -> str:
    """What to type against `error`, as the end of its message; "" where it says all itself."""
    if error.option == "n_ctx" and error.value is not None:
        return f": give --ctx {error.value}"
    return _HINTS[error.option] if error.option else ""
