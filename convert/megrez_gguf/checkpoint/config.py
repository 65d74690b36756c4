"""`config.json` of a Megrez2 checkpoint as a frozen, validated dataclass.

Every hyper-parameter is read with its type, and is either required or has a default written here:
by `settings`, which knows where it may stand and how it may be spelt. Of the fields that are left,
`known_fields` says which would change the mathematics; those are refused. A field nobody here has
heard of is reported in `ModelConfig.remarks`, never silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megrez_gguf.checkpoint.documents import ADAPTER, CONFIG, Documents
from megrez_gguf.checkpoint.known_fields import review
from megrez_gguf.checkpoint.rope import RopeScaling, read_rope
from megrez_gguf.checkpoint.settings import Settings
from megrez_gguf.errors import ConfigError
from megrez_gguf.text import clip
from megrez_llama import MAX_EXPERTS, MAX_LAYERS

MODEL_TYPE = "megrez_moe"
ARCHITECTURE = "MegrezMoeForCausalLM"

# Architectures a user may plausibly hand us, and who converts them instead.
FOREIGN_ARCHITECTURES = {
    "LlamaForCausalLM": (
        "a plain Llama (Megrez-3B-Instruct is one); convert it with llama.cpp's own "
        "convert_hf_to_gguf.py"
    ),
}

# What training libraries wrap a model in; its own name is then its `model_type`.
_WRAPPERS = frozenset(
    {
        "AutoModelForCausalLMWithValueHead",
        "LoraModel",
        "OptimizedModule",
        "PeftModel",
        "PeftModelForCausalLM",
        f"FSDP{ARCHITECTURE}",
    }
)


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
    remarks: tuple[str, ...] = field(default=(), compare=False)
    """What the user should know of fields that were not understood, or have no effect."""

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
        config = cls.from_dict(documents.config, source=str(documents.folder / CONFIG))
        if documents.has_adapter:
            remark = f"{ADAPTER} tells of a PEFT adapter beside the model, which is left out"
            return replace(config, remarks=(*config.remarks, remark))
        return config

    @classmethod
    def from_dict(cls, raw: Any, source: str = "config.json") -> ModelConfig:
        """Validate a parsed `config.json`; `source` names it in messages.

        Raises ConfigError: another architecture, a field missing or of the wrong type, values that
        contradict each other, or a value that changes the maths and is not supported.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{source}: expected a JSON object, found {type(raw).__name__}")
        r = Settings(raw, source)
        _check_architecture(r)

        hidden = r.integer("hidden_size", minimum=1)
        layers = r.integer("num_hidden_layers", minimum=1, maximum=MAX_LAYERS)
        heads = r.integer("num_attention_heads", minimum=1)
        lead = r.integer("first_k_dense_replace", minimum=0)
        context = r.integer("max_position_embeddings", minimum=1)
        head_dim = r.integer("head_dim", default=0, minimum=0)
        if head_dim == 0:
            if hidden % heads:
                r.fail(
                    "hidden_size", f"{hidden} is not a multiple of num_attention_heads = {heads}"
                )
            head_dim = hidden // heads
        theta, scaling = read_rope(r, head_dim, context)
        r.choice("hidden_act", ("silu", "swish"), default="silu")

        config = cls(
            vocab_size=r.integer("vocab_size", minimum=1),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=r.integer("num_key_value_heads", default=heads, minimum=1),
            head_dim=head_dim,
            intermediate_size=r.integer("intermediate_size", minimum=1),
            moe_intermediate_size=r.integer("moe_intermediate_size", minimum=1),
            n_routed_experts=r.integer("n_routed_experts", minimum=1, maximum=MAX_EXPERTS),
            num_experts_per_tok=r.integer("num_experts_per_tok", minimum=1),
            n_shared_experts=r.integer("n_shared_experts", default=0, minimum=0),
            first_k_dense_replace=lead,
            moe_layer_freq=_moe_layer_freq(r, layers, lead),
            experts_shared_frequency=r.integer(
                "experts_shared_frequency", minimum=1, maximum=MAX_LAYERS
            ),
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
            attention_bias=r.boolean("attention_bias", default=False),
            tie_word_embeddings=r.boolean("tie_word_embeddings", default=False),
            num_nextn_predict_layers=r.integer("num_nextn_predict_layers", default=0, minimum=0),
        )
        config._check(r)
        unknown = review(r, config._derived())
        if unknown:
            r.remarks.append(f"config.json has fields nobody here knows: {', '.join(unknown)}")
        return replace(config, remarks=tuple(r.remarks))

    def _derived(self) -> dict[str, float]:
        """Fields of other families that repeat, or follow from, what stands here already."""
        size = self.head_dim
        scale = dict.fromkeys(
            ("attention_multiplier", "attention_scale", "softmax_scale"), 1 / size**0.5
        )
        head = dict.fromkeys(
            (
                "qk_head_dim", "qk_rope_head_dim", "query_pre_attn_scalar", "rotary_dim",
                "rotary_emb_dim", "v_head_dim",
            ),
            size,
        )  # fmt: skip
        shared = dict.fromkeys(
            (
                "moe_shared_expert_intermediate_size",
                "shared_expert_intermediate_size",
                "shared_experts_intermediate_size",
            ),
            self.shared_intermediate_size,
        )
        return {
            **scale,
            **head,
            **shared,
            "dim_model_base": self.hidden_size,
            "qk_nope_head_dim": 0,
        }

    def _check(self, r: Settings) -> None:
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
        if self.shared_intermediate_size >= 2**31:
            r.fail(
                "n_shared_experts",
                f"{self.n_shared_experts} of moe_intermediate_size = {self.moe_intermediate_size} "
                "are wider together than llama.cpp can tell: 2^31 - 1",
            )
        if self.routed_scaling_factor == 0:
            r.fail("routed_scaling_factor", "0 would switch every routed expert off")
        self._check_groups(r)
        self._check_layer_kinds(r)
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

    def _check_layer_kinds(self, r: Settings) -> None:
        kinds = r.a_list("mlp_layer_types")[: self.num_hidden_layers]
        expected = ["sparse" if self.is_moe(i) else "dense" for i in range(self.num_hidden_layers)]
        if kinds and kinds != expected:
            r.fail(
                "mlp_layer_types",
                f"{clip(kinds)} is not what first_k_dense_replace = {self.first_k_dense_replace} "
                f"and moe_layer_freq = {self.moe_layer_freq} say",
            )

    def _check_groups(self, r: Settings) -> None:
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


def _check_architecture(r: Settings) -> None:
    """Trainers drop or wrap `architectures`; `model_type` then tells, and the tensors' names."""
    names: list[str] = []
    for value in r.values("architectures"):
        if not isinstance(value, list) or not all(isinstance(n, str) for n in value):
            r.fail("architectures", f"expected a list of names, found {clip(value)}")
        names += value
    if ARCHITECTURE in names:
        return
    types = r.values("model_type")
    if set(names) <= _WRAPPERS and MODEL_TYPE in types:
        return
    if not names:
        r.fail(
            "architectures",
            f"missing, and `model_type` is {clip(types[0]) if types else 'missing'}; expected "
            f"{ARCHITECTURE} and {MODEL_TYPE}",
        )
    hint = FOREIGN_ARCHITECTURES.get(names[0], "not a Megrez2 model")
    raise ConfigError(
        f"{r.source}: unknown architecture {clip(names[0])}: {hint}. megrez-gguf knows "
        f"{ARCHITECTURE}."
    )


def _moe_layer_freq(r: Settings, layers: int, lead: int) -> int:
    """A number, or a list that says of every layer whether it routes to experts."""
    if not any(isinstance(value, list) for value in r.values("moe_layer_freq")):
        return r.integer("moe_layer_freq", default=1, minimum=1)
    routed = r.a_list("moe_layer_freq")
    given = [bool(value) for value in routed[lead:layers]]
    periods = (
        period
        for period in range(1, layers + 1)
        if given == [layer % period == 0 for layer in range(lead, layers)]
    )
    period = next(periods, None)
    if period is None:
        r.fail(
            "moe_layer_freq",
            f"{clip(routed)} is not every n-th layer, of {layers}, from first_k_dense_replace = "
            f"{lead}",
        )
    return period
