"""The key-values of the GGUF, other than the tokenizer's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.rope import RopeScaling
from megrez_gguf.format.writer import KeyValues
from megrez_llama import ARCH

if TYPE_CHECKING:
    from megrez_gguf.checkpoint.location import Location
    from megrez_gguf.checkpoint.shards import Checkpoint

# Prefix of the keys that say how a file was made; llama.cpp does not read them.
OURS = "megrez-gguf"
# "NAME TYPE SHA256" of every tensor. The type tells a record that another program's quantizer has
# copied from the file it read.
HASHES = f"{OURS}.sha256"
RECIPE = f"{OURS}.recipe"


GATING = {"softmax": 1, "sigmoid": 2}

# The model card's advice, for a checkpoint that brings no generation_config.json.
DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.9}
# generation_config.json's name -> the key llama.cpp reads, and its type.
_SAMPLING_KEYS: dict[str, tuple[str, type[int] | type[float]]] = {
    "temperature": ("general.sampling.temp", float),
    "top_p": ("general.sampling.top_p", float),
    "top_k": ("general.sampling.top_k", int),
    "min_p": ("general.sampling.min_p", float),
    "repetition_penalty": ("general.sampling.penalty_repeat", float),
}


def key_values(checkpoint: Checkpoint, parameters: int) -> dict[str, Any]:
    """All keys but the tokenizer's. `parameters` counts the stored weights."""
    config, documents = checkpoint.config, checkpoint.documents
    return {
        **general(config, documents.config, checkpoint.place, parameters),
        **architecture(config),
        **sampling(documents.generation),
    }


def architecture(config: ModelConfig) -> KeyValues:
    """Every hyper-parameter llama.cpp needs to run the model."""
    c = config
    values: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "leading_dense_block_count": c.first_k_dense_replace,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": c.rms_norm_eps,
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": c.rope_theta,
        "expert_count": c.n_routed_experts,
        "expert_used_count": c.num_experts_per_tok,
        "expert_shared_count": c.n_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_shared_feed_forward_length": c.shared_intermediate_size,
        "expert_gating_func": GATING[c.scoring_func],
        "expert_weights_norm": c.norm_topk_prob,
        "expert_weights_scale": c.routed_scaling_factor,
        "expert_group_count": c.n_group,
        "expert_group_used_count": c.topk_group,
        "experts_shared_frequency": c.experts_shared_frequency,
        "pre_gate": c.pre_gate,
    }
    if c.moe_layer_freq != 1:
        values["moe_every_n_layers"] = c.moe_layer_freq
    if c.rope_scaling is not None:
        values |= _rope_scaling(c.rope_scaling)
    return {f"{ARCH}.{key}": value for key, value in values.items()}


def _rope_scaling(scaling: RopeScaling) -> KeyValues:
    values: dict[str, Any] = {
        "rope.scaling.type": scaling.kind,
        "rope.scaling.factor": scaling.factor,
        "rope.scaling.original_context_length": scaling.original_context_length,
    }
    if scaling.kind == "yarn":
        # ggml's rope multiplies cos and sin by 1 + 0.1 ln(factor) on its own, and llama.cpp by
        # attn_factor on top of that, so the key carries what is left of the factor wanted.
        own = 1.0 + 0.1 * math.log(scaling.factor)
        values["rope.scaling.attn_factor"] = scaling.attention_factor / own
        values["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        values["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return values


def general(
    config: ModelConfig, raw_config: Mapping[str, Any], place: Location, parameters: int
) -> KeyValues:
    """`general.*`: name, size, license and source, as far as `raw_config` and `place` tell.

    Our own key has the commit it was fetched at, if that is known. `parameters` counts the stored
    weights.
    """
    folder, repository = place.path, place.repository or _repository(raw_config)
    name = repository.rpartition("/")[2] if repository else folder.resolve().name
    values: dict[str, Any] = {
        "general.architecture": ARCH,
        "general.type": "model",
        "general.name": name,
    }
    match = re.fullmatch(r"(.+?)[-_ ](\d+x[\d.]+[MB](?:-A[\d.]+[MB])?)(?:[-_ ](.+))?", name)
    if match:
        values["general.basename"], values["general.size_label"] = match[1], match[2]
        if match[3]:
            values["general.finetune"] = match[3]
    else:
        values["general.basename"] = name
        values["general.size_label"] = size_label(config, parameters)
    front = front_matter(folder / "README.md")
    for key in ("license", "license_name", "license_link"):
        if front.get(key):
            values[f"general.{key.replace('_', '.')}"] = front[key]
    if repository:
        values["general.source.url"] = place.url or f"https://huggingface.co/{repository}"
    if place.hub:
        values[f"{OURS}.source"] = f"{place.hub}:{place.repository}@{place.revision}"
    if repository and place.hub != "modelscope":
        values["general.source.huggingface.repository"] = repository
    values["general.quantization_version"] = 2
    return values


def sampling(generation: Mapping[str, Any]) -> KeyValues:
    """Sampling defaults from a parsed `generation_config.json`, else the model card's."""
    chosen = {k: generation.get(k) for k in _SAMPLING_KEYS}
    if generation.get("do_sample") is False:
        chosen = {"temperature": 0.0}
    elif all(chosen[k] is None for k in DEFAULT_SAMPLING):
        chosen |= DEFAULT_SAMPLING
    values: dict[str, Any] = {}
    for name, value in chosen.items():
        key, kind = _SAMPLING_KEYS[name]
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            values[key] = kind(value)
    return values


def size_label(config: ModelConfig, parameters: int) -> str:
    """How often each pool is used, weights stored, weights a token meets: "3x7.5B-A3.0B"."""
    return (
        f"{config.experts_shared_frequency}x{_rounded(parameters)}"
        f"-A{_rounded(active_parameters(config, parameters))}"
    )


def active_parameters(config: ModelConfig, parameters: int) -> int:
    """Weights used for one token, a shared pool counted once per layer that routes into it.

    Embeddings and output are left out, as the model card leaves them out of its "A3B".
    """
    vocab = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    pools = len(config.pool_layers) * config.n_routed_experts * expert
    return parameters - vocab - pools + len(config.moe_layers) * config.num_experts_per_tok * expert


def _rounded(count: int) -> str:
    for scale, unit in ((1e9, "B"), (1e6, "M")):
        if count >= scale:
            return f"{count / scale:.1f}{unit}"
    return f"{count / 1e3:.1f}K"


def front_matter(readme: Path) -> dict[str, str]:
    """Top-level `key: value` lines of a README's front matter; empty if there is none."""
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    if not match:
        return {}
    pairs = re.findall(r"^([A-Za-z_]+):[ \t]*(\S[^\r\n]*?)[ \t]*\r?$", match[1], re.MULTILINE)
    return {key: value.strip("\"'") for key, value in pairs}


def _repository(raw_config: Mapping[str, Any]) -> str | None:
    """`owner/name` on the Hugging Face hub, as its library leaves it in a configuration."""
    name = raw_config.get("_name_or_path")
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*", name):
        return name
    return None
