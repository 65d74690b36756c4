"""Megrez2 for transformers: Llama around GLM-4's experts, and what makes Megrez2 different.

Attention, norms, cache, masks, generation and the loop over layers are Llama's, experts and MLPs
GLM-4's. What is ours is where a router looks (PRE-GATE) and whose experts a layer uses (SHARED
POOLS); `megrez_parity.reference` tells both at length. A pool is a module of the first layer that
uses it, so weights have the names that the checkpoint gives them.

Llama's loop hands layers one tensor and keeps one. So both come in a `Carried`, one for each call
of the model, and a layer takes out what its `forward` needs: as arguments of its own, which is what
recomputing a layer for gradients keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts, Glm4MoeMLP
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.output_capturing import OutputRecorder

from megrez_engines.configuration import MegrezMoeConfig
from megrez_engines.routing import at_least_float32, select
from megrez_gguf.errors import CheckpointError


@dataclass(slots=True)
class Carried:
    """What layers of one call tell each other."""

    pools: dict[int, nn.Module]  # by the layer that owns it
    state: Tensor | None = None  # what the layer before read in its FFN, `[B, S, D]`


class MegrezMoeRouter(nn.Module):
    """A layer's own router and correction bias."""

    def __init__(self, config: MegrezMoeConfig) -> None:
        super().__init__()
        facts = config.facts()
        self.rule = config.rule()
        self.weight = nn.Parameter(torch.empty(facts.n_routed_experts, facts.hidden_size))
        if facts.has_correction_bias:
            bias = torch.zeros(facts.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        else:
            self.e_score_correction_bias = None

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits `[N, E]`, weights `[N, K]` and ids `[N, K]`, as `select`, for `state` `[N, D]`."""
        logits = nn.functional.linear(at_least_float32(state), at_least_float32(self.weight))
        weights, ids = select(self.rule, logits, self.e_score_correction_bias)
        return logits, weights, ids


class MegrezMoeMLP(nn.Module):
    """Routed experts, of this layer's pool or of an earlier one's, and the shared MLP."""

    def __init__(self, config: MegrezMoeConfig, layer_idx: int) -> None:
        super().__init__()
        facts = config.facts()
        self.owner = facts.pool_layer(layer_idx)
        self.gate = MegrezMoeRouter(config)
        if self.owner == layer_idx:
            self.experts = Glm4MoeExperts(config)
        self.shared_experts = None
        if facts.n_shared_experts:
            self.shared_experts = Glm4MoeMLP(config, facts.shared_intermediate_size)

    def forward(self, h: Tensor, routed_on: Tensor, experts: nn.Module) -> Tensor:
        """`[B, S, D]` of this layer's state `h`, by experts chosen for the state `routed_on`."""
        _, weights, ids = self.gate(routed_on.flatten(0, -2))
        y: Tensor = experts(h.flatten(0, -2), ids, weights.to(h.dtype)).view_as(h)
        return y if self.shared_experts is None else y + self.shared_experts(h)


class MegrezMoeDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    def __init__(self, config: MegrezMoeConfig, layer_idx: int) -> None:
        super().__init__()
        facts = config.facts()
        self.pre_gate = facts.pre_gate
        self.self_attn = LlamaAttention(config, layer_idx)
        moe = facts.is_moe(layer_idx)
        self.mlp = MegrezMoeMLP(config, layer_idx) if moe else Glm4MoeMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, hidden_states: Tensor, *, carried: Carried, **kwargs: Any) -> Tensor:
        """The residual stream `[B, S, D]` after the layer; `kwargs` are what attention takes."""
        if isinstance(self.mlp, MegrezMoeMLP):
            kwargs["experts"] = carried.pools[self.mlp.owner]
        after, carried.state = super().__call__(hidden_states, carried.state, **kwargs)
        return after  # type: ignore[no-any-return]

    def forward(
        self,
        hidden_states: Tensor,
        previous: Tensor | None,
        experts: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream `[B, S, D]` after the layer, and the state that its FFN read."""
        out, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + out
        h = self.post_attention_layernorm(hidden_states)
        if experts is None:
            return hidden_states + self.mlp(h), h
        routed_on = previous if self.pre_gate and previous is not None else h
        return hidden_states + self.mlp(h, routed_on, experts), h


class MegrezMoePreTrainedModel(LlamaPreTrainedModel):  # type: ignore[misc]
    config: MegrezMoeConfig
    config_class = MegrezMoeConfig
    _no_split_modules = ("MegrezMoeDecoderLayer",)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": MegrezMoeDecoderLayer,
        "attentions": LlamaAttention,
        "router_logits": OutputRecorder(MegrezMoeRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: MegrezMoeConfig, *args: Any, **kwargs: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config, *args, **kwargs)  # and not LlamaModel's
        # Layers for speculative decoding, which do without.
        first, beyond = config.num_hidden_layers, config.num_nextn_predict_layers or 0
        ignored = [rf"model\.layers\.{i}\." for i in range(first, first + beyond)]
        self._keys_to_ignore_on_load_unexpected = ignored

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As transformers', which would make up what is missing; here that is a CheckpointError."""
        where = args[0] if args else "the checkpoint"
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except RuntimeError as e:
            if "report" not in str(e):  # in which transformers tells what does not fit
                raise
            raise CheckpointError(
                f"{where}: experts are missing, or tensors have other shapes than config.json says "
                "(transformers' report names them): download it again, and compare it with its "
                "index by megrez-gguf verify"
            ) from e
        # The family's code has biases here as well, and published weights need not.
        lacking = (name for name in info["missing_keys"] if not name.endswith("o_proj.bias"))
        if missing := sorted(lacking):
            raise CheckpointError(
                f"{where}: {len(missing)} tensors are missing, {missing[0]} first: download it "
                "again, and compare it with its index by megrez-gguf verify"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # transformers looks for it in this file, and GLM-4's experts have it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MegrezMoeRouter):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, Glm4MoeExperts):
            nn.init.normal_(module.gate_up_proj, std=std)
            nn.init.normal_(module.down_proj, std=std)


class MegrezMoeModel(MegrezMoePreTrainedModel, LlamaModel):  # type: ignore[misc]
    def __init__(self, config: MegrezMoeConfig) -> None:
        MegrezMoePreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            MegrezMoeDecoderLayer(config, i) for i in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As `LlamaModel.forward`."""
        pools = {
            i: layer.mlp.experts
            for i, layer in enumerate(self.layers)
            if isinstance(layer.mlp, MegrezMoeMLP) and layer.mlp.owner == i
        }
        return super().forward(*args, carried=Carried(pools), **kwargs)


class MegrezMoeForCausalLM(MegrezMoePreTrainedModel, LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: MegrezMoeConfig) -> None:
        MegrezMoePreTrainedModel.__init__(self, config)
        self.model = MegrezMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
