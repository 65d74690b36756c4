"""The command line, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from megrez_cli import app

RUN = [sys.executable, "-m", "megrez_cli"]


def cli(*arguments: Any) -> Result:
    """Run it in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def chat_command(*arguments: str | Path) -> list[str]:
    return [*RUN, "chat", *map(str, arguments)]


def chat(*arguments: str | Path, stdin: str | bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The chat command with its three streams piped."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    return subprocess.run(
        chat_command(*arguments), input=data, capture_output=True, check=False, timeout=120
    )
