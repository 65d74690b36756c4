"""The reference's own tensors in the places of a stored reference and of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import CheckpointWeights, forward
from support.marks import loop_takes
from support.random_checkpoint import SMALL, make_checkpoint

Weights = Mapping[str, Tensor]
Nodes = dict[tuple[str, int], NDArray[Any]]

CONFIG: dict[str, Any] = SMALL | {"num_hidden_layers": 6}
GROUPS = {"n_group": 4, "topk_group": 2}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"pre_gate": False},
    {"first_k_dense_replace": 0},
    {"first_k_dense_replace": 5},
    {"pre_gate": False, "first_k_dense_replace": 0, "num_hidden_layers": 1},
    {"moe_layer_freq": 2, "first_k_dense_replace": 2, "experts_shared_frequency": 2},
    {"scoring_func": "softmax"},
    {"topk_method": "greedy"},
    {"n_shared_experts": 0, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"num_experts_per_tok": 1},
    {"num_experts_per_tok": 8},
    {"tie_word_embeddings": True, "attention_bias": True},
    GROUPS,
    GROUPS | {"pre_gate": False, "scoring_func": "softmax", "topk_method": "greedy"},
    {"n_group": 2, "topk_group": 2},
]
# What differs most, for the loop.
SOME_IN_LOOP = loop_takes(
    [{}, {"pre_gate": False}, {"first_k_dense_replace": 0}, GROUPS].__contains__, VARIANTS
)
LENGTH = 48
WINDOWS = [
    torch.randint(0, 300, (LENGTH,), generator=torch.Generator().manual_seed(i)).int().numpy()
    for i in range(3)
]


def model(changes: dict[str, Any], folder: Path) -> tuple[ModelConfig, Path, dict[str, Tensor]]:
    """A random checkpoint, its folder, and its weights in float64."""
    raw = CONFIG | changes
    make_checkpoint(raw, folder / "checkpoint")
    weights = dict(CheckpointWeights(folder / "checkpoint", torch.float64))
    return ModelConfig.from_dict(raw), folder / "checkpoint", weights


def noisy(weights: Weights, size: float = 0.02) -> dict[str, Tensor]:
    """All matrices off by `size` of their standard deviation, the routers' excepted."""
    draw = torch.Generator().manual_seed(1)
    out = dict(weights)
    for name, tensor in weights.items():
        if tensor.ndim == 2 and ".mlp.gate." not in name:
            step = torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype)
            out[name] = tensor + size * tensor.std() * step
    return out


@torch.no_grad()
def computed(config: ModelConfig, weights: Weights, window: int) -> Nodes:
    """All that the reference computes for a window, `[S, columns]` each, in float64."""
    nodes: Nodes = {}

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        if tensor.ndim == 3:
            nodes[name, layer] = tensor[0].numpy()

    tokens = torch.from_numpy(WINDOWS[window]).long()
    logits = forward(config, weights, tokens[None], keep)
    nodes["result_output", -1] = logits[0].numpy()
    nodes["embd", -1] = weights["model.embed_tokens.weight"][tokens].numpy()
    return nodes


def candidate(config: ModelConfig, weights: Weights, window: int) -> Nodes:
    """The same as llama.cpp would give it: float32, the last layer's last rows only."""
    nodes = {}
    for (name, layer), values in computed(config, weights, window).items():
        reduced = layer == config.num_hidden_layers - 1 and name not in ("attn_norm", "kqv_out")
        reduced |= name in ("result_norm", "result_output")
        rows = values[LENGTH // 2 :] if reduced else values
        nodes[name, layer] = rows.astype(np.int32 if name == "ffn_moe_topk" else np.float32)
    if not config.n_shared_experts:  # the graph renames it to ffn_out
        nodes = {key: values for key, values in nodes.items() if key[0] != "ffn_moe_out"}
    return nodes


class Stored:
    """A `StoredReference` in memory."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.windows = [computed(config, weights, w) for w in range(len(WINDOWS))]

    def state(self, name: str, layer: int, window: int) -> NDArray[Any]:
        return self.windows[window][name, layer]

    def scores(self, layer: int, window: int) -> NDArray[Any]:
        return self.windows[window]["ffn_moe_probs_biased", layer]
