"""Tasks on models: what each scores, and in which answers two of them differ.

lm-evaluation-harness has the tasks, asks the questions and judges the answers; a model is anything
that is its `LM`. Here are the order of things, the comparison, and plain data to show.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import numpy as np
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from megrez_eval.statistics import Flips, Score, bits, flips, score
from megrez_gguf.errors import ConfigError, SourceError
from megrez_parity.answers import at_chance

# What a task is judged by, best first, where it has several metrics.
MAIN = (
    "exact_match", "acc", "pass@1", "pass_at_1", "prompt_level_strict_acc", "math_verify",
    "acc_norm", "bits_per_byte",
)  # fmt: skip
EXAMPLES = 5  # of what was lost, kept for each difference
LONG = 600  # characters of a question or an answer that are shown
OWN_TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One model on one task. `right` has a value for each question by number; texts have none."""

    task: str
    metric: str
    filter: str  # which of the task's ways of reading an answer
    score: Score
    chance: float | None  # what guessing scores; None where nothing can be guessed
    seconds: float
    right: Mapping[int, float] = field(repr=False)

    @property
    def at_chance(self) -> bool:
        """Whether guessing would do as well, as far as these questions tell."""
        return at_chance(self.score.low, self.chance)


@dataclass(frozen=True, slots=True)
class ModelResult:
    model: str
    tasks: tuple[TaskResult, ...]
    cut: int  # texts that were too long for the context


@dataclass(frozen=True, slots=True)
class Example:
    """A question that the first model answered right, and the second did not."""

    number: int
    question: str  # its end, where that is long
    target: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed from `first` to `second` on one task, with some of what was lost."""

    task: str
    first: str
    second: str
    flips: Flips
    examples: tuple[Example, ...]


@dataclass(frozen=True, slots=True)
class Evaluation:
    models: tuple[ModelResult, ...]
    differences: tuple[Difference, ...]
    samples: Mapping[str, Mapping[str, Sequence[Any]]] = field(repr=False)  # by model and task
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """All but the samples, as plain data."""
        return {
            "models": [asdict(model) for model in self.models],
            "differences": [asdict(difference) for difference in self.differences],
            "settings": dict(self.settings),
        }


def evaluate(
    models: Mapping[str, Callable[[], AbstractContextManager[LM]]],
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    system: str | None = None,
    allow_code: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Ask each of `models`, opened one after the other, the questions of `tasks`.

    Every model is compared with the first. `include` is a folder with more tasks in the harness's
    YAML, `limit` takes so many questions of each task, `fewshot` puts so many examples before each,
    `chat` uses the model's chat template, with the `system` prompt. `allow_code` lets tasks execute
    what a model wrote. `seed` is the harness's, for drawing examples.

    Raises ConfigError: a task that nobody knows, or one that executes code and may not.
    SourceError: a task's data cannot be had.
    """
    manager = TaskManager(include_path=[str(p) for p in (OWN_TASKS, include) if p])
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"no task is called {', '.join(unknown)}; `lm-eval ls tasks` lists the harness's own"
        )
    results, samples = [], {}
    for name, open_model in models.items():
        say(f"{name}: loading")
        parts: list[TaskResult] = []
        kept: dict[str, Sequence[Any]] = {}
        with open_model() as lm:
            for task in tasks:
                say(f"{name}: {task}")
                begun = time.monotonic()
                found = _run(lm, task, manager, limit, fewshot, chat, system, allow_code, seed)
                kept |= found["samples"]
                parts += _results(task, found, time.monotonic() - begun)
            results.append(ModelResult(name, tuple(parts), getattr(lm, "cut", 0)))
        samples[name] = kept
    settings = {
        "tasks": list(tasks), "limit": limit, "fewshot": fewshot, "chat": chat, "system": system,
        "seed": seed,
    }  # fmt: skip
    return Evaluation(tuple(results), tuple(_differences(results, samples)), samples, settings)


def _run(
    lm: LM,
    task: str,
    manager: TaskManager,
    limit: int | None,
    fewshot: int | None,
    chat: bool,
    system: str | None,
    allow_code: bool,
    seed: int,
) -> dict[str, Any]:
    try:
        with _quiet():
            loaded = manager.load([task])
    except Exception as e:  # whatever the code of a task, or of what fetches its data, may raise
        raise SourceError(
            f"{task}: lm-evaluation-harness cannot load it ({type(e).__name__}: {e}); its data "
            "come from Hugging Face, or from where its YAML says"
        ) from None
    for one in loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if own is None or (fewshot is not None and own != 0):  # 0 is meant by its task
            one.set_config(key="num_fewshot", value=fewshot or 0)
        one.set_fewshot_seed(seed=seed)
    random.seed(seed)
    np.random.seed(seed)
    with _quiet():
        try:
            found = lm_eval.evaluator.evaluate(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=0,
                system_instruction=system,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                confirm_run_unsafe_code=allow_code,
            )
        except ValueError as e:
            if "unsafe" not in str(e):
                raise
            raise ConfigError(
                f"{task} executes what the model wrote, as you: --allow-code-execution if you mean "
                "it, best in a container"
            ) from None
    assert found is not None
    return dict(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness tells how it is set up at each call; what goes wrong it raises."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _results(asked: str, found: Mapping[str, Any], seconds: float) -> Iterator[TaskResult]:
    """A result for each task that `asked` stands for; of several one more, of all their questions.

    That is the mean over questions, as the harness gives it for MMLU, and not over tasks.
    """
    results = list(_each(found, seconds))
    yield from results
    for name, metric in dict.fromkeys((one.filter, one.metric) for one in results):
        parts = [one for one in results if (one.filter, one.metric) == (name, metric)]
        values = [value for one in parts for value in one.right.values()]
        if len(parts) > 1 and values:
            chance = None
            if all(one.chance is not None for one in parts):
                chance = sum((one.chance or 0) * one.score.n for one in parts) / len(values)
            right = dict(enumerate(values))
            yield TaskResult(asked, metric, name, score(values), chance, seconds, right)


def _each(found: Mapping[str, Any], seconds: float) -> Iterator[TaskResult]:
    for task, samples in sorted(found["samples"].items()):
        metrics = {m for sample in samples for m in sample["metrics"]}
        metric = next((m for m in MAIN if m in metrics), None)
        if metric is None:
            raise ConfigError(f"{task} has none of the metrics {', '.join(MAIN)}: {metrics}")
        filters = list(dict.fromkeys(sample["filter"] for sample in samples))
        for name in filters:
            values = {s["doc_id"]: s[metric] for s in samples if s["filter"] == name}
            if metric == "bits_per_byte":  # a text's log-likelihood and its length
                mean, right = bits(list(values.values())), {}
            else:
                right = {number: float(value) for number, value in values.items()}
                mean = score(list(right.values()))
            chance = _chance(found["configs"].get(task, {}), samples)
            share = seconds / len(found["samples"]) / len(filters)
            yield TaskResult(task, metric, name, mean, chance, share, right)


def _chance(config: Mapping[str, Any], samples: Sequence[Any]) -> float | None:
    """The mean share of a question's choices that are right, where there are choices.

    A task whose answers are written tells in its metadata which field has the choices.
    """
    if named := (config.get("metadata") or {}).get("choices"):
        return sum(1 / len(s["doc"][named]) for s in samples) / len(samples)
    if config.get("output_type") != "multiple_choice":
        return None
    # Some tasks ask once more for each choice, without the question.
    counts = [sum(bool(context) for context, *_ in s["arguments"]) or 1 for s in samples]
    return sum(1 / count for count in counts) / len(counts)


def _differences(
    results: Sequence[ModelResult], samples: Mapping[str, Mapping[str, Sequence[Any]]]
) -> Iterator[Difference]:
    if not results:
        return
    before = {(task.task, task.filter): task for task in results[0].tasks}
    for result in results[1:]:
        for task in result.tasks:
            old = before[task.task, task.filter]
            a, b = list(old.right.values()), [task.right[number] for number in old.right]
            if not a or not set(a) | set(b) <= {0, 1}:
                continue
            lost = [n for n in old.right if old.right[n] > task.right[n]]
            first, second = (
                {
                    s["doc_id"]: s
                    for s in samples[model].get(task.task, ())  # none of a task made of others
                    if s["filter"] == task.filter
                }
                for model in (results[0].model, result.model)
            )
            shown = [n for n in lost if n in first][:EXAMPLES]
            examples = tuple(_example(n, first[n], second[n]) for n in shown)
            yield Difference(task.task, results[0].model, result.model, flips(a, b), examples)


def _example(number: int, first: Mapping[str, Any], second: Mapping[str, Any]) -> Example:
    question = str(first["arguments"][0][0])
    target = first["target"]
    choices = [arguments[1] for arguments in first["arguments"]]
    if len(choices) > 1 and isinstance(target, int):
        target = choices[target]
    return Example(number, question[-LONG:], str(target)[-LONG:], _said(first), _said(second))


def _said(sample: Mapping[str, Any]) -> str:
    """The answer given, or of choices the one that is likeliest."""
    if len(sample["arguments"]) > 1:
        scores = [responses[0][0] for responses in sample["resps"]]
        return str(sample["arguments"][scores.index(max(scores))][1])
    return str(sample["resps"][0][0])[-LONG:]
