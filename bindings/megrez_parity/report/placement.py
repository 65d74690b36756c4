"""Where the labels of points go: on no other label, on no point, and apart from others' lines.

A label stands beside its point where there is room, or else farther off, tied to it by a line.
All is in pixels of the plot, x to the right and y down, and depends on nothing else: the page shows
what was found here for the width it has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FONT = 12
"""Pixels: the size of the labels' font."""
HEIGHT = 16
"""Pixels that a line of it takes."""
RADIUS = 7.5
"""Pixels from a point's middle that its marker may take."""

# Pixels between a label and anything else.
_GAP = 2.0
# Beside a point: to the right, below it, and so on.
_BESIDE = np.array([(x, y) for x in (1, 0, -1) for y in (0, -1, 1) if x or y], np.float64)
# Farther off: directions, and pixels from the edge of the marker to that of the label.
_TURNS = np.linspace(0, 2 * math.pi, 24, endpoint=False)
_FAR = np.array([8.0, 15, 23, 33, 45, 60, 80, 105, 135])
# What a line costs beside its length, each marker that it passes over, and a turn to the crowd, all
# in pixels of a line's length; and how near what crowds is.
_LINE, _PASSED, _CROWD, _NEAR = 20.0, 25.0, 30.0, 90.0
# What it costs to drive another label away; for how long, a label, that may lead to nothing.
_DRIVEN, _PATIENCE = 40.0, 3

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Point:
    """A point at `x` and `y`, with an error bar from `top` to `bottom` and a label `width` wide."""

    x: float
    y: float
    top: float
    bottom: float
    width: float


@dataclass(frozen=True, slots=True)
class Place:
    """The middle of a label, from its point; `line` tells whether one leads there."""

    x: float
    y: float
    line: bool


@dataclass(frozen=True, slots=True)
class _Options:
    """Places for one label, their costs `[C]`, and their boxes and lines, `[C, 4]` each.

    A box is its left, top, right and bottom; a line its two ends, NaN where there is none.
    """

    places: list[Place]
    costs: Floats
    boxes: Floats
    lines: Floats


def place(
    points: Sequence[Point],
    width: float,
    height: float,
    before: Sequence[Place | None] = (),
) -> list[Place | None]:
    """A place for each point's label in a plot of that size; None where there is no room.

    Labels take the cheapest place and drive away those that are in it, which then look for another
    and are dearer to drive away again. Points that come first are dearer from the start. Of all
    that was tried, what names the most points is kept. `before` is what was found for a plot of
    nearly that size: the labels start there.
    """
    table = _Table([_options(points, i, width, height) for i in range(len(points))])
    for i, wanted in enumerate(before):
        table.return_to(i, wanted)
    worth = np.linspace(2, 1, len(points))
    dear = worth.copy()
    best, most, since = dict(table.chosen), -1.0, 0
    queue = deque(i for i in table.movable if i not in table.chosen)
    while queue and since < _PATIENCE * len(points):
        i = queue.popleft()
        for j in table.take(i, dear):
            dear[j] += 1
            queue.append(j)
        value, since = worth[list(table.chosen)].sum(), since + 1
        if value > most:
            best, most, since = dict(table.chosen), value, 0
    table.chosen = best
    for i in list(best):
        # Where none need be driven away, there may be something cheaper by now.
        table.take(i, np.full(len(points), math.inf))
    return [table.place(i) for i in range(len(points))]


class _Table:
    """The labels, and which of its places each has at the moment."""

    def __init__(self, options: Sequence[_Options]) -> None:
        self._options = options
        self.movable = [i for i, mine in enumerate(options) if mine.places]
        self.chosen: dict[int, int] = {}

    def place(self, i: int) -> Place | None:
        return self._options[i].places[self.chosen[i]] if i in self.chosen else None

    def return_to(self, i: int, wanted: Place | None) -> None:
        """Let label `i` have the place `wanted` if there is such, and nobody is in it."""
        places = self._options[i].places
        if wanted in places:
            at = places.index(wanted)
            if not self._met(i)[1][at].any():
                self.chosen[i] = at

    def take(self, i: int, dear: Floats) -> list[int]:
        """Let label `i` choose, and tell whom it drives away; `dear` `[labels]` is their price."""
        mine = self._options[i]
        others, met = self._met(i)
        price = np.where(met, dear[others] * _DRIVEN, 0.0).sum(1)
        at = int(np.argmin(mine.costs + price))
        driven = [j for j, meets in zip(others, met[at], strict=True) if meets]
        for j in driven:
            del self.chosen[j]
        self.chosen[i] = at
        return driven

    def _met(self, i: int) -> tuple[list[int], Bools]:
        """The other labels, and `[C, others]` which of them each of label `i`'s options meets."""
        mine = self._options[i]
        others = [j for j in self.chosen if j != i]
        at = [(self._options[j], self.chosen[j]) for j in others]
        boxes = np.array([one.boxes[k] for one, k in at]).reshape(-1, 4)
        lines = np.array([one.lines[k] for one, k in at]).reshape(-1, 4)
        met = _overlap(mine.boxes, boxes) | _hit(lines, mine.boxes).T
        return others, met | _hit(mine.lines, boxes) | _cross(mine.lines, lines)


def text_width(text: str) -> float:
    """Pixels that `text` takes at most, in the usual sans-serif fonts at the size of labels."""
    return sum(_em(character) for character in text) * FONT


def _em(character: str) -> float:
    if not character.isascii():
        return 1.05
    if character in "ijl|.,:;'!()[] ":
        return 0.45
    if character in "mwMW@%+=<>#&~":
        return 1.0
    return 0.8 if character.isupper() else 0.66


def _options(points: Sequence[Point], i: int, width: float, height: float) -> _Options:
    """Where label `i` may go as far as points, error bars and the plot's edges let it."""
    point = points[i]
    middle, half = np.array([point.x, point.y]), np.array([point.width, HEIGHT]) / 2
    offsets, cost = _around(half)
    tied: Bools = np.asarray(cost >= _LINE)
    boxes = np.hstack([middle + offsets - half, middle + offsets + half])
    lines = np.where(tied[:, None], _lines(middle, offsets, half), np.nan)
    corners = np.array([-RADIUS, -RADIUS, RADIUS, RADIUS])
    markers = np.array([(p.x, p.y, p.x, p.y) for p in points]) + corners
    bars = np.array([(p.x - 3, p.top, p.x + 3, p.bottom) for p in points])
    others = np.delete(markers, i, axis=0)
    size = np.array([width, height])
    free: Bools = np.all((boxes[:, :2] >= 0) & (boxes[:, 2:] <= size), axis=1)
    free &= ~_overlap(boxes, others).any(1) & ~_overlap(boxes, bars).any(1)
    length = np.hypot(*offsets.T)
    cost = cost + _CROWD * (1 - offsets @ _away(points, i) / length) / 2
    # A line may pass over points that its own overlaps, which it can hardly leave else.
    touching = _overlap(markers[i : i + 1], others)[0]
    passed = _hit(lines, others)
    free &= ~passed[:, ~touching].any(1)
    cost += _PASSED * passed.sum(1)
    kept = np.flatnonzero(free)
    places = [Place(float(offsets[k, 0]), float(offsets[k, 1]), bool(tied[k])) for k in kept]
    return _Options(places, cost[kept], boxes[kept], lines[kept])


def _around(half: Floats) -> tuple[Floats, Floats]:
    """Middles `[C, 2]` of a label of that half size from its point, and what they cost `[C]`."""
    corner = np.abs(_BESIDE).sum(1) == 2
    # At a corner a label may come nearer: markers are round.
    beside = _BESIDE * (half + RADIUS + np.where(corner, -1.0, _GAP)[:, None])
    far, turn = (grid.ravel() for grid in np.meshgrid(_FAR, _TURNS))
    x, y = np.cos(turn), np.sin(turn)
    reach = RADIUS + far
    tied = np.stack([x * reach + np.clip(3 * x, -1, 1) * half[0], y * (reach + half[1])], axis=1)
    return np.vstack([beside, tied]), np.hstack([np.arange(len(beside)), _LINE + far])


def _lines(middle: Floats, offsets: Floats, half: Floats) -> Floats:
    """Lines `[C, 4]` from the edge of a marker at `middle` to that of its label, to its middle."""
    start = RADIUS / np.hypot(*offsets.T)
    with np.errstate(divide="ignore"):
        end = 1 - (half / np.abs(offsets)).min(1)
    return np.hstack([middle + offsets * start[:, None], middle + offsets * end[:, None]])


def _away(points: Sequence[Point], i: int) -> Floats:
    """The direction `[2]` that leads out of the crowd around point `i`: shorter where none does."""
    steps = np.array([(points[i].x - p.x, points[i].y - p.y) for p in points])
    length = np.hypot(*steps.T)
    near: Floats = np.exp(-length / _NEAR) * np.sign(length)
    if not near.any():
        return np.zeros(2)
    length = np.maximum(length, 1e-9)
    away: Floats = (steps * (near / length)[:, None]).sum(0) / near.sum()
    return away


def _overlap(one: Floats, two: Floats) -> Bools:
    """`[A, B]`: whether boxes `[A, 4]` and `[B, 4]` come nearer than the gap."""
    a, b = one[:, None], two[None]
    low = np.maximum(a[..., :2], b[..., :2])
    high = np.minimum(a[..., 2:], b[..., 2:])
    found: Bools = np.all(low < high + _GAP, axis=-1)
    return found


def _hit(lines: Floats, boxes: Floats) -> Bools:
    """`[A, B]`: whether lines `[A, 4]` pass through boxes `[B, 4]`; what is NaN does not."""
    start = lines[:, None, :2]
    step = lines[:, None, 2:] - start
    step = np.where(step == 0, 1e-9, step)
    one = (boxes[None, :, :2] - _GAP - start) / step
    two = (boxes[None, :, 2:] + _GAP - start) / step
    enter, leave = np.minimum(one, two).max(-1), np.maximum(one, two).min(-1)
    found: Bools = (enter < leave) & (leave > 0) & (enter < 1)
    return found


def _cross(one: Floats, two: Floats) -> Bools:
    """`[A, B]`: whether lines `[A, 4]` and `[B, 4]` cross; what is NaN does not."""
    p, q = one[:, None, :2], two[None, :, :2]
    r, s = one[:, None, 2:] - p, two[None, :, 2:] - q
    across = _area(r, s)
    across = np.where(across == 0, 1e-9, across)
    t, u = _area(q - p, s) / across, _area(q - p, r) / across
    found: Bools = (t > 0) & (t < 1) & (u > 0) & (u < 1)
    return found


def _area(one: Floats, two: Floats) -> Floats:
    """Of the parallelograms that vectors `[..., 2]` span, positive or negative."""
    area: Floats = one[..., 0] * two[..., 1] - one[..., 1] * two[..., 0]
    return area
