"""llama.cpp's log: kept off the terminal, remembered for error messages."""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# enum ggml_log_level; llama_cpp's own table of these numbers is out of date.
_WARNING, _ERROR, _CONTINUED = 3, 4, 5


class Log:
    """The process-wide receiver of llama.cpp's log lines. Use `log`, the one instance."""

    def __init__(self) -> None:
        self.verbose = False
        self._errors: deque[str] = deque(maxlen=8)
        self._warnings: deque[str] = deque(maxlen=4096)
        self._heard: list[str] | None = None
        self._level = 0
        self._callback: Any = None

    def install(self, llama_cpp: ModuleType, *, verbose: bool = False) -> None:
        """Receive everything from now on, and forget what was received.

        `verbose` passes each line on to stderr.
        """
        self.verbose = verbose
        self._errors.clear()
        self._warnings.clear()
        if self._callback is None:
            # llama.cpp keeps the bare pointer: the callback has to outlive every model.
            self._callback = llama_cpp.llama_log_callback(self._receive)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def take_errors(self) -> str:
        """The errors logged since the last call or `install`, as one line; "" if there are none."""
        lines = (line.strip() for line in "".join(self._errors).splitlines())
        self._errors.clear()
        return "; ".join(dict.fromkeys(line for line in lines if line))

    def take_warnings(self) -> list[str]:
        """The lines logged as warnings since the last call or `install`."""
        lines = "".join(self._warnings).splitlines()
        self._warnings.clear()
        return lines

    @contextmanager
    def listening(self) -> Iterator[Callable[[], list[str]]]:
        """Keep every line of every level; the callable yielded gives those logged so far."""
        heard: list[str] = []
        self._heard = heard
        try:
            yield lambda: "".join(heard).splitlines()
        finally:
            self._heard = None

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        self._level = level if level != _CONTINUED else self._level
        line = text.decode("utf-8", "replace")
        if self._heard is not None:
            self._heard.append(line)
        if self._level == _ERROR:
            self._errors.append(line)
        elif self._level == _WARNING:
            self._warnings.append(line)
        if self.verbose:
            print(line, end="", file=sys.stderr, flush=True)


log = Log()
