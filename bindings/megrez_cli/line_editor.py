"""Reads what somebody types: lines of any length, pasted paragraphs, and several lines at once."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from megrez_cli import signals

PROMPT = "> "


class LineEditor:
    """A prompt on the terminal that stdin is. A context manager.

    What is typed is shown on stdout if that is a terminal, or else on stderr, or else on stdin's
    own terminal: a result that goes to a file holds none of it. History is kept in memory only.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._history = InMemoryHistory()

    def __enter__(self) -> LineEditor:
        if not os.environ.get("TERM"):
            os.environ["TERM"] = "dumb"  # what is not known can do nothing
        output = Vt100_Output.from_pty(self._screen(), term=os.environ["TERM"])
        # Nothing drawn here needs to know where the cursor is, and not every terminal answers.
        output.enable_cpr = False
        self._stack.enter_context(create_app_session(output=output))
        return self

    def _screen(self) -> TextIO:
        for stream in (sys.stdout, sys.stderr):
            if stream.isatty():
                return stream
        name = os.ttyname(sys.stdin.fileno())
        return self._stack.enter_context(open(name, "w", encoding="utf-8"))  # noqa: PTH123

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def read(self) -> str:
        """What was typed until Enter. Raises EOFError for Ctrl-D, KeyboardInterrupt for Ctrl-C."""
        session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=". ",
            key_bindings=_bindings(),
            history=self._history,
        )
        return session.prompt(handle_sigint=not signals.ignored(signal.SIGINT))


def _bindings() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings
