"""Chat in a terminal or through a pipe: answers on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import IO

from megrez_gguf.errors import MegrezError
from megrez_gguf.text import format_size
from megrez_llama.expert_store import ExpertStats, expert_stats
from megrez_runtime.session import Answer, Session

HELP = """\
/reset    forget the conversation
/help     this text
/exit     leave; so does Ctrl-D
Ctrl-C    stop the answer; at the prompt, twice, leave"""

# What a model may print raw. Anything else below space could drive the terminal.
_UNSAFE = {i: None for i in (*range(32), *range(127, 160)) if chr(i) not in "\n\t"}
INTERRUPTED = 130


class Terminal:
    """The user's side of a `Session`, on this process's standard streams."""

    def __init__(self, session: Session, *, stats: bool = False) -> None:
        self.session = session
        self.stats = stats
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            # Half a character in the input, or a narrow locale, is no reason to die.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        self._out, self._err = sys.stdout, sys.stderr

    def once(self, prompt: str) -> int:
        """Answer one prompt; returns the exit code."""
        return INTERRUPTED if self._answer(prompt).ending == "cancelled" else 0

    def run(self) -> int:
        """Answer what stdin says, line by line, until it ends; returns the exit code."""
        if _tty(sys.stdin):
            return self._converse()
        # Whoever pipes lines in cannot type at us: Ctrl-C is for the whole run.
        for line in sys.stdin or ():
            if not self._turn(line):
                break
            if self.session.last and self.session.last.ending == "cancelled":
                return INTERRUPTED
        return 0

    def _converse(self) -> int:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() edits lines once this is imported)
        s = self.session
        name = s.llm.metadata.get("general.name", s.llm.model_path)
        trained = int(s.llm.metadata.get("megrez-moe.context_length", s.context))
        beyond = f" (trained on {trained})" if s.context > trained else ""
        self._talk(f"{name}: {s.context} tokens of context{beyond}, {s.sampling}. /help for help.")
        interrupted = False
        while True:
            try:
                line = self._read()
            except EOFError:
                self._err.write("\n")
                return 0
            except KeyboardInterrupt:
                self._err.write("\n")
                if interrupted:
                    return 0
                interrupted = True
                self._talk("Ctrl-C again, Ctrl-D or /exit to leave")
                continue
            interrupted = False
            try:
                if not self._turn(line):
                    return 0
            except MegrezError as e:
                self._talk(f"error: {e}")

    def _read(self) -> str:
        if _tty(self._out):
            return input("> ")
        self._err.write("> ")
        self._err.flush()
        return input()

    def _turn(self, line: str) -> bool:
        """Deal with a line of input; False if it was the last one."""
        text = line.strip()
        if text == "/exit":
            return False
        if text == "/reset":
            self.session.reset()
            self._talk("conversation forgotten")
        elif text == "/help":
            self._talk(HELP)
        elif text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> Answer:
        """Stream the answer to stdout, its figures to stderr; Ctrl-C ends only the answer."""
        shown = ""
        before = expert_stats(self.session.llm) if self.stats else None
        with self._interruptible():
            with contextlib.closing(self.session.ask(text)) as pieces:
                for piece in pieces:
                    shown = piece.translate(_UNSAFE) if _tty(self._out) else piece
                    self._out.write(shown)
                    self._out.flush()
            answer = self.session.last
            assert answer is not None
            if not shown.endswith("\n"):
                self._out.write("\n")
                self._out.flush()
            self._talk(figures(answer, self.session.context))
            if self.stats:
                after = expert_stats(self.session.llm)
                did = _experts(after.since(before)) if after and before else "all in memory"
                self._talk(f"[experts: {did}]")
        return answer

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self.session.cancel()

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _talk(self, text: str) -> None:
        self._err.write(f"\033[2m{text}\033[0m\n" if _tty(self._err) else f"{text}\n")
        self._err.flush()


def figures(answer: Answer, context: int) -> str:
    """One line on what an answer cost and why it ended, if not by itself."""
    a = answer
    notes = {
        "turn end": "",
        "max tokens": "cut at --max-tokens; ",
        "context full": f"cut: the context of {context} tokens is full; ",
        "cancelled": "stopped by Ctrl-C; ",
    }[a.ending]
    if a.forgotten_turns:
        turns = "turn" if a.forgotten_turns == 1 else f"{a.forgotten_turns} turns"
        notes = f"the oldest {turns} forgotten to make room; {notes}"
    rate = f", {a.rate:.1f} tok/s" if a.rate else ""
    prompt = f"prompt {a.prompt_tokens}"
    if a.reused_tokens:
        prompt += f", {a.reused_tokens} of them cached"
    if a.prompt_rate:
        prompt += f", {a.prompt_rate:.1f} tok/s"
    return f"[{notes}{len(a.tokens)} tokens{rate}; {prompt}]"


def _experts(stats: ExpertStats) -> str:
    return (
        f"{stats.hit_rate:.1%} of {stats.hits + stats.misses} in memory, "
        f"{format_size(stats.bytes_read)} read, waited {stats.wait_us / 1e6:.2f} s, "
        f"{stats.wasted} wasted"
    )


def _tty(stream: IO[str] | None) -> bool:
    return stream is not None and stream.isatty()
