"""How the report's figures look. Colours are CSS variables: the page resolves them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from megrez_parity.report.words import clean, family, labels
from megrez_parity.results import Figure, LevelResult

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x", "star")
INK, GRID, BAD, MUTED = "var(--ink)", "var(--grid)", "var(--bad)", "var(--muted)"


class Style:
    """How a level is drawn everywhere: colour by bits a weight, symbol by type, imatrix dashed."""

    def __init__(self, label: str, bits: int, symbol: str, dashed: bool) -> None:
        self.label, self.bits, self.symbol, self.dashed = label, bits, symbol, dashed
        self.color = f"var(--w{bits})"

    def line(self) -> dict[str, Any]:
        return {"color": self.color, "width": 1.6, "dash": "dash" if self.dashed else "solid"}

    def marker(self, size: int) -> dict[str, Any]:
        symbol = self.symbol + "-open" * self.dashed
        return {"color": self.color, "size": size, "symbol": symbol} | {
            "line": {"width": 1.6, "color": self.color}
        }


def styles(levels: Sequence[LevelResult]) -> list[Style]:
    symbols: dict[tuple[int, str], str] = {}
    used: dict[int, int] = {}
    found = []
    for result, label in zip(levels, labels(levels), strict=True):
        bits, dashed = family(result), "+imatrix" in result.level
        key = (bits, result.level.removesuffix("+imatrix"))
        if key not in symbols:
            symbols[key] = SYMBOLS[used.get(bits, 0) % len(SYMBOLS)]
            used[bits] = used.get(bits, 0) + 1
        found.append(Style(label, bits, symbols[key], dashed))
    return found


def blank(height: int, x: str, y: str) -> go.Figure:
    axis = {
        "gridcolor": GRID,
        "linecolor": "var(--rule)",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 11, "color": MUTED},
        "title": {"font": {"size": 12}, "standoff": 8},
    }
    template = {
        "layout": {
            "font": {"family": "system-ui, sans-serif", "color": INK, "size": 12},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "xaxis": axis,
            "yaxis": axis,
            "hoverlabel": {
                "bgcolor": "var(--raised)",
                "bordercolor": "var(--rule)",
                "font": {"color": INK, "family": "system-ui, sans-serif", "size": 12},
                "align": "left",
            },
            "legend": {"orientation": "h", "font": {"size": 12}},
        },
        "data": {"scatter": [{"hoverinfo": "text", "showlegend": True}]},
    }
    return go.Figure(
        layout={
            "template": template,
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "showlegend": False,
            "hovermode": "closest",
            "xaxis": {"title": {"text": x}},
            "yaxis": {"title": {"text": y}},
        }
    )


def pair(x: str, above: str, below: str) -> go.Figure:
    """Two plots over the same layers."""
    figure = blank(620, x=x, y=above)
    figure.update_layout(
        yaxis={"domain": [0.54, 1]},
        yaxis2={"domain": [0, 0.46], "title": {"text": below}},
        xaxis={"anchor": "y2", "type": "linear", "tickformat": "d"},
    )
    return figure


def add_line(
    figure: go.Figure,
    style: Style,
    x: Iterable[int],
    y: Sequence[float],
    hover: Sequence[str],
    below: bool = False,
) -> None:
    figure.add_scatter(
        x=list(x),
        y=positive(y),
        yaxis="y2" if below else "y",
        mode="lines+markers",
        line=style.line(),
        marker=style.marker(6),
        legendgroup=style.label,
        name=style.label,
        hovertext=hover,
    )


def name_rows(figure: go.Figure, names: Sequence[str]) -> None:
    order = [safe(name) for name in names]
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=order[::-1],
        range=[-0.7, len(order) - 0.3],
        showgrid=False,
        ticks="",
    )


def log_axis(values: Iterable[float | None], most: int = 8) -> dict[str, Any]:
    """A logarithmic axis for `values`, with few ticks whatever they span."""
    known = [x for x in values if x is not None and math.isfinite(x) and x > 0]
    low, high = (min(known), max(known)) if known else (0.1, 1.0)
    decades = math.log10(high / low)
    if decades > 3:
        step = math.ceil(decades / most)
        # Plotly draws powers a quarter larger than it is told.
        font = {"size": 9, "color": MUTED}
        return {"type": "log", "exponentformat": "power", "dtick": step, "tickfont": font}
    places = _ticks(low, high, most)
    return {"type": "log", "tickvals": places, "ticktext": [f"{x:,.6g}" for x in places]}


def _ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    low, high = low * 0.8, high * 1.25
    for digits in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), [1 + i / 10 for i in range(90)]):
        places = [m * 10.0**power for power in powers for m in digits]
        places = [place for place in places if low <= place <= high]
        if len(places) >= 3:
            return places[:: math.ceil(len(places) / most)]
    return places


def error_bars(figure: Figure, floor: float, color: str) -> dict[str, Any] | None:
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return None
    above = max(figure.high - figure.value, 0)
    down = max(figure.value - max(figure.low, floor), 0)
    return {
        "array": [above],
        "arrayminus": [down],
        "symmetric": False,
        "color": color,
        "thickness": 1.2,
        "width": 3,
    }


def axis_floor(values: Iterable[float], decades: int) -> float:
    """Where a logarithmic axis starts: below all values, but not more than `decades` below."""
    known = [value for value in values if math.isfinite(value) and value > 0]
    if not known:
        return 10.0**-decades
    return max(min(known), max(known) * 10.0**-decades)


def positive(values: Iterable[float]) -> list[float | None]:
    """What a logarithmic axis can show."""
    return [value if math.isfinite(value) and value > 0 else None for value in values]


def safe(text: str) -> str:
    """For Plotly, which reads some HTML in its labels."""
    return html.escape(clean(text), quote=False)


def hover(heading: str, *facts: tuple[str, str]) -> str:
    lines = [f"{name}: {html.escape(value, quote=False)}" for name, value in facts]
    return "<br>".join([f"<b>{safe(heading)}</b>", *lines])
