"""The command line as a whole, and what importing it costs."""

from __future__ import annotations

import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import megrez_gguf
from megrez_cli import main
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


def test_interrupt_while_nothing_is_written(model: Path) -> None:
    process = subprocess.Popen(
        [*RUN, "chat", str(model)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(b"/help\n")
        process.stdin.flush()
        assert process.stderr.readline()  # from now on it reads, or is about to
        process.send_signal(signal.SIGINT)
        talk = process.stderr.read()
    assert process.returncode == 130
    assert b"Traceback" not in talk
    assert talk.endswith(b"interrupted\n")


SIGNALS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers() -> Iterator[Callable[[], list[object]]]:
    """What SIGTERM and SIGHUP do; put back as it was."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield lambda: [signal.getsignal(number) for number in SIGNALS]
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["inspect", "nowhere.gguf"], 2), (["no"], 2)]
)
def test_no_handler_stays_behind(
    arguments: list[str], code: int, handlers: Callable[[], list[object]]
) -> None:
    def mine(number: int, frame: object) -> None: ...

    for handler in (signal.SIG_DFL, signal.SIG_IGN, mine):
        for number in SIGNALS:
            signal.signal(number, handler)
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert (stop.value.code or 0) == code
        assert handlers() == [handler, handler]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_command_and_nothing_after_it(
    number: signal.Signals,
    handlers: Callable[[], list[object]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = handlers()
    cleaned = []

    def command(argv: list[str] | None) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            cleaned.append(argv)

    monkeypatch.setattr(importlib.import_module("megrez_cli.app"), "app", command)
    with pytest.raises(SystemExit) as stop:
        main(["x"])
    assert stop.value.code == 128 + number
    assert cleaned == [["x"]]
    assert handlers() == before
    # Later, it ends the process as it ends any other.
    code = (
        "import contextlib, os\nfrom megrez_cli import main\n"
        "with contextlib.suppress(SystemExit): main(['--version'])\n"
        f"os.kill(os.getpid(), {int(number)})\nprint('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -number
    assert "went on" not in done.stdout


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
