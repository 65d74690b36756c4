"""The command line: its commands, and what becomes of failures and signals.

Data goes to stdout, talk to stderr, and the exit code is the truth: 0 done, 1 the answer is no,
2 something is wrong with the input or the machine, 130 interrupted.

One module holds one group of commands; a command imports what is heavy when it runs.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
import typer.core

from megrez_cli import console, files, measuring, running
from megrez_gguf.errors import MegrezError


class _Commands(typer.core.TyperGroup):
    """Turns the failures we expect into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MegrezError as e:
            console.say(f"error: {e}{console.hint(e)}")
            sys.exit(e.exit_code)
        except KeyboardInterrupt:
            console.say("interrupted")
            sys.exit(130)


app = typer.Typer(
    name="megrez-gguf",
    cls=_Commands,
    help="Convert, run and verify Megrez2 mixture-of-experts models as GGUF.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            version = metadata.version("megrez-gguf")
        except metadata.PackageNotFoundError:
            version = "(run from its source, not installed)"
        typer.echo(f"megrez-gguf {version}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for command in (
    files.convert,
    files.quantize,
    files.verify,
    measuring.imatrix,
    files.inspect,
    measuring.parity,
    measuring.search,
    running.chat,
    running.bench,
):
    app.command()(command)


def _terminated(number: int, frame: FrameType | None) -> None:
    # As an exception, so that everything on the way out is cleaned up.
    raise SystemExit(128 + number)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command by an exception; afterwards all is as it was."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {}
    try:
        for name in names:
            number = getattr(signal, name)
            # Who started us may want a signal ignored, as nohup does.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _terminated)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code. `argv` defaults to the process's arguments."""
    with _terminable():
        app(argv)
