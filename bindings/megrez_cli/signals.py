"""Signals: handled while a command runs, and never those that whoever started us wants ignored."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]


@contextmanager
def handled(names: tuple[str, ...], handler: Handler) -> Iterator[None]:
    """Let `handler` have the signals of these names; afterwards all is as it was.

    What is ignored stays so: nohup ignores SIGHUP, a shell SIGINT for what it starts with `&`.
    """
    before = {}
    try:
        for name in names:
            number = getattr(signal, name, None)  # not every system has all
            if number is not None and not ignored(number):
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def ignored(number: int) -> bool:
    return signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command by an exception, which cleans up on its way."""
    with handled(("SIGTERM", "SIGHUP"), _terminated):
        yield


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
