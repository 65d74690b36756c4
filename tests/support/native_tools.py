"""llama.cpp's own programs, which judge what is done here in another way."""

import subprocess
from pathlib import Path

import pytest

from support.paths import REPO


def native(name: str) -> Path:
    """A program of scripts/development/build_native. Fails the test when it has not been run."""
    path = REPO / "build" / "native" / "bin" / name
    if not path.is_file():
        pytest.fail(f"no {name}: run scripts/development/build_native", pytrace=False)
    return path


def run_native(name: str, *arguments: object) -> str:
    """What the program prints, on either stream. Fails the test when it fails."""
    command = [str(native(name)), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        pytest.fail(f"{name} exits with {done.returncode}:\n{said[-2000:]}", pytrace=False)
    return said
