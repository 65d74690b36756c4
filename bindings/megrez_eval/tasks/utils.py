"""Prompts as the model's authors advise them, and how their answers are read.

For mathematics "Please reason step by step, and put your final answer within \\boxed{}.", for
choices "Please show your choice in the answer field with only the choice letter": the model card of
Megrez2-3x7B-A3B gives both. Whether two answers are the same is the harness's own judgement.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lm_eval.tasks.hendrycks_math.utils import is_equiv, last_boxed_only_string, remove_boxed

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE = (
    "\nPlease show your choice in the `answer` field with only the choice letter, e.g., "
    '`"answer": "C"`.'
)
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
