"""What is known of the fields of a `config.json` that no Megrez2 model has.

Some change the mathematics in ways that this project does not implement: for these, the values that
change nothing. Others never touch the forward pass. Both hold wherever a field stands.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megrez_gguf.checkpoint.settings import Settings
from megrez_gguf.text import clip

_OFF = (False, 0)
_ONE = (1,)
_NEVER: tuple[Any, ...] = ()

# Field -> the values that change nothing; null and empty never do, and of a list every element
# must be such a value. Texts are in lower case.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    # attention
    "alibi": _OFF,
    "attention_chunk_size": _OFF,
    "attention_logit_cap": _OFF,
    "attention_output_gate": _OFF,
    "attention_sink": _OFF,
    "attention_sink_bias": _OFF,
    "attention_sinks": _OFF,
    "attention_value_scale": _ONE,
    "attn_logit_softcapping": _OFF,
    "attn_output_gate": _OFF,
    "attn_temperature_tuning": _OFF,
    "add_full_attention_sink_bias": _OFF,
    "add_swa_attention_sink_bias": _OFF,
    "attention_in_multiplier": _ONE,
    "attention_out_multiplier": _ONE,
    "clip_qkv": _NEVER,
    "gated_attention": _OFF,
    "global_attn_every_n_layers": _ONE,
    "index_topk": _OFF,
    "interleaved_sliding_window": _OFF,
    "is_causal": (True,),
    "kv_lora_rank": _OFF,
    "layer_types": ("full_attention", "attention", "full"),
    "local_attention": _OFF,
    "num_kv_shared_layers": _OFF,
    "q_lora_rank": _OFF,
    "qk_clip": _OFF,
    "qk_layernorm": _OFF,
    "qk_norm": _OFF,
    "qkv_clip": _NEVER,
    "scale_attn_by_inverse_layer_idx": _OFF,
    "sliding_window": _OFF,
    "sliding_window_pattern": _ONE,
    "use_alibi": _OFF,
    "use_logn_attn": _OFF,
    "use_attention_gate": _OFF,
    "use_attention_sink": _OFF,
    "use_attention_sinks": _OFF,
    "use_bidirectional_attention": _OFF,
    "use_gated_attention": _OFF,
    "use_mla": _OFF,
    "use_qk_layernorm": _OFF,
    "use_qk_norm": _OFF,
    "use_sliding_window": _OFF,
    "qk_scale_factor": _ONE,
    "key_multiplier": _ONE,
    "value_residual": _OFF,
    # positions
    "interleaved_rope": _OFF,
    "is_neox_style": (True,),
    "mscale_all_dim": _OFF,
    "no_rope_layer_interval": _OFF,
    "no_rope_layers": _ONE,  # 1: a layer that has it
    "nope_layer_interval": _OFF,
    "nope_layers": _NEVER,
    "partial_rotary_factor": _ONE,
    "position_embedding_type": ("rope", "rotary", "rotary_half"),
    "rope_interleave": _OFF,
    "rope_interleaved": _OFF,
    "use_absolute_position_embeddings": _OFF,
    "use_dynamic_ntk": _OFF,
    "use_rope": (True,),
    "use_rotary_embedding": (True,),
    # norms, residuals, scales
    "apply_residual_connection_post_layernorm": _OFF,
    "embedding_multiplier": _ONE,
    "embedding_scale": _ONE,
    "final_logit_softcapping": _OFF,
    "hc_mult": _ONE,
    "lm_head_multiplier": _ONE,
    "logit_scale": _ONE,
    "logits_scaling": _ONE,
    "logits_soft_cap": _OFF,
    "mup_enabled": _OFF,
    "norm_after": _OFF,
    "norm_type": ("rmsnorm", "rms_norm", "rms"),
    "normalization_type": ("rmsnorm", "rms_norm", "rms"),
    "num_residual_streams": _ONE,
    "output_logit_soft_cap": _OFF,
    "output_multiplier": _ONE,
    "parallel_attn": _OFF,
    "parallel_residual": _OFF,
    "per_layer_config": _NEVER,
    "hidden_size_per_layer_input": _OFF,
    "residual_multiplier": _ONE,
    "residual_scale": _ONE,
    "rms_norm_add_unit_offset": _OFF,
    "router_logit_softcapping": _OFF,
    "moe_router_logit_softcapping": _OFF,
    "sandwich_norm": _OFF,
    "scale_depth": _NEVER,
    "scale_emb": _ONE,
    "scale_embedding": _OFF,
    "scale_embeddings": _OFF,
    "normalize_embeddings": _OFF,
    "post_norm": _OFF,
    "softcap": _OFF,
    "use_parallel_residual": _OFF,
    "use_post_norm": _OFF,
    "use_sandwich_norm": _OFF,
    # feed-forward
    "activation_limit": _NEVER,
    "add_bias_linear": _OFF,
    "decoder_sparse_step": _ONE,
    "gated_mlp": (True,),
    "interleave_moe_layer_step": _ONE,
    "lm_head_bias": _OFF,
    "mlp_bias": _OFF,
    "mlp_multipliers": _ONE,
    "mlp_only_layers": _NEVER,
    "moe_apply_router_weight_on_input": _OFF,
    "moe_bias": _OFF,
    "moe_latent_size": _OFF,
    "moe_layer_interval": _ONE,
    "router_bias": _OFF,
    "swiglu_alpha": _ONE,
    "swiglu_limit": _NEVER,
    "swiglu_limits": _NEVER,
    "swiglu_limits_shared": _NEVER,
    "use_bias": _OFF,
    "use_gated_mlp": (True,),
    "use_shared_expert_gate": _OFF,
    "zero_expert_num": _OFF,
    # other kinds of model
    "num_loops": _ONE,
    "total_ut_steps": _ONE,
    "add_cross_attention": _OFF,
    "audio_config": _NEVER,
    "cross_attention_hidden_size": _OFF,
    "is_encoder_decoder": _OFF,
    "pruned_heads": _NEVER,
    "vision_config": _NEVER,
}

# Field -> the switch without which it has no effect.
_SWITCHES = {
    "kv_lora_rank": "use_mla",
    "q_lora_rank": "use_mla",
    "qk_head_dim": "use_mla",
    "qk_nope_head_dim": "use_mla",
    "qk_rope_head_dim": "use_mla",
    "sliding_window": "use_sliding_window",
    "v_head_dim": "use_mla",
}

# Never touched by the forward pass at inference.
INERT = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_from_model_config",
        "_name_or_path",
        "activation_dropout",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "attn_pdrop",
        "auto_map",
        "aux_loss_alpha",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "embd_pdrop",
        "eos_token_id",
        "ep_size",
        "experts_implementation",
        "finetuning_task",
        "flash_attention",
        "fp32_lm_head",
        "fuse_attention_ffn",
        "fuse_attention_qkv",
        "gradient_checkpointing",
        "hidden_dropout",
        "hidden_dropout_prob",
        "id2label",
        "initializer_range",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_window_layers",
        "model_type",
        "moe_aux_loss_coef",
        "moe_router_bias_update_speed",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "resid_pdrop",
        "residual_dropout",
        "return_dict",
        "return_dict_in_generate",
        "router_aux_loss_coef",
        "router_bias_update_speed",
        "router_jitter_noise",
        "router_z_loss_coef",
        "sep_token_id",
        "seq_aux",
        "task_specific_params",
        "tie_encoder_decoder",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "tpu_num_cores",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_tiled_mlp",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_cache_kernel",
        "use_cache_quantization",
        "use_flash_attention",
        "use_flash_attention_2",
        "use_flash_attn",
        "use_flash_attn_2",
        "use_return_dict",
    }
)

# Objects that say how weights are packed, and by what.
_QUANTIZED = ("compression_config", "quantization", "quantization_config")


def review(settings: Settings, wanted: Mapping[str, float]) -> tuple[str, ...]:
    """Ask about every field that was not read; where those stand that nobody knows.

    `wanted` has the values that fields must have which follow from others, such as `rotary_dim`.
    A field that is harmless only because of another one is told of in `settings.remarks`. Raises
    ConfigError for a value that changes the mathematics, and for quantized weights.
    """
    unknown = []
    for name, where, value in settings.unread():
        if name in INERT:
            continue
        if name in _QUANTIZED:
            _check_quantized(settings, where, value)
        elif name in HARMLESS or name in wanted:
            _check(settings, wanted, name, where, value)
        else:
            unknown.append(where)
            for inner, place, held in _nested(where, value):
                if inner in HARMLESS or inner in wanted:
                    _check(settings, wanted, inner, place, held)
    return tuple(sorted(unknown))


def _check(
    settings: Settings, wanted: Mapping[str, float], name: str, where: str, value: Any
) -> None:
    supported = HARMLESS.get(name, (wanted.get(name),))
    if (name in wanted and _is_about(value, wanted[name])) or _is_harmless(value, supported):
        return
    if reason := _has_no_effect(settings, wanted, name, value):
        settings.remarks.append(f"{where} = {clip(value)} changes nothing: {reason}")
        return
    known = ", ".join(json.dumps(v) for v in (*supported, None))
    settings.fail(
        where, f"{clip(value)} is not supported: it changes the maths; supported: {known}"
    )


def _is_harmless(value: Any, supported: Collection[Any]) -> bool:
    if isinstance(value, list):
        return all(v is None or _is_harmless(v, supported) for v in value)
    if isinstance(value, str):
        return value.lower() in supported
    return value is None or value == {} or value in supported


def _is_about(value: Any, wanted: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value - wanted) <= 1e-6 * abs(wanted)


def _has_no_effect(
    settings: Settings, wanted: Mapping[str, float], name: str, value: Any
) -> str | None:
    """Why a harmful value does nothing in this model; None where it does."""
    switch = _SWITCHES.get(name)
    if switch and settings.values(switch) and not any(settings.values(switch)):
        return f"{switch} is false"
    if name == "sliding_window":
        if any(settings.values("layer_types")):  # which `_check` has found to be of full attention
            return "every layer has full attention"
        if type(value) is int and value >= max(settings.values("max_position_embeddings")):
            return "max_position_embeddings is no more"
    return None


def _nested(where: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """(name, where, value) of all fields of objects inside of `value`."""
    pending = [(where, value)]
    while pending:
        place, node = pending.pop()
        if isinstance(node, list):
            pending += [(f"{place}[{i}]", v) for i, v in enumerate(node)]
        elif isinstance(node, dict):
            for key, held in node.items():
                yield key, f"{place}.{key}", held
                pending.append((f"{place}.{key}", held))


def _check_quantized(settings: Settings, where: str, value: Any) -> None:
    if not value:
        return
    found = value if isinstance(value, dict) else {}
    method = found.get("quant_method") or found.get("format") or found.get("quant_algo")
    settings.fail(
        where,
        f"the weights are quantized ({clip(method) if method else 'method not named'}) and cannot "
        "be quantized again without loss; start from the BF16 or F16 checkpoint they were made "
        "from, or dequantize them with transformers (`model.dequantize()`, then "
        "`save_pretrained(OUT)`). If they are of full precision already, as after a merge, remove "
        "this field",
    )
