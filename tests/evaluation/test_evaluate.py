"""Whole evaluations: scores far from chance, one that is not, flips, refusals, files."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megrez_eval import candidates, tables
from megrez_eval.evaluation import Evaluation, evaluate
from megrez_gguf.errors import ConfigError, SourceError
from megrez_gguf.format.reader import GGUFFile
from megrez_parity.answers import read as read_answers
from megrez_parity.answers import verdict
from support import eval_tasks
from support.commands import RUN
from support.paths import POCKET


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*RUN, *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def scrambled(pocket_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model with the rows of its output layer in another order."""
    path = tmp_path_factory.mktemp("scrambled") / "scrambled.gguf"
    data = bytearray(pocket_gguf("f32").read_bytes())
    file = GGUFFile.open(pocket_gguf("f32"))
    (output,) = [tensor for tensor in file.tensors if tensor.name == "output.weight"]
    start, rows = output.begin, output.shape[0]
    size = output.nbytes // rows
    order = random.Random(0).sample(range(rows), rows)
    old = bytes(data[start : start + output.nbytes])
    data[start : start + output.nbytes] = b"".join(old[i * size : (i + 1) * size] for i in order)
    path.write_bytes(data)
    return path


def asked(files: list[Path], tasks: Path, names: list[str], **options: Any) -> Evaluation:
    found = candidates.files(files, n_threads=2)
    return evaluate(found, names, include=tasks, **options)


def test_the_pocket_is_far_from_chance_and_a_scrambled_one_at_it(
    pocket_gguf: Callable[..., Path], scrambled: Path, tasks: Path
) -> None:
    result = asked([pocket_gguf("f32"), scrambled], tasks, ["pocket_cloze"])
    (good,), (bad,) = (model.tasks for model in result.models)
    assert good.chance == bad.chance == 0.25
    assert good.score.low > 0.25
    assert not good.at_chance
    assert bad.at_chance
    (difference,) = result.differences
    assert difference.flips.p < 0.05
    found = difference.flips
    assert verdict(found.lost, found.won, found.p) == "worse"
    assert [line for line in tables.remarks(result) if "at chance" in line]
    assert 0 < len(difference.examples) <= 5
    for example in difference.examples:
        assert good.right[example.number] > bad.right[example.number]
        assert example.first == example.target != example.second


def test_answers_in_chat(pocket_gguf: Callable[..., Path], tasks: Path) -> None:
    files = [pocket_gguf("f32"), pocket_gguf("q8_0")]
    chat: dict[str, Any] = {"chat": True, "system": eval_tasks.SYSTEM}
    result = asked(files, tasks, ["pocket_capitals"], limit=12, **chat)
    for model in result.models:
        assert model.tasks[0].score.value == 1
        assert model.tasks[0].chance is None
    without = asked(files[:1], tasks, ["pocket_capitals"], limit=12)
    assert without.models[0].tasks[0].score.value < 1


def test_a_level_loses_bits(pocket_gguf: Callable[..., Path], tasks: Path) -> None:
    result = asked([pocket_gguf("f32"), pocket_gguf("q2_k")], tasks, ["pocket_text"])
    good, bad = (model.tasks[0].score.value for model in result.models)
    assert good < bad < good * 1.1
    assert not result.differences


def test_a_task_nobody_knows_is_named(pocket_gguf: Callable[..., Path], tasks: Path) -> None:
    with pytest.raises(ConfigError, match="pocket_clozes"):
        asked([pocket_gguf("f32")], tasks, ["pocket_cloze", "pocket_clozes"])


def test_data_that_are_not_there_are_told(
    pocket_gguf: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / "capitals.yaml").read_text("utf-8").replace("capitals", "absent")
    (tmp_path / "absent.yaml").write_text(text, "utf-8")
    with pytest.raises(SourceError, match="pocket_absent"):
        asked([pocket_gguf("f32")], tmp_path, ["pocket_absent"])


def test_a_group_is_all_its_questions(
    pocket_gguf: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / "cloze.yaml").read_text("utf-8")
    for name in ("one", "two"):
        part = text.replace("pocket_cloze", f"pocket_{name}")
        (tmp_path / f"{name}.yaml").write_text(part, "utf-8")
    group = "group: pocket_both\ntask: [pocket_one, pocket_two]\n"
    (tmp_path / "both.yaml").write_text(group, "utf-8")
    files = [pocket_gguf("f32"), pocket_gguf("q2_k")]
    result = asked(files, tmp_path, ["pocket_both"], limit=10)
    one, two, both = result.models[0].tasks
    assert (one.task, two.task, both.task) == ("pocket_one", "pocket_two", "pocket_both")
    assert both.score.n == 20
    assert both.score.value == one.score.value
    assert both.chance == 0.25
    assert [d.task for d in result.differences] == ["pocket_one", "pocket_two", "pocket_both"]


def test_code_is_executed_only_when_asked(
    pocket_gguf: Callable[..., Path], tasks: Path, tmp_path: Path
) -> None:
    text = (tasks / "capitals.yaml").read_text("utf-8")
    unsafe = text.replace("pocket_capitals", "pocket_unsafe") + "unsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(unsafe, "utf-8")
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        asked([pocket_gguf("f32")], tmp_path, ["pocket_unsafe"], limit=1)
    asked([pocket_gguf("f32")], tmp_path, ["pocket_unsafe"], limit=1, allow_code=True)


def test_levels_of_a_checkpoint_by_the_command(tasks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["eval", str(POCKET), "--levels", "q8_0,q4_0", "--tasks", "pocket_cloze"]
    command += ["--include", str(tasks), "--limit", "8", "--threads", "2", "-o", str(out)]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "q8_0" in done.stdout
    assert "least that shows" in done.stdout
    results = json.loads((out / "results.json").read_text("utf-8"))
    assert [model["model"] for model in results["models"]] == ["q8_0", "q4_0"]
    shown = read_answers(out)
    assert [one.model for one in shown.scores] == ["q8_0", "q4_0"]
    assert shown.flips[0].n == 8
    samples = (out / "samples" / "q4_0" / "pocket_cloze.jsonl").read_text("utf-8").splitlines()
    assert len(samples) == 8
    known = (out / "answers.jsonl").read_bytes()
    again = run(*command, "--json")
    assert (out / "answers.jsonl").read_bytes() == known  # nothing was asked twice
    assert json.loads(again.stdout)["models"][1]["tasks"][0]["score"]["n"] == 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x.gguf"], "--tasks"),
        (["--tasks", "a"], "whom to ask"),
        (["a", "b", "--levels", "q8_0", "--tasks", "a"], "one checkpoint"),
        ([str(POCKET), "--engine", "jax", "--tasks", "arc_easy"], "no engine is called jax"),
    ],
)
def test_a_call_that_means_nothing_is_refused(arguments: list[str], words: str) -> None:
    done = run("eval", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
