"""Fixtures of the converter's tests."""

from __future__ import annotations

import pytest

from support.disturbed import Calls


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)
