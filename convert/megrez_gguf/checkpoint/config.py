"""`config.json` of a Megrez2 checkpoint as a frozen, validated dataclass.

Every hyper-parameter is read with its type, and is either required or has a default written here.
A field that would change the mathematics in a way this project does not implement is refused; a
field nobody here has heard of is reported in `ModelConfig.unknown_fields`, never silently dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from megrez_gguf.checkpoint.documents import CONFIG, Documents
from megrez_gguf.errors import ConfigError

ARCHITECTURE = "MegrezMoeForCausalLM"

# Architectures a user may plausibly hand us, and who converts them instead.
FOREIGN_ARCHITECTURES = {
    "LlamaForCausalLM": (
        "a plain Llama (Megrez-3B-Instruct is one); convert it with llama.cpp's own "
        "convert_hf_to_gguf.py"
    ),
}

# Fields that do not touch the forward pass at inference.
_INERT_FIELDS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "ep_size",
    "hidden_dropout",
    "initializer_range",
    "is_decoder",
    "max_window_layers",
    "model_type",
    "moe_router_bias_update_speed",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_attn_implementation",
    "_attn_implementation_internal",
}

# Fields that change the maths; only the listed values are what the architecture implements.
_FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, 1.0, None),
    "rope_interleave": (False, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "use_qk_norm": (False, None),
    "qk_layernorm": (False, None),
    "quantization_config": (None,),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Context extension of the rotary embedding.

    `linear` divides every position by `factor`. `yarn` is arXiv 2309.00071 as `transformers` has
    it: interpolation by `factor` of the slow dimensions only, and cos/sin times `attention_factor`.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context_length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Hyper-parameters of one Megrez2 model, under their published names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    first_k_dense_replace: int
    moe_layer_freq: int
    experts_shared_frequency: int
    pre_gate: bool
    scoring_func: Literal["sigmoid", "softmax"]
    topk_method: Literal["noaux_tc", "greedy"]
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    tie_word_embeddings: bool
    num_nextn_predict_layers: int = 0
    dtype: str | None = None
    unknown_fields: tuple[str, ...] = field(default=(), compare=False)

    @property
    def remarks(self) -> list[str]:
        """What the user should know of fields that were not understood."""
        names = ", ".join(self.unknown_fields)
        return [f"config.json has fields nobody here knows: {names}"] if names else []

    @property
    def shared_intermediate_size(self) -> int:
        """Width of the one MLP that holds a layer's shared experts; 0 when it has none."""
        return self.n_shared_experts * self.moe_intermediate_size

    @property
    def has_correction_bias(self) -> bool:
        """Whether every router carries `e_score_correction_bias` (`topk_method: noaux_tc`)."""
        return self.topk_method == "noaux_tc"

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` routes to experts, as opposed to a dense MLP."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def pool_layer(self, layer: int) -> int:
        """First layer of `layer`'s group: the one whose tensors hold the expert pool."""
        lead, period = self.first_k_dense_replace, self.experts_shared_frequency
        return lead + (layer - lead) // period * period

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self.is_moe(i))

    @property
    def pool_layers(self) -> tuple[int, ...]:
        """The layers that own an expert pool, ascending."""
        return tuple(sorted({self.pool_layer(i) for i in self.moe_layers}))

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder/config.json`. Raises ConfigError as `Documents.read` and `of` do."""
        return cls.of(Documents.read(folder))

    @classmethod
    def of(cls, documents: Documents) -> ModelConfig:
        """The configuration that `documents` hold. Raises ConfigError as `from_dict` does."""
        return cls.from_dict(documents.config, source=str(documents.folder / CONFIG))

    @classmethod
    def from_dict(cls, raw: Any, source: str = "config.json") -> ModelConfig:
        """Validate a parsed `config.json`; `source` names it in messages.

        Raises ConfigError: another architecture, a field missing or of the wrong type, values that
        contradict each other, or a value that changes the maths and is not supported.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        _check_architecture(raw, source)
        r = _Reader(raw, source)

        hidden = r.integer("hidden_size", minimum=1)
        layers = r.integer("num_hidden_layers", minimum=1)
        heads = r.integer("num_attention_heads", minimum=1)
        lead = r.integer("first_k_dense_replace", minimum=0)
        experts = r.integer("n_routed_experts", minimum=1)
        context = r.integer("max_position_embeddings", minimum=1)
        kv_heads = r.integer("num_key_value_heads", default=heads, minimum=1)
        head_dim = r.integer("head_dim", default=0, minimum=0)
        if head_dim == 0:
            if hidden % heads:
                r.fail(
                    "hidden_size", f"{hidden} is not a multiple of num_attention_heads = {heads}"
                )
            head_dim = hidden // heads
        theta, scaling = _rope(r, context)

        config = cls(
            vocab_size=r.integer("vocab_size", minimum=1),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            intermediate_size=r.integer("intermediate_size", minimum=1),
            moe_intermediate_size=r.integer("moe_intermediate_size", minimum=1),
            n_routed_experts=experts,
            num_experts_per_tok=r.integer("num_experts_per_tok", minimum=1),
            n_shared_experts=r.integer("n_shared_experts", default=0, minimum=0),
            first_k_dense_replace=lead,
            moe_layer_freq=r.integer("moe_layer_freq", default=1, minimum=1),
            experts_shared_frequency=r.integer("experts_shared_frequency", minimum=1),
            pre_gate=r.boolean("pre_gate"),
            scoring_func=r.choice("scoring_func", ("sigmoid", "softmax"), default="sigmoid"),
            topk_method=r.choice("topk_method", ("noaux_tc", "greedy"), default="noaux_tc"),
            norm_topk_prob=r.boolean("norm_topk_prob", default=True),
            routed_scaling_factor=r.number("routed_scaling_factor", default=1.0),
            n_group=r.integer("n_group", default=1, minimum=1),
            topk_group=r.integer("topk_group", default=1, minimum=1),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=context,
            rms_norm_eps=r.number("rms_norm_eps", positive=True),
            attention_bias=r.boolean("attention_bias", default=False)
            or r.boolean("qkv_bias", default=False),
            tie_word_embeddings=r.boolean("tie_word_embeddings", default=False),
            num_nextn_predict_layers=r.integer("num_nextn_predict_layers", default=0, minimum=0),
            dtype=r.optional_string("torch_dtype") or r.optional_string("dtype"),
            unknown_fields=r.unknown(),
        )
        config._check(r)
        return config

    def _check(self, r: _Reader) -> None:
        """Refuse values that are fine each alone and contradict each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            r.fail(
                "num_attention_heads",
                f"{self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}",
            )
        if self.head_dim % 2:
            r.fail("head_dim", f"{self.head_dim} is odd; rotary embeddings need an even size")
        if self.num_experts_per_tok > self.n_routed_experts:
            r.fail(
                "num_experts_per_tok",
                f"{self.num_experts_per_tok} is more than "
                f"n_routed_experts = {self.n_routed_experts}",
            )
        if self.routed_scaling_factor == 0:
            r.fail("routed_scaling_factor", "0 would switch every routed expert off")
        self._check_groups(r)
        if not self.moe_layers:
            r.fail("first_k_dense_replace", "no layer is left that routes to experts")
        for layer in self.moe_layers:
            owner = self.pool_layer(layer)
            if not self.is_moe(owner):
                r.fail(
                    "moe_layer_freq",
                    f"with {self.moe_layer_freq}, layer {layer} shares the expert pool of layer "
                    f"{owner}, which is dense and has none",
                )

    def _check_groups(self, r: _Reader) -> None:
        groups, used = self.n_group, self.topk_group
        if groups == 1:
            if used != 1:
                r.fail("topk_group", f"{used} is more than n_group = 1")
            return
        if self.n_routed_experts % groups:
            r.fail(
                "n_group", f"{groups} does not divide n_routed_experts = {self.n_routed_experts}"
            )
        size = self.n_routed_experts // groups
        if size < 2:
            r.fail(
                "n_group", f"{groups} leaves {size} expert a group; a group is scored by its best 2"
            )
        if used > groups:
            r.fail("topk_group", f"{used} is more than n_group = {groups}")
        if self.num_experts_per_tok > used * size:
            r.fail(
                "topk_group",
                f"{used} groups of {size} cannot supply "
                f"num_experts_per_tok = {self.num_experts_per_tok} experts",
            )


def _check_architecture(raw: Mapping[str, Any], source: str) -> None:
    names = raw.get("architectures")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or not names:
        raise ConfigError(f"{source}: `architectures`: expected a list of names, found {names!r}")
    if ARCHITECTURE in names:
        return
    name = names[0]
    hint = FOREIGN_ARCHITECTURES.get(name, "not a Megrez2 model")
    raise ConfigError(
        f"{source}: unknown architecture {name!r}: {hint}. megrez-gguf knows {ARCHITECTURE}."
    )


def _rope(r: _Reader, context: int) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and `rope_scaling`: flat fields, or transformers 5's `rope_parameters`."""
    nested = r.optional_object("rope_parameters")
    if nested is not None:
        p = r.child("rope_parameters", nested)
        theta = (p if "rope_theta" in nested else r).number("rope_theta", positive=True)
        r.seen("rope_theta", "rope_scaling")
        return theta, _rope_scaling(p, context)
    theta = r.number("rope_theta", positive=True)
    raw = r.optional_object("rope_scaling")
    return theta, None if raw is None else _rope_scaling(r.child("rope_scaling", raw), context)


def _rope_scaling(r: _Reader, context: int) -> RopeScaling | None:
    kind = r.raw.get("rope_type", r.raw.get("type", "default"))
    r.seen("rope_type", "type", "rope_theta")
    if kind == "default":
        r.refuse_unknown()
        return None
    if kind not in ("linear", "yarn"):
        r.fail("rope_type", f"{kind!r} is not supported; known: default, linear, yarn")
    factor = r.number("factor", positive=True)
    if factor < 1:
        r.fail("factor", f"{factor} is below 1")
    original = r.integer("original_max_position_embeddings", default=context, minimum=1)
    if kind == "linear":
        r.refuse_unknown()
        return RopeScaling("linear", factor, original)

    # DeepSeek's variant also rescales the softmax by mscale_all_dim; no Megrez2 code is known to.
    if r.number("mscale_all_dim", default=0.0) != 0:
        r.fail("mscale_all_dim", "a softmax rescaled by yarn is not supported")
    if r.raw.get("truncate", True) is not True:
        r.fail("truncate", "only yarn with whole-numbered ramp bounds (true) is supported")
    r.seen("truncate")
    mscale = r.number("mscale", default=1.0)
    attention = 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
    scaling = RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=r.number("attention_factor", default=attention, positive=True),
        beta_fast=r.number("beta_fast", default=32.0, positive=True),
        beta_slow=r.number("beta_slow", default=1.0, positive=True),
    )
    r.refuse_unknown()
    return scaling


class _Reader:
    """Typed reads of one JSON object; remembers what was read."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.raw, self.source, self.prefix = raw, source, prefix
        self._seen: set[str] = set()

    def child(self, name: str, raw: dict[str, Any]) -> _Reader:
        return _Reader(raw, self.source, f"{self.prefix}{name}.")

    def fail(self, name: str, reason: str) -> NoReturn:
        raise ConfigError(f"{self.source}: `{self.prefix}{name}`: {reason}")

    def seen(self, *names: str) -> None:
        self._seen.update(names)

    def _read(self, name: str, expected: str, default: Any) -> Any:
        self._seen.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                self.fail(name, f"required ({expected}) and missing")
            return default
        return value

    def _wrong_type(self, name: str, expected: str, value: Any) -> NoReturn:
        self.fail(name, f"expected {expected}, found {value!r}")

    def integer(self, name: str, default: Any = ..., minimum: int = 0) -> int:
        value = self._read(name, "integer", _REQUIRED if default is ... else default)
        if isinstance(value, bool) or not isinstance(value, int):
            self._wrong_type(name, "an integer", value)
        if not minimum <= value < 2**31:
            self.fail(name, f"expected an integer from {minimum} up to 2^31 - 1, found {value}")
        return int(value)

    def number(self, name: str, default: Any = ..., positive: bool = False) -> float:
        value = self._read(name, "number", _REQUIRED if default is ... else default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._wrong_type(name, "a number", value)
        if not math.isfinite(value) or (positive and value <= 0):
            self.fail(
                name, f"expected a finite{' positive' if positive else ''} number, found {value}"
            )
        return float(value)

    def boolean(self, name: str, default: Any = ...) -> bool:
        value = self._read(name, "true or false", _REQUIRED if default is ... else default)
        if not isinstance(value, bool):
            self._wrong_type(name, "true or false", value)
        return bool(value)

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> Any:
        value = self._read(name, "string", default)
        if value not in allowed:
            self.fail(name, f"{value!r} is not supported; known: {', '.join(allowed)}")
        return value

    def optional_string(self, name: str) -> str | None:
        value = self._read(name, "string", None)
        if value is not None and not isinstance(value, str):
            self._wrong_type(name, "a string", value)
        return value if value is None else str(value)

    def optional_object(self, name: str) -> dict[str, Any] | None:
        value = self._read(name, "object", None)
        if value is not None and not isinstance(value, dict):
            self._wrong_type(name, "an object or null", value)
        return value if value is None else dict(value)

    def unknown(self) -> tuple[str, ...]:
        """Fields nobody here has read; refuses those known to change the maths."""
        for name, allowed in _FIXED_FIELDS.items():
            if name in self.raw and self.raw[name] not in allowed:
                self.fail(name, f"{self.raw[name]!r} is not supported; supported: {_join(allowed)}")
        return tuple(sorted(self.raw.keys() - self._seen - _INERT_FIELDS - _FIXED_FIELDS.keys()))

    def refuse_unknown(self) -> None:
        for name in sorted(self.raw.keys() - self._seen):
            self.fail(name, "unknown, and might change the maths: not supported")


_REQUIRED: Any = object()


def _join(values: tuple[Any, ...]) -> str:
    return ", ".join(json.dumps(v) for v in values)
