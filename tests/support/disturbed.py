"""Functions of `os` that fail, or do something else, at a call of one's choosing."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Replace = Callable[..., Any]


class Calls:
    """Functions of `os`, as one module sees them, that fail or do something else on one call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.count = 0
        self._lock = threading.Lock()

    def replace(self, module: ModuleType, replacements: dict[str, Replace]) -> None:
        """`replacements[name](number of the call, the real function, *its arguments)`.

        Calls are counted from 1, over all of the functions. Those the system lacks are left out.
        """
        self.count = 0
        fakes = {n: self._fake(n, f) for n, f in replacements.items() if hasattr(os, n)}
        self._monkeypatch.setattr(module, "os", SimpleNamespace(**{**vars(os), **fakes}))

    def _fake(self, name: str, replacement: Replace) -> Replace:
        real = getattr(os, name)

        def fake(*args: Any, **options: Any) -> Any:
            with self._lock:  # no later call overtakes an earlier one
                self.count += 1
                return replacement(self.count, real, *args, **options)

        return fake

    def also(self, module: object, name: str, value: object) -> None:
        self._monkeypatch.setattr(module, name, value)

    def restore(self) -> None:
        self._monkeypatch.undo()


def plain(number: int, real: Replace, *args: Any) -> Any:
    return real(*args)


def fail_from(first: int, code: int) -> Replace:
    """Fail on that call and on all that follow, as a full disk does."""

    def replacement(number: int, real: Replace, *args: Any) -> Any:
        if number >= first:
            raise OSError(code, os.strerror(code))
        return real(*args)

    return replacement


def fail_at(at: int, error: BaseException) -> Replace:
    def replacement(number: int, real: Replace, *args: Any) -> Any:
        if number == at:
            raise error
        return real(*args)

    return replacement


def do_at(at: int, action: Callable[[], object]) -> Replace:
    def replacement(number: int, real: Replace, *args: Any) -> Any:
        if number == at:
            action()
        return real(*args)

    return replacement


def short(limit: int) -> Replace:
    """A read or write that does less than it was asked to: at most `limit` bytes."""

    def replacement(number: int, real: Replace, file: int, data: Any, *rest: int) -> Any:
        return real(file, [data[0][:limit]] if isinstance(data, list) else data[:limit], *rest)

    return replacement
