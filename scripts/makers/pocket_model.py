"""A fast bfloat16 forward pass of the pocket model, for training on a processor.

The same function as `megrez_parity.reference.forward` (the trainer asserts it), arranged for speed:
a pool's experts are kept as one wide MLP whose units are scaled by their expert's routing weight,
zero for experts not chosen. For small experts that is faster than gathering tokens by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import rms_norm, rotary, rotate

Weights = dict[str, Tensor]


def initial(config: ModelConfig, seed: int) -> Weights:
    """Master weights, float32. Experts of one pool are stacked: gate and up `[E, M, D]`, down
    `[E, D, M]`; everything else has its published name and shape. Routers' correction biases
    are entries too, and are not trained by gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, head = config.hidden_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    residual = (2 * config.num_hidden_layers) ** -0.5

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        shrunk: float = shape[-1] ** -0.5
        return torch.randn(*shape, generator=generator) * gain * shrunk

    weights = {
        "model.embed_tokens.weight": torch.randn(config.vocab_size, hidden, generator=generator),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(config.vocab_size, hidden, gain=0.5),
    }
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}{norm}.weight"] = torch.ones(hidden)
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            weights[f"{name}self_attn.{part}_proj.weight"] = normal(rows, hidden)
        weights[f"{name}self_attn.o_proj.weight"] = normal(hidden, queries, gain=residual)
        mlps = {"mlp.": (1, config.intermediate_size)}
        if config.is_moe(layer):
            experts = config.n_routed_experts
            weights[f"{name}mlp.gate.weight"] = normal(experts, hidden)
            weights[f"{name}mlp.gate.e_score_correction_bias"] = torch.zeros(experts)
            mlps = {"mlp.shared_experts.": (1, config.shared_intermediate_size)}
            if config.pool_layer(layer) == layer:
                mlps["mlp.experts."] = (experts, config.moe_intermediate_size)
        for mlp, (count, width) in mlps.items():
            many = (count,) if mlp == "mlp.experts." else ()
            weights[f"{name}{mlp}gate_proj.weight"] = normal(*many, width, hidden)
            weights[f"{name}{mlp}up_proj.weight"] = normal(*many, width, hidden)
            weights[f"{name}{mlp}down_proj.weight"] = normal(*many, hidden, width, gain=residual)
    return weights


def published(weights: Weights) -> Weights:
    """`weights` under their published names: stacks of experts become one tensor an expert."""
    out: Weights = {}
    for name, tensor in weights.items():
        if ".mlp.experts." in name:
            prefix, part = name.split(".mlp.experts.")
            for expert, one in enumerate(tensor):
                out[f"{prefix}.mlp.experts.{expert}.{part}"] = one
        else:
            out[name] = tensor
    return out


def forward(
    config: ModelConfig, weights: Weights, tokens: Tensor, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Logits `[B, S, V]` in `dtype`, and tokens given to each expert `[MoE layers, E]`.

    Matrix products run in `dtype`; the residual stream, norms and routers in float32.
    """
    low = {
        name: tensor.to(dtype) if tensor.ndim > 1 and ".gate.weight" not in name else tensor
        for name, tensor in weights.items()
    }
    rope = tuple(part.to(dtype) for part in rotary(config, tokens.shape[1], torch.float32))
    x = F.embedding(tokens, weights["model.embed_tokens.weight"])
    previous: Tensor | None = None
    loads = []
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = rms_norm(config, weights[name + "input_layernorm.weight"], x)
        x = x + _attention(config, low, name + "self_attn.", h.to(dtype), rope)
        state = rms_norm(config, weights[name + "post_attention_layernorm.weight"], x)
        h = state.to(dtype)
        if config.is_moe(layer):
            routed_on = previous if config.pre_gate and previous is not None else state
            scale, load = _route(config, low, name + "mlp.gate.", routed_on)
            loads.append(load)
            pool = f"model.layers.{config.pool_layer(layer)}.mlp.experts."
            y = _experts(low, pool, h, scale.to(dtype)) + _mlp(low, name + "mlp.shared_experts.", h)
        else:
            y = _mlp(low, name + "mlp.", h)
        x, previous = x + y, state
    x = rms_norm(config, weights["model.norm.weight"], x)
    return x.to(dtype) @ low["lm_head.weight"].T, torch.stack(loads)


def _route(config: ModelConfig, w: Weights, name: str, state: Tensor) -> tuple[Tensor, Tensor]:
    """Routing weights `[B, S, E]`, zero for experts not chosen, and how often each was chosen."""
    scores = (state @ w[name + "weight"].T).sigmoid()
    biased = scores.detach() + w[name + "e_score_correction_bias"]
    ids = biased.topk(config.num_experts_per_tok, -1).indices
    chosen = torch.zeros_like(scores).scatter(-1, ids, 1.0)
    kept = scores * chosen
    return kept / kept.sum(-1, keepdim=True) * config.routed_scaling_factor, chosen.sum((0, 1))


def _experts(w: Weights, pool: str, h: Tensor, scale: Tensor) -> Tensor:
    gate, up, down = (w[f"{pool}{part}_proj.weight"] for part in ("gate", "up", "down"))
    width = gate.shape[1]
    inner = F.silu(h @ gate.flatten(0, 1).T) * (h @ up.flatten(0, 1).T)  # [B, S, E * M]
    inner = (inner.view(*inner.shape[:-1], -1, width) * scale.unsqueeze(-1)).flatten(-2)
    out: Tensor = inner @ down.transpose(1, 2).flatten(0, 1)  # [E, D, M] -> [E, M, D] -> [E * M, D]
    return out


def _mlp(w: Weights, name: str, h: Tensor) -> Tensor:
    gate, up, down = (w[f"{name}{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T


def _attention(
    config: ModelConfig, w: Weights, name: str, h: Tensor, rope: tuple[Tensor, ...]
) -> Tensor:
    size = config.head_dim
    q, k, v = (
        (h @ w[f"{name}{part}_proj.weight"].T).view(*h.shape[:-1], -1, size).transpose(1, 2)
        for part in "qkv"
    )
    cos, sin = rope
    out = F.scaled_dot_product_attention(
        rotate(q, (cos, sin)), rotate(k, (cos, sin)), v, is_causal=True, enable_gqa=True
    )
    return out.transpose(1, 2).flatten(2) @ w[name + "o_proj.weight"].T
