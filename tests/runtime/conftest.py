"""Tiny models to talk to. They are random, so what they say is noise, but always the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import megrez_gguf
from make_checkpoint import make_checkpoint
from megrez_runtime import load

CONFIG: dict[str, Any] = {
    "architectures": ["MegrezMoeForCausalLM"],
    "experts_shared_frequency": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 2048,
    "model_type": "megrez_moe",
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pre_gate": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "vocab_size": 512,
}

Edit = Callable[[Path], None]
Make = Callable[..., Path]


@pytest.fixture(scope="session")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(edit) -> a GGUF converted from the tiny checkpoint after edit(folder) changed it."""

    def make(edit: Edit | None = None) -> Path:
        folder = make_checkpoint(CONFIG, tmp_path_factory.mktemp("made") / "tiny")
        if edit:
            edit(folder)
        return Path(megrez_gguf.convert(folder, folder.with_suffix(".gguf")).path)

    return make


@pytest.fixture(scope="session")
def model(make: Make) -> Path:
    return make()


@pytest.fixture
def llm(model: Path) -> Iterator[Any]:
    """The tiny model with 512 tokens of context and one batch for all of them."""
    llm = load(model, n_ctx=512, n_batch=512, n_ubatch=512)
    yield llm
    llm.close()
