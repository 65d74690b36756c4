"""Prompts as the model's authors advise them, and how their answers are read.

For mathematics "Please reason step by step, and put your final answer within \\boxed{}.", for
choices "Please show your choice in the answer field with only the choice letter": the model card of
Megrez2-3x7B-A3B gives both. Whether two answers are the same is the harness's own judgement.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

from megrez_eval.sandbox import passes

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "\nPlease show your choice in the `answer` field with only the choice letter, e.g., "
    '`"answer": "C"`.'
)
BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
# Of several the last counts: a model may think aloud.
ANSWER = re.compile(r'"?answer"?\s*:\s*"?\(?([A-J])\b', re.IGNORECASE)


def gsm8k_text(doc: dict[str, Any]) -> str:
    return str(doc["question"]) + BOXED


def gsm8k_target(doc: dict[str, Any]) -> str:
    return str(doc["answer"]).rpartition("####")[2].strip().replace(",", "")


def math500_text(doc: dict[str, Any]) -> str:
    return str(doc["problem"]) + BOXED


def mmlu_text(doc: dict[str, Any]) -> str:
    return str(doc["question"]) + _choices(doc["choices"]) + CHOICE


def mmlu_target(doc: dict[str, Any]) -> str:
    return "ABCD"[doc["answer"]]


def mmlu_pro_text(doc: dict[str, Any]) -> str:
    return str(doc["question"]) + _choices(doc["options"]) + CHOICE


def ceval(**metadata: Any) -> dict[str, Any]:
    """The validation questions of all subjects of C-EVAL, whose test answers are not published."""
    import datasets
    from lm_eval.tasks.ceval._generate_configs import SUBJECTS

    parts = [datasets.load_dataset("ceval/ceval-exam", name, split="val") for name in SUBJECTS]
    return {"val": datasets.concatenate_datasets(parts)}


def ceval_docs(dataset: Any) -> Any:
    return dataset.map(lambda doc: {"choices": [doc[letter] for letter in "ABCD"]})


def gpqa_docs(dataset: Any) -> Any:
    """Choices in an order that is always the same, and gives nothing away."""

    def shuffled(doc: dict[str, Any]) -> dict[str, Any]:
        right = doc["Correct Answer"].strip()
        choices = [right, *(doc[f"Incorrect Answer {i}"].strip() for i in (1, 2, 3))]
        choices.sort(key=lambda c: hashlib.sha256((doc["Question"] + c).encode()).digest())
        return {"choices": choices, "answer": "ABCD"[choices.index(right)]}

    return dataset.map(shuffled)


def gpqa_text(doc: dict[str, Any]) -> str:
    return str(doc["Question"]) + _choices(doc["choices"]) + CHOICE


def humaneval_text(doc: dict[str, Any]) -> str:
    return (
        "Complete this function, and answer with all of it in a block of Python.\n"
        f"```python\n{doc['prompt']}```"
    )


def mbpp_text(doc: dict[str, Any]) -> str:
    tests = "\n".join(doc["test_list"])
    return (
        f"{doc['text']} Your code should pass these tests:\n```python\n{tests}\n```\n"
        "Answer with a block of Python."
    )


def _choices(texts: Sequence[str]) -> str:
    return "".join(f"\n{chr(65 + i)}. {text}" for i, text in enumerate(texts))


def boxed(doc: dict[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if what stands in the last box is the target, as MATH's own comparison finds."""
    found = last_boxed_only_string(results[0])
    target = doc["answer"] if "problem" in doc else gsm8k_target(doc)
    if found is None:
        return {"exact_match": 0}
    said = remove_boxed(found)
    plain = said.replace(",", "") if "problem" not in doc else said
    return {"exact_match": int(is_equiv(plain, target))}


def choice(doc: dict[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if the last letter in an answer field is the target's."""
    found = ANSWER.findall(results[0])
    target = doc["answer"] if isinstance(doc["answer"], str) else mmlu_target(doc)
    return {"exact_match": int(bool(found) and found[-1].upper() == target)}


def code(doc: dict[str, Any], results: Sequence[str]) -> dict[str, int]:
    """1 if the last block of Python in the answer passes the tests of its question."""
    blocks = BLOCK.findall(results[0])
    program = blocks[-1] if blocks else results[0]
    if "entry_point" in doc:  # HumanEval's; an answer may go on where its question ends
        if f"def {doc['entry_point']}(" not in program:
            program = doc["prompt"] + program
        else:  # the question has what its function needs, and the function without its body
            program = doc["prompt"] + "\n\n" + program
        tests = f"{doc['test']}\ncheck({doc['entry_point']})"
    else:
        tests = "\n".join([doc.get("test_setup_code") or "", *doc["test_list"]])
    return {"acc": int(passes(f"{program}\n{tests}\n"))}


def ifeval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, bool]:
    """Whether the answer does all that the question asks: as it is, and without its frills."""
    from lm_eval.tasks.ifeval.utils import process_results  # it loads NLTK and its data

    found = process_results(doc, results)
    return {name: bool(found[name]) for name in found if name.startswith("prompt_level")}
