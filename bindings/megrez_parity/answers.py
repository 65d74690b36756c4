"""Answers that `megrez-gguf eval` wrote, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megrez_gguf.errors import SourceError
from megrez_parity.results import Answered, Answers, Flipped, Lost

NAME = "results.json"


def verdict(lost: int, won: int, p: float) -> str:
    """What flips say: "worse", "better", or that they show no difference."""
    if p < 0.05:
        return "worse" if lost > won else "better"
    return "no difference shown"


def at_chance(low: float, chance: float | None) -> bool:
    """Whether guessing would do as well as a score whose interval begins at `low`."""
    return chance is not None and low <= chance


def read(folder: Path) -> Answers:
    """What `eval --out FOLDER` found. Raises SourceError: there is nothing, or something else."""
    path = folder / NAME
    try:
        return answers(json.loads(path.read_text("utf-8")))
    except OSError as e:
        raise SourceError(f"{path}: {e.strerror}; megrez-gguf eval --out writes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise SourceError(f"{path}: not what megrez-gguf eval --out writes ({e!r})") from None


def answers(found: dict[str, Any]) -> Answers:
    """What an evaluation found, as plain data. Raises KeyError, ValueError, TypeError for other."""
    return Answers(
        [_score(model["model"], task) for model in found["models"] for task in model["tasks"]],
        [_flipped(one) for one in found["differences"]],
    )


def _score(model: str, task: dict[str, Any]) -> Answered:
    score, named = task["score"], task["filter"]
    return Answered(
        model=model,
        task=task["task"],
        metric=task["metric"] if named == "none" else f"{task['metric']}, {named}",
        n=int(score["n"]),
        value=float(score["value"]),
        low=float(score["low"]),
        high=float(score["high"]),
        chance=task["chance"],
    )


def _flipped(one: dict[str, Any]) -> Flipped:
    flips = one["flips"]
    return Flipped(
        task=one["task"],
        first=one["first"],
        second=one["second"],
        n=int(flips["n"]),
        lost=int(flips["lost"]),
        won=int(flips["won"]),
        p=float(flips["p"]),
        least=float(flips["least"]),
        examples=[
            Lost(str(e["question"]), str(e["target"]), str(e["first"]), str(e["second"]))
            for e in one["examples"]
        ],
    )
