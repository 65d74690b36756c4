"""The one table between published tensor names and GGUF names.

Names, shapes, which layers carry what, and which tensors must stay float32 all come from `TABLE`;
"missing", "extra" and "wrong shape" are its consequences. Names that others give to what is
published are translated first, in `names`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import INDEX
from megrez_gguf.checkpoint.shard_set import Index
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion.copies import Copy
from megrez_gguf.conversion.names import (
    EMBEDDINGS,
    HEAD,
    expert_layer,
    foreign,
    is_buffer,
    published,
    shared,
)
from megrez_gguf.errors import CheckpointError
from megrez_gguf.storage.tensor import RAW_DTYPE, Tensor
from megrez_gguf.text import clip, few

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
        "layer {i} is dense",
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

# What types that are none of RAW_DTYPE tell, by how their names begin.
_ORIGINAL = "; start from the unquantized checkpoint"
_OTHER_TYPES: dict[str | tuple[str, ...], str] = {
    "F64": "save it as float32 or bfloat16: model.to(torch.bfloat16).save_pretrained(FOLDER)",
    "F8": "FP8 weights" + _ORIGINAL,
    ("F4", "F6"): "weights of 4 or 6 bits" + _ORIGINAL,
    ("U8", "I8", "I32", "U32"): "packed weights, as of bitsandbytes, GPTQ or AWQ" + _ORIGINAL,
    "": "no weights",
}


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
    weights: Mapping[str, Tensor]
    """What the model is made of, by published name."""
    skipped: tuple[tuple[Tensor, str], ...]
    """What no forward pass needs, and why."""
    copies: tuple[Copy, ...]
    """What is left out if it is equal to what is kept, as `copies.check` finds."""
    notes: tuple[str, ...] = ()

    @property
    def left_out(self) -> Sequence[tuple[Tensor, str]]:
        """Stored tensors that become no part of the model, and why."""
        equal = [(c.tensor, f"equal to others that are kept: {c.why}") for c in self.copies]
        return [*self.skipped, *equal]

    @property
    def remarks(self) -> list[str]:
        """What the user should know of what is left out, renamed, or at odds with the index."""
        reasons = Counter(reason for _, reason in self.left_out)
        left_out = [f"{count} tensors left out: {reason}" for reason, count in reasons.items()]
        other = [f"{t.name} as {name}" for name, t in self.weights.items() if t.name != name]
        if other:
            left_out.append(f"{len(other)} tensors taken under other names: {few(other, 1)}")
        return [*left_out, *self.notes]


def plan(checkpoint: Checkpoint) -> Layout:
    """Match the checkpoint's tensors with the table, in the order they will be written.

    Raises CheckpointError naming the tensors: missing, extra, of the wrong shape or type, experts
    absent where the group needs them, or an index that is at odds with what the model is made of.
    """
    config = checkpoint.config
    skipped, stored = _sorted_out(checkpoint)
    placed = [(rule, layer, _source_names(rule, config, layer)) for rule, layer in _placed(config)]
    expected = {name: rule for rule, _, names in placed for name in names}
    # What is there and should not be is usually why something else is not where it should be.
    _refuse_extra(checkpoint, {n: ts for n, ts in stored.items() if n not in expected})
    for name, tensors in stored.items():
        for tensor in tensors:
            _check(tensor, expected[name].shape(config))
    if missing := [name for name in required(config) if name not in stored]:
        raise CheckpointError(f"{checkpoint.folder}: {_list(missing)}: {_why(missing, checkpoint)}")
    _check_optional(config, stored, checkpoint.folder)
    weights = {n: _kept(n, tensors, checkpoint.index) for n, tensors in stored.items()}
    targets = []
    for rule, layer, names in placed:
        if names[0] in weights:
            sources = tuple(weights[n] for n in names)
            shape = rule.shape(config)
            if "{e}" in rule.source:
                shape = (len(sources), *shape)
            name = rule.target.format(i=layer)
            targets.append(Target(name, shape, sources, rule.role, rule.f32))
    copies = [
        Copy(tensor, weights[name], _one(name, tensor, weights[name], config))
        for name, tensors in stored.items()
        for tensor in tensors
        if tensor is not weights[name]
    ]
    notes = _compare_index(checkpoint, weights.values())
    return Layout(tuple(targets), weights, tuple(skipped), tuple(copies), notes)


def required(config: ModelConfig) -> list[str]:
    """The published names of the tensors without which there is no model."""
    kinds = [(rule, layer) for rule, layer in _placed(config) if not rule.optional]
    return [name for rule, layer in kinds for name in _source_names(rule, config, layer)]


def check_ledger(checkpoint: Checkpoint, plan: Layout, consumed: Iterable[str]) -> None:
    """Prove that every source tensor was written or left out, once.

    Raises CheckpointError: this cannot happen unless the converter itself is wrong.
    """
    count = Counter(consumed)
    count.update(tensor.name for tensor, _ in plan.left_out)
    stored = Counter(tensor.name for tensor in checkpoint.tensors)
    if wrong := {n: count[n] for n in stored | count if count[n] != stored[n]}:
        name, times = min(wrong.items())
        raise CheckpointError(
            f"{checkpoint.folder}: internal error, please report it: tensor {name}, stored "
            f"{stored[name]} times, was consumed {times} times and {len(wrong) - 1} others are off "
            "too"
        )


def explain(name: str, config: ModelConfig) -> str:
    """Say why the published name `name` does not belong in a checkpoint of this configuration."""
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
            return reason.format(i=layer)
        return f"n_routed_experts is {config.n_routed_experts}"
    return "no Megrez2 tensor has such a name"


def role_of(target: str) -> str:
    """Role of a tensor by its GGUF name; "other" for one no rule makes."""
    for rule in TABLE:
        if _pattern(rule.target).fullmatch(target):
            return rule.role
    return "other"


def _placed(config: ModelConfig) -> Iterable[tuple[Rule, int]]:
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


def _sorted_out(
    checkpoint: Checkpoint,
) -> tuple[list[tuple[Tensor, str]], dict[str, list[Tensor]]]:
    """What is skipped, and why; and all else by published name."""
    config = checkpoint.config
    last = config.num_hidden_layers + config.num_nextn_predict_layers
    skipped = [(t, "a buffer, not a weight") for t in checkpoint.tensors if is_buffer(t.name)]
    rest = [t for t in checkpoint.tensors if not is_buffer(t.name)]
    names = published([t.name for t in rest])
    _check_pools(checkpoint, {i for n in names if (i := expert_layer(n)) is not None})
    stored: dict[str, list[Tensor]] = {}
    for tensor, name in zip(rest, names, strict=True):
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if match and config.num_hidden_layers <= int(match[1]) < last:
            skipped.append((tensor, "multi-token prediction"))
        else:
            stored.setdefault(shared(name, config), []).append(tensor)
    return skipped, stored


def _check_pools(checkpoint: Checkpoint, holding: set[int]) -> None:
    """Refuse pools in layers that tell of another sharing period than the configuration does.

    As published, a layer uses the pool of the last layer at or before it that has one. Where every
    layer has such a one, it must be in the layer's own group.
    """
    config = checkpoint.config
    late = [p for p in config.pool_layers if p not in holding]
    elsewhere = {config.pool_layer(i) for i in holding & set(config.moe_layers)}
    if config.moe_layers[0] in holding and elsewhere & set(late):
        stored, expected = (
            few([str(i) for i in sorted(layers)], 9) for layers in (holding, config.pool_layers)
        )
        raise CheckpointError(
            f"{checkpoint.folder}: experts are stored in layers {stored}; config.json puts them in "
            f"layers {expected} (experts_shared_frequency {config.experts_shared_frequency})"
        )


def _refuse_extra(checkpoint: Checkpoint, extra: Mapping[str, Sequence[Tensor]]) -> None:
    if not extra:
        return
    names = {tensor.name: name for name, tensors in extra.items() for tensor in tensors}
    telling = {stored: what for stored in names if (what := foreign(stored))}
    first = next(iter(telling or names))
    reason = telling.get(first) or explain(names[first], checkpoint.config)
    listed = [first, *(n for n in names if n != first)]
    raise CheckpointError(f"{checkpoint.folder}: {_list(listed)}: not expected: {reason}")


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    where = f"{tensor.shard.path}: tensor {tensor.name}"
    if tensor.dtype not in RAW_DTYPE:
        hint = next(h for start, h in _OTHER_TYPES.items() if tensor.dtype.startswith(start))
        raise CheckpointError(
            f"{where}: stored as {tensor.dtype}; expected one of {', '.join(RAW_DTYPE)}: {hint}"
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where}: has shape {clip(list(tensor.shape))}; config.json asks for {list(shape)}"
        )


def _why(missing: list[str], checkpoint: Checkpoint) -> str:
    """Why these published names may be missing, and what to do."""
    index = checkpoint.index.weight_map if checkpoint.index else {}
    present = {shard.path.name for shard in checkpoint.shards}
    if away := sorted({index[n] for n in missing if n in index} - present):
        return (
            f"{INDEX} says that they are in {few(away)}, missing from this folder; is the download "
            "complete? `hf download OWNER/NAME` fetches what is missing"
        )
    if promised := [n for n in missing if n in index]:
        return f"{INDEX} says that {promised[0]} is in {index[promised[0]]}, which does not hold it"
    if missing == [HEAD]:
        return (
            "missing from the checkpoint: a model whose output layer is its embeddings has "
            "tie_word_embeddings true in config.json; one saved without a head (AutoModel) is to "
            "be saved with it (AutoModelForCausalLM)"
        )
    return "missing from the checkpoint"


def _kept(name: str, tensors: Sequence[Tensor], index: Index | None) -> Tensor:
    """Of the copies of one parameter, the one that is where it should be."""

    def order(tensor: Tensor) -> tuple[bool, bool]:
        listed = index is None or index.weight_map.get(tensor.name) == tensor.shard.path.name
        return not listed, tensor.name != name

    return min(tensors, key=order)


def _one(name: str, one: Tensor, two: Tensor, config: ModelConfig) -> str:
    """Why two stored tensors are one parameter, of the published name `name`."""
    if one.name == two.name:
        return "the same tensor is in two shards"
    if name == EMBEDDINGS and config.tie_word_embeddings:
        return "config.json says tie_word_embeddings"
    layers = [re.findall(r"layers\.(\d+)\.", tensor.name) for tensor in (one, two)]
    if layers[0] != layers[1]:
        return f"layers share experts (experts_shared_frequency {config.experts_shared_frequency})"
    return "the same parameter goes by both names"


def _compare_index(checkpoint: Checkpoint, needed: Iterable[Tensor]) -> tuple[str, ...]:
    """What the index says amiss of tensors that are not needed; raises for those that are."""
    if checkpoint.index is None:
        return ()
    path, index = checkpoint.folder / INDEX, checkpoint.index.weight_map
    for tensor in needed:
        found, said = tensor.shard.path, index.get(tensor.name)
        if said is None:
            raise CheckpointError(f"{found}: holds {tensor.name}, which {INDEX} does not name")
        if said != found.name:
            raise CheckpointError(
                f"{path}: says tensor {tensor.name} is in {said}; it is in {found.name}"
            )
    names = {tensor.name for tensor in checkpoint.tensors}
    absent = [name for name in index if name not in names]
    if not absent:
        return ()
    return (f"{INDEX} names {few(absent)}, which no shard holds and the model does not need",)


def _check_optional(config: ModelConfig, stored: Mapping[str, object], folder: Path) -> None:
    """An optional tensor is in every layer or in none."""
    for rule in TABLE:
        if not rule.optional or not _WHERE[rule.where][0](config, 0):
            continue
        names = [rule.source.format(i=i) for i in range(config.num_hidden_layers)]
        absent = [n for n in names if n not in stored]
        if absent and len(absent) < len(names):
            raise CheckpointError(
                f"{folder}: {_list(absent)}: missing, and other layers have it; "
                "expected in all layers or in none"
            )


def _list(names: list[str]) -> str:
    return f"tensor{'s' if len(names) > 1 else ''} {few(names)}"
