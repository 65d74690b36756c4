"""Tiny random models, converted once for all tests of a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from samples import TINY, Sample

from make_checkpoint import make_checkpoint
from megrez_gguf import convert


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Sample]:
    """sample(**config fields) -> a random F32 checkpoint of TINY with those fields, converted."""
    cache: dict[str, Sample] = {}

    def sample(outtype: str = "f32", **fields: Any) -> Sample:
        key = json.dumps([outtype, fields], sort_keys=True)
        if key not in cache:
            folder = tmp_path_factory.mktemp("sample")
            make_checkpoint(TINY | fields, folder / "checkpoint", dtype="float32")
            convert(folder / "checkpoint", folder / "model.gguf", outtype=outtype)
            cache[key] = Sample(folder / "checkpoint", folder / "model.gguf")
        return cache[key]

    return sample


@pytest.fixture(scope="session")
def tiny(sample: Callable[..., Sample]) -> Sample:
    return sample()
