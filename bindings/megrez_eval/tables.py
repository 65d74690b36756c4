"""An evaluation on a terminal, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megrez_eval.evaluation import Evaluation
from megrez_parity.answers import NAME, answers
from megrez_parity.report.answers import flips, scores
from megrez_parity.report.table import print_content


def print_tables(evaluation: Evaluation) -> None:
    """Scores, then what changed between models, then what that can show."""
    found = answers(evaluation.as_dict())
    print_content(scores(found.scores))
    if found.flips:
        print()
        print_content(flips(found.flips))
    print()
    for line in remarks(evaluation):
        print(line)


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """What a reader should know beside the figures."""
    for model in evaluation.models:
        for task in model.tasks:
            if task.at_chance:
                yield (
                    f"{model.model}: {task.task} is at chance, as far as {task.score.n} questions "
                    "tell: read nothing into its score."
                )
        times = ", ".join(f"{task.task} {task.seconds:.0f} s" for task in model.tasks)
        yield f"{model.model} took: {times}."
        if model.cut:
            yield f"{model.model}: {model.cut} texts were too long, and lost their beginnings."


def write(evaluation: Evaluation, folder: Path) -> list[Path]:
    """results.json, and samples/MODEL/TASK.jsonl with every question and answer; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / NAME
    text = json.dumps(evaluation.as_dict(), indent=1, ensure_ascii=False, default=str)
    results.write_text(text + "\n", "utf-8")
    paths = [results]
    for model, tasks in evaluation.samples.items():
        for task, samples in tasks.items():
            path = folder / "samples" / model.replace("/", "_") / f"{task}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(s, ensure_ascii=False, default=str) + "\n" for s in samples)
            path.write_text("".join(lines), "utf-8")
            paths.append(path)
    return paths
