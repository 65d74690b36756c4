"""Every kind of Megrez2 that `config.json` can ask for, by what it changes in `TINY`."""

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "as published": {},
    "no pre-gate": {"pre_gate": False},
    "a pool a layer": {"experts_shared_frequency": 1},
    "one pool": {"experts_shared_frequency": 9},
    "no dense layer": {"first_k_dense_replace": 0},
    "dense layers between": {"moe_layer_freq": 2, "experts_shared_frequency": 1},
    "softmax": {"scoring_func": "softmax"},
    "no bias": {"topk_method": "greedy"},
    "scaled": {"routed_scaling_factor": 2.5},
    "not normalized": {"norm_topk_prob": False},
    "groups of experts": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "no shared experts": {"n_shared_experts": 0},
    "biases in attention": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
    "layers to speculate with": {"num_nextn_predict_layers": 1},
}
