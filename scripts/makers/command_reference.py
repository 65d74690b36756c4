#!/usr/bin/env python3
"""Write the reference of all commands, from the command line itself, into its README.

    scripts/makers/command_reference.py            write bindings/megrez_cli/README.md
    scripts/makers/command_reference.py --check    exit 1 if it is not what would be written

Only what stands between the two markers is replaced. The text comes from the help of commands and
options; to change a sentence, change it there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import typer.main

from megrez_cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "bindings" / "megrez_cli" / "README.md"
SCRIPT = "scripts/makers/command_reference.py"
BLOCK = re.compile(r"(?s)(<!-- commands:begin[^\n]*-->\n).*?(<!-- commands:end -->)")
EXAMPLES = "\b\nExamples:\n"


def reference() -> str:
    """All commands, in the order in which the help lists them, as Markdown."""
    program = typer.main.get_command(app)
    commands: dict[str, Any] = program.commands  # type: ignore[attr-defined]
    lines = ["| command | what it does |", "|---|---|"]
    for name, command in commands.items():
        lines.append(f"| [`{name}`](#{name}) | {_cell(_summary(command))} |")
    for name, command in commands.items():
        lines += ["", *_section(f"{program.name} {name}", name, command)]
    return "\n".join([*lines, ""])


def _section(call: str, name: str, command: Any) -> list[str]:
    """Heading, usage, description, arguments and options, examples."""
    shown = [p for p in command.params if not getattr(p, "hidden", False)]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    options = [p for p in shown if p.param_type_name == "option"]
    needed = [f"{p.opts[0]} {_placeholder(p)}" for p in options if p.required]
    usage = [call, *needed, *map(_usage, arguments), "[OPTIONS]"]
    description, _, examples = command.help.partition(EXAMPLES)
    lines = [f"### {name}", "", "```text", " ".join(usage), "```", "", description.strip(), ""]
    lines += ["| argument or option | meaning |", "|---|---|"]
    for parameter in (*arguments, *options):
        lines.append(f"| {_name(parameter)} | {_cell(_meaning(parameter))} |")
    if examples:
        lines += ["", "```bash", *(line.strip() for line in examples.strip().splitlines()), "```"]
    return lines


def _summary(command: Any) -> str:
    return " ".join(command.help.partition("\n\n")[0].split())


def _placeholder(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _usage(argument: Any) -> str:
    name = _placeholder(argument) + ("..." if argument.nargs == -1 else "")
    return name if argument.required else f"[{name}]"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{_placeholder(parameter)}`"
    names = sorted([*parameter.opts, *parameter.secondary_opts], key=len)
    if not parameter.is_flag:
        names[-1] += f" {_placeholder(parameter)}"
    return ", ".join(f"`{name}`" for name in names)


def _meaning(parameter: Any) -> str:
    """The help, then the default: where the help gives none in words, the value itself."""
    text, _, default = parameter.help.partition("[default: ")
    default = default.rstrip("]")
    value = parameter.default
    if value is True:
        value = parameter.opts[0]
    if not default and value is not None and value is not False:
        default = f"`{value}`"
    if parameter.required and parameter.param_type_name == "option":
        text += " Required."
    return f"{text.strip()} Default: {default}." if default else text.strip()


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--page", type=Path, default=PAGE, help=argparse.SUPPRESS)
    args = parser.parse_args()
    before = args.page.read_text("utf-8")
    made = reference()
    after, count = BLOCK.subn(lambda m: m[1] + made + m[2], before)
    if count != 1:
        print(f"error: {args.page} has no markers of the commands", file=sys.stderr)
        return 2
    if not args.check:
        args.page.write_text(after, "utf-8")
    elif after != before:
        print(f"{args.page} does not show the commands as they are: run {SCRIPT}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
