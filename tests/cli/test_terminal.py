"""The chat command as users meet it: through pipes, and in a terminal with Ctrl-C."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.commands import chat, chat_command, cli

# How the line editor draws, which is not what it says. Dim talk is neither.
DRAWING = re.compile(r"\x1b\[(?!2m|0m\r\n)[?\d;]*[A-Za-z]|\x08")
PROMPT = "> ?$"  # its space is a movement of the cursor
FIGURES = rb"\[(?:[^;\]]*; )?(\d+) tokens(, [\d.]+ tok/s)?; prompt \d+.*\]\n"
LONG = ("--temp", "0", "--ctx", "32768")  # an answer of half a minute


def test_one_prompt_answers_on_stdout_and_talks_on_stderr(model: Path) -> None:
    done = chat(model, "-p", "hello", "--temp", "0", "--max-tokens", "12", stdin="not read\n")
    assert done.returncode == 0
    assert done.stdout.count(b"\n") >= 1
    assert done.stdout.endswith(b"\n")
    assert re.fullmatch(FIGURES, done.stderr)
    assert b"12 tokens, " in done.stderr
    assert b"cut at --max-tokens" in done.stderr
    assert b"\x1b" not in done.stdout + done.stderr
    again = chat(model, "-p", "-", "--temp", "0", "--max-tokens", "12", stdin="hello\n")
    assert again.stdout == done.stdout


def test_options_reach_the_model(model: Path) -> None:
    def answer(*options: str) -> bytes:
        done = cli("chat", model, "-p", "hello", "--max-tokens", "12", *options)
        assert done.exit_code == 0, done.stderr
        return done.stdout_bytes

    greedy = answer("--temp", "0")
    assert answer("--top-k", "1", "--seed", "9") == greedy
    assert answer("--min-p", "1", "--seed", "9") == greedy
    assert answer("--top-p", "0", "--seed", "9") == greedy
    assert answer("--temp", "0", "--system", "be brief") != greedy
    assert answer("--temp", "0", "--repeat-penalty", "5") != greedy
    assert answer("--seed", "1") == answer("--seed", "1", "--threads", "1", "--ctx", "300")
    assert answer("--seed", "1") != answer("--seed", "2")
    assert answer("--seed", "1") != answer("--seed", "1", "--temp", "2")
    assert b"megrez-moe" in chat(model, "-p", "x", "--max-tokens", "1", "--verbose").stderr


def test_lines_from_a_pipe_are_turns(model: Path) -> None:
    lines = "hello\n\nand then?\n/reset\n  hello \n/exit\nnever\n"
    done = chat(model, "--temp", "0", "--max-tokens", "12", stdin=lines)
    assert done.returncode == 0
    prompts = [int(n) for n in re.findall(rb"prompt (\d+)", done.stderr)]
    assert len(prompts) == 3
    assert prompts[0] == prompts[2] < prompts[1]
    assert b"conversation forgotten\n" in done.stderr
    assert b"> " not in done.stdout
    assert b"\x1b" not in done.stderr
    first = chat(model, "-p", "hello", "--temp", "0", "--max-tokens", "12").stdout
    assert done.stdout.startswith(first)
    assert done.stdout.endswith(first)
    assert chat(model, stdin="").returncode == 0
    helped = chat(model, stdin="/help\n")
    assert (helped.stdout, b"Ctrl-C" in helped.stderr) == (b"", True)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_bytes_that_are_no_text_are_survived(
    model: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    done = chat(model, "--temp", "0", "--max-tokens", "40", stdin=b"caf\xe9 \xff\xfe\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding.partition(":")[0])


def test_a_message_too_long_exits_2(model: Path) -> None:
    done = chat(model, "-p", "x " * 400, "--ctx", "256")
    assert (done.returncode, done.stdout) == (2, b"")
    assert re.fullmatch(rb"error: the message is too long: .*--ctx\)\n", done.stderr)


@pytest.mark.parametrize("option", [("--temp", "-1"), ("--top-p", "1.5"), ("--ctx", "0")])
def test_options_out_of_range_exit_2(model: Path, option: tuple[str, str]) -> None:
    assert chat(model, "-p", "x", *option).returncode == 2


def test_a_reader_that_leaves_ends_the_program(model: Path) -> None:
    process = subprocess.Popen(
        chat_command(model, "-p", "hello", *LONG), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process, process.stdout, process.stderr:
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(timeout=20) == 128 + signal.SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_piped_run(model: Path, number: int, code: int) -> None:
    process = subprocess.Popen(
        chat_command(model, *LONG),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(b"hello\nsecond\n")
        process.stdin.flush()
        assert process.stdout.read(10)
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        talk = process.stderr.read()
    assert b"Traceback" not in talk
    assert (b"stopped by Ctrl-C" in talk) == (number == signal.SIGINT)


class Screen:
    """The chat command in a terminal of its own."""

    def __init__(
        self,
        *arguments: str | Path,
        stdout: int | None = None,
        stderr: int | None = None,
        **env: str,
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
        self.process = subprocess.Popen(
            chat_command(*arguments),
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave if stderr is None else stderr,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=os.environ | {"TERM": "xterm"} | env,
        )
        os.close(slave)
        self.raw, self._forgotten = b"", 0
        self.banner = ""

    @property
    def text(self) -> str:
        """What is new on the screen, without what only moves the cursor about."""
        shown = DRAWING.sub("", self.raw.decode("utf-8", "replace"))
        return shown.replace("\r\r\n", "\r\n")[self._forgotten :]

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, timeout: float = 30) -> str:
        """Read until `pattern` shows up; returns, and forgets, everything up to its end."""
        deadline = time.monotonic() + timeout
        while not (match := re.search(pattern, self.text)):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                raise AssertionError(f"no {pattern!r} within {timeout} s in {self.text!r}")
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:  # Linux says so when the last process has gone
                data = b""
            if not data:
                raise AssertionError(f"ended without {pattern!r}: {self.text!r}")
            self.raw += data
        seen = self.text[: match.end()]
        self._forgotten += match.end()
        return seen

    def interrupt(self, pattern: str) -> None:
        """Press Ctrl-C until `pattern` shows up.

        Python loses a Ctrl-C in the instant between writing the prompt and waiting for input.
        """
        for _ in range(20):
            time.sleep(0.3)
            self.type("\x03")
            try:
                self.wait_for(pattern, timeout=2)
            except AssertionError:
                if self.process.poll() is not None:
                    raise
            else:
                return
        raise AssertionError(f"Ctrl-C never led to {pattern!r}: {self.text!r}")

    def code(self) -> int:
        return self.process.wait(timeout=20)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    """screen(arguments...) -> a Screen at its first prompt."""
    opened: list[Screen] = []

    def start(*arguments: str | Path, **options: Any) -> Screen:
        opened.append(Screen(*arguments, **options))
        if options.get("stderr") is not None:
            opened[-1].wait_for(PROMPT)
            return opened[-1]
        opened[-1].banner = opened[-1].wait_for("/help for help.*\r\n" + PROMPT)
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_conversation_in_a_terminal(model: Path, screen: Callable[..., Screen]) -> None:
    s = screen(model, "--temp", "0", "--max-tokens", "12")
    s.type("hello\r")
    first = s.wait_for(r"\x1b\[2m\[[^\]]*12 tokens, [\d.]+ tok/s; prompt \d+[^\]]*\]\x1b\[0m\r\n")
    s.wait_for(PROMPT)
    s.type("世界\r")
    s.wait_for(r"prompt \d+, \d+ of them cached")
    s.wait_for(PROMPT)
    s.type("/reset\r")
    s.wait_for("conversation forgotten")
    s.wait_for(PROMPT)
    s.type("hello\r")
    again = s.wait_for(r"\x1b\[2m\[[^\]]*12 tokens.*\]\x1b\[0m\r\n")
    assert again.split("\r\n")[1] == first.split("\r\n")[1]
    s.wait_for(PROMPT)
    s.type("/exit\r")
    assert s.code() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(
    model: Path, screen: Callable[..., Screen]
) -> None:
    s = screen(model, *LONG)
    assert "32768 tokens of context (trained on 2048), greedy." in s.banner
    s.type("hello\r")
    s.wait_for("hello\r\n.{40}")
    s.type("\x03")
    s.wait_for(r"\[stopped by Ctrl-C; \d+ tokens, ", timeout=10)
    s.wait_for(PROMPT)
    s.type("and?\r")
    s.wait_for("and\\?\r\n.{20}")
    s.type("\x03")
    s.wait_for("stopped by Ctrl-C", timeout=10)
    s.wait_for(PROMPT)
    s.type("\x04")
    assert s.code() == 0


def test_ctrl_c_at_the_prompt_asks_before_it_leaves(
    model: Path, screen: Callable[..., Screen]
) -> None:
    s = screen(model, "--temp", "0", "--max-tokens", "3")
    for _ in range(2):
        s.type("half a li")
        s.wait_for("half a li")
        s.interrupt("Ctrl-C again, Ctrl-D or /exit to leave")
        s.wait_for(PROMPT)
        s.type("hello\r")  # anything typed in between starts over
        s.wait_for("3 tokens")
        s.wait_for(PROMPT)
    s.interrupt("Ctrl-C again")
    s.wait_for(PROMPT)
    with pytest.raises(AssertionError, match="ended without"):
        s.interrupt("Ctrl-C again")
    assert s.code() == 0


def test_an_error_does_not_end_the_conversation(model: Path, screen: Callable[..., Screen]) -> None:
    s = screen(model, "--temp", "0", "--max-tokens", "3", "--ctx", "256")
    s.type("x " * 300 + "\r")
    s.wait_for("error: the message is too long")
    s.wait_for(PROMPT)
    s.type("hello\r")
    s.wait_for("3 tokens")


def test_answers_cannot_drive_the_terminal(
    model: Path, screen: Callable[..., Screen], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Warm enough to draw every byte there is, escape among them.
    s = screen(model, "--temp", "50", "--seed", "1", "--ctx", "2048")
    s.type("hello\r")
    seen = s.wait_for(r"\[[^\]]*tokens, ").partition("hello\r\n")[2]
    assert len(seen) > 200
    body = re.sub(r"\x1b\[2m\[[^\]]*tokens, $", "", seen)
    assert not set(body) & {
        chr(i) for i in (*range(32), *range(127, 160)) if chr(i) not in "\r\n\t"
    }


def test_a_pasted_paragraph_is_one_question(model: Path, screen: Callable[..., Screen]) -> None:
    s = screen(model, "--temp", "0", "--max-tokens", "3")
    s.type("\x1b[200~one\rtwo\r\n\nthree 世界\x1b[201~")
    s.wait_for("three 世界")
    s.type("\r")
    pasted = s.wait_for(r"3 tokens.*prompt \d+")
    s.wait_for(PROMPT)
    s.type("/reset\r")
    s.wait_for("forgotten")
    s.wait_for(PROMPT)
    for keys in ("one\\\r", "two\x1b\r", "\\\r", "three 世界\r"):  # written line by line
        s.type(keys)
    typed = s.wait_for(r"3 tokens.*prompt \d+")
    assert pasted.rpartition("prompt")[2] == typed.rpartition("prompt")[2]
    assert "3 tokens" not in s.text


@pytest.mark.parametrize("term", ["xterm", "dumb", ""])
@pytest.mark.parametrize("redirected", ["stdout", "stderr", "both"])
def test_long_lines_are_whole_wherever_the_answer_goes(
    term: str, redirected: str, model: Path, screen: Callable[..., Screen], tmp_path: Path
) -> None:
    streams = ("stdout", "stderr") if redirected == "both" else (redirected,)
    with (tmp_path / "file").open("wb") as file:
        s = screen(
            model, "--temp", "0", "--max-tokens", "3", "--ctx", "16384", "--stats",
            **dict.fromkeys(streams, file.fileno()), TERM=term,
        )  # fmt: skip
        time.sleep(0.5)  # a dumb terminal shows the prompt a moment before it is read
        text = "x " * 2500
        s.type(text)
        s.type("\r")
        if redirected == "stdout":
            talk = s.wait_for(r"prompt \d+")
        for _ in range(60):  # it is lost while an answer is computed
            s.type("\x04")
            with contextlib.suppress(AssertionError):
                s.wait_for("^never$", timeout=0.3)  # reads what it shows
            if s.process.poll() is not None:
                break
        assert s.code() == 0
    kept = (tmp_path / "file").read_text("utf-8", "replace")
    if redirected != "stdout":
        talk = kept
        assert "\x1b" not in kept
    found = re.search(r"prompt (\d+)", talk)
    assert found
    assert int(found[1]) > 2500
    assert "> " not in kept


def test_a_dumb_terminal_gets_nothing_but_text(model: Path, screen: Callable[..., Screen]) -> None:
    s = screen(model, "--temp", "0", "--max-tokens", "3", TERM="dumb")
    s.type("hello\r")
    s.wait_for("3 tokens")
    s.wait_for(PROMPT)
    assert b"\x1b[2m" not in s.raw


@pytest.mark.parametrize(
    ("settings", "styled"),
    [
        ({}, True),
        ({"NO_COLOR": "1"}, False),
        ({"NO_COLOR": ""}, True),
        ({"CLICOLOR": "0"}, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, True),
    ],
)
def test_talk_is_dim_where_that_is_wanted(
    settings: dict[str, str], styled: bool, model: Path, screen: Callable[..., Screen]
) -> None:
    s = screen(model, **settings)
    assert (b"\x1b[2m" in s.raw) == styled


@pytest.mark.parametrize("seed", range(5))
def test_a_pipe_goes_on_after_a_line_that_is_too_long(seed: int, model: Path) -> None:
    draw = random.Random(seed)
    lines = [draw.choice(["hello", "x " * 400]) for _ in range(4)] + ["x " * 400, "hello"]
    done = chat(model, "--ctx", "256", "--temp", "0", "--max-tokens", "2", stdin="\n".join(lines))
    assert done.returncode == 2
    told = re.findall(rb"error: line (\d+): the message is too long", done.stderr)
    assert [int(n) for n in told] == [i for i, line in enumerate(lines, 1) if line != "hello"]
    assert len(re.findall(rb"\[.*2 tokens", done.stderr)) == lines.count("hello")
