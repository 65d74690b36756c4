"""Files that say less than ours, or say it in another way, and every quantization of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from megrez_gguf.format.model_check import open_checked
from support.gguf_edit import ARRAY, U32, Gguf
from support.llama import LlamaError, Model, logits, nmse, quantize
from support.samples import TOKENS, Sample

OURS = ("experts_shared_frequency", "pre_gate")
DEDUCED = (
    *OURS,
    "expert_gating_func",
    "expert_weights_norm",
    "expert_weights_scale",
    "leading_dense_block_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "vocab_size",
    "rope.dimension_count",
)


@pytest.mark.parametrize("absent", [OURS, DEDUCED], ids=["our two keys", "all that can be deduced"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"experts_shared_frequency": 1},
        {"experts_shared_frequency": 2},
        {"experts_shared_frequency": 50},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"first_k_dense_replace": 5},
        {"n_shared_experts": 0},
    ],
    ids=str,
)
def test_deduced_keys(
    sample: Callable[..., Sample], tmp_path: Path, fields: dict[str, Any], absent: tuple[str, ...]
) -> None:
    model = sample(**fields)
    file = Gguf.read(model.gguf)
    file.drop(*absent)
    path = file.write(tmp_path / "bare.gguf")
    assert np.array_equal(logits(model.gguf, TOKENS), logits(path, TOKENS))


@pytest.mark.parametrize("key", DEDUCED)
def test_each_deduced_key_alone(tiny: Sample, tmp_path: Path, key: str) -> None:
    file = Gguf.read(tiny.gguf)
    file.drop(key)
    path = file.write(tmp_path / "bare.gguf")
    assert np.array_equal(logits(tiny.gguf, TOKENS[:8]), logits(path, TOKENS[:8]))


def test_widths_given_by_layer(tiny: Sample, tmp_path: Path) -> None:
    """Upstream's arrays, with 0 where a layer has no such tensors."""
    file = Gguf.read(tiny.gguf)
    file.set("feed_forward_length", (U32, [160, 0, 0, 0, 0, 0]), ARRAY)
    file.set("expert_feed_forward_length", (U32, [0, 96, 0, 0, 96, 0]), ARRAY)
    path = file.write(tmp_path / "arrays.gguf")
    assert np.array_equal(logits(tiny.gguf, TOKENS), logits(path, TOKENS))


def test_all_groups_used_is_no_limit(sample: Callable[..., Sample]) -> None:
    model = sample(n_group=4, topk_group=4)
    assert nmse(model.reference(), logits(model.gguf, TOKENS)) < 1e-9


def test_one_expert(sample: Callable[..., Sample]) -> None:
    model = sample(n_routed_experts=1, num_experts_per_tok=1)
    assert nmse(model.reference(), logits(model.gguf, TOKENS)) < 1e-9


def test_tiny_scores_are_still_normalised(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """Sigmoids of about 1e-7 sum to less than the smallest normal F16."""
    model = sample(norm_topk_prob=True, first_k_dense_replace=0, num_hidden_layers=2)
    file, weights = Gguf.read(model.gguf), model.weights
    for layer in range(2):
        # Norm weights of one sign and states of any: give the router a direction of its own.
        name = f"model.layers.{layer}.mlp.gate.weight"
        weights[name] = weights[name] * 8
        tensor = file.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        tensor.data = (tensor.floats() * 8).astype(np.float32).tobytes()
        bias = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        # A bias that prefers the experts whatever they score makes low scores common.
        weights[bias] = torch.linspace(0, 1000, 8, dtype=torch.float64)
        tensor = file.tensors[f"blk.{layer}.exp_probs_b.bias"]
        tensor.data = np.linspace(0, 1000, 8).astype(np.float32).tobytes()
    sums: list[float] = []

    def watch(name: str, layer: int, tensor: Any) -> None:
        if name == "ffn_moe_logits":
            sums.append(float(tensor[..., -3:].sigmoid().sum(-1).min()))

    expected = model.reference(weights=weights, trace=watch)
    assert min(sums) < 1e-6
    assert nmse(expected, logits(file.write(tmp_path / "m.gguf"), TOKENS)) < 1e-7


@pytest.mark.parametrize(
    "fields",
    [
        {"num_experts_per_tok": 32, "n_routed_experts": 64, "moe_intermediate_size": 32},
        {
            "experts_shared_frequency": 100,
            "n_shared_experts": 0,
            "topk_method": "greedy",
            "n_group": 2,
            "topk_group": 1,
        },
    ],
    ids=["many experts a token", "few tensors a layer"],
)
def test_graph_has_room(sample: Callable[..., Sample], fields: dict[str, Any]) -> None:
    """Upstream allows eight nodes a tensor; sharing leaves fewer tensors for as many nodes."""
    model = sample("f16", num_hidden_layers=48, hidden_size=64, **fields)
    assert np.isfinite(logits(model.gguf, TOKENS)).all()


@pytest.mark.parametrize(
    ("kind", "limit"),
    [
        ("q8_0", 3e-2),
        ("q6_k", 6e-2),
        ("q5_k_m", 0.15),
        ("q4_k_m", 0.3),
        ("q4_0", 0.4),
        ("q4_1", 0.4),
        ("iq4_nl", 0.3),
        ("iq4_xs", 0.4),
        ("q3_k_m", 0.7),
        ("q2_k", 1.0),
        ("f16", 1e-4),
        ("bf16", 1e-3),
    ],
)
def test_quantized(tiny: Sample, tmp_path: Path, kind: str, limit: float) -> None:
    path = tmp_path / "quantized.gguf"
    quantize(tiny.gguf, path, kind)
    types = {n: GGMLQuantizationType(t.type).name for n, t in Gguf.read(path).tensors.items()}
    for name, found in types.items():
        if any(part in name for part in ("norm", "ffn_gate_inp", "exp_probs_b")):
            assert found == "F32", name
        else:
            assert found != "F32", name
    # Random weights flip near ties between experts, hence the wide limits.
    # Rows of 96 and 160 do not fill blocks of 256; rows of 256 do.
    fallback = {"q6_k": "Q8_0", "q5_k_m": "Q5_1 Q8_0", "q4_k_m": "Q5_0 Q8_0", "q2_k": "Q4_0 Q5_0"}
    if kind in fallback:
        for name in ("blk.1.ffn_down_exps.weight", "blk.0.ffn_down.weight"):
            assert types[name] in fallback[kind], name
        assert types["blk.1.ffn_up_exps.weight"].endswith("_K")
    assert nmse(logits(tiny.gguf, TOKENS), logits(path, TOKENS)) < limit


@pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
def test_every_type_runs_or_is_refused(
    sample: Callable[..., Sample], tmp_path: Path, kind: GGMLQuantizationType
) -> None:
    """Zeros of every type there is, in the expert pool and in the embeddings."""
    # 256 wide, so that every block fits.
    model = sample(moe_intermediate_size=256)
    file = Gguf.read(model.gguf)
    for name in ("blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight", "token_embd.weight"):
        file.tensors[name] = file.tensors[name].cast(kind)
    path = file.write(tmp_path / "typed.gguf")
    if kind.name in ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"):
        with pytest.raises(LlamaError, match=f"(?i)tensor '.*' has wrong type; .*{kind.name}"):
            Model(path)
    else:
        assert np.isfinite(logits(path, TOKENS[:8])).all()


def test_a_file_that_llama_cpp_saved_is_a_model(tiny: Sample, tmp_path: Path) -> None:
    """Its saver writes keys of its own, some with what stands for "not set"."""
    saved = tmp_path / "saved.gguf"
    with Model(tiny.gguf) as model:
        llama_cpp.llama_model_save_to_file(model.handle, str(saved).encode())
    open_checked(saved)
    assert np.array_equal(logits(tiny.gguf, TOKENS), logits(saved, TOKENS))
