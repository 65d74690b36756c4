"""The key-values of the GGUF, other than the tokenizer's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import GENERATION
from megrez_gguf.checkpoint.rope import RopeScaling
from megrez_gguf.errors import ConfigError
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.storage.opening import opened
from megrez_gguf.text import clip
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
ROUNDING, FEEDBACK = f"{OURS}.rounding", "feedback"


GATING = {"softmax": 1, "sigmoid": 2}

# The model card's advice, for a checkpoint that brings no generation_config.json.
DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.9}
# generation_config.json's name -> the key llama.cpp reads, its type, the least and the most.
_SAMPLING_KEYS: dict[str, tuple[str, type[int] | type[float], float, float]] = {
    "temperature": ("general.sampling.temp", float, 0, 100),
    "top_p": ("general.sampling.top_p", float, 0, 1),
    "top_k": ("general.sampling.top_k", int, 0, 2**31 - 1),
    "min_p": ("general.sampling.min_p", float, 0, 1),
    "repetition_penalty": ("general.sampling.penalty_repeat", float, 0.01, 100),
}
# Others that change what a model says -> the value that changes nothing.
_NOT_CARRIED: Mapping[str, Any] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "frequency_penalty": 0,
    "guidance_scale": 1,
    "length_penalty": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "penalty_alpha": 0,
    "presence_penalty": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1,
}

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# Folders that hold one of many states of a model, and folders whose names tell of no model.
_STEP = re.compile(r"(?:checkpoint|ckpt|epoch|global_step|iter|step)[-_]?\d+", re.IGNORECASE)
_NO_NAME = re.compile(
    r"|[0-9a-f]{40}|[0-9a-f]{64}|(?:bf16|fp16|f16|fp32|f32)"
    r"|(?:best|final|hf|last|latest|merged)?[-_]?(?:checkpoints|ckpts?|models?|weights|safetensors)"
    r"|best|export(?:ed)?|final|hf|last|latest|main|master|merged|out(?:put)?s?|results?|snapshots?",
    re.IGNORECASE,
)
# Bytes of a README that are looked at.
_FRONT = 1 << 20
# Bytes: a name of 255, less what is put behind it.
_LONGEST_STEM = 200


def key_values(checkpoint: Checkpoint, parameters: int) -> dict[str, Any]:
    """All keys but the tokenizer's. `parameters` counts the stored weights."""
    config, documents = checkpoint.config, checkpoint.documents
    return {
        **general(config, checkpoint.place, parameters),
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


def general(config: ModelConfig, place: Location, parameters: int) -> KeyValues:
    """`general.*`: name, size, license, source and base models, as far as `place` tells.

    Our own key has the commit it was fetched at, if that is known. `parameters` counts the stored
    weights.
    """
    name = model_name(place)
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
    front = front_matter(place.path / "README.md")
    for key in ("license", "license_name", "license_link"):
        if front.get(key):
            values[f"general.{key.replace('_', '.')}"] = front[key][0]
    values |= _base_models(front.get("base_model", []), place)
    if place.hub:
        values["general.source.url"] = place.url
        values[f"{OURS}.source"] = f"{place.hub}:{place.repository}@{place.revision}"
    if place.hub == "huggingface":
        values["general.source.huggingface.repository"] = place.repository
    values["general.quantization_version"] = 2
    return values


def model_name(place: Location) -> str:
    """A printable name: the repository's if it is known, otherwise the folder's.

    Not `_name_or_path` in config.json, which says what a fine-tune was made from. A folder whose
    name tells nothing, such as `model` or a commit, is called after the one it lies in; `run/
    checkpoint-500` is `run-checkpoint-500`.
    """
    if place.repository:
        return place.repository.rpartition("/")[2]
    folder = place.path.resolve()
    steps = ""
    for path in (folder, *folder.parents):
        if _STEP.fullmatch(path.name):
            steps = f"-{path.name}{steps}"
        elif not _NO_NAME.fullmatch(path.name):
            # What lies so high is a disk's or a person's.
            if path != folder and (len(path.parts) < 3 or path.parent.name in ("home", "Users")):
                break
            return _printable(path.name) + steps
    return _printable(steps.lstrip("-") or folder.name or ARCH)


def file_stem(name: str) -> str:
    """A file name, less its end, for the model `name`: one that every file system takes."""
    stem = re.sub(r'[/\\:*?"<>|]', "_", _printable(name)).lstrip(".- ")
    return stem.encode("utf-8")[:_LONGEST_STEM].decode("utf-8", "ignore") or ARCH


def _printable(text: str) -> str:
    """`text` without control characters, and bytes that are not UTF-8."""
    return "".join(c if c.isprintable() else "_" for c in text)


def _base_models(names: Sequence[str], place: Location) -> KeyValues:
    """The repositories that the model card says the model was made from."""
    repositories = [name.removeprefix("https://huggingface.co/").rstrip("/") for name in names]
    found = [r for r in repositories if _REPOSITORY.fullmatch(r) and r != place.repository]
    values: dict[str, Any] = {"general.base_model.count": len(found)} if found else {}
    for i, repository in enumerate(found):
        owner, _, name = repository.partition("/")
        values[f"general.base_model.{i}.name"] = name
        values[f"general.base_model.{i}.organization"] = owner
        values[f"general.base_model.{i}.repo_url"] = f"https://huggingface.co/{repository}"
    return values


def sampling(generation: Mapping[str, Any]) -> KeyValues:
    """Sampling defaults from a parsed `generation_config.json`, else the model card's."""
    return _sampling(generation)[0]


def sampling_remarks(generation: Mapping[str, Any]) -> list[str]:
    """What a `generation_config.json` asks for that is left out of the file, and why."""
    return _sampling(generation)[1]


def _sampling(generation: Mapping[str, Any]) -> tuple[KeyValues, list[str]]:
    remarks = [
        f"{GENERATION}: {name} = {clip(generation[name])} is left out: GGUF has no key for it"
        for name, without in _NOT_CARRIED.items()
        if generation.get(name) not in (None, without, [], {})
    ]
    greedy = generation.get("do_sample")
    if greedy not in (None, True, False):
        remarks.append(f"{GENERATION}: do_sample = {clip(greedy)} is left out: not true or false")
    chosen: dict[str, Any] = {k: generation.get(k) for k in _SAMPLING_KEYS}
    if greedy is False:
        chosen = {"temperature": 0.0}
    elif all(chosen[k] is None for k in DEFAULT_SAMPLING):
        chosen |= DEFAULT_SAMPLING
    values: dict[str, Any] = {}
    for name, value in chosen.items():
        key, kind, low, high = _SAMPLING_KEYS[name]
        if name == "top_k" and value == -1:
            value = 0  # both mean all tokens, to vLLM and to llama.cpp
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and low <= value <= high and (kind is float or value == int(value)):
            values[key] = kind(value)
        elif value is not None:
            remarks.append(
                f"{GENERATION}: {name} = {clip(value)} is left out: expected "
                f"{'a number' if kind is float else 'an integer'} from {low} to {high:g}"
            )
    return values, remarks


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


def front_matter(readme: Path) -> dict[str, list[str]]:
    """Top-level keys of a README's front matter, `key: value` or a list; empty if there is none."""
    try:
        with opened(readme, ConfigError) as (file, _):
            text = file.read(_FRONT).decode("utf-8", "replace")
    except ConfigError:
        return {}
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    found: dict[str, list[str]] = {}
    values: list[str] = []
    for line in match[1].splitlines() if match else ():
        if entry := re.match(r"([A-Za-z_]+):(?:[ \t]+(.*))?$", line):
            values = found.setdefault(entry[1], [])
            values += _scalars(entry[2] or "")
        elif entry := re.match(r"[ \t]*-[ \t]+(.*)$", line):
            values += _scalars(entry[1])
    return found


def _scalars(text: str) -> list[str]:
    """The values in a line of YAML: none, one, or those of a `[list]`."""
    text = "" if text.startswith("#") else text.partition(" #")[0].strip()
    parts = text[1:-1].split(",") if text[:1] == "[" and text[-1:] == "]" else [text]
    return [_printable(part.strip().strip("\"'")) for part in parts if part.strip()]
