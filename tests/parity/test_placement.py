"""Labels in the report's first figure: on no other label, on no point, at any width."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest

from megrez_parity.report.drawing import styles
from megrez_parity.report.frontier import frontier
from megrez_parity.report.placement import HEIGHT, RADIUS, Place, Point, place, text_width
from megrez_parity.results import Figure, ParityReport
from support import reports

# MiB and mean KLD of the pocket checkpoint's levels: most lie in a sixth of the width and height.
POCKET = {
    "f32": (21.93, 3e-12), "bf16": (11.07, 2e-5), "f16": (11.07, 1.6e-6), "q8_0": (5.98, 2.5e-4),
    "q6_k": (4.81, 0.0013), "q5_k_m": (4.10, 0.0024), "q5_k_s": (4.07, 0.0027),
    "q5_0": (4.03, 0.0034), "q4_k_m": (3.58, 0.0057), "q4_k_s": (3.53, 0.0067),
    "q4_0": (3.44, 0.011), "iq4_nl": (3.46, 0.0072), "iq4_xs": (3.33, 0.0073),
    "mxfp4_moe": (5.18, 0.0025), "q3_k_m": (3.10, 0.017), "q2_k": (2.59, 0.081),
    "recipe:megrez-q3": (3.09, 0.011), "recipe:megrez-q4": (3.58, 0.0046),
    "recipe:megrez-q5": (4.09, 0.0021), "q4_k_m+imatrix": (3.58, 0.0057),
    "iq4_xs+imatrix": (3.33, 0.0071), "q3_k_m+imatrix": (3.10, 0.016),
    "q2_k+imatrix": (2.59, 0.073),
}  # fmt: skip

Box = tuple[float, float, float, float]


def box(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def met(one: Box, two: Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def faults(
    points: Sequence[Point], places: Sequence[Place | None], width: float, height: float
) -> list[str]:
    """What a reader would complain of, found by walking along lines pixel by pixel."""
    markers = [box(p.x, p.y, 2 * RADIUS, 2 * RADIUS) for p in points]
    labels = {
        i: box(points[i].x + at.x, points[i].y + at.y, points[i].width, HEIGHT)
        for i, at in enumerate(places)
        if at
    }
    found = []
    for i, mine in labels.items():
        at = places[i]
        assert at is not None
        if mine[0] < 0 or mine[1] < 0 or mine[2] > width or mine[3] > height:
            found.append(f"{i} leaves the plot")
        found += [f"{i} on {j}" for j, other in labels.items() if j < i and met(mine, other)]
        found += [f"{i} on point {j}" for j, m in enumerate(markers) if j != i and met(mine, m)]
        if math.hypot(at.x, at.y) > 30 + points[i].width / 2 and not at.line:
            found.append(f"{i} is far off and has no line")
        steps = range(round(math.hypot(at.x, at.y))) if at.line else ()
        for step in steps:
            share = step / len(steps)
            spot = box(points[i].x + share * at.x, points[i].y + share * at.y, 0.1, 0.1)
            found += [f"{i}'s line on {j}" for j in labels if j != i and met(spot, labels[j])]
    return found


def pocket() -> ParityReport:
    one = reports.report(["q4_0"], layers=4)
    levels = []
    for name, (mib, kld) in POCKET.items():
        level = reports.level(name, 4)
        metrics = dataclasses.replace(level.metrics, mean_kld=Figure(kld, kld * 0.96, kld * 1.04))
        size = round(mib * 2**20)
        levels.append(dataclasses.replace(level, file_bytes=size, metrics=metrics))
    return dataclasses.replace(one, levels=levels)


@cache
def drawn_pocket() -> tuple[list[Any], list[tuple[int, list[Point], list[Any]]]]:
    return drawn(pocket())


def drawn(report: ParityReport) -> tuple[list[Any], list[tuple[int, list[Point], list[Any]]]]:
    """Names of the labels; of each width, where the points are, and what the page is told."""
    layout = frontier(report, styles(report.levels)).to_dict()["layout"]
    margin, height = layout["margin"], layout["height"]
    height -= margin["t"] + margin["b"]
    (left, right), (bottom, top) = layout["xaxis"]["range"], layout["yaxis"]["range"]
    names = [label["name"] for label in layout["annotations"]]
    plots = []
    for plot in layout["meta"]["layouts"]:
        points = []
        for label in layout["annotations"]:
            x = plot["width"] * (label["x"] - left) / (right - left)
            y = height * (top - label["y"]) / (top - bottom)
            points.append(Point(x, y, y, y, text_width(label["name"])))
        places: list[Place | None] = [None] * len(points)
        for i, dx, dy, line in plot["labels"]:
            places[i] = Place(dx, dy, line)
        plots.append((plot["width"], points, places))
    return names, plots


@pytest.mark.slow
def test_labels_of_the_report_keep_apart_at_any_width() -> None:
    names, plots = drawn_pocket()
    assert sorted(names) == sorted(POCKET)
    named = {}
    for width, points, places in plots:
        assert faults(points, places, width, 476) == [], width
        named[width] = sum(at is not None for at in places)
    # A phone, a tablet and a desk. Hovering and the legend name the others.
    assert [min(n for w, n in named.items() if w >= least) for least in (300, 700, 950)] >= [
        16, 20, 23,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_check_can_fail() -> None:
    _, plots = drawn_pocket()
    width, points, places = plots[-1]
    # As labels lay before: each to the right of its point.
    right = [Place(RADIUS + 2 + p.width / 2, 0, False) for p in points]
    assert len(faults(points, right, width, 476)) > 10
    moved = [at and Place(at.x, at.y + HEIGHT, at.line) for at in places]
    assert faults(points, moved, width, 476)


@pytest.mark.parametrize("seed", range(6))
def test_points_anywhere(seed: int) -> None:
    draw = random.Random(seed)
    width, height = draw.uniform(60, 900), draw.uniform(60, 500)
    spread = draw.choice((1, 0.2, 0.01))
    points = [
        Point(
            width * (0.5 + spread * draw.uniform(-0.5, 0.5)),
            y := height * (0.5 + spread * draw.uniform(-0.5, 0.5)),
            y - draw.uniform(0, 20),
            y + draw.uniform(0, 20),
            draw.uniform(20, 150),
        )
        for _ in range(draw.randrange(1, 30))
    ]
    places = place(points, width, height)
    assert faults(points, places, width, height) == []
    assert places == place(points, width, height)
    assert place(points, width, height, before=places).count(None) <= places.count(None)


def test_a_point_alone_has_its_label_beside_it() -> None:
    (found,) = place([Point(100, 100, 100, 100, 40)], 300, 300)
    assert found == Place(RADIUS + 2 + 20, 0, False)
    assert place([Point(5, 5, 5, 5, 40)], 20, 20) == [None]  # no room at all
    assert place([], 300, 300) == []
