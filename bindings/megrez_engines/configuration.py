"""`MegrezMoeConfig`: `config.json` as transformers and vLLM hold it.

Fields, defaults and checks are those of the converter (`megrez_gguf.checkpoint.config`): what one
takes the other takes, and what one refuses the other refuses in the same words.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from megrez_engines.routing import Rule
from megrez_gguf.checkpoint.config import ARCHITECTURE, MODEL_TYPE, ModelConfig
from megrez_gguf.errors import ConfigError


@strict
class MegrezMoeConfig(PreTrainedConfig):  # type: ignore[misc]
    """A Megrez2 model; the defaults are Megrez2-3x7B-A3B's.

    Raises ConfigError, as `ModelConfig.from_dict` does, for values that contradict each other or
    change the mathematics, and for a checkpoint whose weights are quantized.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ("past_key_values", "cache")
    attribute_map = {"num_local_experts": "n_routed_experts"}  # noqa: RUF012
    # Which weights are cut how for tensor parallelism, in transformers' words.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 128880
    hidden_size: int = 2048
    intermediate_size: int = 10944
    num_hidden_layers: int = 31
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    mlp_bias: bool = False
    moe_intermediate_size: int = 1408
    num_experts_per_tok: int = 6
    n_shared_experts: int | None = 4
    n_routed_experts: int = 64
    first_k_dense_replace: int = 1
    moe_layer_freq: int | list[int] | list[bool] = 1
    experts_shared_frequency: int = 3
    pre_gate: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 1.0
    n_group: int | None = 1
    topk_group: int | None = 1
    num_nextn_predict_layers: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("quantization_config"):
            raise ConfigError(
                "the checkpoint's weights are quantized (quantization_config), and Megrez2 is "
                "loaded from the published ones: download those, and for fewer bits convert them "
                "to GGUF with megrez-gguf convert, or quantize while loading"
            )
        super().__post_init__(**kwargs)
        facts = self.facts()
        self.head_dim = facts.head_dim
        self.num_key_value_heads = facts.num_key_value_heads

    def facts(self) -> ModelConfig:
        """The same, validated and typed, as the converter reads it."""
        values = self.to_dict()
        # Its defaults are transformers' own: nothing that was in the file.
        for name in ("architectures", "model_type", "quantization_config"):
            values.pop(name, None)
        return ModelConfig.from_dict({**values, "architectures": [ARCHITECTURE]})

    def rule(self) -> Rule:
        """How every router of the model chooses."""
        facts = self.facts()
        return Rule(
            facts.num_experts_per_tok,
            facts.scoring_func,
            facts.norm_topk_prob,
            facts.routed_scaling_factor,
            facts.n_group,
            facts.topk_group,
        )
