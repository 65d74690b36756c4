"""Which bounds apply to which model, and what is no thresholds file."""

import json
from pathlib import Path

import pytest

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import ConfigError
from megrez_llama import nodes as node_names
from megrez_parity.level_files import LEVELS
from megrez_parity.provenance import checkpoint_sha256
from megrez_parity.thresholds import Thresholds
from support.paths import POCKET


def test_the_committed_ones_are_the_pockets() -> None:
    bounds = Thresholds.load()
    assert bounds.weights_sha256 == checkpoint_sha256(Checkpoint.open(POCKET))
    assert list(bounds.figures) == list(LEVELS)
    assert bounds.local_nmse.keys() == bounds.figures.keys()
    for level in LEVELS:
        assert {"nmse", "tokenizer_agreement"} <= bounds.of(level, bounds.weights_sha256).keys()
        assert bounds.local_nmse[level]


ANY = {"tokenizer_agreement": 0.999, "unfaithful": 0.0}
ROUTER = {"ffn_moe_logits": 1e-9, "ffn_moe_probs_biased": 1e-9}


def test_other_models_are_held_to_what_is_true_of_any() -> None:
    bounds = Thresholds.load()
    assert bounds.of("q4_0", "another") == ANY
    assert bounds.of("f32", "another") == ANY | {"nmse": 1e-9}
    assert bounds.of("", "another") == ANY
    assert bounds.tolerances("q4_0", "another") == bounds.tolerances("", "another") == ROUTER
    assert bounds.tolerances("f32", "another") == dict.fromkeys(node_names.TRACED, 1e-9)
    assert bounds.tolerances("q4_0", bounds.weights_sha256) == bounds.local_nmse["q4_0"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = {"levels": {"q4_0": {"mean_kld": 0.5, "unfaithful": 3, "trace": {"l_out": 0.1}}}}
    path.write_text(json.dumps(mine), encoding="utf-8")
    bounds = Thresholds.load(path)
    assert bounds.of("q4_0", "anything") == ANY | {"mean_kld": 0.5, "unfaithful": 3.0}
    assert bounds.tolerances("q4_0", "anything") == ROUTER | {"l_out": 0.1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"levels": {"q4_0": 3}}',
        '{"levels": {"q4_0": {"mean_kld": "low"}}}',
        '{"levels": {"q4_0": {"mean_kdl": 0.1}}}',
        '{"levels": {"q4_0": {"positions": 1}}}',
    ],
)
def test_refusals(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"bad\.json: "):
        Thresholds.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read as thresholds"):
        Thresholds.load(tmp_path / "none.json")
