"""Megrez2 for SGLang: Llama's attention, SGLang's fused experts, and what makes Megrez2 different.

* SHARED POOLS. A pool is one `FusedMoE`, which every layer of its group has as its own; what a
  layer chooses comes to it with each call.
* PRE-GATE. A layer hands the next one the state its FFN read. Between pipeline stages SGLang
  carries the residual stream and no more, so a stage computes that state anew, by the norm of the
  layer before its first.
* A stage that begins inside a group needs the group's pool as well: it is loaded there under the
  first layer of the group that the stage has. `SGLANG_PP_LAYER_PARTITION` avoids it.

What is not supported is refused by name in `_refuse`. Only SGLang imports this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat
from sglang.srt.layers.utils import PPMissingLayer
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.lora.utils import get_default_hidden_dim
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.model_loader.auto_loader import LLAMA_STACKED_MAPPING
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.models.llama import LlamaAttention, LlamaMLP
from sglang.srt.runtime_context import get_parallel, get_server_args
from sglang.srt.utils import add_prefix, make_pp_layers
from torch import Tensor, nn

from megrez_engines.configuration import MegrezMoeConfig
from megrez_engines.routing import at_least_float32, select
from megrez_engines.weights import complete
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import ConfigError

# The linear layers that adapters may be on; others are not tried.
LORA_MODULES = ("qkv_proj", "o_proj")
# A projection of an expert -> its place among SGLang's stacked ones.
EXPERT_PARTS = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


def _refuse(args: Any, facts: ModelConfig) -> None:
    """Raise ConfigError for what the server's arguments `args` ask and was never tried here."""
    for name, why in {
        "enable_eplb": "layers share experts",
        "enable_dp_attention": "it was never tried",
        "enable_two_batch_overlap": "it was never tried",
        "quantization": "Megrez2 is served in the checkpoint's own precision; for fewer bits "
        "convert it to GGUF with megrez-gguf convert, and serve that",
        "speculative_algorithm": "Megrez2 has no layers for speculative decoding in SGLang",
    }.items():
        if getattr(args, name, None):
            raise ConfigError(f"leave --{name.replace('_', '-')} out: {why}")
    if get_parallel().moe_ep_size > 1:
        raise ConfigError("leave --ep-size out: experts in parallel were never tried")
    size = get_parallel().tp_size
    for name in ("moe_intermediate_size", "intermediate_size", "num_attention_heads"):
        if getattr(facts, name) % size:
            raise ConfigError(f"--tp-size {size} does not divide {name} = {getattr(facts, name)}")


class MegrezMoeRouter(nn.Module):
    """A layer's own router and correction bias, in float32."""

    def __init__(self, config: MegrezMoeConfig, facts: ModelConfig, layer_id: int) -> None:
        super().__init__()
        self.rule = config.rule()
        shape = (facts.n_routed_experts, facts.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        self.e_score_correction_bias = None
        if facts.has_correction_bias:
            bias = torch.empty(facts.n_routed_experts, dtype=torch.float32)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)
        self.topk = TopK(
            facts.num_experts_per_tok,
            layer_id=layer_id,
            custom_routing_function=self._choose,
            output_format=TopKOutputFormat.STANDARD,  # kernels that route would have other rules
        )

    def _choose(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        weights, ids = select(self.rule, gating_output, self.e_score_correction_bias)
        return weights, ids.to(torch.int32)

    def forward(self, state: Tensor) -> Any:
        """SGLang's record of weights and ids `[N, K]`, as `select`, for `state` `[N, D]`."""
        return self.topk(state, nn.functional.linear(at_least_float32(state), self.weight))


class MegrezMoeMLP(nn.Module):
    """Routed experts and the shared MLP; `pool` is an earlier layer's, of the same group."""

    def __init__(
        self,
        config: MegrezMoeConfig,
        facts: ModelConfig,
        layer_id: int,
        pool: FusedMoE | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.gate = MegrezMoeRouter(config, facts, layer_id)
        self.experts = pool or FusedMoE(
            num_experts=facts.n_routed_experts,
            top_k=facts.num_experts_per_tok,
            hidden_size=facts.hidden_size,
            intermediate_size=facts.moe_intermediate_size,
            layer_id=layer_id,
            prefix=add_prefix("experts", prefix),
            inplace=False,  # the next layer's router reads what went in
        )
        self.shared_experts = None
        if facts.n_shared_experts:
            self.shared_experts = LlamaMLP(
                facts.hidden_size,
                facts.shared_intermediate_size,
                config.hidden_act,
                prefix=add_prefix("shared_experts", prefix),
                reduce_results=False,
            )

    def forward(self, h: Tensor, routed_on: Tensor) -> Tensor:
        """`[N, D]` of this layer's state `h`, by experts chosen for the state `routed_on`."""
        y: Tensor = self.experts(h, self.gate(routed_on))
        if self.shared_experts is not None:
            y = y + self.shared_experts(h)
        if get_parallel().tp_size > 1:
            y = tensor_model_parallel_all_reduce(y)
        return y


class MegrezMoeDecoderLayer(nn.Module):
    def __init__(
        self,
        config: MegrezMoeConfig,
        facts: ModelConfig,
        layer_id: int,
        pools: dict[int, tuple[int, FusedMoE]],
        prefix: str,
    ) -> None:
        super().__init__()
        self.pre_gate = facts.pre_gate
        rope = config.rope_parameters or {}
        self.self_attn = LlamaAttention(
            config,
            facts.hidden_size,
            facts.num_attention_heads,
            facts.num_key_value_heads,
            layer_id=layer_id,
            rope_theta=rope["rope_theta"],
            rope_scaling=rope,
            max_position_embeddings=facts.max_position_embeddings,
            prefix=add_prefix("self_attn", prefix),
            bias=facts.attention_bias,
        )
        self.mlp: nn.Module
        if facts.is_moe(layer_id):
            owner = facts.pool_layer(layer_id)
            holder, pool = pools.get(owner, (layer_id, None))
            self.mlp = MegrezMoeMLP(config, facts, layer_id, pool, add_prefix("mlp", prefix))
            pools[owner] = holder, self.mlp.experts
        else:
            self.mlp = LlamaMLP(
                facts.hidden_size,
                facts.intermediate_size,
                config.hidden_act,
                prefix=add_prefix("mlp", prefix),
            )
        self.input_layernorm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)

    def forward(
        self,
        positions: Tensor,
        x: Tensor,
        forward_batch: ForwardBatch,
        residual: Tensor | None,
        previous: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[N, D]` each: the FFN's output, the residual stream before it, and what the FFN read."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x, forward_batch)
        h, residual = self.post_attention_layernorm(x, residual)
        if not isinstance(self.mlp, MegrezMoeMLP):
            return self.mlp(h), residual, h
        routed_on = previous if self.pre_gate and previous is not None else h
        return self.mlp(h, routed_on), residual, h


class MegrezMoeModel(nn.Module):
    def __init__(self, config: MegrezMoeConfig, facts: ModelConfig, prefix: str) -> None:
        super().__init__()
        stage = get_parallel().pp_group
        tied = facts.tie_word_embeddings and stage.is_last_rank
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank or tied:
            self.embed_tokens = VocabParallelEmbedding(
                facts.vocab_size, facts.hidden_size, prefix=add_prefix("embed_tokens", prefix)
            )
        # By the layer whose pool it is: the layer that holds it on this stage, and the pool.
        pools: dict[int, tuple[int, FusedMoE]] = {}
        self.layers, self.start_layer, self.end_layer = make_pp_layers(
            facts.num_hidden_layers,
            lambda idx, prefix: MegrezMoeDecoderLayer(config, facts, idx, pools, prefix),
            prefix=add_prefix("layers", prefix),
        )
        self.holders = {owner: holder for owner, (holder, _) in pools.items()}
        self.norm_before: nn.Module = PPMissingLayer()
        if not stage.is_first_rank:
            self.norm_before = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)
        self.norm: nn.Module = PPMissingLayer()
        if stage.is_last_rank:
            self.norm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None,
        before: PPProxyTensors | None,
    ) -> Tensor | PPProxyTensors:
        """The last stage's normed states `[N, D]`, or what the next stage needs."""
        residual = previous = None
        if before is None:
            x = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        else:
            x, residual = before["hidden_states"], before["residual"]
            previous = self.norm_before(residual)
        for i in range(self.start_layer, self.end_layer):
            x, residual, previous = self.layers[i](positions, x, forward_batch, residual, previous)
        if not get_parallel().pp_group.is_last_rank:
            return PPProxyTensors({"hidden_states": x, "residual": residual})
        x, _ = self.norm(x, residual)
        return x


class MegrezMoeForCausalLM(nn.Module):
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, config: MegrezMoeConfig, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        facts = config.facts()
        _refuse(get_server_args(), facts)
        self.config, self.facts = config, facts
        self.model = MegrezMoeModel(config, facts, add_prefix("model", prefix))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_parallel().pp_group.is_last_rank:
            self.lm_head = self.model.embed_tokens
            if not facts.tie_word_embeddings:
                self.lm_head = ParallelLMHead(
                    facts.vocab_size, facts.hidden_size, prefix=add_prefix("lm_head", prefix)
                )
        self.logits_processor = LogitsProcessor(config)
        self.start_layer, self.end_layer = self.model.start_layer, self.model.end_layer
        self.has_weights = False

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_hidden_dim(self, module_name: str, layer_idx: int) -> tuple[int, int]:
        """Input and output of a layer for adapters. Raises ConfigError: it is not of attention."""
        if module_name not in LORA_MODULES:
            raise ConfigError(f"LoRA on {module_name} is not supported, only on attention")
        found: tuple[int, int] = get_default_hidden_dim(module_name, self.config, layer_idx)
        return found

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: ForwardBatch,
        input_embeds: Tensor | None = None,
        pp_proxy_tensors: PPProxyTensors | None = None,
    ) -> Any:
        x = self.model(input_ids, positions, forward_batch, input_embeds, pp_proxy_tensors)
        if not get_parallel().pp_group.is_last_rank:
            return x
        return self.logits_processor(input_ids, x, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Load this stage's share of `weights`, named as in a checkpoint.

        Raises CheckpointError naming what is missing, unless the engine was started without
        weights and gets them later, a part at a time.
        """
        if get_server_args().load_format != "dummy":
            weights = complete(weights, self.facts)
        parameters = dict(self.named_parameters())
        # The family's code has biases here as well, and published weights need not.
        if not self.has_weights:  # not at a later part
            for name in parameters:
                if name.endswith("o_proj.bias"):
                    parameters[name].data.zero_()
        self.has_weights = True
        for name, weight in self._here(weights):
            self._load(name, weight, parameters)

    def _here(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` that this stage has, under its own names."""
        model = self.model
        for name, weight in weights:
            parts = name.split(".")
            if parts[:2] == ["model", "layers"]:
                layer = int(parts[2])
                if layer == model.start_layer - 1 and parts[3] == "post_attention_layernorm":
                    yield "model.norm_before.weight", weight
                if parts[3:5] == ["mlp", "experts"]:
                    layer = model.holders.get(layer, -1)
                if not model.start_layer <= layer < model.end_layer:
                    continue
                parts[2] = str(layer)
            yield ".".join(parts), weight

    @staticmethod
    def _load(name: str, weight: Tensor, parameters: dict[str, Any]) -> None:
        before, experts, rest = name.partition(".mlp.experts.")
        if experts:
            expert, part, _ = rest.split(".")
            stack, shard = EXPERT_PARTS[part]
            target = f"{before}{experts}{stack}_weight"
            parameters[target].weight_loader(
                parameters[target], weight, target, shard_id=shard, expert_id=int(expert)
            )
            return
        if LLAMA_STACKED_MAPPING.try_load(name, weight, parameters):
            return
        # Embeddings, their norm and the head are at the ends only, and a head may be tied.
        if name.startswith("model.layers.") or name in parameters:
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
