"""Which published name a stored tensor goes by, whoever saved it; and what a stranger's name means.

A name is translated only where it can mean one thing. Two stored tensors that come out under one
name are copies of one parameter: `copies.check` compares them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megrez_gguf.checkpoint.config import ModelConfig

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# What wraps a module and changes nothing in it: torch.compile, DDP, FSDP, checkpointing, and the
# text half of a model for more.
_WRAPPERS = {
    "_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "language_model",
}  # fmt: skip
# The parts of `model`, as a model without a head names them.
_BODY = ("layers", "embed_tokens", "norm")

# Names within a layer that other code gives to what is published under the second.
_ALIASES = tuple(
    (re.compile(rf"(model\.layers\.\d+\.){pattern}"), published)
    for pattern, published in (
        (r"mlp\.(?:\w+\.)?e_score_correction_bias", r"\1mlp.gate.e_score_correction_bias"),
        (r"mlp\.router\.weight", r"\1mlp.gate.weight"),
        (r"mlp\.shared_expert\.(.*)", r"\1mlp.shared_experts.\2"),
    )
)
_EXPERT = re.compile(r"model\.layers\.(0|[1-9]\d{0,8})\.mlp\.experts\.(.*)")

# Buffers that exporters saved and no forward pass reads: each is computed anew.
_BUFFERS = re.compile(
    r"(?:.*\.)?(?:(?:original_)?inv_freq|(?:cos|sin|cos_sin)_cached?|(?:rope|rotary_emb)\.freqs"
    r"|freqs_(?:cis|cos|sin)|masked_bias|causal_mask|position_ids|_extra_state)"
)

_PEFT = (
    "the model was saved with an adapter of PEFT in it, or it is the adapter alone; load it with "
    "PEFT and save the whole: model = model.merge_and_unload(); model.save_pretrained(FOLDER)"
)
_QUANTIZED = "; the converter starts from the original weights: use the unquantized checkpoint"
# What is in a name that belongs to no Megrez2 tensor, and what it tells.
_FOREIGN: tuple[tuple[str, str], ...] = (
    (
        r"lora_\w+|base_layer|base_model|modules_to_save|original_module|ia3_\w+|vera_\w+"
        r"|prompt_encoder",
        _PEFT,
    ),
    (r"qweight|qzeros|g_idx|scales|qscales?", "GPTQ or AWQ weights" + _QUANTIZED),
    (
        r"absmax|quant_map|quant_state|nested_\w+|SCB|weight_format|bitsandbytes__\w+",
        "bitsandbytes weights" + _QUANTIZED + ", or load it and call model.dequantize()",
    ),
    (
        r"\w*_scale(?:_inv|_2)?|weight_(?:packed|shape|zero_point|global_scale)|\w+_(?:scales|blocks)",
        "FP8 weights, or others with scales" + _QUANTIZED,
    ),
    (r"packed|codes|codebooks|trellis|suh|svh|q_weight", "quantized weights" + _QUANTIZED),
    (
        r"experts\.(?:gate_up_proj|gate_proj|up_proj|down_proj|w\d+)\w*(?:\.\w+)?",
        "all experts of a layer in one tensor, as transformers 5 and vLLM keep them in memory; "
        "split them into mlp.experts.N.{gate,up,down}_proj.weight, one [out, in] matrix each",
    ),
    (
        r"w[123]|block_sparse_moe",
        "an MLP named as in Mixtral; rename w1, w2 and w3 to gate_proj, down_proj and up_proj",
    ),
    (
        r"gate_up_proj|qkv_proj|qkv|W_pack|query_key_value",
        "several matrices in one, as serving code keeps them in memory; split it along its rows "
        "into the published ones",
    ),
    (
        r"gate\.bias|expert_bias|router\.bias|router_bias",
        "the bias that only selects experts, or one that is added to the router's logits: the name "
        "does not tell; if it is the former, rename it to mlp.gate.e_score_correction_bias",
    ),
    (r"shared_expert_gate", "a gate on shared experts, which Megrez2 has not"),
    (r"[qk]_norm|[qk]_layernorm", "a norm of queries or keys, which Megrez2 has not"),
    (r"v_head|value_head|score|classifier", "a head of a reward model or classifier; save the "
     "language model alone"),
    (r"vis\w*|mm_projector|multi_modal_projector|audio\w*|image\w*", "a part of a multi-modal "
     "model, which Megrez2 is not"),
    (r"exp_avg\w*|optimizer|state|step", "the state of an optimizer, not a weight"),
    (r"blk|token_embd|output_norm", "named as in a GGUF file; give the GGUF file itself, or the "
     "checkpoint it was made from"),
)  # fmt: skip


def is_buffer(name: str) -> bool:
    """Whether no forward pass reads the tensor of this stored name."""
    return _BUFFERS.fullmatch(name) is not None


def foreign(name: str) -> str | None:
    """What a stored name that is no Megrez2 tensor's tells of its maker; None if nothing."""
    for pattern, what in _FOREIGN:
        if re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name):
            return what
    return None


def published(stored: Sequence[str]) -> list[str]:
    """The published name of each stored one, or something else for what has none.

    What holds the whole model under one name is taken off, and so is what wraps a module.
    """
    parts = [[part for part in name.split(".") if part not in _WRAPPERS] for name in stored]
    outside = _container(parts)
    return [_alias(_plain(name[outside:])) for name in parts]


def expert_layer(name: str) -> int | None:
    """The layer whose expert a tensor of this published name is; None for no expert."""
    match = _EXPERT.fullmatch(name)
    return int(match[1]) if match else None


def shared(name: str, config: ModelConfig) -> str:
    """`name`, or that of the parameter which it is by `config`.

    The experts of a layer are those of its group's first, and a tied head is the embeddings.
    """
    if name == HEAD and config.tie_word_embeddings:
        return EMBEDDINGS
    match = _EXPERT.fullmatch(name)
    if match and (layer := int(match[1])) < config.num_hidden_layers and config.is_moe(layer):
        return f"model.layers.{config.pool_layer(layer)}.mlp.experts.{match[2]}"
    return name


def _container(names: Sequence[list[str]]) -> int:
    """How many of the first components all of `names` begin with, but for the last component."""
    outside = 0
    while names and all(
        len(name) > outside + 1
        and name[outside] == names[0][outside] != "model"
        and name[outside] not in _BODY
        for name in names
    ):
        outside += 1
    # PEFT's leaves open whether an adapter was merged.
    return 0 if names and "base_model" in names[0][:outside] else outside


def _plain(parts: list[str]) -> str:
    while parts[:1] == ["model"]:
        parts = parts[1:]
    return ".".join(["model"] * (parts[:1] != [] and parts[0] in _BODY) + parts)


def _alias(name: str) -> str:
    for pattern, target in _ALIASES:
        if match := pattern.fullmatch(name):
            return match.expand(target)
    return name
