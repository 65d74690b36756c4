"""What the loop (`scripts/test --fast`) leaves to the full run, and how examples are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

SLOW = pytest.mark.slow

# The same examples in every run, beside files that each of them writes anew.
DRAWN = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def loop_takes(chosen: Callable[[Any], bool], values: Iterable[Any]) -> list[Any]:
    """The values of a parameter; the loop takes those that are `chosen`, the full run all."""
    return [value if chosen(value) else pytest.param(value, marks=SLOW) for value in values]
