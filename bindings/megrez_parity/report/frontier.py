"""The report's first figure: size against loss, with a label at every point that has room for one.

Its height and margins are fixed, so that where points are is known here, in pixels, for a plot of
any width, and with it where labels go (`placement`). The page is given that for many widths, draws
the widest plot of them that fits, and leaves the few pixels that remain blank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from megrez_parity.report.drawing import (
    MUTED,
    Style,
    axis_floor,
    blank,
    error_bars,
    hover,
    log_axis,
    safe,
)
from megrez_parity.report.placement import FONT, RADIUS, Place, Point, place, text_width
from megrez_parity.report.words import number, percent
from megrez_parity.results import ParityReport

# All in pixels; widths are of the plot without its margins.
_TALL = 540
_MARGINS = {"r": 12, "t": 12, "b": 52}
_WIDTHS = tuple(round(200 * 1.06**i) for i in range(30))


@dataclass(frozen=True, slots=True)
class _Mark:
    """A point as it is drawn, in MiB and nats, with the ends of its error bar."""

    style: Style
    front: bool  # no file of its size or less is better
    size: float
    kld: float
    low: float
    high: float


def frontier(report: ParityReport, looks: Sequence[Style]) -> go.Figure:
    """File size against mean KLD, both logarithmic, and the line no file lies below."""
    known = [
        (result.file_bytes / 2**20, result.metrics.mean_kld, result, style)
        for result, style in zip(report.levels, looks, strict=True)
        if math.isfinite(result.metrics.mean_kld.value)
    ]
    floor = axis_floor([kld.value for _, kld, *_ in known], decades=5)
    best, edge = math.inf, []
    for size, kld, result, _ in sorted(known, key=lambda item: (item[0], item[1].value)):
        if kld.value < best:
            best = kld.value
            edge.append((size, max(kld.value, floor), result))
    figure = blank(_TALL, x="file size, MiB", y="mean KLD, nats")
    figure.add_scatter(
        x=[size for size, *_ in edge],
        y=[kld for _, kld, _ in edge],
        mode="lines",
        line={"shape": "hv", "color": MUTED, "width": 1.2, "dash": "dot"},
        hoverinfo="skip",
        name="front",
    )
    on_edge = {id(result) for *_, result in edge}
    marks = []
    for size, kld, result, style in known:
        below = kld.value < floor
        bar = None if below else error_bars(kld, floor, style.color)
        at = max(kld.value, floor)
        low, high = (max(kld.low, floor), kld.high) if bar else (at, at)
        marks.append(_Mark(style, id(result) in on_edge, size, at, low, high))
        figure.add_scatter(
            x=[size],
            y=[at],
            error_y=bar,
            mode="markers",
            marker=style.marker(10) | ({"symbol": "triangle-down"} if below else {}),
            legendgroup=style.label,
            name=style.label,
            hovertext=hover(
                style.label,
                ("size", f"{size:,.2f} MiB"),
                ("mean KLD", f"{number(kld.value)} [{number(kld.low)}, {number(kld.high)}]"),
                ("same top", percent(result.metrics.same_top_p.value)),
                ("PPL ratio", number(result.metrics.perplexity_ratio.value, ".5f")),
            ),
        )
    sizes = [size for size, *_ in known] or [1.0]
    tops = [kld.high if math.isfinite(kld.high) else kld.value for _, kld, *_ in known]
    top = max([*tops, floor * 10])
    across = (math.log10(min(sizes)) - 0.06, math.log10(max(sizes)) + 0.12)
    up = (math.log10(floor) - 0.25, math.log10(top) + 0.4)
    # What grew a margin would move the points.
    figure.update_xaxes(log_axis(sizes, most=5), range=across, automargin=False)
    ticks = log_axis([floor, top])
    figure.update_yaxes(ticks, range=up, automargin=False)
    # A title, and powers of ten or what is longer.
    left = 30 + 7 * max((len(text) for text in ticks.get("ticktext", ())), default=4)
    marks.sort(key=lambda mark: not mark.front)
    figure.update_layout(
        margin=_MARGINS | {"l": left},
        annotations=[_label(mark) for mark in marks],
        meta=_layouts(marks, across, up),
    )
    return figure


def _label(mark: _Mark) -> dict[str, Any]:
    return {
        "name": mark.style.label,
        "text": safe(mark.style.label),
        "font": {"color": mark.style.color, "size": FONT},
        "x": math.log10(mark.size),
        "y": math.log10(mark.kld),
        "xanchor": "center",
        "yanchor": "middle",
        "borderpad": 0,
        "arrowhead": 0,
        "arrowwidth": 1,
        "arrowcolor": mark.style.color,
        "standoff": RADIUS - 1,
        "visible": False,
    }


def _layouts(
    marks: Sequence[_Mark], across: tuple[float, float], up: tuple[float, float]
) -> dict[str, Any]:
    """Of plots of all widths, the places of the labels: [label, x, y, whether a line leads there].

    x and y are pixels from the point to the label's middle, downwards positive.
    """
    height = _TALL - _MARGINS["t"] - _MARGINS["b"]

    def down(kld: float) -> float:
        return height * (up[1] - math.log10(kld)) / (up[1] - up[0])

    layouts = []
    places: list[Place | None] = []
    for width in _WIDTHS:
        points = [
            Point(
                width * (math.log10(mark.size) - across[0]) / (across[1] - across[0]),
                down(mark.kld),
                top=down(mark.high),
                bottom=down(mark.low),
                width=text_width(mark.style.label),
            )
            for mark in marks
        ]
        places = place(points, width, height, before=places)
        labels = [[i, round(at.x, 1), round(at.y, 1), at.line] for i, at in enumerate(places) if at]
        layouts.append({"width": width, "labels": labels})
    return {"right": _MARGINS["r"], "layouts": layouts}
