"""Tiny models to talk to. They are random, so what they say is noise, but always the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megrez_gguf
from megrez_runtime import load
from support.checkpoints import Make
from support.configurations import TALKING
from support.random_checkpoint import make_checkpoint

Edit = Callable[[Path], None]


@pytest.fixture
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(edit) -> a GGUF converted from the tiny checkpoint after edit(folder) changed it."""

    def make(edit: Edit | None = None) -> Path:
        folder = make_checkpoint(TALKING, tmp_path_factory.mktemp("made") / "tiny")
        if edit:
            edit(folder)
        return Path(megrez_gguf.convert(folder, folder.with_suffix(".gguf")).path)

    return make


@pytest.fixture
def llm(model: Path) -> Iterator[Any]:
    """The tiny model with 512 tokens of context and one batch for all of them."""
    llm = load(model, n_ctx=512, n_batch=512, n_ubatch=512)
    yield llm
    llm.close()
