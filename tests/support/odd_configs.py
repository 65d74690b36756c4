"""Configurations unlike the published one, and how far llama.cpp is from the reference on each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megrez_gguf import convert
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import ConfigError
from megrez_llama.engine import Engine
from megrez_parity.metrics import Comparison
from megrez_parity.reference import CheckpointWeights, forward
from support.random_checkpoint import FULL, make_checkpoint

THRESHOLD = 1e-9
TOKENS = 96

BASE: dict[str, Any] = FULL | {
    "hidden_size": 128,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}


def _biases_below_every_score(tensors: dict[str, torch.Tensor]) -> None:
    """Make every selection score negative: a group masked with 0 instead of -inf would win."""
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor -= 2


@dataclass(frozen=True)
class Case:
    """A configuration: what it changes in BASE, and how its checkpoint is made."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[dict[str, torch.Tensor]], None] | None = None


GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

CASES = [
    Case("as published, small"),
    Case("sharing period 1", {"experts_shared_frequency": 1}),
    Case("sharing period 2", {"experts_shared_frequency": 2}),
    Case("sharing period 4, last group short", {"experts_shared_frequency": 4}),
    Case("sharing period beyond the layers", {"experts_shared_frequency": 100}),
    Case("no dense layer", {"first_k_dense_replace": 0}),
    Case("2 dense layers", {"first_k_dense_replace": 2}),
    Case("3 dense layers, last group of one", {"first_k_dense_replace": 3}),
    Case("one MoE layer, the last", {"first_k_dense_replace": 6}),
    Case(
        "every second layer dense",
        {"moe_layer_freq": 2, "first_k_dense_replace": 0, "experts_shared_frequency": 4},
    ),
    Case(
        "every second layer dense, 2 leading",
        {"moe_layer_freq": 2, "first_k_dense_replace": 2, "experts_shared_frequency": 2},
    ),
    Case("pre-gate off", {"pre_gate": False}),
    Case("pre-gate off, no dense layer", {"pre_gate": False, "first_k_dense_replace": 0}),
    Case("2 of 4 groups", GROUPS),
    Case("4 of 4 groups", {"n_group": 4, "topk_group": 4}),
    Case("2 of 4 groups, all scores negative", GROUPS, edit=_biases_below_every_score),
    Case("softmax", {"scoring_func": "softmax"}),
    Case("softmax, 2 of 4 groups", {"scoring_func": "softmax"} | GROUPS),
    Case("no correction bias", {"topk_method": "greedy"}),
    Case("no correction bias, 2 of 4 groups", {"topk_method": "greedy"} | GROUPS),
    Case("weights not normalised", {"norm_topk_prob": False}),
    Case("softmax, not normalised", {"scoring_func": "softmax", "norm_topk_prob": False}),
    Case("scaling factor 2.5", {"routed_scaling_factor": 2.5}),
    Case("q, k, v biases", {"attention_bias": True}),
    Case("q, k, v, o biases", {"attention_bias": True}, {"output_bias": True}),
    Case("tied embeddings", {"tie_word_embeddings": True}),
    Case("head_dim 48, hidden / heads 32", {"head_dim": 48}),
    Case("linear rope", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    Case("yarn, text beyond original context", {"rope_scaling": YARN}),
    Case("yarn, attention factor 0.8", {"rope_scaling": YARN | {"attention_factor": 0.8}}),
    Case("yarn, beta_fast 2", {"rope_scaling": YARN | {"beta_fast": 2.0}, "rope_theta": 1e4}),
    Case("yarn, beta_slow 0.5", {"rope_scaling": YARN | {"beta_slow": 0.5}, "rope_theta": 1e4}),
    Case("one key-value head", {"num_key_value_heads": 1}),
    Case("as many key-value heads as heads", {"num_key_value_heads": 4}),
    Case("no shared expert", {"n_shared_experts": 0}),
    Case("one expert a token", {"num_experts_per_tok": 1}),
    Case("every expert", {"num_experts_per_tok": 16}),
    Case("vocabulary padded", options={"tokenizer_vocab": 300}),
    Case("large norm epsilon, short rope base", {"rms_norm_eps": 0.05, "rope_theta": 1e4}),
    Case(
        "most at once",
        {
            "experts_shared_frequency": 2,
            "first_k_dense_replace": 2,
            "routed_scaling_factor": 1.5,
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "head_dim": 16,
            "rope_scaling": YARN,
        }
        | GROUPS,
        {"output_bias": True, "tokenizer_vocab": 300},
    ),
]


def random_case(seed: int) -> Case:
    """A valid configuration drawn by `seed`."""
    draw = random.Random(seed)
    while True:
        groups = draw.choice([1, 1, 2, 4])
        heads = draw.choice([2, 4, 6])
        changes = {
            "experts_shared_frequency": draw.randint(1, 5),
            "first_k_dense_replace": draw.randint(0, 3),
            "num_hidden_layers": draw.randint(2, 9),
            "moe_layer_freq": draw.choice([1, 1, 1, 2]),
            "pre_gate": draw.random() < 0.7,
            "n_routed_experts": draw.choice([8, 12, 16]),
            "num_experts_per_tok": draw.randint(1, 4),
            "n_group": groups,
            "topk_group": draw.randint(1, groups),
            "n_shared_experts": draw.randint(0, 3),
            "scoring_func": draw.choice(["sigmoid", "softmax"]),
            "topk_method": draw.choice(["noaux_tc", "greedy"]),
            "norm_topk_prob": draw.random() < 0.5,
            "routed_scaling_factor": draw.choice([1.0, 0.5, 2.5]),
            "attention_bias": draw.random() < 0.5,
            "tie_word_embeddings": draw.random() < 0.3,
            "num_attention_heads": heads,
            "num_key_value_heads": draw.choice([h for h in (1, 2, 3, 4, 6) if heads % h == 0]),
            "head_dim": draw.choice([16, 32, 48]),
            "hidden_size": draw.choice([96, 128, 160]),
            "rope_scaling": draw.choice([None, None, {"type": "linear", "factor": 3.0}, YARN]),
        }
        try:
            ModelConfig.from_dict(BASE | changes)
        except ConfigError:
            continue
        output_bias = changes["attention_bias"] and draw.random() < 0.5
        return Case(f"drawn by seed {seed}", changes, {"output_bias": output_bias})


def measure(case: Case, folder: Path, seed: int = 0) -> float:
    """NMSE of llama.cpp's logits at F32 against the float64 reference; works inside `folder`."""
    checkpoint, gguf = folder / "checkpoint", folder / "f32.gguf"
    make_checkpoint(BASE | case.changes, checkpoint, seed=seed, dtype="float32", **case.options)
    if case.edit:
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        case.edit(tensors)
        save_file(tensors, path)
    convert(checkpoint, gguf, outtype="f32")
    config = ModelConfig.from_folder(checkpoint)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, TOKENS, dtype=np.int32)
    weights = dict(CheckpointWeights(checkpoint, torch.float64))
    reference = forward(config, weights, torch.from_numpy(tokens).long()[None])[0]
    with Engine(gguf, TOKENS) as engine:
        logits = engine.logits(tokens)
    comparison = Comparison()
    comparison.add(reference.numpy()[:-1], logits[:-1], tokens[1:])
    return comparison.result().nmse.value
