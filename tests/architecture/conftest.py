"""Tiny random models, converted once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from support.configurations import FOR_K_QUANTS
from support.samples import Sample
from support.shared import Shared


@pytest.fixture(scope="session")
def sample(shared: Shared) -> Callable[..., Sample]:
    """sample(**fields) -> a random F32 checkpoint of FOR_K_QUANTS with those fields, converted."""

    def sample(outtype: str = "f32", **fields: Any) -> Sample:
        checkpoint = shared.checkpoint(FOR_K_QUANTS | fields, dtype="float32")
        return Sample(checkpoint, shared.converted(checkpoint, outtype))

    return sample


@pytest.fixture(scope="session")
def tiny(sample: Callable[..., Sample]) -> Sample:
    return sample()
