"""Standard streams that are full, closed, slow, cut short, or cannot print what there is to say."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from support.commands import RUN
from support.shared import Shared

# Commands that print a result, all of which take a moment.
COMMANDS: dict[str, Callable[[Path, Path], list[str]]] = {
    "help": lambda model, out: ["--help"],
    "verify": lambda model, out: ["verify", str(model)],
    "inspect": lambda model, out: ["inspect", str(model), "--no-scan"],
    "quantize": lambda model, out: ["quantize", str(model), str(out), "q8_0"],
    "plan": lambda model, out: ["quantize", str(model), str(out), "q8_0", "--dry-run"],
    "chat": lambda model, out: ["chat", str(model), "-p", "x", "--max-tokens", "3"],
}
every_command = pytest.mark.parametrize("command", COMMANDS)


def shell(redirection: str, arguments: list[str]) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a shell does with `redirection` behind it."""
    script = f'"$@" {redirection}'
    return subprocess.run(
        ["bash", "-c", script, "bash", *RUN, *arguments], capture_output=True, timeout=60
    )


@every_command
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">/dev/full 2>&-", ">&- 2>/dev/full"])
def test_a_result_that_cannot_be_written_is_an_error(
    command: str, redirection: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    done = shell(redirection, COMMANDS[command](model, out))
    assert done.returncode == 2
    if "2>" not in redirection:
        assert b"error: cannot write to stdout: " in done.stderr
        assert b"Traceback" not in done.stderr
    assert out.exists() == (command == "quantize")  # what was done stays done


@every_command
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", "2> >(true)", "<&-", "<&- 2>&-"])
def test_talk_that_cannot_be_written_changes_nothing(
    command: str, redirection: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    arguments = COMMANDS[command](model, out)
    if command == "chat":
        arguments += ["--temp", "0"]
    usual = subprocess.run([*RUN, *arguments], capture_output=True)
    out.unlink(missing_ok=True)
    done = shell(redirection, arguments)
    assert (done.returncode, usual.returncode) == (0, 0)
    if command != "plan":  # which says how long it will take
        assert done.stdout == usual.stdout


def test_a_closed_descriptor_is_not_given_to_a_file(model: Path, tmp_path: Path) -> None:
    """What is written to descriptor 1 or 2, by whatever library, must not land in the output."""
    out = tmp_path / "out.gguf"
    done = shell(">&- 2>&- <&-", ["quantize", str(model), str(out), "q8_0"])
    assert done.returncode == 2
    assert subprocess.run([*RUN, "verify", str(out)], capture_output=True).returncode == 0


@every_command
def test_a_reader_that_leaves_is_no_error(command: str, model: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*RUN, *COMMANDS[command](model, tmp_path / "out.gguf")],
        stdout=write,
        stderr=subprocess.PIPE,
    )
    os.close(write)
    assert done.returncode == 128 + signal.SIGPIPE
    assert b"rror" not in done.stderr


def test_a_slow_reader_gets_all(model: Path) -> None:
    """A pipe that does not block, as Node.js leaves it, and is soon full."""
    usual = subprocess.run([*RUN, "inspect", str(model), "--json"], capture_output=True)
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETFL, os.O_NONBLOCK)
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    assert len(usual.stdout) > 8192
    with subprocess.Popen([*RUN, "inspect", str(model), "--json"], stdout=write) as process:
        os.close(write)
        time.sleep(1)  # it is waiting by now; if not, the test is easier to pass
        with open(read, "rb") as pipe:  # noqa: PTH123
            assert pipe.read() == usual.stdout
    assert process.returncode == 0


def test_a_slow_writer_is_waited_for(model: Path) -> None:
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETFL, os.O_NONBLOCK)
    command = [*RUN, "chat", str(model), "--max-tokens", "3"]
    with subprocess.Popen(
        command, stdin=read, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        os.close(read)
        assert process.stderr
        os.write(write, b"/help\n")
        assert process.stderr.readline()  # it reads
        time.sleep(0.5)
        os.write(write, b"hello\n")
        os.close(write)
        assert b"3 tokens" in process.stderr.read()
    assert process.returncode == 0


ENCODINGS = ("ascii", "latin-1", "cp1252", "utf-8:strict", "gbk:strict", "utf-16-le")


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_names_and_encodings(encoding: str, seed: int, shared: Shared, tmp_path: Path) -> None:
    """Whatever bytes a folder's name has, the result on stdout is the name, byte for byte."""
    draw = random.Random(f"{encoding} {seed}")
    letters = [*range(1, 47), *range(48, 256)]
    name = bytes(draw.choices(letters, k=draw.randint(1, 40))) + draw.choice(["世", "é"]).encode()
    folder = os.fsencode(tmp_path) + b"/" + name
    os.mkdir(folder)  # noqa: PTH102
    source, out = shared.pocket(), folder + b"/q.gguf"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command: list[str | bytes] = [*RUN, "quantize", os.fspath(source), out, "q8_0"]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert (done.returncode, done.stdout) == (0, out + b"\n"), done.stderr
    again = subprocess.run(command, capture_output=True, env=environment)
    assert again.returncode == 2
    talk = again.stderr.decode(encoding.partition(":")[0])
    assert talk.startswith("error: ")
    assert talk.count("\n") == 1
    assert not {unicodedata.category(c) for c in talk.rstrip("\n").replace("\t", "")} & {"Cc", "Cs"}
    check: list[str | bytes] = [*RUN, "verify", out]
    found = subprocess.run(check, capture_output=True, env=environment)
    assert found.returncode == 0, found.stderr


def test_a_name_that_is_no_text_in_json_and_in_llama_cpp(model: Path, tmp_path: Path) -> None:
    out = os.fsencode(tmp_path) + b"/\xff\x1b[31m\n\x7f\xe4.gguf"
    command: list[str | bytes] = [*RUN, "quantize", str(model), out, "q8_0", "--json"]
    done = subprocess.run(command, capture_output=True, check=True)
    assert os.fsencode(json.loads(done.stdout)["path"]) == out
    assert done.stdout.isascii()
    assert set(done.stdout) & {*range(32), 127} == {ord("\n")}
    talk: list[str | bytes] = [*RUN, "chat", out, "-p", "x", "--max-tokens", "2"]
    assert subprocess.run(talk, capture_output=True).returncode == 0


IGNORED = ("SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT")


@pytest.mark.parametrize("name", IGNORED)
def test_an_ignored_signal_stays_ignored(name: str, model: Path) -> None:
    """As nohup, and a shell's `&`, ask for."""
    number = getattr(signal, name)
    with subprocess.Popen(
        [*RUN, "chat", str(model), "--temp", "0", "--ctx", "1024"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_IGN),
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"hello\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(number)
        process.stdin.write(b"/help\n")
        process.stdin.close()
        process.stdout.read()
        talk = process.stderr.read()
    assert process.returncode == 0
    assert b"stopped" not in talk
    assert b"/help" in talk


@pytest.mark.parametrize("home", [None, "/nonexistent", "/dev/null", ""])
def test_neither_home_nor_terminal_nor_time_zone(home: str | None, model: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TERM"}
    environment |= {"TZ": "Odd/Zone", "TMPDIR": "/nonexistent"}
    environment.pop("HOME", None)
    if home is not None:
        environment["HOME"] = home
    for arguments in (["verify", str(model)], ["chat", str(model), "-p", "x", "--max-tokens", "2"]):
        done = subprocess.run([*RUN, *arguments], capture_output=True, env=environment)
        assert done.returncode == 0, done.stderr


def test_no_current_folder(model: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        gone = tmp_path / "gone"
        gone.mkdir()
        script = f'cd "{gone}" && rmdir "{gone}" && exec "$@"'
        command = ["bash", "-c", script, "bash", *RUN, *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("verify", str(model)).returncode == 0
    for arguments in (["parity", "x"], ["search", "x", "--work", "y"], ["verify", "x.gguf"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: ")
