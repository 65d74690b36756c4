"""The search for recipes: it finds what brute force finds, in the sizes asked for, and goes on."""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megrez_cli import main
from megrez_gguf.conversion.convert import convert, plan_convert
from megrez_gguf.quantization import recipe
from megrez_parity import recipe_meter
from megrez_parity import recipe_search as search
from megrez_parity.recipe_search import Choice, Sizes, best_mixes, neighbours, predicted, roles_of
from support.paths import POCKET
from support.random_checkpoint import FULL, SMALL, make_checkpoint


def options(seed: int, roles: int = 5) -> list[list[Choice]]:
    draw = random.Random(seed)

    def choice(kind: int) -> Choice:
        return Choice(str(kind), draw.random() / (kind + 1), (draw.randrange(900), kind * 100))

    return [[choice(kind) for kind in range(4)] for _ in range(roles)]


@pytest.mark.parametrize("seed", range(5))
def test_the_best_mix_is_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "GRID", 1 << 20)
    budgets = (2200, 900)
    table = options(seed)
    fitting = {}
    for chosen in itertools.product(*table):
        used = [sum(sizes) for sizes in zip(*(c.nbytes for c in chosen), strict=True)]
        if all(u <= b for u, b in zip(used, budgets, strict=True)):
            fitting[tuple(c.kind for c in chosen)] = sum(c.kld for c in chosen)
    found = list(best_mixes(table, budgets))
    assert found[0] == min(fitting, key=fitting.__getitem__)
    assert set(found) <= fitting.keys()
    assert [predicted(m, table) for m in found] == sorted(predicted(m, table) for m in found)
    monkeypatch.setattr(search, "GRID", 400)
    assert predicted(next(best_mixes(table, budgets)), table) < 1.05 * fitting[found[0]]
    near = set(neighbours(found[0], table, budgets))
    assert near == {
        m for m in fitting if 0 < sum(a != b for a, b in zip(m, found[0], strict=True)) <= 2
    }
    assert list(best_mixes(table, (0, 0))) == []


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    roles = roles_of(POCKET)
    assert tuple(roles) == search.ROLES
    sizes = Sizes(POCKET, roles)
    assert not sizes.can(r"\.ffn_down_exps\.", "q4_K")
    assert sizes.can(r"\.ffn_down_exps\.", "iq4_nl")
    padded = Sizes(POCKET, roles, pad_rows=True)
    # 64 columns become 256, but only where a type's blocks need them.
    assert padded.of(r"\.ffn_down_exps\.", "q4_K") == 4 * padded.of(r"\.ffn_down_exps\.", "iq4_nl")
    assert padded.of(r"\.ffn_down_exps\.", "iq4_nl") == sizes.of(r"\.ffn_down_exps\.", "iq4_nl")
    assert not padded.can(r"\.ffn_down\.", "q4_K")
    mix = ("q4_K", "q8_0", "iq4_xs", *("q5_0",) * (len(roles) - 3))
    done = convert(POCKET, tmp_path / "x.gguf", recipe=search.recipe_of(mix, roles, level="q4_k_m"))
    assert 0 <= done.nbytes - sizes.whole(mix) < 1024
    assert sizes.level("q4_k_m") == convert(POCKET, tmp_path / "y.gguf", outtype="q4_k_m").nbytes


@pytest.mark.parametrize("pad_rows", [False, True])
def test_what_is_written_is_what_was_found(tmp_path: Path, pad_rows: bool) -> None:
    found = search.recipe_of(("q3_K", "q8_0"), ("_exps", "attn"), name="x", pad_rows=pad_rows)
    path = tmp_path / "x.toml"
    path.write_text(search.toml(found))
    again = recipe.load(path)
    assert (again.types, again.level, again.pad_rows) == (found.types, found.level, pad_rows)


def test_a_role_the_model_lacks_is_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(
        SMALL | {"tie_word_embeddings": True, "n_shared_experts": 0}, tmp_path / "c"
    )
    missing = set(search.ROLES) - set(roles_of(folder))
    assert missing == {r"^output\.", r"\.ffn_(gate|up)_shexp\.", r"\.ffn_down_shexp\."}


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A search small enough for a test: three roles, three types, few tokens."""
    rest = r"^token_embd\.|\.attn_(q|k|v|output)\.|_shexp\.|\.ffn_(gate|up|down)\."
    roles = (r"^output\.", r"_exps\.", rest)
    monkeypatch.setattr(search, "ROLES", roles)
    monkeypatch.setattr(search, "TYPES", ("q4_0", "q5_0", "q8_0"))
    monkeypatch.setattr(search, "TARGETS", {"mine": "q5_0"})
    monkeypatch.setattr(search, "STOCK", ("q5_0",))
    work = tmp_path / "work"
    return ["search", str(POCKET), "--work", str(work), "--ctx", "64", "--windows", "2"]


@pytest.mark.slow
def test_searches_judges_and_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*more: str) -> str:
        with pytest.raises(SystemExit) as done:
            main([*arguments, *more])
        assert done.value.code == 0
        return (tmp_path / "work" / "mine.toml").read_text("utf-8")

    text = run()
    found = recipe.load(tmp_path / "work" / "mine.toml")
    assert found.level == "q5_0"
    assert "No larger than q5_0" in tomllib.loads(text)["description"]
    target = tmp_path / "x.gguf"
    plain = convert(POCKET, target, outtype="q5_0").nbytes
    mine = convert(POCKET, target, recipe=found, force=True).nbytes
    assert mine <= plain
    assert (tmp_path / "work" / "report" / "report.html").is_file()

    # Killed while it wrote its last line, it measures that one again, and no other.
    (log,) = (tmp_path / "work").glob("measured-*.jsonl")
    whole = log.read_text("utf-8")
    log.write_text(whole[:-5], "utf-8")
    measured = []
    real = recipe_meter.Meter._measure

    def measure(self: recipe_meter.Meter, mix: Any) -> Any:
        measured.append(mix)
        return real(self, mix)

    monkeypatch.setattr(recipe_meter.Meter, "_measure", measure)
    assert run("--no-judge") == text
    assert len(measured) == 1


@pytest.mark.slow
def test_a_size_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    """Of another checkpoint: how large this one becomes does not matter."""
    large = make_checkpoint(FULL, tmp_path / "full", tokenizer_vocab=4000, empty=True)
    size = plan_convert(large, "x", outtype="q5_0").nbytes
    arguments += ["--also", str(large), "--size", str(size), "--no-judge"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0
    (path,) = (tmp_path / "work").glob("megrez-*.toml")
    found = recipe.load(path)
    assert found.name == f"megrez-{size / 2**30:g}g"
    assert set(dict(found.types).values()) != {"q4_0"}
    assert size * 0.9 < plan_convert(large, "x", recipe=found).nbytes <= size


def test_tells_how_long_it_will_take(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = itertools.count(step=60)
    monkeypatch.setattr(recipe_meter, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(recipe_meter.Meter, "_measure", lambda self, mix: 0.1)
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--no-judge"])
    assert done.value.code == 0
    # Two types of three roles are to be measured, besides what all begin with.
    left = re.findall(r"about (\d+) min left", capsys.readouterr().err)
    assert left == list("5443221")
