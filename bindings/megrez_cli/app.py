"""The command line: its commands, and what becomes of failures.

Data goes to stdout, talk to stderr, and the exit code is the truth: 0 done, 1 the answer is no,
2 something is wrong with the input or the machine, 128 + n ended as by signal n.

One module holds one group of commands; a command imports what is heavy when it runs.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import Annotated, Any

import typer
import typer.core

from megrez_cli import console, evaluating, files, measuring, running, serving, signals, streams
from megrez_gguf.errors import MegrezError

# The base of what is wrong with a call; typer gives it no public name.
_UsageError: Any = typer.BadParameter.__mro__[2]


class _Commands(typer.core.TyperGroup):
    """Turns whatever can go wrong into a message and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        sys.exit(self._run(*args, **{**extra, "standalone_mode": False}))

    def _run(self, *args: Any, **extra: Any) -> int:
        try:
            return super().main(*args, **extra) or 0
        except MegrezError as e:
            console.say(f"error: {e}{console.hint(e)}")
            return e.exit_code
        except _UsageError as e:
            _say_usage(e)
        except streams.BrokenStream as e:
            console.say(f"error: {e}")
        except MemoryError:
            console.say("error: out of memory")
        except OSError as e:
            # Of a file nobody expected to fail: the names tell more than a traceback would.
            names = [str(name) for name in (e.filename, e.filename2) if name is not None]
            console.say(f"error: {': '.join([*names, e.strerror or str(e)])}")
        except Exception:
            for line in traceback.format_exc().splitlines():
                console.say(line)
            console.say("error: this is a fault of megrez-gguf; please report it with these lines")
        return 2

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            console.say("interrupted")
            raise typer.Exit(130) from None


class _Command(typer.core.TyperCommand):
    """Says when an option that counts once is given twice."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=[*args])
        for parameter in dict.fromkeys(given):
            once = parameter.param_type_name == "option" and not parameter.multiple
            if once and given.count(parameter) > 1:
                console.say(
                    f"warning: {parameter.opts[0]} is given more than once; the last counts"
                )
        return super().parse_args(ctx, args)


def _say_usage(error: Any) -> None:
    text = io.StringIO()
    error.show(text)
    for line in text.getvalue().splitlines():
        console.say(line)


app = typer.Typer(
    name="megrez-gguf",
    cls=_Commands,
    help="Convert, run and verify Megrez2 mixture-of-experts models as GGUF.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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
        console.tell(f"megrez-gguf {version}")
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
    evaluating.eval_,
    running.chat,
    serving.serve,
    running.bench,
):
    app.command(command.__name__.rstrip("_"), cls=_Command)(command)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit with its code. `argv` defaults to the process's arguments."""
    with streams.standard(), signals.terminable():
        app(argv)
