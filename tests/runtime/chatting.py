"""Ways to edit a checkpoint, and to run the chat command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def edit_json(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(content | fields), "utf-8")


def chat_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "megrez_cli", "chat", *map(str, arguments)]


def chat(*arguments: str | Path, stdin: str | bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The chat command with its three streams piped."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    return subprocess.run(
        chat_command(*arguments), input=data, capture_output=True, check=False, timeout=120
    )
