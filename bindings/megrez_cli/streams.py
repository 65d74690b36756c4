"""The standard streams, so that what is wrong with them costs no work and changes no result.

stdout carries the result: a write that fails is an error, told once, and what was done stays done.
stderr carries talk: whether it can be written changes nothing. Neither fails for characters that
its encoding lacks, nor because its reader is slow.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class BrokenStream(Exception):
    """stdin cannot be read, or the result not be written to stdout; the message says why."""


@contextmanager
def standard() -> Iterator[None]:
    """Guard this process's standard streams; those that somebody put in their place are kept."""
    _fill_gaps()
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is sys.__stdin__:
        source = io.BufferedReader(_Descriptor(0, _input_failed))
        # ASCII is the same in UTF-8, and what is beyond it need not be lost.
        encoding = _encoding(sys.stdin).replace("ascii", "utf-8")
        sys.stdin = io.TextIOWrapper(source, encoding, errors="surrogateescape")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _guarded(sys.stdout, 1, _result_failed)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _guarded(sys.stderr, 2, _talk_failed)
    try:
        yield
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _encoding(stream: TextIO | None) -> str:
    return stream.encoding if stream else "utf-8"


def _fill_gaps() -> None:
    """Keep closed standard descriptors from being given to the next file that is opened.

    What is put there cannot be used either: to write to stdout stays an error.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY if number else os.O_WRONLY)


def _guarded(stream: TextIO | None, number: int, failed: Callable[[OSError], None]) -> TextIO:
    if stream:
        with suppress(OSError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, failed)),
        encoding=_encoding(stream),
        errors="backslashreplace",
        line_buffering=True,
    )


def _input_failed(error: OSError) -> None:
    raise BrokenStream(f"cannot read from stdin: {error.strerror}")


def _result_failed(error: OSError) -> None:
    if error.errno == errno.EPIPE:
        # The reader has what it wanted. Quietly, as SIGPIPE ends other programs.
        raise SystemExit(128 + signal.SIGPIPE)
    raise BrokenStream(f"cannot write to stdout: {error.strerror}")


def _talk_failed(error: OSError) -> None:
    pass


class _Descriptor(io.RawIOBase):
    """A file descriptor that stays open, and may be a non-blocking one.

    `failed` is called at most once, and may raise; from then on nothing is read or written.
    """

    def __init__(self, number: int, failed: Callable[[OSError], None]) -> None:
        self._number = number
        self._failed: Callable[[OSError], None] | None = failed

    def write(self, data: Any) -> int:
        done = self._transfer(os.write, data)
        return len(data) if done is None else done

    def readinto(self, buffer: Any) -> int:
        return self._transfer(os.readv, [buffer]) or 0

    def _transfer(self, call: Callable[[int, Any], int], data: Any) -> int | None:
        while self._failed:
            try:
                return call(self._number, data)
            except BlockingIOError:
                waiting = [self._number]
                if self.readable():
                    select.select(waiting, [], [])
                else:
                    select.select([], waiting, [])
            except OSError as e:
                failed, self._failed = self._failed, None
                failed(e)
        return None

    def readable(self) -> bool:
        return self._number == 0

    def writable(self) -> bool:
        return self._number != 0

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)
