"""The authors' advice as tasks: right answers count, wrong ones do not, in their data's form."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megrez_eval.evaluation import OWN_TASKS, evaluate
from megrez_gguf.errors import ConfigError
from support.local_task import Says, local

# A row as each dataset has them; a right answer, and wrong ones.
ROWS: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "megrez2_gsm8k": (
        {"question": "How many?", "answer": "Because.\n#### 1,234"},
        [r"So \boxed{1234}.", r"\boxed{1} or rather \boxed{1,234}"],
        [r"\boxed{12345}", "1234", r"\boxed{1234} no, \boxed{5}", ""],
    ),
    "megrez2_math500": (
        {"problem": "Half?", "solution": "x", "answer": r"\frac{1}{2}", "subject": "", "level": 1},
        [r"\boxed{\frac{1}{2}}", r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac12}"],
        [r"\boxed{2}", r"\frac{1}{2}"],
    ),
    "megrez2_mmlu": (
        {"question": "Which?", "subject": "x", "choices": ["p", "q", "r", "s"], "answer": 2},
        ['{"answer": "C"}', 'answer: "B"? No. {"answer": "C"}', '"answer": "C. r"'],
        ['{"answer": "B"}', "C", '{"answer": "Cats"}', ""],
    ),
    "megrez2_mmlu_pro": (
        {"question": "Which?", "options": list("pqrstuvwxy"), "answer": "J", "answer_index": 9},
        ['{"answer": "J"}'],
        ['{"answer": "I"}'],
    ),
    "megrez2_ceval": (
        {
            "id": 0,
            "question": "哪一个？",
            "A": "甲",
            "B": "乙",
            "C": "丙",
            "D": "丁",
            "answer": "D",
        },
        ['{"answer": "D"}', '答案是 D：{"answer": "D"}'],
        ['{"answer": "A"}', "答案：D", ""],
    ),
    "megrez2_ifeval": (
        {
            "key": 1,
            "prompt": "Say it without commas, and with the word Fluss.",
            "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
            "kwargs": [{}, {"keywords": ["Fluss"]}],
        },
        ["Der Fluss.", "Fluss und Fluss"],
        ["Ach, der Fluss.", "No commas.", ""],
    ),
    "megrez2_gpqa_diamond": (
        {"Question": "Which?", "Correct Answer": " p\n"}
        | {f"Incorrect Answer {i}": f"x{i}" for i in (1, 2, 3)},
        ['{"answer": "B"}'],
        ['{"answer": "A"}', '{"answer": "C"}', '{"answer": "D"}'],
    ),
    "megrez2_humaneval": (
        {
            "task_id": "x",
            "prompt": 'from math import pi\n\n\ndef area(r):\n    """Of a circle."""\n',
            "canonical_solution": "    return pi * r * r\n",
            "test": "def check(candidate):\n    assert 12 < candidate(2) < 13\n",
            "entry_point": "area",
        },
        [
            "Here.\n```python\ndef area(r):\n    return pi * r**2\n```\nDone.",
            "    return pi * r * r\n",
            "```python\ndef area(r): return 0\n```\nNo:\n```py\ndef area(r): return 12.5\n```",
        ],
        [
            "```python\ndef area(r):\n    return pi * r\n```",
            "```python\ndef area(r): return 12.5\n```\nNo:\n```\ndef area(r): return 0\n```",
            "```python\nraise SystemExit(0)\ndef area(r): pass\n```",
            "I cannot.",
            "",
        ],
    ),
    "megrez2_mbpp": (
        {
            "text": "Write a function to add.",
            "code": "def add(a, b): return a + b",
            "test_list": ["assert add(1, 2) == three"],
            "test_setup_code": "three = 3",
        },
        ["```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b): return 3"],
        ["```python\ndef add(a, b):\n    return a - b\n```", ""],
    ),
}


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """IFEval's code would fetch data for counting sentences, which nothing here does."""
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda name: name)


@pytest.mark.parametrize("task", ROWS)
def test_right_and_wrong(tmp_path: Path, task: str) -> None:
    row, right, wrong = ROWS[task]
    form = OWN_TASKS / f"{task}.yaml"
    folder = local(tmp_path, form, [row])
    said = {text: Says(lambda _, text=text: text) for text in (*right, *wrong)}  # type: ignore[misc]
    models = {text: partial(nullcontext, lm) for text, lm in said.items()}
    result = evaluate(models, ["local"], include=folder, allow_code=True)
    advice = {"_boxed": "\\boxed{}", "_choice": '`"answer": "C"`', "_code": "```python"}
    included = re.findall(r"include: (\w+)\.yaml", form.read_text("utf-8"))
    choices = len(row.get("options", "ABCD"))
    for one in result.models:
        assert one.tasks[0].score.value == (one.model in right), one.model
        assert one.tasks[0].chance == (1 / choices if "_choice" in included else None)
    prompt, options = said[right[0]].asked[0]
    assert all(advice[name] in prompt for name in included)
    assert options["temperature"] == 0.7
    assert options["top_p"] == 0.9
    assert options["do_sample"]


def test_code_is_not_executed_unasked(tmp_path: Path) -> None:
    task = "megrez2_humaneval"
    folder = local(tmp_path, OWN_TASKS / f"{task}.yaml", [ROWS[task][0]])
    with pytest.raises(ConfigError, match="--allow-code-execution"):
        evaluate({"x": partial(nullcontext, Says(lambda _: "pass"))}, ["local"], include=folder)


def test_every_variant_is_tried() -> None:
    assert {path.stem for path in OWN_TASKS.glob("megrez2_*.yaml")} == set(ROWS)


def test_ceval_is_all_of_its_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from megrez_eval.tasks import utils

    asked = []

    def load(path: str, name: str, split: str) -> datasets.Dataset:
        asked.append((path, name, split))
        return datasets.Dataset.from_list([ROWS["megrez2_ceval"][0] | {"question": name}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = utils.ceval(version=1)["val"]
    assert len(rows) == len(set(asked)) == 52
    assert set(rows["question"]) == {name for _, name, _ in asked}
    assert {(path, split) for path, _, split in asked} == {("ceval/ceval-exam", "val")}
