"""The ways to harm a model that the parity check must notice, and where its trace must look.

A harm changes a checkpoint before it is converted, the GGUF file it was converted to, or, where no
file can ask for it, the reference itself. Most were real mistakes of some implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity import reference, tracing


@dataclass
class Model:
    """A checkpoint to be harmed: `raw` is config.json, `tensors` have the published names."""

    config: ModelConfig
    raw: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass
class File:
    """A GGUF file to be harmed. `data` is as stored: float32, or the bytes of quantized rows."""

    values: dict[str, Any]
    types: dict[str, GGMLQuantizationType]
    data: dict[str, NDArray[Any]]

    @classmethod
    def read(cls, path: Path) -> File:
        reader = GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
        types = {t.name: t.tensor_type for t in reader.tensors}
        return cls(values, types, {t.name: t.data.copy() for t in reader.tensors})

    def replace(self, path: Path) -> None:
        """Write over `path`, the file this was read from; keys keep their types."""
        fields = GGUFReader(path).fields
        target = path.with_suffix(".new")
        writer = GGUFWriter(target, self.values["general.architecture"])
        for name, field in fields.items():
            if name.startswith("GGUF.") or name == "general.architecture":
                continue  # the writer's own
            kind, *inner = field.types
            sub = inner[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, self.values[name], kind, sub)
        for name, data in self.data.items():
            writer.add_tensor(name, data, raw_dtype=self.types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        target.replace(path)


def label(tensor: str, layer: int | None) -> str:
    """A node's name: the embeddings and the output belong to no layer, or to layer -1."""
    return tensor if layer is None or layer < 0 else f"{tensor}-{layer}"


@dataclass(frozen=True)
class Sabotage:
    """One way to harm the model.

    `layer` and `tensor` are the first thing the harm makes wrong, by llama.cpp's names, which the
    trace must name; None where no tensor is wrong. A `local` harm lives in that layer alone (one of
    experts: in that layer's pool), the others begin there.
    """

    name: str
    layer: int | None = None
    tensor: str | None = None
    local: bool = False
    level: str = "f32"
    change: Callable[[Model], None] | None = None
    edit: Callable[[File, File], None] | None = None
    """Changes the first file; the second is of the same model at `other`, whole or to take from."""
    other: str = ""
    patch: Callable[[], AbstractContextManager[None]] | None = None

    @property
    def first(self) -> str | None:
        """What the trace must name, e.g. "ffn_moe_out-4"."""
        return None if self.tensor is None else label(self.tensor, self.layer)


# --- names ---


def _layer(layer: int) -> str:
    return f"model.layers.{layer}."


def _experts(layer: int) -> str:
    return f"{_layer(layer)}mlp.experts."


def _exchange(tensors: dict[str, Any], one: str, other: str) -> None:
    """Exchange all tensors whose names begin with `one` and those that begin with `other`."""
    for name in [name for name in tensors if name.startswith(one)]:
        twin = other + name.removeprefix(one)
        tensors[name], tensors[twin] = tensors[twin], tensors[name]


def _replace(tensors: dict[str, Tensor], prefix: str, source: dict[str, Tensor], by: str) -> None:
    """Put copies of the tensors of `source` that begin with `by` where `prefix` says."""
    for name in [name for name in source if name.startswith(by)]:
        tensors[prefix + name.removeprefix(by)] = source[name].clone()


def setting(key: str, change: Callable[[Any], Any]) -> Callable[[Model], None]:
    """A value of config.json, changed."""

    def harm(model: Model) -> None:
        model.raw[key] = change(getattr(model.config, key))

    return harm


# --- routing ---


def sharing_shifted(model: Model) -> None:
    """Groups begin a layer early, written out as one pool a layer."""
    config, pools = model.config, dict(model.tensors)
    model.raw["experts_shared_frequency"] = 1
    last = config.pool_layers[-1]
    for layer in config.moe_layers:
        owner = min(config.pool_layer(layer + 1), last)
        _replace(model.tensors, _experts(layer), pools, _experts(owner))


def shared_in_group(name: str) -> Callable[[Model], None]:
    """What every layer has of its own, taken from the first of each group instead."""

    def harm(model: Model) -> None:
        for layer in model.config.moe_layers:
            own, first = (
                f"{_layer(i)}mlp.gate.{name}" for i in (layer, model.config.pool_layer(layer))
            )
            model.tensors[own] = model.tensors[first].clone()

    return harm


def bias_ignored(model: Model) -> None:
    for name in [n for n in model.tensors if n.endswith("e_score_correction_bias")]:
        model.tensors[name].zero_()


def bias_shifted(model: Model) -> None:
    name = _layer(4) + "mlp.gate.e_score_correction_bias"
    model.tensors[name] = model.tensors[name].roll(1)


def routers_exchanged(model: Model) -> None:
    _exchange(model.tensors, _layer(2) + "mlp.gate.", _layer(3) + "mlp.gate.")


def groups_limited(model: Model) -> None:
    model.raw |= {"n_group": 4, "topk_group": 2}


@contextmanager
def bias_weighs() -> Iterator[None]:
    """No file can ask for this, so here it is the reference that is sabotaged."""
    original = reference.route

    def route(
        config: ModelConfig,
        weights: reference.Weights,
        layer: int,
        state: Tensor,
        emit: reference.Trace,
    ) -> tuple[Tensor, Tensor]:
        ids, _ = original(config, weights, layer, state, emit)
        prefix = f"{_layer(layer)}mlp.gate."
        scores = (state @ weights[prefix + "weight"].T).sigmoid()
        w = (scores + weights[prefix + "e_score_correction_bias"]).gather(-1, ids)
        return ids, w / w.sum(-1, keepdim=True) * config.routed_scaling_factor

    with mock.patch.object(reference, "route", route):
        yield


@contextmanager
def early_gate_unread() -> Iterator[None]:
    """A layer after a dense one reads its own state: here, too, in the reference."""
    original = reference.block

    def block(
        config: ModelConfig,
        weights: reference.Weights,
        layer: int,
        x: Tensor,
        previous: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        after_moe = layer > 0 and config.is_moe(layer - 1)
        return original(config, weights, layer, x, previous if after_moe else None, *rest)

    with mock.patch.object(reference, "block", block), mock.patch.object(tracing, "block", block):
        yield


# --- experts ---


def gate_and_up_swapped(model: Model) -> None:
    p = f"{_experts(1)}0."
    _exchange(model.tensors, p + "gate_proj", p + "up_proj")


def experts_swapped(model: Model) -> None:
    """In the pool only: the routers still mean the old ids."""
    _exchange(model.tensors, f"{_experts(4)}2.", f"{_experts(4)}5.")


def stacked_by_name(model: Model) -> None:
    """Experts in the order 0, 1, 10, 11, ... 2, as sorted names come."""
    pools, count = dict(model.tensors), model.config.n_routed_experts
    for layer in model.config.pool_layers:
        for place, expert in enumerate(sorted(range(count), key=str)):
            _replace(
                model.tensors, f"{_experts(layer)}{place}.", pools, f"{_experts(layer)}{expert}."
            )


def expert_zeroed(model: Model) -> None:
    model.tensors[f"{_experts(4)}3.down_proj.weight"].zero_()


def neighbours_pool(model: Model) -> None:
    """The first group uses the last group's experts."""
    _replace(model.tensors, _experts(1), dict(model.tensors), _experts(4))


def neighbours_shared_expert(model: Model) -> None:
    shared = "mlp.shared_experts."
    _replace(model.tensors, _layer(5) + shared, dict(model.tensors), _layer(4) + shared)


# --- attention, norms and head ---


def interleaved_rope(model: Model) -> None:
    """Pairs (2i, 2i + 1) instead of (i, i + C / 2)."""
    config, tensors = model.config, model.tensors
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = tensors[name].view(-1, config.head_dim // 2, 2, config.hidden_size)
            tensors[name] = rows.transpose(1, 2).reshape_as(tensors[name]).contiguous()


def kv_heads_interleaved(model: Model) -> None:
    """Query head j reads key-value head j mod G, not j // (H / G), written as heads moved."""
    config, tensors = model.config, model.tensors
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        query, out = (f"{_layer(layer)}self_attn.{name}_proj.weight" for name in "qo")
        # [H, C, D] -> [H / G, G, C, D] -> [G, H / G, C, D], and so the columns of the output.
        q = tensors[query].view(heads // kv_heads, kv_heads, config.head_dim, -1).transpose(0, 1)
        o = tensors[out].view(-1, heads // kv_heads, kv_heads, config.head_dim).transpose(1, 2)
        tensors[query] = q.reshape_as(tensors[query]).contiguous()
        tensors[out] = o.reshape_as(tensors[out]).contiguous()


def norms_exchanged(model: Model) -> None:
    _exchange(model.tensors, _layer(2) + "input_layernorm", _layer(5) + "input_layernorm")


def embeddings_scaled(model: Model) -> None:
    """By the square root of their size, as some families do."""
    model.tensors["model.embed_tokens.weight"] *= model.config.hidden_size**0.5


def head_tied(model: Model) -> None:
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].clone()


# --- in the file ---


def key(name: str, change: Callable[[Any], Any]) -> Callable[[File, File], None]:
    """A value of the file, changed."""

    def harm(file: File, other: File) -> None:
        file.values[name] = change(file.values[name])

    return harm


def from_other(name: str) -> Callable[[File, File], None]:
    """One tensor taken from the file of another level."""

    def harm(file: File, other: File) -> None:
        assert file.types[name] != other.types[name], name
        file.types[name], file.data[name] = other.types[name], other.data[name]

    return harm


def rows_late(file: File, other: File) -> None:
    """A tensor read from one row further on."""
    name = "blk.3.attn_v.weight"
    file.data[name] = np.roll(file.data[name], -1, axis=0)


def scales_damaged(file: File, other: File) -> None:
    """Every 16th scale of one tensor doubled: a bit of its exponent."""
    blocks = file.data["blk.5.ffn_down_shexp.weight"].reshape(-1, 34)  # a half and 32 bytes each
    scales = blocks[::16, :2].copy().view(np.float16)
    blocks[::16, :2] = (scales * np.float16(2)).view(np.uint8)


def nibbles_exchanged(file: File, other: File) -> None:
    """The halves of every byte, in the gate of one pool."""
    name = "blk.4.ffn_gate_exps.weight"
    blocks = file.data[name].reshape(-1, 18)  # a half and 32 nibbles each
    blocks[:, 2:] = blocks[:, 2:] >> 4 | blocks[:, 2:] << 4


SABOTAGES = (
    Sabotage("pre-gate off", 1, "ffn_moe_logits", change=setting("pre_gate", lambda on: not on)),
    Sabotage(
        "pre-gate off after a dense layer", 1, "ffn_moe_logits", True, patch=early_gate_unread
    ),
    Sabotage("sharing shifted by a layer", 3, "ffn_moe_out", change=sharing_shifted),
    Sabotage(
        "group's first bias for all its layers",
        2,
        "ffn_moe_probs_biased",
        change=shared_in_group("e_score_correction_bias"),
    ),
    Sabotage(
        "group's first router for all its layers",
        2,
        "ffn_moe_logits",
        change=shared_in_group("weight"),
    ),
    Sabotage("two layers' routers exchanged", 2, "ffn_moe_logits", True, change=routers_exchanged),
    Sabotage("bias weighs as well as selects", 1, "ffn_moe_out", patch=bias_weighs),
    Sabotage("bias ignored", 1, "ffn_moe_probs_biased", change=bias_ignored),
    Sabotage("bias ignored", 1, "ffn_moe_probs_biased", level="q2_k", change=bias_ignored),
    Sabotage("bias shifted by an expert", 4, "ffn_moe_probs_biased", True, change=bias_shifted),
    Sabotage(
        "normalisation off",
        1,
        "ffn_moe_out",
        change=setting("norm_topk_prob", lambda on: not on),
    ),
    Sabotage(
        "scaling factor 1% off",
        1,
        "ffn_moe_out",
        change=setting("routed_scaling_factor", lambda x: x * 1.01),
    ),
    Sabotage(
        "softmax instead of sigmoid",
        1,
        "ffn_moe_probs_biased",
        change=setting("scoring_func", {"sigmoid": "softmax", "softmax": "sigmoid"}.__getitem__),
    ),
    Sabotage(
        "one expert a token fewer",
        1,
        "ffn_moe_out",
        change=setting("num_experts_per_tok", lambda k: k - 1),
    ),
    Sabotage("routing limited to groups", 1, "ffn_moe_out", change=groups_limited),
    Sabotage(
        "one expert's gate and up swapped", 1, "ffn_moe_out", True, change=gate_and_up_swapped
    ),
    Sabotage("two experts of a pool swapped", 4, "ffn_moe_out", True, change=experts_swapped),
    Sabotage("experts stacked in order of name", 1, "ffn_moe_out", change=stacked_by_name),
    Sabotage("one expert zeroed", 4, "ffn_moe_out", True, change=expert_zeroed),
    Sabotage("neighbour's pool", 1, "ffn_moe_out", True, change=neighbours_pool),
    Sabotage("neighbour's shared expert", 5, "ffn_shexp", True, change=neighbours_shared_expert),
    Sabotage("rope base a fifth", 0, "kqv_out", change=setting("rope_theta", lambda x: x / 5)),
    Sabotage("rope base times five", 0, "kqv_out", change=setting("rope_theta", lambda x: x * 5)),
    Sabotage("rope pairs interleaved", 0, "kqv_out", change=interleaved_rope),
    Sabotage("key-value heads interleaved", 0, "kqv_out", change=kv_heads_interleaved),
    Sabotage(
        "norm's epsilon a tenth", 0, "kqv_out", change=setting("rms_norm_eps", lambda x: x / 10)
    ),
    Sabotage("two layers' norms exchanged", 2, "kqv_out", True, change=norms_exchanged),
    Sabotage("embeddings scaled", -1, "embd", True, change=embeddings_scaled),
    Sabotage("output head tied", -1, "result_output", True, change=head_tied),
    Sabotage("another pre-tokenizer", edit=key("tokenizer.ggml.pre", lambda pre: "gpt-2")),
    Sabotage("merges reversed", edit=key("tokenizer.ggml.merges", lambda merges: merges[::-1])),
    Sabotage("BOS flag flipped", edit=key("tokenizer.ggml.add_bos_token", lambda on: not on)),
    Sabotage("rows read one late", 3, "kqv_out", True, "q4_k_m", edit=rows_late),
    Sabotage("scales damaged", 5, "ffn_shexp", True, "q8_0", edit=scales_damaged),
    Sabotage("nibbles exchanged", 4, "ffn_moe_out", True, "q4_0", edit=nibbles_exchanged),
    Sabotage(
        "fallback in the wrong tensor",
        4,
        "ffn_shexp",
        True,
        "q6_k",
        edit=from_other("blk.4.ffn_gate_shexp.weight"),
        other="q2_k",
    ),
    Sabotage(
        "fallback in an attention tensor",
        2,
        "ffn_inp",
        True,
        "q5_k_m",
        edit=from_other("blk.2.attn_output.weight"),
        other="q2_k",
    ),
)
