"""The tiny configuration, once; the others say what they change in it, and why.

Whole checkpoints have sizes of their own: `FULL`, `POCKET` and `SMALL` in `random_checkpoint`.
"""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

# Two leading dense layers, a full group of two and a short last one; every size is different.
TINY: Config = {
    "architectures": ["MegrezMoeForCausalLM"],
    "experts_shared_frequency": 2,
    "first_k_dense_replace": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "model_type": "megrez_moe",
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 3,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "pre_gate": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000.0,
    "vocab_size": 320,
}
# One dense layer, a full group of three, a short one of two. Rows of 256 take K-quants; 96 do not.
FOR_K_QUANTS: Config = TINY | {
    "experts_shared_frequency": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 256,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,
    "vocab_size": 384,
}
# To talk to: one dense layer and one group, room for a long answer, and letters to answer in.
TALKING: Config = TINY | {
    "experts_shared_frequency": 3,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 2048,
    "n_shared_experts": 2,
    "num_hidden_layers": 4,
    "vocab_size": 512,
}
