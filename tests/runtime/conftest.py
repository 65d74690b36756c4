"""Tiny models to talk to. They are random, so what they say is noise, but always the same noise."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megrez_gguf
from megrez_runtime import load
from support.checkpoints import Make
from support.configurations import TALKING
from support.paths import POCKET
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

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


@pytest.fixture(scope="module")
def large(shared: Shared) -> Path:
    """Random, 330 MB in q8_0, of which 300 are experts."""
    config = json.loads((POCKET / "config.json").read_text()) | {
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 13,
    }
    return shared.converted(shared.checkpoint(config), "q8_0")


CGROUP = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def cgroup() -> Iterator[Path]:
    folder = CGROUP / f"megrez-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as e:
        pytest.skip(f"memory cannot be limited here: no writable cgroup v1 memory controller ({e})")
    yield folder
    for _ in range(50):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
