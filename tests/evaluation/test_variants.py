"""The authors' advice as tasks: right answers count, wrong ones do not, in their data's form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from megrez_eval.evaluation import OWN_TASKS, evaluate

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
}


class Says(LM):  # type: ignore[misc]
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.prompts = text, []  # type: ignore[var-annotated]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        self.prompts += [request.args for request in requests]
        return [self.text] * len(requests)

    def loglikelihood(self, requests: Any) -> Any:
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


@pytest.fixture
def local(tmp_path: Path) -> Callable[[str], Path]:
    """local(task) -> a folder with the task as it is, but for where its data come from."""

    def make(task: str) -> Path:
        for path in OWN_TASKS.iterdir():
            if path.suffix in (".yaml", ".py"):
                (tmp_path / path.name).write_text(path.read_text("utf-8"), "utf-8")
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps(ROWS[task][0]) + "\n", "utf-8")
        for name in ROWS:
            (tmp_path / f"{name}.yaml").unlink()
        text = (OWN_TASKS / f"{task}.yaml").read_text("utf-8").replace(task, "local")
        text = re.sub("(?m)^dataset_name:.*\n", "", text)
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}"
        text = re.sub("(?m)^dataset_path:.*$", source, text)
        (tmp_path / "local.yaml").write_text(text, "utf-8")
        return tmp_path

    return make


@pytest.mark.parametrize("task", ROWS)
def test_right_and_wrong(local: Callable[[str], Path], task: str) -> None:
    folder, (_, right, wrong) = local(task), ROWS[task]
    for text in (*right, *wrong):
        lm = Says(text)
        result = evaluate({"x": partial(nullcontext, lm)}, ["local"], include=folder)
        assert result.models[0].tasks[0].score.value == (text in right), text
    prompt, options = lm.prompts[0]
    assert ("boxed" if "\\boxed" in right[0] else '"answer": "C"') in prompt
    assert options["temperature"] == 0.7
    assert options["top_p"] == 0.9
    assert options["do_sample"]


def test_every_variant_is_tried() -> None:
    assert {path.stem for path in OWN_TASKS.glob("megrez2_*.yaml")} == set(ROWS)
