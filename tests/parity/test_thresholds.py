"""Which bounds apply to which model, and what is no thresholds file."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import ConfigError
from megrez_llama import nodes as node_names
from megrez_parity.level_files import LEVELS
from megrez_parity.provenance import checkpoint_sha256
from megrez_parity.thresholds import Scope, Thresholds
from megrez_parity.windows import read_corpus
from support.paths import POCKET

WEIGHTS, TEXTS = "aa" * 32, {"11" * 32: 4, "22" * 32: 3}
ANOTHER = Scope("another", 512, TEXTS)


def test_the_committed_ones_are_the_pockets() -> None:
    bounds = Thresholds.load()
    source = Checkpoint.open(POCKET)
    texts = read_corpus(source, [], n_ctx=512, n_windows=4).texts
    windows = {text.sha256: text.windows for text in texts}
    assert bounds.scope == Scope(checkpoint_sha256(source), 512, windows)
    assert list(bounds.figures) == list(LEVELS)
    assert bounds.local_nmse.keys() == bounds.figures.keys()
    for level in LEVELS:
        assert {"nmse", "tokenizer_agreement"} <= bounds.of(level, bounds.scope).keys()
        assert bounds.local_nmse[level]


ANY = {"tokenizer_agreement": 0.999, "unfaithful": 0.0}
ROUTER = {"ffn_moe_logits": 1e-9, "ffn_moe_probs_biased": 1e-9}


def test_other_models_are_held_to_what_is_true_of_any() -> None:
    bounds = Thresholds.load()
    assert bounds.of("q4_0", ANOTHER) == ANY
    assert bounds.of("f32", ANOTHER) == ANY | {"nmse": 1e-9}
    assert bounds.of("", ANOTHER) == ANY
    assert bounds.tolerances("q4_0", ANOTHER) == bounds.tolerances("", ANOTHER) == ROUTER
    assert bounds.tolerances("f32", ANOTHER) == dict.fromkeys(node_names.TRACED, 1e-9)
    assert bounds.tolerances("q4_0", bounds.scope) == bounds.local_nmse["q4_0"]


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    mine = {"levels": {"q4_0": {"mean_kld": 0.5, "unfaithful": 3, "trace": {"l_out": 0.1}}}}
    path.write_text(json.dumps(mine), encoding="utf-8")
    bounds = Thresholds.load(path)
    assert bounds.of("q4_0", ANOTHER) == ANY | {"mean_kld": 0.5, "unfaithful": 3.0}
    assert bounds.tolerances("q4_0", ANOTHER) == ROUTER | {"l_out": 0.1}


@pytest.mark.parametrize("seed", range(20))
def test_bounds_hold_where_at_least_as_much_was_measured(seed: int) -> None:
    draw = random.Random(seed)
    texts = {f"{draw.getrandbits(256):064x}": draw.randint(2, 9) for _ in range(draw.randint(2, 5))}
    scope = Scope(WEIGHTS, 2 ** draw.randint(3, 12), texts)
    one = draw.choice([*texts])
    assert not scope.lacks(scope)
    assert not scope.lacks(replace(scope, texts={**texts, one: texts[one] + draw.randint(1, 9)}))
    less = [
        replace(scope, weights_sha256="bb" * 32),
        replace(scope, context=scope.context + draw.choice([-4, -1, 1, 512])),
        replace(scope, texts={**texts, one: draw.randrange(texts[one])}),
        replace(scope, texts={**texts, "33" * 32: 9}),
        replace(scope, texts={text: n for text, n in texts.items() if text != one}),
    ]
    assert all(scope.lacks(run) for run in less)
    bounds = Thresholds(scope, {"q4_0": {"nmse": 0.5}}, {"q4_0": {"l_out": 0.5}})
    for run in less:
        assert bounds.of("q4_0", run) == ANY
        assert bounds.tolerances("q4_0", run) == ROUTER
        assert not Scope().lacks(run)  # a file that does not say holds for any
    assert bounds.of("q4_0", scope) == ANY | {"nmse": 0.5}
    assert bounds.tolerances("q4_0", scope) == ROUTER | {"l_out": 0.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"levels": {"q4_0": 3}}',
        '{"levels": {}, "context": "long"}',
        '{"levels": {}, "texts": ["one.txt"]}',
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
