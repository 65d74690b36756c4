"""The engines' choice of experts against the reference's."""

from typing import Any

import pytest
import torch

from megrez_engines.configuration import MegrezMoeConfig
from megrez_engines.routing import select
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import route
from support.configurations import TINY
from support.megrez_kinds import KINDS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", [0.0, -3.0], ids=["", "negative bias"])
def test_as_the_reference(kind: str, level: float) -> None:
    raw: dict[str, Any] = TINY | KINDS[kind]
    facts = ModelConfig.from_dict(raw)
    layer = facts.moe_layers[-1]
    make = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    state, router = draw(1, 500, facts.hidden_size), draw(facts.n_routed_experts, facts.hidden_size)
    bias = draw(facts.n_routed_experts) + level if facts.has_correction_bias else None
    prefix = f"model.layers.{layer}.mlp.gate."
    weights = {prefix + "weight": router / 8}
    if bias is not None:
        weights[prefix + "e_score_correction_bias"] = bias
    ids, expected = route(facts, weights, layer, state, lambda *_: None)

    logits = state[0] @ weights[prefix + "weight"].T
    got, chosen = select(MegrezMoeConfig(**raw).rule(), logits, bias)
    order, wanted = chosen.argsort(-1), ids[0].argsort(-1)
    assert torch.equal(chosen.gather(-1, order), ids[0].gather(-1, wanted))
    torch.testing.assert_close(
        got.gather(-1, order), expected[0].gather(-1, wanted), rtol=1e-12, atol=0
    )


def test_scores_are_float32_at_least() -> None:
    rule = MegrezMoeConfig().rule()
    weights, _ = select(rule, torch.randn(3, 64, dtype=torch.bfloat16), torch.zeros(64))
    assert weights.dtype == torch.float32
