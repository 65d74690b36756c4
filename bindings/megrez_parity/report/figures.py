"""The report's figures, one for a section."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go

from megrez_parity.report.drawing import (
    BAD,
    INK,
    MUTED,
    Style,
    add_line,
    axis_floor,
    blank,
    hover,
    log_axis,
    name_rows,
    pair,
    positive,
    safe,
    styles,
)
from megrez_parity.report.frontier import frontier
from megrez_parity.report.layers import depth_names
from megrez_parity.report.words import NONE, labels, number, percent
from megrez_parity.results import LevelResult, ParityReport

# Widths of the bars that hold the middle 98%, 80% and 50% of positions.
_BANDS = (("98%", 1, 99, 3), ("80%", 10, 90, 8), ("50%", 25, 75, 15))


def figures(report: ParityReport) -> dict[str, go.Figure]:
    """Figures by the name of the section they belong to; none for what was not measured."""
    looks = styles(report.levels)
    found = {
        "overview": frontier(report, looks),
        "distribution": distribution(report),
    }
    if any(result.routing for result in report.levels):
        found["routing"] = routing(report)
        found["pregate"] = pregate(report, looks)
    if any(result.depth for result in report.levels):
        found["depth"] = depth(report, looks)
    if any(result.trace and result.trace.points for result in report.levels):
        found["trace"] = trace(report)
    return found


def distribution(report: ParityReport) -> go.Figure:
    """A row a level: the middle halves of its positions' KLD, median, mean and worst."""
    rows = [
        (label, result)
        for label, result in zip(labels(report.levels), report.levels, strict=True)
        if len(result.kld_percentiles) == 101
    ]
    values = [x for _, result in rows for x in result.kld_percentiles]
    floor = axis_floor(values, decades=14)
    figure = blank(110 + 26 * max(len(rows), 2), x="KLD of a position, nats", y="")

    def at(value: float) -> float | None:
        return max(value, floor) if math.isfinite(value) else None

    for share, low, high, width in _BANDS:
        xs: list[float | None] = []
        ys: list[str | None] = []
        for label, result in rows:
            xs += [at(result.kld_percentiles[low]), at(result.kld_percentiles[high]), None]
            ys += [safe(label)] * 2 + [None]
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={"width": width, "color": f"var(--band{width})"},
            hoverinfo="skip",
            name=f"middle {share}",
        )
    marks: Sequence[tuple[str, str, str, int, Callable[[LevelResult], float]]] = (
        ("median", "line-ns-open", "var(--paper)", 11, lambda x: x.kld_percentiles[50]),
        ("mean", "diamond", INK, 7, lambda x: x.metrics.mean_kld.value),
        ("worst", "x-thin-open", BAD, 7, lambda x: x.kld_percentiles[100]),
    )
    for name, symbol, color, size, of in marks:
        figure.add_scatter(
            x=[at(of(result)) for _, result in rows],
            y=[safe(label) for label, _ in rows],
            mode="markers",
            marker={"symbol": symbol, "color": color, "size": size, "line": {"width": 2}},
            name=name,
            hovertext=[
                hover(
                    label,
                    *((f"{p}%", number(result.kld_percentiles[p])) for p in (1, 25, 50, 75, 99)),
                    ("mean", number(result.metrics.mean_kld.value)),
                    ("worst", number(result.kld_percentiles[100])),
                )
                for label, result in rows
            ],
        )
    figure.update_xaxes(log_axis([max(x, floor) for x in values], most=5))
    name_rows(figure, [label for label, _ in rows])
    return figure


def routing(report: ParityReport) -> go.Figure:
    """Layers x levels: the share of tokens with the same experts, or of experts in common."""
    names = labels(report.levels)
    layers = sorted({x.layer for result in report.levels for x in result.routing})
    cells = [{x.layer: x for x in result.routing} for result in report.levels]
    figure = blank(150 + 24 * max(len(names), 2), x="layer", y="")
    notes = [
        [
            hover(
                f"{name}, layer {layer}",
                ("same experts", percent(x.identical.value)),
                ("in common", percent(x.overlap.value)),
                ("first left by a tie", str(x.first_ties)),
                ("first diverged", str(x.first_diverged)),
                ("noise", number(x.noise)),
                ("unfaithful", str(x.unfaithful)),
            )
            if (x := row.get(layer))
            else NONE
            for layer in layers
        ]
        for name, row in zip(names, cells, strict=True)
    ]
    for kind in ("identical", "overlap"):
        z = [
            [getattr(row[layer], kind).value if layer in row else math.nan for layer in layers]
            for row in cells
        ]
        known = [value for row in z for value in row if math.isfinite(value)]
        # The scale ends where the figures do, in steps that leave it comparable between reports.
        low = min([0.9, *(math.floor(value * 10) / 10 for value in known)])
        figure.add_heatmap(
            z=[[value if math.isfinite(value) else None for value in row] for row in z],
            x=[str(layer) for layer in layers],
            y=[safe(name) for name in names],
            zmin=low,
            zmax=1,
            xgap=1,
            ygap=1,
            colorscale=[[i / 3, f"var(--heat{3 - i})"] for i in range(4)],
            colorbar={
                "orientation": "h",
                "y": 1,
                "yanchor": "bottom",
                "ypad": 4,
                "thickness": 10,
                "tickformat": ".0%",
                "outlinewidth": 0,
                "nticks": 6,
            },
            hovertext=notes,
            hoverinfo="text",
            meta=kind,
        )
    for name, symbol, size, color, field in (
        ("diverged", "circle", 3, INK, "first_diverged"),
        ("unfaithful", "x", 8, BAD, "unfaithful"),
    ):
        marked = [
            (str(layer), safe(label))
            for label, row in zip(names, cells, strict=True)
            for layer in layers
            if layer in row and getattr(row[layer], field)
        ]
        figure.add_scatter(
            x=[layer for layer, _ in marked],
            y=[label for _, label in marked],
            mode="markers",
            marker={"symbol": symbol, "size": size, "color": color}
            | {"line": {"color": "var(--paper)", "width": 0.5}},
            hoverinfo="skip",
            name=name,
            showlegend=False,
        )
    figure.update_xaxes(
        type="category",
        showgrid=False,
        ticks="",
        title_standoff=24,
        range=[-0.5, len(layers) - 0.5],
    )
    figure.update_layout(margin_t=4)
    name_rows(figure, names)
    return figure


def pregate(report: ParityReport, looks: Sequence[Style]) -> go.Figure:
    """Error of what the router reads; and that over the error of its own layer's state."""
    figure = pair(x="layer", above="NMSE of the input", below="ratio to the own state's")
    inputs: list[float] = []
    all_ratios: list[float] = []
    for result, style in zip(report.levels, looks, strict=True):
        layers = [x.layer for x in result.routing]
        inputs += [x.input_nmse for x in result.routing]
        ratios = [x.input_nmse / x.own_nmse if x.own_nmse > 0 else math.nan for x in result.routing]
        notes = [
            hover(
                f"{style.label}, layer {x.layer}",
                ("NMSE of the input", number(x.input_nmse)),
                ("NMSE of the own state", number(x.own_nmse)),
                ("ratio", number(ratio)),
            )
            for x, ratio in zip(result.routing, ratios, strict=True)
        ]
        add_line(figure, style, layers, [x.input_nmse for x in result.routing], notes)
        all_ratios += ratios
        add_line(figure, style, layers, ratios, notes, below=True)
    figure.update_layout(yaxis=log_axis(inputs), yaxis2=log_axis([1.0, *all_ratios]))
    figure.add_hline(y=1, line={"color": INK, "width": 1, "dash": "dot"}, yref="y2")
    return figure


def depth(report: ParityReport, looks: Sequence[Style]) -> go.Figure:
    """NMSE of the hidden states by layer, a line a level."""
    names = depth_names(report)[:2]
    figure = pair(x="layer", above=f"NMSE of {names[0]}", below=f"NMSE of {names[-1]}")
    for result, style in zip(report.levels, looks, strict=True):
        for i, name in enumerate(names):
            values = result.depth.get(name, [])
            notes = [
                hover(f"{style.label}, {name}-{layer}", ("NMSE", number(value)))
                for layer, value in enumerate(values)
            ]
            add_line(figure, style, range(len(values)), values, notes, below=i == 1)
    for name, axis in zip(names, ("yaxis", "yaxis2"), strict=False):
        spread = [x for result in report.levels for x in result.depth.get(name, ())]
        figure.update_layout({axis: log_axis(spread)})
    return figure


def trace(report: ParityReport) -> go.Figure:
    """Total and local error of every tensor in the order of computing, one level at a time."""
    figure = blank(460, x="layer", y="NMSE")
    ticks: dict[int, int] = {}
    for i, (result, label) in enumerate(zip(report.levels, labels(report.levels), strict=True)):
        if not result.trace or not result.trace.points:
            continue
        points, first = result.trace.points, result.trace.first_beyond
        for at, point in enumerate(points):
            if point.layer >= 0:
                ticks.setdefault(point.layer, at)
        notes = [
            hover(
                f"{label}, {point}",
                ("NMSE", number(point.nmse)),
                ("local NMSE", number(point.local_nmse)),
                ("tolerance", number(point.tolerance)),
            )
            for point in points
        ]
        common: dict[str, Any] = {"x": list(range(len(points))), "meta": str(i)}
        lines: Sequence[tuple[str, list[float], dict[str, Any]]] = (
            ("total", [x.nmse for x in points], {"line": {"color": "var(--w8)", "width": 1.6}}),
            (
                "local",
                [x.local_nmse for x in points],
                {"marker": {"color": "var(--w4)", "size": 5}},
            ),
            (
                "tolerance of the local error",
                [math.nan if x.tolerance is None else x.tolerance for x in points],
                {"line": {"color": MUTED, "width": 1.2, "dash": "dot", "shape": "hvh"}},
            ),
        )
        for name, values, look in lines:
            mode = "markers" if "marker" in look else "lines"
            figure.add_scatter(
                **common, y=positive(values), name=name, mode=mode, hovertext=notes, **look
            )
        if first:
            at = points.index(first)
            height = [x for x in positive([first.local_nmse, first.nmse]) if x is not None]
            figure.add_scatter(
                **common | {"x": [at]},
                y=height[:1] or positive([first.tolerance or 0.0]),
                name=f"first beyond: {first}",
                mode="markers",
                marker={"symbol": "circle-open", "size": 16, "color": BAD, "line": {"width": 2.5}},
                hovertext=notes[at],
            )
    # Levels are far apart, and each is seen alone: the axis fits itself to the one chosen.
    figure.update_yaxes(type="log", dtick=1, exponentformat="power", tickfont_size=9)
    every = math.ceil(len(ticks) / 11)
    figure.update_xaxes(
        tickvals=list(ticks.values())[::every], ticktext=[str(x) for x in ticks][::every]
    )
    figure.update_layout(showlegend=True, legend={"y": 1.02, "yanchor": "bottom"})
    return figure
