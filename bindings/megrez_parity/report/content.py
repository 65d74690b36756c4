"""What a report is made of, in no form yet: sections of words and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from megrez_parity.report.words import NONE, labels
from megrez_parity.results import LevelResult, ParityReport


class Bad(str):
    """A cell that is no good news."""


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are plain text, not yet escaped for any form."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: frozenset[int] = frozenset({0})  # columns of words; all others are figures
    folded: bool = False  # long: shown when asked for


@dataclass(frozen=True, slots=True)
class Section:
    """`name` is also the key of its figure, if it has one."""

    name: str
    title: str
    reading: str  # how to read it
    lines: Sequence[str] = ()
    code: str = ""
    tables: Sequence[Table] = ()


def by_layer(
    caption: str,
    report: ParityReport,
    layers: Iterable[int],
    cells: Callable[[LevelResult], dict[int, str]],
) -> Table:
    """A row a level, a column a layer; folded, for it is wide."""
    columns = list(layers)
    rows = [
        [name, *(found.get(layer, NONE) for layer in columns)]
        for name, found in zip(labels(report.levels), map(cells, report.levels), strict=True)
    ]
    return Table(caption, ["level", *map(str, columns)], rows if columns else [], folded=True)
