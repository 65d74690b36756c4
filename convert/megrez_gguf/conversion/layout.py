"""The one table between published tensor names and GGUF names.

Names, shapes, which layers carry what, and which tensors must stay float32 all come from `TABLE`;
"missing", "extra", "wrong shape", "experts in a layer that shares another's" are its consequences.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import CheckpointError
from megrez_gguf.storage.tensor import RAW_DTYPE, Tensor
from megrez_gguf.text import few

Shape = Callable[[ModelConfig], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of tensor.

    `source` and `target` are names with `{i}` for the layer and `{e}` for the expert; `shape` is
    the shape of ONE source tensor. A rule with `{e}` stacks its sources along a new first axis.
    """

    source: str
    target: str
    shape: Shape
    role: str
    where: str = "model"
    f32: bool = False
    optional: bool = False


# Where a rule applies: is the tensor there for this layer (None outside layers)? And why not?
_WHERE: dict[str, tuple[Callable[[ModelConfig, int], bool], str]] = {
    "model": (lambda c, i: True, ""),
    "untied": (lambda c, i: not c.tie_word_embeddings, "tie_word_embeddings is true"),
    "layer": (lambda c, i: True, ""),
    "bias": (lambda c, i: c.attention_bias, "attention_bias is false"),
    "dense": (lambda c, i: not c.is_moe(i), "layer {i} is a mixture-of-experts layer"),
    "moe": (lambda c, i: c.is_moe(i), "layer {i} is dense"),
    "moe_bias": (
        lambda c, i: c.is_moe(i) and c.has_correction_bias,
        "topk_method is not noaux_tc, or layer {i} is dense",
    ),
    "shared": (
        lambda c, i: c.is_moe(i) and c.n_shared_experts > 0,
        "n_shared_experts is 0, or layer {i} is dense",
    ),
    "pool": (
        lambda c, i: c.is_moe(i) and c.pool_layer(i) == i,
        "layer {i} has no experts of its own: it shares those of layer {pool}",
    ),
}

_Q: Shape = lambda c: (c.num_attention_heads * c.head_dim, c.hidden_size)  # noqa: E731
_KV: Shape = lambda c: (c.num_key_value_heads * c.head_dim, c.hidden_size)  # noqa: E731
_HIDDEN: Shape = lambda c: (c.hidden_size,)  # noqa: E731
_VOCAB: Shape = lambda c: (c.vocab_size, c.hidden_size)  # noqa: E731

_L, _B = "model.layers.{i}.", "blk.{i}."


def _mlp(source: str, target: str, width: Callable[[ModelConfig], int], where: str) -> list[Rule]:
    """Gate, up and down projections of one SwiGLU MLP."""
    return [
        Rule(
            f"{_L}{source}.{part}_proj.weight",
            _B + target.format(part),
            (lambda c: (c.hidden_size, width(c)))
            if part == "down"
            else (lambda c: (width(c), c.hidden_size)),
            {"dense": "dense MLP", "shared": "shared experts", "pool": "experts"}[where],
            where,
        )
        for part in ("gate", "up", "down")
    ]


TABLE: tuple[Rule, ...] = (
    Rule("model.embed_tokens.weight", "token_embd.weight", _VOCAB, "embeddings"),
    Rule("lm_head.weight", "output.weight", _VOCAB, "embeddings", "untied"),
    Rule("model.norm.weight", "output_norm.weight", _HIDDEN, "norms", f32=True),
    Rule(_L + "input_layernorm.weight", _B + "attn_norm.weight", _HIDDEN, "norms", "layer", True),
    Rule(_L + "self_attn.q_proj.weight", _B + "attn_q.weight", _Q, "attention", "layer"),
    Rule(_L + "self_attn.k_proj.weight", _B + "attn_k.weight", _KV, "attention", "layer"),
    Rule(_L + "self_attn.v_proj.weight", _B + "attn_v.weight", _KV, "attention", "layer"),
    Rule(
        _L + "self_attn.o_proj.weight",
        _B + "attn_output.weight",
        lambda c: _Q(c)[::-1],
        "attention",
        "layer",
    ),
    Rule(
        _L + "self_attn.q_proj.bias",
        _B + "attn_q.bias",
        lambda c: _Q(c)[:1],
        "attention",
        "bias",
        True,
    ),
    Rule(
        _L + "self_attn.k_proj.bias",
        _B + "attn_k.bias",
        lambda c: _KV(c)[:1],
        "attention",
        "bias",
        True,
    ),
    Rule(
        _L + "self_attn.v_proj.bias",
        _B + "attn_v.bias",
        lambda c: _KV(c)[:1],
        "attention",
        "bias",
        True,
    ),
    Rule(
        _L + "self_attn.o_proj.bias",
        _B + "attn_output.bias",
        _HIDDEN,
        "attention",
        "layer",
        True,
        optional=True,
    ),
    Rule(
        _L + "post_attention_layernorm.weight",
        _B + "ffn_norm.weight",
        _HIDDEN,
        "norms",
        "layer",
        True,
    ),
    *_mlp("mlp", "ffn_{}.weight", lambda c: c.intermediate_size, "dense"),
    Rule(
        _L + "mlp.gate.weight",
        _B + "ffn_gate_inp.weight",
        lambda c: (c.n_routed_experts, c.hidden_size),
        "routers",
        "moe",
        True,
    ),
    Rule(
        _L + "mlp.gate.e_score_correction_bias",
        _B + "exp_probs_b.bias",
        lambda c: (c.n_routed_experts,),
        "routers",
        "moe_bias",
        True,
    ),
    *_mlp("mlp.experts.{e}", "ffn_{}_exps.weight", lambda c: c.moe_intermediate_size, "pool"),
    *_mlp(
        "mlp.shared_experts", "ffn_{}_shexp.weight", lambda c: c.shared_intermediate_size, "shared"
    ),
)

# Buffers that older exporters saved and no forward pass reads.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the GGUF: the stack (or the only one) of `sources`."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Tensor, ...]
    role: str
    f32: bool

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(t.size for t in self.sources)

    @property
    def dtype(self) -> str:
        """The type most of its sources are stored in."""
        return Counter(t.dtype for t in self.sources).most_common(1)[0][0]


@dataclass(frozen=True, slots=True)
class Layout:
    """What becomes of every tensor of a checkpoint."""

    targets: tuple[Target, ...]
    skipped: Mapping[str, str]
    """Source tensors that are left out on purpose, and why."""
    tied_copy: tuple[Tensor, Tensor] | None = None
    """`lm_head` and embeddings that must be equal, because the configuration ties them."""

    @property
    def remarks(self) -> list[str]:
        """What the user should know of what is left out."""
        reasons = Counter(self.skipped.values())
        return [f"{count} tensors left out: {reason}" for reason, count in reasons.items()]


def plan(checkpoint: Checkpoint) -> Layout:
    """Match the checkpoint's tensors with the table, in the order they will be written.

    Raises CheckpointError naming the tensors: missing, extra, of the wrong shape or type, experts
    where the layer shares another's, experts absent where the group needs them.
    """
    config, found = checkpoint.config, checkpoint.tensors
    skipped = _skipped(config, found)
    targets = []
    missing: list[str] = []
    expected: set[str] = set(skipped)
    for rule, layer in _placements(config):
        names = _source_names(rule, config, layer)
        expected.update(names)
        absent = [n for n in names if n not in found]
        if absent:
            if not rule.optional:
                missing += absent
            continue
        sources = tuple(_checked(found[n], rule.shape(config)) for n in names)
        shape = rule.shape(config)
        if "{e}" in rule.source:
            shape = (len(sources), *shape)
        target = rule.target.format(i=layer)
        targets.append(Target(target, shape, sources, rule.role, rule.f32))
    # What is there and should not be is usually why something else is not where it should be.
    if extra := [n for n in found if n not in expected]:
        raise CheckpointError(
            f"{checkpoint.folder}: {_list(extra)}: not expected: {explain(extra[0], config)}"
        )
    if missing:
        raise CheckpointError(f"{checkpoint.folder}: {_list(missing)}: missing from the checkpoint")
    _check_optional(config, checkpoint)
    tied = None
    if config.tie_word_embeddings and "lm_head.weight" in found:
        head = _checked(found["lm_head.weight"], _VOCAB(config))
        tied = (head, found["model.embed_tokens.weight"])
    return Layout(tuple(targets), skipped, tied)


def check_ledger(checkpoint: Checkpoint, plan: Layout, consumed: Iterable[str]) -> None:
    """Prove that every source tensor was written or skipped, once.

    Raises CheckpointError: this cannot happen unless the converter itself is wrong.
    """
    count = Counter(consumed)
    count.update(plan.skipped.keys())
    wrong = {n: count[n] for n in checkpoint.tensors.keys() | count.keys() if count[n] != 1}
    if wrong:
        name, times = min(wrong.items())
        raise CheckpointError(
            f"{checkpoint.folder}: internal error, please report it: tensor {name} was consumed "
            f"{times} times and {len(wrong) - 1} others are off too"
        )


def explain(name: str, config: ModelConfig) -> str:
    """Say why `name` does not belong in a checkpoint of this configuration."""
    for rule in TABLE:
        match = _pattern(rule.source).fullmatch(name)
        if match is None:
            continue
        groups = match.groupdict()
        layer = int(groups.get("i") or 0)
        if "i" in groups and layer >= config.num_hidden_layers:
            return f"num_hidden_layers is {config.num_hidden_layers}"
        applies, reason = _WHERE[rule.where]
        if not applies(config, layer):
            if rule.where == "pool" and not config.is_moe(layer):
                reason = "layer {i} is dense"
            return reason.format(i=layer, pool=config.pool_layer(layer))
        return f"n_routed_experts is {config.n_routed_experts}"
    return "no Megrez2 tensor has such a name"


def role_of(target: str) -> str:
    """Role of a tensor by its GGUF name; "other" for one no rule makes."""
    for rule in TABLE:
        if _pattern(rule.target).fullmatch(target):
            return rule.role
    return "other"


def _placements(config: ModelConfig) -> Iterable[tuple[Rule, int]]:
    layered = [r for r in TABLE if "{i}" in r.source]
    for rule in TABLE:
        if rule not in layered and _WHERE[rule.where][0](config, 0):
            yield rule, 0
    for layer in range(config.num_hidden_layers):
        for rule in layered:
            if _WHERE[rule.where][0](config, layer):
                yield rule, layer


def _source_names(rule: Rule, config: ModelConfig, layer: int) -> list[str]:
    if "{e}" not in rule.source:
        return [rule.source.format(i=layer)]
    return [rule.source.format(i=layer, e=e) for e in range(config.n_routed_experts)]


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.escape(template)
    for letter in "ie":
        pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>0|[1-9]\d{{0,8}})")
    return re.compile(pattern)


def _checked(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    where = f"{tensor.shard.path}: tensor {tensor.name}"
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where}: has shape {list(tensor.shape)}; config.json asks for {list(shape)}"
        )
    if tensor.dtype not in RAW_DTYPE:
        raise CheckpointError(
            f"{where}: stored as {tensor.dtype}; expected one of {', '.join(RAW_DTYPE)}"
        )
    return tensor


def _skipped(config: ModelConfig, found: Mapping[str, Tensor]) -> dict[str, str]:
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    skipped = {}
    for name in found:
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if match and config.num_hidden_layers <= int(match[1]) < last:
            skipped[name] = "multi-token prediction"
        elif _IGNORED.fullmatch(name):
            skipped[name] = "a buffer, not a weight"
        elif name == "lm_head.weight" and config.tie_word_embeddings:
            skipped[name] = "equal to model.embed_tokens.weight, as tie_word_embeddings says"
    return skipped


def _check_optional(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """An optional tensor is in every layer or in none."""
    for rule in TABLE:
        if not rule.optional or not _WHERE[rule.where][0](config, 0):
            continue
        names = [rule.source.format(i=i) for i in range(config.num_hidden_layers)]
        absent = [n for n in names if n not in checkpoint.tensors]
        if absent and len(absent) < len(names):
            raise CheckpointError(
                f"{checkpoint.folder}: {_list(absent)}: missing, and other layers have it; "
                "expected in all layers or in none"
            )


def _list(names: list[str]) -> str:
    return f"tensor{'s' if len(names) > 1 else ''} {few(names)}"
