"""The trace names the tensor that errs by itself, by as much as it errs, and no other."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_llama.nodes import TRACED
from megrez_parity.reference import block, head, rotary
from megrez_parity.results import Trace
from megrez_parity.tracing import trace
from support.traces import GROUPS, SOME_IN_LOOP, WINDOWS, Nodes, candidate, computed, model, noisy

TIGHT = dict.fromkeys(TRACED, 1e-11)
LAYER = "model.layers.{}."


def traced(
    config: ModelConfig, folder: Path, others: dict[str, dict[str, Tensor]]
) -> dict[str, Trace]:
    """Candidates of weights `others`, over all windows."""
    nodes = {
        name: [candidate(config, weights, w) for w in range(len(WINDOWS))]
        for name, weights in others.items()
    }
    return trace(config, folder, WINDOWS, nodes, dict.fromkeys(others, TIGHT))


@pytest.mark.parametrize("changes", SOME_IN_LOOP, ids=str)
def test_the_same_model_errs_nowhere(changes: dict[str, Any], tmp_path: Path) -> None:
    config, folder, weights = model(changes, tmp_path)
    found = traced(config, folder, {"same": weights})["same"]
    assert found.first_beyond is None
    assert all(point.tolerance == 1e-11 for point in found.points)
    assert max(max(point.nmse, point.local_nmse) for point in found.points) < 1e-12
    names = [(point.name, point.layer) for point in found.points]
    everywhere = ["kqv_out", "ffn_inp", "ffn_norm", "ffn_out", "l_out"]
    mixture = ["ffn_moe_logits", "ffn_moe_probs_biased"]
    mixture += ["ffn_moe_out", "ffn_shexp"] * (config.n_shared_experts > 0)
    expected = [("embd", -1)]
    for i in range(config.num_hidden_layers):
        middle = mixture * config.is_moe(i)
        expected += [(name, i) for name in [*everywhere[:3], *middle, *everywhere[3:]]]
    assert names == [*expected, ("result_norm", -1), ("result_output", -1)]


@pytest.mark.parametrize("changes", SOME_IN_LOOP, ids=str)
def test_errors_by_hand(changes: dict[str, Any], tmp_path: Path) -> None:
    config, folder, weights = model(changes, tmp_path)
    other = noisy(weights, 0.1)
    (found,) = traced(config, folder, {"noisy": other}).values()
    nodes = [candidate(config, other, w) for w in range(len(WINDOWS))]
    true = [computed(config, weights, w) for w in range(len(WINDOWS))]
    own = [local(config, weights, node) for node in nodes]
    for point in found.points:
        key = point.name, point.layer
        assert point.nmse == pytest.approx(nmse(nodes, true, key), rel=1e-9, abs=1e-20)
        if point.name != "embd":  # nothing before it
            assert point.local_nmse == pytest.approx(nmse(nodes, own, key), rel=1e-9)
        assert point.nmse > 0


def local(config: ModelConfig, weights: dict[str, Tensor], node: Nodes) -> Nodes:
    """What the reference's layers make of a candidate's states."""
    found: Nodes = {}

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        found[name, layer] = tensor.flatten(0, -2).numpy()

    rope = rotary(config, len(WINDOWS[0]), torch.float64)
    previous = None
    for layer in range(config.num_hidden_layers):
        x = torch.from_numpy(node["l_out", layer - 1] if layer else node["embd", -1])
        block(config, weights, layer, x[None].double(), previous, rope, keep)
        previous = torch.from_numpy(node["ffn_norm", layer])[None].double()
    left = torch.from_numpy(node["l_out", layer])[None].double()
    found["result_output", -1] = head(config, weights, left, keep)[0].numpy()
    return found


def nmse(nodes: list[Nodes], expected: list[Nodes], key: tuple[str, int]) -> float:
    error = power = 0.0
    for node, other in zip(nodes, expected, strict=True):
        mine, theirs = np.asarray(node[key], np.float64), other[key][-len(node[key]) :]
        both = np.isfinite(mine) & np.isfinite(theirs)
        error += np.square(mine[both] - theirs[both]).sum()
        power += np.square(theirs)[both].sum()
    return error / power


# What is 1.1 times as large, and where that shows first; linear there, so by 0.1 squared.
LARGER = [
    ("model.embed_tokens.weight", "embd", -1, 0.01),
    (LAYER.format(3) + "self_attn.v_proj.weight", "kqv_out", 3, 0.01),
    (LAYER.format(3) + "self_attn.q_proj.weight", "kqv_out", 3, None),
    (LAYER.format(5) + "self_attn.o_proj.weight", "ffn_inp", 5, None),
    (LAYER.format(2) + "post_attention_layernorm.weight", "ffn_norm", 2, 0.01),
    (LAYER.format(4) + "mlp.gate.weight", "ffn_moe_logits", 4, 0.01),
    (LAYER.format(4) + "mlp.gate.e_score_correction_bias", "ffn_moe_probs_biased", 4, None),
    (LAYER.format(4) + "mlp.experts.2.down_proj.weight", "ffn_moe_out", 4, None),
    (LAYER.format(5) + "mlp.shared_experts.down_proj.weight", "ffn_shexp", 5, 0.01),
    (LAYER.format(0) + "mlp.down_proj.weight", "ffn_out", 0, 0.01),
    ("model.norm.weight", "result_norm", -1, 0.01),
    ("lm_head.weight", "result_output", -1, 0.01),
]


@pytest.mark.parametrize("changes", [{}, {"pre_gate": False}, GROUPS], ids=str)
@pytest.mark.parametrize(("weight", "name", "layer", "error"), LARGER, ids=lambda value: str(value))
def test_one_error_is_named(
    weight: str,
    name: str,
    layer: int,
    error: float | None,
    changes: dict[str, Any],
    tmp_path: Path,
) -> None:
    config, folder, weights = model(changes, tmp_path)
    other = weights | {weight: 1.1 * weights[weight]}
    found = traced(config, folder, {"same": weights, "other": other})
    assert found["same"].first_beyond is None
    point = found["other"].first_beyond
    assert point is not None
    assert (point.name, point.layer) == (name, layer)
    assert point.nmse == pytest.approx(point.local_nmse, rel=1e-3)
    if error is not None:
        assert point.local_nmse == pytest.approx(error, rel=1e-3)
    # What follows is fed wrong, and right by itself: only layers that share the pool err too.
    sound = {p.layer for p in found["other"].points if p.local_nmse < 1e-12}
    pool = {i for i in (4, 5) if "experts.2." in weight}
    after = {i for i in range(config.num_hidden_layers) if i > layer} - pool
    assert after <= sound if layer >= 0 else sound


def test_two_errors_do_not_hide_each_other(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    first, second = (LAYER.format(i) + "mlp.shared_experts.down_proj.weight" for i in (2, 4))
    other = weights | {first: 1.1 * weights[first], second: 1.3 * weights[second]}
    (found,) = traced(config, folder, {"other": other}).values()
    local_errors = {p.layer: p.local_nmse for p in found.points if p.name == "ffn_shexp"}
    assert local_errors[2] == pytest.approx(0.01, rel=1e-3)
    assert local_errors[3] < 1e-12
    assert local_errors[4] == pytest.approx(0.09, rel=1e-3)


def test_nan_is_beyond_any_tolerance(tmp_path: Path) -> None:
    config, folder, weights = model(GROUPS, tmp_path)
    nodes = [candidate(config, weights, w) for w in range(len(WINDOWS))]
    nodes[1]["ffn_moe_probs_biased", 2][3, 4] = np.nan
    found = trace(config, folder, WINDOWS, {"nan": nodes}, {"nan": dict.fromkeys(TRACED, 1e9)})
    point = found["nan"].first_beyond
    assert point is not None
    assert (point.name, point.layer) == ("ffn_moe_probs_biased", 2)
    assert math.isnan(point.local_nmse)


def test_without_tolerance_nothing_is_beyond(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    nodes = [candidate(config, noisy(weights, 0.5), w) for w in range(len(WINDOWS))]
    found = trace(config, folder, WINDOWS, {"one": nodes, "two": nodes}, {"two": {"l_out": 1e-9}})
    assert found["one"].first_beyond is None
    assert {point.tolerance for point in found["one"].points} == {None}
    point = found["two"].first_beyond
    assert point is not None
    assert (point.name, point.layer) == ("l_out", 0)


def test_what_was_not_captured(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    nodes = [candidate(config, weights, w) for w in range(len(WINDOWS))]
    del nodes[2]["ffn_shexp", 3]
    with pytest.raises(ValueError, match="ffn_shexp-3 was not captured"):
        trace(config, folder, WINDOWS, {"some": nodes}, {})
