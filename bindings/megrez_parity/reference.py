"""Megrez2 in plain torch: the forward pass every other implementation here is held against.

Functional, causal, without cache or fast path. Weights are looked up under their published names;
their dtype (float32 or float64) is the dtype of everything, router included. Differentiable.

What differs from a plain Llama (pre-norm RMSNorm, rotate-half RoPE, GQA, SwiGLU):

* `first_k_dense_replace` leading layers, and layers with `i % moe_layer_freq != 0`, are dense.
  The others add a routed mixture of experts and one shared MLP that every token passes.

What differs from a DeepSeek-V3 or GLM-4 mixture of experts:

* SHARED POOLS. `experts_shared_frequency` consecutive MoE layers use the experts of the first of
  them. Router, correction bias, shared MLP, norms and attention stay each layer's own.
* PRE-GATE. A router reads the state the PREVIOUS layer's FFN read (also when that layer is dense);
  the experts read this layer's. The first layer of all has no previous one and reads its own.
* Groups of experts that routing leaves out are masked with -inf, not 0: a correction bias may make
  every score of a kept group negative.

Shapes: B batch, S sequence, D hidden, V vocabulary, H query heads, G key-value heads, C head_dim,
E experts, K experts a token uses, N = B * S, F an MLP's inner width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion import layout
from megrez_gguf.errors import CheckpointError

Weights = Mapping[str, Tensor]
Trace = Callable[[str, int, Tensor], None]
Rope = tuple[Tensor, Tensor]


def forward(
    config: ModelConfig, weights: Weights, tokens: Tensor, trace: Trace | None = None
) -> Tensor:
    """Logits `[B, S, V]` for token ids `tokens` `[B, S]`; position 0 is the first column.

    `trace(name, layer, tensor)` sees the intermediates under llama.cpp's names: attn_norm, ffn_inp,
    ffn_norm, ffn_moe_out, ffn_shexp, ffn_out, l_out and (layer -1) result_norm `[B, S, D]`;
    ffn_moe_logits and ffn_moe_probs_biased, the scores that select, `[B, S, E]`; ffn_moe_topk and
    ffn_moe_weights `[B, S, K]`; kqv_out `[B, S, H * C]`, before o_proj; and before down projections
    ffn_swiglu and ffn_shexp_swiglu `[B, S, F]`, ffn_moe_swiglu `[tokens, F]` of one expert a call.
    Raises TypeError for weights of another dtype, KeyError naming a tensor that is missing.
    """
    emit = trace or (lambda name, layer, tensor: None)
    x = embed(weights, tokens)
    rope = rotary(config, tokens.shape[1], x.dtype, x.device)
    previous = None
    for layer in range(config.num_hidden_layers):
        x, previous = block(config, weights, layer, x, previous, rope, emit)
    return head(config, weights, x, emit)


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    """The residual stream `[B, S, D]` that enters the first layer."""
    table = weights["model.embed_tokens.weight"]
    if table.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the reference computes in float32 or float64, weights are {table.dtype}")
    return F.embedding(tokens, table)


def head(config: ModelConfig, weights: Weights, x: Tensor, emit: Trace) -> Tensor:
    """Logits `[B, S, V]` of the residual stream `x` `[B, S, D]` that leaves the last layer."""
    x = rms_norm(config, weights["model.norm.weight"], x)
    emit("result_norm", -1, x)
    tied = config.tie_word_embeddings or "lm_head.weight" not in weights
    return x @ weights["model.embed_tokens.weight" if tied else "lm_head.weight"].T


def block(
    config: ModelConfig,
    weights: Weights,
    layer: int,
    x: Tensor,
    previous: Tensor | None,
    rope: Rope,
    emit: Trace,
) -> tuple[Tensor, Tensor]:
    """One layer: the residual stream `[B, S, D]` after it, and the state its FFN read.

    `previous` is the state the previous layer's FFN read, None for the first layer.
    """
    prefix = f"model.layers.{layer}."
    h = rms_norm(config, weights[prefix + "input_layernorm.weight"], x)
    emit("attn_norm", layer, h)
    x = x + attention(config, weights, layer, h, rope, emit)
    emit("ffn_inp", layer, x)
    h = rms_norm(config, weights[prefix + "post_attention_layernorm.weight"], x)
    emit("ffn_norm", layer, h)
    if config.is_moe(layer):
        routed_on = previous if config.pre_gate and previous is not None else h
        ids, w = route(config, weights, layer, routed_on, emit)
        y = experts(config, weights, layer, h, ids, w, emit)
        emit("ffn_moe_out", layer, y)
        if config.n_shared_experts:
            entering = partial(emit, "ffn_shexp_swiglu", layer)
            shared = swiglu(weights, prefix + "mlp.shared_experts.", h, entering)
            emit("ffn_shexp", layer, shared)
            y = y + shared
    else:
        y = swiglu(weights, prefix + "mlp.", h, partial(emit, "ffn_swiglu", layer))
    emit("ffn_out", layer, y)
    x = x + y
    emit("l_out", layer, x)
    return x, h


def route(
    config: ModelConfig, weights: Weights, layer: int, state: Tensor, emit: Trace
) -> tuple[Tensor, Tensor]:
    """Expert ids and weights, both `[B, S, K]`, that layer `layer` gives to `state` `[B, S, D]`."""
    prefix = f"model.layers.{layer}.mlp.gate."
    logits = state @ weights[prefix + "weight"].T  # [B, S, E]
    emit("ffn_moe_logits", layer, logits)
    scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores  # the correction bias selects; it never weighs
    if config.has_correction_bias:
        choice = scores + weights[prefix + "e_score_correction_bias"]
    if config.n_group > 1:
        choice = limit_groups(choice, config.n_group, config.topk_group)
    emit("ffn_moe_probs_biased", layer, choice)
    ids = choice.topk(config.num_experts_per_tok, -1).indices
    emit("ffn_moe_topk", layer, ids)
    w = scores.gather(-1, ids)
    if config.norm_topk_prob:
        w = w / w.sum(-1, keepdim=True)
    w = w * config.routed_scaling_factor
    emit("ffn_moe_weights", layer, w)
    return ids, w


def limit_groups(choice: Tensor, groups: int, kept: int) -> Tensor:
    """`choice` `[B, S, E]` with -inf for all but the `kept` groups whose best two sum highest."""
    grouped = choice.view(*choice.shape[:-1], groups, -1)  # [B, S, E] -> [B, S, groups, E / groups]
    best = grouped.topk(2, -1).values.sum(-1).topk(kept, -1).indices  # [B, S, kept]
    dropped = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
    masked = grouped.masked_fill(dropped.unsqueeze(-1), -math.inf)
    return masked.view_as(choice)  # [B, S, groups, E / groups] -> [B, S, E]


def experts(
    config: ModelConfig,
    weights: Weights,
    layer: int,
    h: Tensor,
    ids: Tensor,
    w: Tensor,
    emit: Trace,
) -> Tensor:
    """Sum of `w * expert[ids](h)` `[B, S, D]`, experts taken from the pool `layer` uses.

    Only experts that some token uses are looked up, each once.
    """
    prefix = f"model.layers.{config.pool_layer(layer)}.mlp.experts."
    entering = partial(emit, "ffn_moe_swiglu", layer)
    states = h.flatten(0, 1)  # [B, S, D] -> [N, D]
    chosen = ids.flatten()  # [B, S, K] -> [N * K]
    order = chosen.argsort(stable=True)  # positions in `chosen`, sorted by expert
    token = order // ids.shape[-1]  # which of the N tokens each position belongs to
    counts = chosen.bincount(minlength=config.n_routed_experts)
    outputs, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            mine = states[token[start : start + count]]  # [count, D]
            outputs.append(swiglu(weights, f"{prefix}{expert}.", mine, entering))
        start += count
    weighted = torch.cat(outputs) * w.flatten()[order].unsqueeze(-1)  # [N * K, D]
    return torch.zeros_like(states).index_add(0, token, weighted).view_as(h)  # [N, D] -> [B, S, D]


def attention(
    config: ModelConfig, weights: Weights, layer: int, h: Tensor, rope: Rope, emit: Trace
) -> Tensor:
    """Causal grouped-query attention over `h` `[B, S, D]`."""
    prefix = f"model.layers.{layer}.self_attn."
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (linear(weights, f"{prefix}{name}_proj", h) for name in "qkv")
    batch, length, _ = h.shape
    # [B, S, heads * C] -> [B, S, heads, C] -> [B, heads, S, C]
    q = rotate(q.view(batch, length, heads, size).transpose(1, 2), rope)
    k = rotate(k.view(batch, length, kv_heads, size).transpose(1, 2), rope)
    v = v.view(batch, length, kv_heads, size).transpose(1, 2)
    # Query head j reads key-value head j // (H / G): [B, H, S, C] -> [B, G, H / G, S, C]
    q = q.view(batch, kv_heads, heads // kv_heads, length, size)
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # [B, G, S, C] -> [B, G, 1, S, C]
    scores = q @ k.transpose(-1, -2) / math.sqrt(size)  # [B, G, H / G, S, S]
    future = torch.ones(length, length, dtype=torch.bool, device=h.device).triu(1)
    out = scores.masked_fill(future, -math.inf).softmax(-1) @ v  # [B, G, H / G, S, C]
    # [B, G, H / G, S, C] -> [B, H, S, C] -> [B, S, H, C] -> [B, S, H * C]
    out = out.flatten(1, 2).transpose(1, 2).flatten(2)
    emit("kqv_out", layer, out)
    return linear(weights, prefix + "o_proj", out)


def rotary(
    config: ModelConfig, length: int, dtype: torch.dtype, device: torch.device | None = None
) -> Rope:
    """cos and sin `[S, C / 2]` for positions 0 to `length` - 1, computed in float64."""
    size, base, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    pair = torch.arange(0, size, 2, dtype=torch.float64, device=device)
    frequency = base ** (-pair / size)  # [C / 2]
    magnitude = 1.0
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    elif scaling is not None:

        def pair_turning(times: float) -> float:
            """The (fractional) pair that turns `times` times over the original context."""
            period = scaling.original_context_length / (times * 2 * math.pi)
            return size * math.log(period) / (2 * math.log(base))

        low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
        high = min(math.ceil(pair_turning(scaling.beta_slow)), size - 1)
        ramp = ((pair / 2 - low) / max(high - low, 0.001)).clamp(0, 1)  # 1: slow, interpolated
        frequency = frequency * (1 - ramp) + frequency / scaling.factor * ramp
        magnitude = scaling.attention_factor
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = torch.outer(position, frequency)  # [S, C / 2]
    return (angle.cos() * magnitude).to(dtype), (angle.sin() * magnitude).to(dtype)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotary embedding of `x` `[B, heads, S, C]`, pairing dimension i with i + C / 2."""
    cos, sin = rope
    a, b = x.chunk(2, -1)  # [B, heads, S, C] -> 2 x [B, heads, S, C / 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def rms_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps) * weight


def swiglu(weights: Weights, prefix: str, h: Tensor, entering: Callable[[Tensor], None]) -> Tensor:
    """The MLP `prefix` of `h` `[..., D]`; `entering` sees the `[..., F]` that down_proj reads."""
    gate, up, down = (weights[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    z = F.silu(h @ gate.T) * (h @ up.T)
    entering(z)
    return z @ down.T


def linear(weights: Weights, name: str, h: Tensor) -> Tensor:
    out = h @ weights[name + ".weight"].T
    return out + weights[name + ".bias"] if name + ".bias" in weights else out


class CheckpointWeights(Mapping[str, Tensor]):
    """What a checkpoint's model is made of under published names, read and upcast at each access.

    No copy is kept, so a checkpoint larger than memory can be run; `dict(...)` loads a small one.
    What was read stays mapped, and resident, until `reopen()`.
    Raises ConfigError and CheckpointError as `Checkpoint.open` and `layout.plan` do.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._stored = layout.plan(Checkpoint.open(folder)).weights
        self.reopen()

    def reopen(self) -> None:
        """Open the shards anew, which unmaps all that no tensor still uses."""
        self._open: dict[Path, Any] = {}
        for path in {tensor.shard.path for tensor in self._stored.values()}:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as e:
                raise CheckpointError(f"{path}: cannot be read as safetensors: {e}") from None

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(tensor.size for tensor in self._stored.values())

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        tensor: Tensor = self._open[stored.shard.path].get_tensor(stored.name)
        return tensor.to(self.dtype)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
