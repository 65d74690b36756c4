"""Megrez2 for vLLM: Llama's attention, vLLM's fused experts, and what makes Megrez2 different.

* SHARED POOLS. vLLM gives every MoE layer a runner with weights, router and shared MLP. Here each
  layer has a runner of its own, and the runners of a group hold the same weights, once a device.
* PRE-GATE. A layer hands the next one the state its FFN read; between pipeline stages that is a
  third tensor beside the residual stream.
* A stage that begins inside a group needs the group's pool as well: it is loaded there under the
  first layer of the group that the stage has. `VLLM_PP_LAYER_PARTITION` avoids it.

What is not supported is refused by name in `_refuse`. Only vLLM imports this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.llama import LlamaAttention, LlamaMLP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from megrez_engines.configuration import MegrezMoeConfig
from megrez_engines.routing import Rule, select
from megrez_engines.weights import complete
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import ConfigError

# Where adapters may be: the rest of a layer is in the runner of its experts.
LORA_MODULES = ("qkv_proj", "o_proj")


def _refuse(vllm_config: VllmConfig, facts: ModelConfig) -> None:
    """Raise ConfigError for what vLLM offers and this model cannot do."""
    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    if parallel.enable_eplb:
        raise ConfigError("Megrez2 has no EPLB: layers share experts. Leave --enable-eplb out")
    if parallel.enable_expert_parallel and vllm_config.device_config.device_type == "cpu":
        raise ConfigError(
            "vLLM has no expert parallelism on CPUs: leave --enable-expert-parallel out"
        )
    if vllm_config.quant_config is not None:
        raise ConfigError(
            "Megrez2 is served in the checkpoint's own precision here: leave --quantization out. "
            "For fewer bits convert it to GGUF with megrez-gguf convert, and serve that"
        )
    if vllm_config.speculative_config is not None:
        raise ConfigError("Megrez2 has no layers for speculative decoding in vLLM")
    size = parallel.tensor_parallel_size
    for name in ("moe_intermediate_size", "intermediate_size"):  # vLLM looks at heads itself
        if getattr(facts, name) % size:
            raise ConfigError(
                f"--tensor-parallel-size {size} does not divide {name} = {getattr(facts, name)}"
            )
    if parallel.pipeline_parallel_size > facts.num_hidden_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size} is more than the model's "
            f"{facts.num_hidden_layers} layers"
        )
    if lora is not None:
        asked = set(lora.target_modules or LORA_MODULES)
        if others := asked - set(LORA_MODULES):
            raise ConfigError(
                f"LoRA on {', '.join(sorted(others))} is not supported, only on attention: "
                f"--lora-target-modules {' '.join(LORA_MODULES)}"
            )
        lora.target_modules = list(LORA_MODULES)


class MegrezRouter(BaseRouter):  # type: ignore[misc]
    """A layer's own choice among a pool's experts."""

    def __init__(self, rule: Rule, n_experts: int, bias: nn.Parameter | None) -> None:
        super().__init__(rule.num_experts_per_tok, n_experts)
        self.rule, self.bias = rule, bias

    @property
    def routing_method_type(self) -> RoutingMethodType:
        # Kernels that route by themselves would take the bias of the pool's first layer.
        return RoutingMethodType.Custom

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = select(self.rule, router_logits, self.bias)
        return weights, ids.to(torch.int32 if indices_type is None else indices_type)


@contextmanager
def _without_lora(vllm_config: VllmConfig) -> Iterator[None]:
    """Experts made here take no adapters, and the kernels for them are others."""
    kept, vllm_config.lora_config = vllm_config.lora_config, None
    try:
        yield
    finally:
        vllm_config.lora_config = kept


class MegrezMoeMLP(nn.Module):
    """Routed experts and the shared MLP; `pool` is an earlier layer's runner of the same group."""

    def __init__(self, config: MegrezMoeConfig, pool: nn.Module | None, prefix: str) -> None:
        super().__init__()
        facts = config.facts()
        n_experts = facts.n_routed_experts
        self.gate = GateLinear(
            facts.hidden_size,
            n_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=f"{prefix}.gate",
        )
        bias = None
        if facts.has_correction_bias:
            bias = nn.Parameter(torch.empty(n_experts, dtype=torch.float32), requires_grad=False)
            self.gate.e_score_correction_bias = bias
        self.shared_experts = None
        if facts.n_shared_experts:
            self.shared_experts = LlamaMLP(
                facts.hidden_size,
                facts.shared_intermediate_size,
                config.hidden_act,
                prefix=f"{prefix}.shared_experts",
                reduce_results=False,
            )
        held = {} if pool is None else {"routed_experts_cls": lambda *a, **k: pool.routed_experts}
        with _without_lora(get_current_vllm_config()):
            self.experts = FusedMoEFactory(
                num_experts=n_experts,
                top_k=facts.num_experts_per_tok,
                hidden_size=facts.hidden_size,
                intermediate_size=facts.moe_intermediate_size,
                router=MegrezRouter(config.rule(), n_experts, bias),
                router_logits_dtype=torch.float32,
                shared_experts=self.shared_experts,
                prefix=f"{prefix}.experts",
                **held,
            )
        if pool is not None:  # sizes are rounded in the configuration that weights were made by
            self.experts.moe_config = pool.moe_config

    def forward(self, h: Tensor, routed_on: Tensor) -> Tensor:
        """`[N, D]` of this layer's state `h`, by experts chosen for the state `routed_on`."""
        logits, _ = self.gate(routed_on.float())
        y: Tensor = self.experts(hidden_states=h, router_logits=logits)
        return y


class MegrezMoeDecoderLayer(nn.Module):
    def __init__(
        self, vllm_config: VllmConfig, pools: dict[int, tuple[int, nn.Module]], prefix: str
    ) -> None:
        super().__init__()
        config: MegrezMoeConfig = vllm_config.model_config.hf_config
        facts = config.facts()
        index = int(prefix.rsplit(".", 1)[-1])
        self.pre_gate = facts.pre_gate
        self.self_attn = LlamaAttention(
            config,
            facts.hidden_size,
            facts.num_attention_heads,
            facts.num_key_value_heads,
            facts.max_position_embeddings,
            bias=facts.attention_bias,
            bias_o_proj=facts.attention_bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp: nn.Module
        if facts.is_moe(index):
            _, pool = pools.get(facts.pool_layer(index), (index, None))
            self.mlp = MegrezMoeMLP(config, pool, f"{prefix}.mlp")
            pools.setdefault(facts.pool_layer(index), (index, self.mlp.experts))
        else:
            self.mlp = LlamaMLP(
                facts.hidden_size,
                facts.intermediate_size,
                config.hidden_act,
                prefix=f"{prefix}.mlp",
            )
        self.input_layernorm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)

    def forward(
        self, positions: Tensor, x: Tensor, residual: Tensor | None, previous: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`[N, D]` each: the FFN's output, the residual stream before it, and what the FFN read."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions=positions, hidden_states=x)
        h, residual = self.post_attention_layernorm(x, residual)
        if not isinstance(self.mlp, MegrezMoeMLP):
            return self.mlp(h), residual, h
        routed_on = previous if self.pre_gate and previous is not None else h
        return self.mlp(h, routed_on), residual, h


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": 0,
        "positions": -1,
        "intermediate_tensors": 0,
        "inputs_embeds": 0,
    }
)
class MegrezMoeModel(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0),
            ".shared_experts.up_proj": (".shared_experts.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MegrezMoeConfig = vllm_config.model_config.hf_config
        self.config = config
        facts = config.facts()
        _refuse(vllm_config, facts)
        stage = get_pp_group()
        tied = facts.tie_word_embeddings and stage.is_last_rank
        self.embed_tokens: nn.Module = PPMissingLayer()
        if stage.is_first_rank or tied:
            self.embed_tokens = VocabParallelEmbedding(
                facts.vocab_size, facts.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        # By the layer whose pool it is: the layer that holds it on this stage, and its runner.
        pools: dict[int, tuple[int, nn.Module]] = {}
        self.start_layer, self.end_layer, self.layers = make_layers(
            facts.num_hidden_layers,
            lambda prefix: MegrezMoeDecoderLayer(vllm_config, pools, prefix),
            prefix=f"{prefix}.layers",
        )
        self.holders = {owner: holder for owner, (holder, _) in pools.items()}
        self.norm: nn.Module = PPMissingLayer()
        if stage.is_last_rank:
            self.norm = RMSNorm(facts.hidden_size, eps=facts.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual", "previous"], facts.hidden_size
        )

    def embed_input_ids(self, input_ids: Tensor | None) -> Tensor:
        x: Tensor = self.embed_tokens(input_ids)
        return x

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | IntermediateTensors:
        residual = previous = None
        if get_pp_group().is_first_rank:
            x = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        else:
            assert intermediate_tensors is not None
            x, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
            previous = intermediate_tensors["previous"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x, residual, previous = layer(positions, x, residual, previous)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors(
                {"hidden_states": x, "residual": residual, "previous": previous}
            )
        x, _ = self.norm(x, residual)
        return x

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load this stage's share of `weights`, named as in a checkpoint less `model.`"""
        loader = AutoWeightsLoader(self)
        loaded: set[str] = loader.load_weights(self._here(weights), mapper=self.hf_to_vllm_mapper)
        return loaded

    def _here(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` without speculative layers, and pools where this stage has them."""
        for name, weight in weights:
            parts = name.split(".")
            if parts[0] == "layers":
                layer = int(parts[1])
                if layer >= self.config.num_hidden_layers:
                    continue
                if parts[2:4] == ["mlp", "experts"]:
                    if layer not in self.holders:
                        continue
                    parts[1] = str(self.holders[layer])
            yield ".".join(parts), weight


class MegrezMoeForCausalLM(nn.Module, SupportsPP, SupportsLoRA):  # type: ignore[misc]
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: MegrezMoeConfig = vllm_config.model_config.hf_config
        self.config = config
        self.in_parts = vllm_config.load_config.load_format == "dummy"
        self.weight_bytes: int | None = None  # known once there are weights
        self.model = MegrezMoeModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = ParallelLMHead(
                config.vocab_size, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            self.lm_head = head
            if config.tie_word_embeddings:
                self.lm_head = head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: Tensor | None) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits: Tensor | None = self.logits_processor(self.lm_head, hidden_states)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load this stage's share of `weights`, named as in a checkpoint; the parameters loaded.

        Raises CheckpointError naming what is missing, unless the engine was started without
        weights and gets them later, a part at a time.
        """
        if not self.in_parts:
            weights = complete(weights, self.config.facts())
        if self.config.tie_word_embeddings:
            weights = ((name, w) for name, w in weights if not name.startswith("lm_head."))
        parameters = dict(self.named_parameters())
        # The family's code has biases here as well, and published weights need not.
        optional = {name for name in parameters if name.endswith("o_proj.bias")}
        if self.weight_bytes is None:  # not at a later part
            for name in optional:
                parameters[name].data.zero_()
        loaded: set[str] = AutoWeightsLoader(self).load_weights(weights) | optional
        # Here, as kernels for CPUs put weights where no parameter shows them.
        self.weight_bytes = sum(parameter.nbytes for parameter in parameters.values())
        return loaded
