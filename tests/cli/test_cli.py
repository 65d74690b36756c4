"""The command line as a whole, and what importing it costs."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import megrez_gguf
from support.commands import RUN, cli


def test_help_is_fast() -> None:
    """Processor time, which other work on the machine does not stretch as it does wall time."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*RUN, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.3


def test_help_shows_examples() -> None:
    top = cli("--help").stdout
    commands = re.findall(r"^  ([a-z]+)  +\S", top.partition("Commands:")[2], re.MULTILINE)
    assert {"convert", "inspect"} <= set(commands)
    for command in commands:
        assert "Examples:" in cli(command, "--help").stdout, command


def test_version() -> None:
    result = subprocess.run([*RUN, "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("megrez-gguf ")


def test_wrong_usage() -> None:
    for arguments in (["convert"], ["convert", "x", "--outtype", "q4"], ["nonsense"]):
        result = subprocess.run([*RUN, *arguments], capture_output=True, text=True)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def test_stdout_is_data(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    result = subprocess.run(
        [*RUN, "convert", str(checkpoint), "-o", str(out)], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert result.stdout == f"{out}\n"
    assert "tensors" in result.stderr
    # No terminal, no progress bar.
    assert "\x1b" not in result.stderr


def test_progress_bar_on_a_terminal(checkpoint: Path, tmp_path: Path) -> None:
    main, side = os.openpty()
    process = subprocess.Popen(
        [*RUN, "convert", str(checkpoint), "-o", str(tmp_path / "x.gguf")],
        stderr=side,
        stdout=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(side)
    output = b""
    try:
        while data := os.read(main, 4096):
            output += data
    except OSError:
        pass  # Linux reports the other end's close as an error.
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert b"Converting" in output
    assert b"\x1b" not in stdout


def test_closed_stdout_is_no_crash(checkpoint: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [*RUN, "inspect", str(checkpoint)], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert "Traceback" not in result.stderr


def test_interrupt_while_nothing_is_written(tmp_path: Path) -> None:
    pipe = tmp_path / "config.json"
    os.mkfifo(pipe)
    process = subprocess.Popen([*RUN, "inspect", str(tmp_path)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while True:  # until it reads
        try:
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    # Python looks at a signal between `open` and `read` only when the next one comes.
    for timeout in (10, 30):
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            _, stderr = process.communicate(timeout=timeout)
            break
    os.close(writer)
    assert process.returncode == 130
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "code",
    [
        "import megrez_gguf",
        "import megrez_cli as cli",
        "import megrez_gguf.checkpoint.config, megrez_gguf.errors",
    ],
)
def test_imports_are_light(code: str) -> None:
    heavy = ("torch", "numpy", "gguf", "rich", "llama_cpp", "transformers")
    check = f"{code}\nimport sys\nprint([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_converting_needs_neither_torch_nor_llama_cpp(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'llama_cpp', 'safetensors', 'transformers', 'tokenizers'):\n"
        "    sys.modules[name] = None\n"
        "import megrez_gguf\n"
        "megrez_gguf.convert(sys.argv[1], sys.argv[2])\n"
        "megrez_gguf.inspect(sys.argv[2])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "x.gguf")], check=True
    )


def test_functions_win_over_modules() -> None:
    """`megrez_gguf.convert` stays the function whatever was imported before."""
    code = (
        "import importlib, pkgutil, megrez_gguf\n"
        "for m in pkgutil.iter_modules(megrez_gguf.__path__):\n"
        "    importlib.import_module(f'megrez_gguf.{m.name}')\n"
        "from megrez_gguf import convert, inspect\n"
        "assert callable(convert) and callable(inspect)\n"
        "assert megrez_gguf.convert is convert\n"
        "assert {'convert', 'inspect'} <= set(dir(megrez_gguf))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        megrez_gguf.nonsense  # noqa: B018
