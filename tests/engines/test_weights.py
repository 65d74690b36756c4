"""A checkpoint without one of its tensors is refused, whichever it is, before it is used."""

from __future__ import annotations

import pytest

from megrez_engines.weights import complete
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.conversion.layout import required
from megrez_gguf.errors import CheckpointError
from support.configurations import TINY

CONFIG = ModelConfig.from_dict(TINY)
NAMES = required(CONFIG)


def test_all_pass_in_their_order() -> None:
    weights = [(name, i) for i, name in enumerate([*NAMES, "model.layers.99.extra"])]
    assert list(complete(iter(weights), CONFIG)) == weights


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.3.up_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias",
        "model.norm.weight",
    ],
)
def test_a_lacking_one_is_named(name: str) -> None:
    assert name in NAMES
    weights = ((other, 0) for other in NAMES if other != name)
    with pytest.raises(CheckpointError, match=rf"lacks 1 .*{name}.*verify"):
        list(complete(weights, CONFIG))
