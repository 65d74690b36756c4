"""Does every key that llama.cpp reads have the type and the range that it takes?

llama.cpp asks for exact types, and hardly for ranges: a factor that is no number gives a model that
answers nonsense, and some numbers end the process much later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megrez_gguf.format.reader import RawValue
from megrez_llama import ARCH

_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "arr", "u64", "i64", "f64")


@dataclass(frozen=True, slots=True)
class Rule:
    """GGUF types that a value may have, and what is expected of it besides."""

    types: tuple[str, ...]
    fits: Callable[[Any], bool] = lambda value: True
    expected: str = ""


def _between(least: int, most: int) -> Rule:
    return Rule(("u32",), lambda n: least <= n <= most, f"{least} to {most}")


# How llama.cpp saves a choice that was left to the program.
_UNSET = (1 << 32) - 1

_TEXT = Rule(("str",))
_FLAG = Rule(("bool",))
_NUMBER = Rule(("u32",))
_SIZE = _between(1, (1 << 31) - 1)
_BY_LAYER = ("u32", "arr")
_FINITE = Rule(("f32",), math.isfinite, "a finite number")
_POSITIVE = Rule(("f32",), lambda x: 0 < x < math.inf, "a finite number above 0")
_NOT_NEGATIVE = Rule(("f32",), lambda x: 0 <= x < math.inf, "a finite number, 0 or more")

# Not here: counts that `model_check` holds against the tensors and one another.
_ARCHITECTURE: dict[str, Rule] = {
    **dict.fromkeys(("context_length", "embedding_length", "vocab_size"), _SIZE),
    **dict.fromkeys(
        (
            "attention.key_length",
            "attention.value_length",
            "block_count",
            "embedding_length_out",
            "expert_count",
            "expert_gating_func",
            "expert_group_count",
            "expert_group_used_count",
            "expert_shared_count",
            "expert_shared_feed_forward_length",
            "experts_shared_frequency",
            "leading_dense_block_count",
            "moe_every_n_layers",
            "nextn_predict_layers",
            "rope.dimension_count",
            "rope.scaling.original_context_length",
        ),
        _NUMBER,
    ),
    **dict.fromkeys(
        (
            "attention.head_count",
            "attention.head_count_kv",
            "expert_feed_forward_length",
            "expert_used_count",
            "feed_forward_length",
        ),
        Rule(_BY_LAYER),
    ),
    **dict.fromkeys(("expert_weights_norm", "pre_gate", "rope.scaling.finetuned"), _FLAG),
    "attention.causal": Rule(("bool",), bool, "true: each token sees those before it"),
    "pooling_type": Rule(("u32",), lambda x: x in (0, _UNSET), f"0, or {_UNSET} for none"),
    "attention.layer_norm_rms_epsilon": Rule(("f32",), lambda x: x < math.inf, "a finite number"),
    "expert_weights_scale": _FINITE,
    "rope.freq_base": _POSITIVE,
    "rope.scale_linear": _NOT_NEGATIVE,
    "rope.scaling.type": _TEXT,
    "rope.scaling.factor": _NOT_NEGATIVE,
    "rope.scaling.attn_factor": _POSITIVE,
    "rope.scaling.yarn_beta_fast": _FINITE,
    "rope.scaling.yarn_beta_slow": _FINITE,
    "rope.scaling.yarn_ext_factor": _FINITE,
    "rope.scaling.yarn_attn_factor": _FINITE,
    "rope.scaling.yarn_log_multiplier": _FINITE,
}
RULES: dict[str, Rule] = {
    **{f"{ARCH}.{key}": rule for key, rule in _ARCHITECTURE.items()},
    "general.architecture": _TEXT,
    "general.name": _TEXT,
    "general.file_type": _NUMBER,
    "split.no": Rule(("u16",)),
    "split.count": Rule(("u16",)),
    "split.tensors.count": Rule(("i32",)),
    "tokenizer.chat_template": _TEXT,
    **{
        f"tokenizer.ggml.{key}": rule
        for rule, keys in (
            (_TEXT, ("model", "pre")),
            (_FLAG, ("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix")),
            (_FLAG, ("remove_extra_whitespaces",)),
            (_NUMBER, ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")),
            (_NUMBER, ("unknown_token_id", "seperator_token_id", "padding_token_id")),
            (_NUMBER, ("mask_token_id", "token_type_count")),
        )
        for key in keys
    },
}


def key_faults(values: Mapping[str, Any], raw: Mapping[str, RawValue]) -> Iterator[str]:
    """What is wrong with the types and ranges of the keys of a file, in its order."""
    for key, value in raw.items():
        rule = RULES.get(key)
        if rule is None:
            continue
        found = _TYPES[value.type]
        if found not in rule.types:
            yield f"key {key} has wrong type {found} but expected type {' or '.join(rule.types)}"
        elif not rule.fits(values[key]):
            shown = f"{values[key]:g}" if found == "f32" else str(values[key]).lower()
            yield f"{key.removeprefix(f'{ARCH}.')} = {shown}, expected {rule.expected}"
