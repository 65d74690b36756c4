"""The order of the graph: a layer's experts are known before the previous layer uses its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llama_cpp as C
import numpy as np
import pytest

from megrez_llama import ggml
from support.llama import nmse, opened
from support.samples import TOKENS, Sample

KEPT = {"ffn_moe_topk", "ffn_moe_logits", "ffn_moe_weights_norm"}


def watch(model: Sample) -> tuple[list[str], dict[str, np.ndarray], dict[str, int]]:
    """Names in order of computing, contents of the KEPT, and types."""
    order: list[str] = []
    values: dict[str, np.ndarray] = {}
    types: dict[str, int] = {}

    @C.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, _: Any) -> bool:
        if ask:
            return True
        node = ggml.Tensor.from_address(tensor)
        name = node.name.decode()
        order.append(name)
        types[name] = node.type
        if name.rsplit("-", 1)[0] in KEPT and name not in values:
            values[name] = np.array(ggml.read(node)).reshape(-1, node.ne[0])
        return True

    with opened(model.gguf, cb_eval=callback) as context:
        context.run(TOKENS)
    return order, values, types


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"first_k_dense_replace": 0},
        {"n_group": 4, "topk_group": 2},
        {"moe_layer_freq": 2, "first_k_dense_replace": 0, "experts_shared_frequency": 4},
    ],
    ids=str,
)
def test_pre_gate(sample: Callable[..., Sample], fields: dict[str, Any]) -> None:
    model = sample(**fields)
    config = model.config
    order, values, types = watch(model)
    place = {name: i for i, name in reversed(list(enumerate(order)))}  # the first of a name
    for layer in config.moe_layers:
        topk, weights = place[f"ffn_moe_topk-{layer}"], place[f"ffn_moe_weights_norm-{layer}"]
        if layer == 0:
            assert place["ffn_norm-0"] < topk < place["ffn_moe_up-0"]
            continue
        before = layer - 1
        ffn = f"ffn_moe_up-{before}" if config.is_moe(before) else f"ffn_up-{before}"
        assert place[f"ffn_norm-{before}"] < topk < weights < place[ffn]
        assert weights < place[f"attn_norm-{layer}"]
        # Nothing stands between the state and the router but, in the last layer, picking rows.
        between = order[place[f"ffn_norm-{before}"] + 1 : place[f"ffn_moe_logits-{layer}"]]
        if before > 0 or not config.is_moe(0):
            allowed = ("ffn_norm", "node_", "leaf_")
            assert all(name.startswith(allowed) for name in between), between
    check_values(model, values, types)


def test_without_pre_gate(sample: Callable[..., Sample]) -> None:
    model = sample(pre_gate=False)
    order, values, types = watch(model)
    place = {name: i for i, name in reversed(list(enumerate(order)))}
    for layer in model.config.moe_layers:
        names = [f"{n}-{layer}" for n in ("ffn_norm", "ffn_moe_topk", "ffn_moe_up")]
        assert sorted(names, key=place.__getitem__) == names
    check_values(model, values, types)


def check_values(model: Sample, values: dict[str, np.ndarray], types: dict[str, int]) -> None:
    """Logits in F32; ids and weights are the reference's, whatever their order."""
    expected: dict[str, np.ndarray] = {}
    model.reference(trace=lambda n, i, t: expected.update({f"{n}-{i}": t[0].numpy()}))
    used = model.config.num_experts_per_tok
    for layer in model.config.moe_layers:
        assert types[f"ffn_moe_logits-{layer}"] == types[f"ffn_moe_probs-{layer}"] == ggml.F32
        assert types[f"ffn_moe_topk-{layer}"] == ggml.I32
        assert nmse(expected[f"ffn_moe_logits-{layer}"], values[f"ffn_moe_logits-{layer}"]) < 1e-10
        ids, found = expected[f"ffn_moe_topk-{layer}"], values[f"ffn_moe_topk-{layer}"]
        assert np.array_equal(np.sort(ids), np.sort(found))
        weights = expected[f"ffn_moe_weights-{layer}"]
        mine = values[f"ffn_moe_weights_norm-{layer}"].reshape(-1, used)
        in_order = np.take_along_axis(weights, np.argsort(ids), 1)
        assert nmse(in_order, np.take_along_axis(mine, np.argsort(found), 1)) < 1e-9
