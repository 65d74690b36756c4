"""What the loop (`scripts/test --fast`) leaves to the full run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

SLOW = pytest.mark.slow


def loop_takes(chosen: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter; the loop takes those that are `chosen`, the full run all."""
    return [value if chosen(value) else pytest.param(value, marks=SLOW) for value in values]
