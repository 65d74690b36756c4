"""Whether models still answer: the section on benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from megrez_parity.answers import at_chance, verdict
from megrez_parity.report.content import Bad, Section, Table
from megrez_parity.report.words import NONE, clean, number, percent
from megrez_parity.results import Answered, Answers, Flipped


def answered(answers: Answers) -> Section:
    return Section(
        "answers",
        "Does it still answer?",
        "Scores of benchmarks, each with its 95% interval; guessing is what a model scores that "
        "knows nothing, and a score whose interval reaches it says nothing. Lost are questions "
        "that the first model answers right and the other does not, won the other way; p is "
        "McNemar's exact test, and under least that shows stands the smallest difference of scores "
        "that so many flips could show. Above p = 0.05 no difference was shown, which is not that "
        "there is none.",
        tables=[scores(answers.scores), flips(answers.flips), _lost(answers.flips)],
    )


def scores(found: Sequence[Answered]) -> Table:
    """What each model scores in each task."""
    rows = []
    for one in found:
        form = (lambda x: number(x, ".4f")) if one.metric == "bits_per_byte" else percent
        value = form(one.value)
        rows.append(
            [
                clean(one.model),
                clean(one.task),
                clean(one.metric),
                f"{one.n:,}",
                Bad(f"{value}, at chance") if at_chance(one.low, one.chance) else value,
                f"{form(one.low)} to {form(one.high)}",
                NONE if one.chance is None else percent(one.chance),
            ]
        )
    header = ["model", "task", "metric", "questions", "score", "95%", "guessing"]
    return Table("Scores", header, rows, frozenset({0, 1, 2}))


def flips(found: Sequence[Flipped]) -> Table:
    """In how many questions models differ, and what that shows."""
    rows = []
    for one in found:
        shown = verdict(one.lost, one.won, one.p)
        names = [clean(name) for name in (one.task, one.first, one.second)]
        counts = [f"{one.lost:,}", f"{one.won:,}", number(one.p), percent(one.least)]
        rows.append([*names, *counts, Bad(shown) if shown == "worse" else shown])
    header = ["task", "from", "to", "lost", "won", "p", "least that shows", ""]
    return Table("What changed", header, rows, frozenset({0, 1, 2, 7}))


def _lost(flips: Sequence[Flipped]) -> Table:
    rows = [
        list(map(clean, (one.task, one.second, e.question, e.target, e.first, e.second)))
        for one in flips
        for e in one.examples
    ]
    header = ["task", "model", "question", "expected", "before", "now"]
    return Table("Questions that were lost", header, rows, frozenset(range(6)), folded=True)
