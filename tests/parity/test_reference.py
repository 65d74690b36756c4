"""The reference against transformers where the two models meet, and by hand where they do not."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import CheckpointError, ConfigError
from megrez_parity import reference
from megrez_parity.reference import CheckpointWeights, forward, limit_groups, rotary, route
from support.random_checkpoint import SMALL, make_checkpoint

LIKE_GLM = SMALL | {"experts_shared_frequency": 1, "pre_gate": False, "num_hidden_layers": 4}


def config_and_weights(
    raw: dict[str, Any], folder: Path, **options: Any
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A random checkpoint of configuration `raw`, in float64."""
    make_checkpoint(raw, folder / "checkpoint", **options)
    return ModelConfig.from_dict(raw), dict(CheckpointWeights(folder / "checkpoint", torch.float64))


def some_tokens(count: int = 40, batch: int = 1) -> Tensor:
    return torch.randint(0, 300, (batch, count), generator=torch.Generator().manual_seed(0))


def nmse(candidate: Tensor, expected: Tensor) -> float:
    return float((candidate - expected).square().mean() / expected.square().mean())


def glm(raw: dict[str, Any], weights: dict[str, Tensor]) -> Glm4MoeForCausalLM:
    """transformers' model of the same maths, holding the same weights, in float64."""
    names = {*inspect.signature(Glm4MoeConfig).parameters, "head_dim"} - {"rope_scaling"}
    fields = {k: v for k, v in raw.items() if k in names}
    rope = {"rope_type": "default"} | (raw["rope_scaling"] or {})
    config = Glm4MoeConfig(
        **fields,
        rope_parameters=rope | {"rope_theta": raw["rope_theta"], "partial_rotary_factor": 1.0},
        use_qk_norm=False,
    )
    config._attn_implementation = config._experts_implementation = "eager"
    model = Glm4MoeForCausalLM(config).double().eval()
    stacked = {}
    for name in model.state_dict():
        if name.endswith("experts.gate_up_proj"):
            gate, up = (stack(weights, name, f"{kind}_proj.weight") for kind in ("gate", "up"))
            stacked[name] = torch.cat((gate, up), 1)
        elif name.endswith("experts.down_proj"):
            stacked[name] = stack(weights, name, "down_proj.weight")
        elif name == "lm_head.weight" and raw["tie_word_embeddings"]:
            stacked[name] = weights["model.embed_tokens.weight"]
        else:
            stacked[name] = weights[name]
    model.load_state_dict(stacked)
    return model


def stack(weights: dict[str, Tensor], name: str, kind: str) -> Tensor:
    prefix = name.rpartition(".")[0]
    return torch.stack([weights[f"{prefix}.{e}.{kind}"] for e in range(8)])


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5},
        {"n_group": 4, "topk_group": 2, "norm_topk_prob": False},
        {"attention_bias": True, "first_k_dense_replace": 2},
        {"first_k_dense_replace": 0, "num_key_value_heads": 1, "head_dim": 24},
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "num_experts_per_tok": 1},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_fast": 2.0, "beta_slow": 0.5}},
    ],
    ids=str,
)
def test_equals_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    raw = LIKE_GLM | changes
    config, weights = config_and_weights(raw, tmp_path)
    tokens = some_tokens(batch=2)
    with torch.no_grad():
        expected = glm(raw, weights)(tokens).logits
    assert expected.std() > 0.5
    # transformers' router, norms and rope are float32, so this is as close as it gets.
    assert nmse(forward(config, weights, tokens), expected) < 1e-11


def traced(config: ModelConfig, weights: dict[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    seen = {}

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        seen[name, layer] = tensor

    forward(config, weights, some_tokens(), keep)
    return seen


@pytest.mark.parametrize("changes", [{}, {"n_group": 4, "topk_group": 2}], ids=str)
def test_traced_intermediates_follow_from_each_other(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config, weights = config_and_weights(SMALL | changes, tmp_path)
    entering: dict[int, list[Tensor]] = {layer: [] for layer in config.moe_layers}
    seen = {}

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        if name == "ffn_moe_swiglu":
            entering[layer].append(tensor)
        else:
            assert (name, layer) not in seen
            seen[name, layer] = tensor

    logits = forward(config, weights, some_tokens(), keep)
    torch.testing.assert_close(logits, seen["result_norm", -1] @ weights["lm_head.weight"].T)
    x = weights["model.embed_tokens.weight"][some_tokens()]
    for layer in range(7):
        p = f"model.layers.{layer}."
        q = seen["attn_norm", layer] @ weights[p + "self_attn.q_proj.weight"].T
        assert q.shape == seen["kqv_out", layer].shape == (1, 40, 64)
        attended = seen["kqv_out", layer] @ weights[p + "self_attn.o_proj.weight"].T
        torch.testing.assert_close(seen["ffn_inp", layer], x + attended)
        x = seen["l_out", layer]
        torch.testing.assert_close(x, seen["ffn_inp", layer] + seen["ffn_out", layer])
        out = seen["ffn_out", layer]
        if layer == 0:
            down = weights[p + "mlp.down_proj.weight"]
            torch.testing.assert_close(out, seen["ffn_swiglu", layer] @ down.T)
            continue
        torch.testing.assert_close(out, seen["ffn_moe_out", layer] + seen["ffn_shexp", layer])
        down = weights[p + "mlp.shared_experts.down_proj.weight"]
        torch.testing.assert_close(
            seen["ffn_shexp", layer], seen["ffn_shexp_swiglu", layer] @ down.T
        )
        scores = seen["ffn_moe_probs_biased", layer]
        bias = weights[p + "mlp.gate.e_score_correction_bias"]
        expected = seen["ffn_moe_logits", layer].sigmoid() + bias
        kept = scores.isfinite()
        torch.testing.assert_close(scores[kept], expected[kept])
        assert kept.sum(-1).unique().tolist() == [4 if changes else 8]
        ids = seen["ffn_moe_topk", layer]
        assert torch.equal(ids, scores.topk(3, -1).indices)
        counts = ids.flatten().bincount(minlength=8)
        assert [len(z) for z in entering[layer]] == counts[counts > 0].tolist()
        first = int(counts.nonzero()[0])
        token = int((ids[0] == first).any(-1).nonzero()[0])
        prefix = f"model.layers.{config.pool_layer(layer)}.mlp.experts.{first}."
        h = seen["ffn_norm", layer][0, token]
        gate, up = (weights[f"{prefix}{n}_proj.weight"] @ h for n in ("gate", "up"))
        torch.testing.assert_close(entering[layer][0][0], gate * gate.sigmoid() * up)


def test_router_reads_the_previous_layers_state(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path)
    seen = traced(config, weights)
    for layer in config.moe_layers:
        gate = weights[f"model.layers.{layer}.mlp.gate.weight"]
        # Layer 0 is dense, and its state routes layer 1 all the same.
        torch.testing.assert_close(
            seen["ffn_moe_logits", layer], seen["ffn_norm", layer - 1] @ gate.T
        )


@pytest.mark.parametrize("changes", [{"pre_gate": False}, {"first_k_dense_replace": 0}], ids=str)
def test_router_reads_its_own_state(changes: dict[str, Any], tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL | changes, tmp_path)
    seen = traced(config, weights)
    layer = config.moe_layers[0]
    gate = weights[f"model.layers.{layer}.mlp.gate.weight"]
    torch.testing.assert_close(seen["ffn_moe_logits", layer], seen["ffn_norm", layer] @ gate.T)


def test_a_group_uses_its_first_layers_experts(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path)
    seen = traced(config, weights)
    for layer, pool in {1: 1, 2: 1, 3: 1, 4: 4, 5: 4, 6: 4}.items():
        h, ids, w = (seen[n, layer][0] for n in ("ffn_norm", "ffn_moe_topk", "ffn_moe_weights"))
        for position in (0, 17, 39):  # one token at a time, as one would by hand
            expected = torch.zeros(64, dtype=torch.float64)
            for expert, weight in zip(ids[position].tolist(), w[position], strict=True):
                p = f"model.layers.{pool}.mlp.experts.{expert}."
                gate = weights[p + "gate_proj.weight"] @ h[position]
                up = weights[p + "up_proj.weight"] @ h[position]
                down = weights[p + "down_proj.weight"]
                expected += weight * (down @ (gate * torch.sigmoid(gate) * up))
            torch.testing.assert_close(seen["ffn_moe_out", layer][0, position], expected)


def one_router(logits: list[float], bias: list[float], **changes: Any) -> tuple[list[int], Tensor]:
    """What a router with these logits and correction biases chooses, two experts a token."""
    raw = SMALL | {"n_routed_experts": len(logits), "num_experts_per_tok": 2} | changes
    weights = {
        "model.layers.1.mlp.gate.weight": torch.tensor(logits, dtype=torch.float64)[:, None],
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.tensor(bias, dtype=torch.float64),
    }
    state = torch.ones(1, 1, 1, dtype=torch.float64)
    ids, w = route(ModelConfig.from_dict(raw), weights, 1, state, lambda *_: None)
    return ids[0, 0].tolist(), w[0, 0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bias_selects_and_does_not_weigh() -> None:
    ids, w = one_router([2.0, 1.0, -1.0, -2.0], [0.0, 0.0, 0.0, 1.0], norm_topk_prob=False)
    assert ids == [3, 0]  # 0.119 + 1 beats 0.881
    assert w.tolist() == pytest.approx([sigmoid(-2), sigmoid(2)])


def test_weights_are_normalised_then_scaled() -> None:
    _, w = one_router([2.0, 1.0, -1.0, -2.0], [0.0] * 4, routed_scaling_factor=2.5)
    total = sigmoid(2) + sigmoid(1)
    assert w.tolist() == pytest.approx([2.5 * sigmoid(2) / total, 2.5 * sigmoid(1) / total])


def test_softmax_scores_count_the_experts_left_out() -> None:
    _, w = one_router([2.0, 1.0, 0.0, 0.0], [0.0] * 4, scoring_func="softmax", norm_topk_prob=False)
    total = math.exp(2) + math.exp(1) + 2
    assert w.tolist() == pytest.approx([math.exp(2) / total, math.exp(1) / total])


def test_a_group_is_scored_by_its_best_two_and_the_others_cannot_win() -> None:
    # Best two: 0.9 + 0.0, 0.5 + 0.5 and, all negative, -1 - 1. The largest single score loses.
    choice = torch.tensor([[[0.9, 0.0, 0.0, 0.5, 0.5, 0.0, -1.0, -1.0, -1.0]]])
    masked = limit_groups(choice, 3, 1)[0, 0]
    assert masked.isneginf().tolist() == [True] * 3 + [False] * 3 + [True] * 3
    kept = limit_groups(choice - 2, 3, 1)[0, 0]
    assert kept.topk(2).indices.sort().values.tolist() == [3, 4]


def test_attention_is_causal(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path)
    tokens = some_tokens()
    changed = tokens.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 300
    before, after = forward(config, weights, tokens), forward(config, weights, changed)
    torch.testing.assert_close(before[:, :25], after[:, :25])
    assert (before[:, 25:] - after[:, 25:]).abs().amax(-1).min() > 1e-3


def test_yarn_keeps_fast_and_interpolates_slow_dimensions() -> None:
    plain = ModelConfig.from_dict(SMALL | {"head_dim": 64})
    yarn = ModelConfig.from_dict(SMALL | {"head_dim": 64, "rope_scaling": YARN | {"factor": 8.0}})
    angles = []
    for config in (plain, yarn):
        cos, sin = rotary(config, 2, torch.float64)
        angles.append(torch.atan2(sin[1], cos[1]))  # position 1: the frequencies themselves
    ratio = angles[0] / angles[1]
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(8)
    cos, sin = rotary(yarn, 5, torch.float64)
    assert cos.square() + sin.square() == pytest.approx((0.1 * math.log(8) + 1) ** 2)


def test_o_proj_bias_is_used(tmp_path: Path) -> None:
    raw = SMALL | {"attention_bias": True}
    config, weights = config_and_weights(raw, tmp_path, output_bias=True)
    with_bias = forward(config, weights, some_tokens())
    del weights["model.layers.0.self_attn.o_proj.bias"]
    assert nmse(forward(config, weights, some_tokens()), with_bias) > 1e-4


def test_every_weight_gets_a_gradient(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path)
    for weight in weights.values():
        weight.requires_grad_()
    forward(config, weights, some_tokens(200)).logsumexp(-1).sum().backward()
    without = [n for n, w in weights.items() if w.grad is None or not w.grad.any()]
    # The correction bias only selects, which no gradient can see.
    assert without == [n for n in weights if n.endswith("e_score_correction_bias")]


def test_low_precision_weights_are_refused(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path)
    half = {name: weight.bfloat16() for name, weight in weights.items()}
    with pytest.raises(TypeError, match="bfloat16"):
        forward(config, half, some_tokens())


def test_streamed_weights_give_the_same_logits(tmp_path: Path) -> None:
    config, weights = config_and_weights(SMALL, tmp_path, shard_bytes=100_000)
    streamed = CheckpointWeights(tmp_path / "checkpoint", torch.float64)
    assert streamed.parameters == sum(w.numel() for w in weights.values())
    streamed.reopen()
    assert torch.equal(
        forward(config, streamed, some_tokens()), forward(config, weights, some_tokens())
    )


def test_unreadable_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        CheckpointWeights(tmp_path)
    folder = make_checkpoint(SMALL, tmp_path / "checkpoint")
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 4 bytes long"):
        CheckpointWeights(folder)


def test_stays_short() -> None:
    assert len(Path(reference.__file__).read_text().splitlines()) < 300
