"""The recipes that come with the converter: what they promise of size, at any configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.errors import ConfigError
from megrez_gguf.quantization import recipe
from support.checkpoints import Make
from support.commands import cli
from support.configurations import TINY
from support.paths import POCKET
from support.random_checkpoint import FULL, make_checkpoint

# A recipe's name says whose size it may have.
BOUNDS = {"megrez-q3": "q3_k_m", "megrez-q4": "q4_k_m", "megrez-q5": "q5_k_m"}
# Or how many GiB it may have at full size.
SIZES = {"megrez-2.5g": 2.5, "megrez-3g": 3.0, "megrez-3.5g": 3.5, "megrez-4g": 4.0}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full size, without weights."""
    folder = tmp_path_factory.mktemp("full") / "full"
    return make_checkpoint(FULL, folder, empty=True)


def test_all_are_known() -> None:
    assert recipe.names() == sorted([*BOUNDS, *SIZES])


@pytest.mark.parametrize("name", SIZES)
def test_no_larger_than_it_says(name: str, full: Path) -> None:
    mine = plan_convert(full, recipe=name)
    assert 0.99 < mine.nbytes / 2**30 / SIZES[name] <= 1
    assert mine.fallbacks == ()


@pytest.mark.parametrize("name", BOUNDS)
def test_no_larger_than_the_level(name: str, full: Path) -> None:
    for checkpoint in (POCKET, full):
        mine = plan_convert(checkpoint, recipe=name)
        assert mine.nbytes <= plan_convert(checkpoint, outtype=BOUNDS[name]).nbytes
        assert mine.fallbacks == ()
        assert mine.path.name.endswith(f"-{name}.gguf")


@pytest.mark.parametrize("name", [*BOUNDS, *SIZES])
def test_names_every_tensor_once(name: str, full: Path) -> None:
    types = recipe.load(name).types
    for item in plan_convert(full, recipe=name).items:
        kinds = [kind.upper() for pattern, kind in types if re.search(pattern, item.name)]
        assert kinds == ([] if item.encoding.name == "F32" else [item.encoding.name]), item.name


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": True},
        {"first_k_dense_replace": 0},
        {"n_shared_experts": 0},
        {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 1},
    ],
)
def test_serves_any_configuration(make: Make, tmp_path: Path, fields: dict[str, Any]) -> None:
    assert (TINY | fields) != TINY
    for name in (*BOUNDS, *SIZES):
        out = tmp_path / f"{name}.gguf"
        done = cli("convert", make(**fields), "-o", out, "--recipe", name)
        assert done.exit_code == 0, done.stderr


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"recipe megrez-q9: .*megrez-q4"):
        recipe.load("megrez-q9")
