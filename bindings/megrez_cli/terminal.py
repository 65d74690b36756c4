"""Chat in a terminal or through a pipe: answers on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import sys
from types import FrameType

from megrez_cli import console, signals
from megrez_gguf.errors import MegrezError
from megrez_gguf.text import format_size, printable
from megrez_llama.expert_store import ExpertStats, expert_stats
from megrez_runtime.session import Answer, Session

HELP = """\
/reset    forget the conversation
/help     this text
/exit     leave; so does Ctrl-D
Alt-Enter goes on in another line, as Enter does after a \\
Ctrl-C    stop the answer; at the prompt, twice, leave"""

INTERRUPTED = 130
FAILED = MegrezError.exit_code


class Terminal:
    """The user's side of a `Session`, on this process's standard streams."""

    def __init__(self, session: Session, *, stats: bool = False) -> None:
        self.session = session
        self.stats = stats

    def once(self, prompt: str) -> int:
        """Answer one prompt; returns the exit code."""
        return INTERRUPTED if self._answer(prompt).ending == "cancelled" else 0

    def run(self) -> int:
        """Answer what stdin says, line by line, until it ends; returns the exit code.

        In a terminal somebody sees what went wrong with a question. A pipe's other lines are
        answered, too, and the code says that one was not.
        """
        if is_typed():
            return self._converse()
        code = 0
        # Whoever pipes lines in cannot type at us: Ctrl-C is for the whole run.
        for number, line in enumerate(sys.stdin, 1):
            try:
                if not self._turn(line):
                    break
            except MegrezError as e:
                console.say(f"error: line {number}: {e}{console.hint(e)}")
                code = FAILED
            else:
                if self.session.last and self.session.last.ending == "cancelled":
                    return INTERRUPTED
        return code

    def _converse(self) -> int:
        from megrez_cli.line_editor import LineEditor

        s = self.session
        name = s.llm.metadata.get("general.name", s.llm.model_path)
        trained = int(s.llm.metadata.get("megrez-moe.context_length", s.context))
        beyond = f" (trained on {trained})" if s.context > trained else ""
        self._talk(f"{name}: {s.context} tokens of context{beyond}, {s.sampling}. /help for help.")
        interrupted = False
        with LineEditor() as editor:
            while True:
                try:
                    line = editor.read()
                except EOFError:
                    return 0
                except KeyboardInterrupt:
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
                    self._talk(f"error: {e}{console.hint(e)}")

    def _turn(self, line: str) -> bool:
        """Deal with what was typed or piped; False if it was the last."""
        text = line.strip()
        if text == "/exit":
            return False
        if text == "/reset":
            self.session.reset()
            self._talk("conversation forgotten")
        elif text == "/help":
            for line in HELP.splitlines():
                self._talk(line)
        elif text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> Answer:
        """Stream the answer to stdout, its figures to stderr; Ctrl-C ends only the answer."""
        text = readable(text)
        shown = ""
        on_screen = sys.stdout.isatty()
        before = expert_stats(self.session.llm) if self.stats else None
        with signals.handled(("SIGINT",), self._stop):
            with contextlib.closing(self.session.ask(text)) as pieces:
                for piece in pieces:
                    shown = printable(piece, keep="\n\t") if on_screen else piece
                    sys.stdout.write(shown)
                    sys.stdout.flush()
            answer = self.session.last
            assert answer is not None
            if not shown.endswith("\n"):
                sys.stdout.write("\n")
                sys.stdout.flush()
            self._talk(figures(answer, self.session.context))
            if self.stats:
                after = expert_stats(self.session.llm)
                did = _experts(after.since(before)) if after and before else "all in memory"
                self._talk(f"[experts: {did}]")
        return answer

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.session.cancel()

    def _talk(self, line: str) -> None:
        console.say(line, dim=True)


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


def is_typed() -> bool:
    """Whether somebody types what stdin says."""
    return sys.stdin is not None and sys.stdin.isatty()


def read_prompt() -> str:
    """One prompt: all that is piped in, or what is typed until Enter."""
    if not is_typed():
        return sys.stdin.read().rstrip("\n")
    from megrez_cli.line_editor import LineEditor

    with LineEditor() as editor, contextlib.suppress(EOFError):
        return editor.read()
    return ""


def readable(text: str) -> str:
    """`text` with a sign in place of each byte that was none in its encoding, and a warning."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if whole != text:
        console.say("warning: some bytes of the input are no text; \ufffd stands for them")
    return whole
