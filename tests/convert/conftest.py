"""Tiny random checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import TINY, Make

from make_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    cache: dict[str, Path] = {}

    def made(config: dict[str, Any], **options: Any) -> Path:
        key = json.dumps([config, options], sort_keys=True)
        if key not in cache:
            folder = tmp_path_factory.mktemp("made") / "tiny"
            make_checkpoint(config, folder, **options)
            cache[key] = folder
        return cache[key]

    return made


@pytest.fixture
def make(_made: Callable[..., Path], tmp_path: Path) -> Make:
    """make(**config fields) -> a fresh checkpoint folder of `TINY` with those fields.

    `options={...}` goes to make_checkpoint; two shards unless it says otherwise.
    """

    def make(options: dict[str, Any] | None = None, **fields: Any) -> Path:
        source = _made(TINY | fields, **({"shard_bytes": 120_000} | (options or {})))
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        return folder

    return make


@pytest.fixture
def checkpoint(make: Make) -> Path:
    """A fresh copy of the default tiny checkpoint: bfloat16, several shards."""
    return make()
