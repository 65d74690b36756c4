"""An evaluation on a terminal, and as files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megrez_eval.evaluation import Evaluation, TaskResult
from megrez_parity.answers import NAME, verdict


def print_tables(evaluation: Evaluation) -> None:
    """Scores, then what changed between models, then what that can show."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100_000)
    scores = Table(box=None, pad_edge=False)
    for name in ("model", "task", "metric", "n", "score", "95%", "guessing", "time", ""):
        scores.add_column(name, justify="left" if name in ("model", "task", "metric") else "right")
    for model in evaluation.models:
        for task in model.tasks:
            scores.add_row(model.model, *_cells(task))
    console.print(scores)
    if evaluation.differences:
        console.print()
        table = Table(box=None, pad_edge=False)
        for name in ("task", "from", "to", "lost", "won", "p", "least that shows", ""):
            table.add_column(name, justify="left" if name in ("task", "from", "to") else "right")
        for one in evaluation.differences:
            f = one.flips
            cells = (
                str(f.lost),
                str(f.won),
                f"{f.p:.3g}",
                f"{f.least:.1%}",
                verdict(f.lost, f.won, f.p),
            )
            table.add_row(one.task, one.first, one.second, *cells)
        console.print(table)
    for line in remarks(evaluation):
        console.print(line)


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """What a reader should know beside the figures."""
    for model in evaluation.models:
        for task in model.tasks:
            if task.at_chance:
                yield (
                    f"{model.model}: {task.task} is at chance, as far as {task.score.n} questions "
                    "tell: read nothing into its score."
                )
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


def _cells(task: TaskResult) -> tuple[str, ...]:
    bits = task.metric == "bits_per_byte"
    form = "{:.4f}" if bits else "{:.1%}"
    value, low, high = map(form.format, (task.score.value, task.score.low, task.score.high))
    metric = task.metric if task.filter == "none" else f"{task.metric}, {task.filter}"
    guessing = "" if task.chance is None else f"{task.chance:.1%}"
    mark = "at chance" if task.at_chance else ""
    time = f"{task.seconds:.0f} s"
    return task.task, metric, str(task.score.n), value, f"{low} to {high}", guessing, time, mark
