"""A parity report as one HTML page that needs nothing else: no network, no fonts, no server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from html import escape
from importlib import resources

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from megrez_parity.report.content import Bad, Section, Table
from megrez_parity.report.drawing import Style, styles
from megrez_parity.report.figures import figures
from megrez_parity.report.sections import sections, title, verdict_line
from megrez_parity.report.words import labels
from megrez_parity.results import ParityReport

# Even a defect of the page could not reach the network.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

_DESCRIPTIONS = {
    "overview": "File size against mean KLD, one point a level.",
    "distribution": "Range of KLD over positions, one row a level.",
    "routing": "Share of tokens with the reference's experts, layers across, levels down.",
    "pregate": "Error of the routing input by layer, one line a level.",
    "depth": "Error of hidden states by layer, one line a level.",
    "trace": "Error of each tensor in the order of computing.",
}
# In viewBox "-5 -5 10 10".
_SHAPES = {
    "circle": "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    "square": "M-3.5,-3.5H3.5V3.5H-3.5Z",
    "diamond": "M0,-4.5L4.5,0L0,4.5L-4.5,0Z",
    "triangle-up": "M0,-4.5L4.5,3.5H-4.5Z",
    "triangle-down": "M0,4.5L4.5,-3.5H-4.5Z",
    "cross": "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "x": "M-4.5,-2.5L-2.5,-4.5L0,-2L2.5,-4.5L4.5,-2.5L2,0L4.5,2.5L2.5,4.5L0,2L-2.5,4.5L-4.5,2.5"
    "L-2,0Z",
    "star": "M0,-5L1.5,-1.6L5,-1.5L2.2,0.7L3.2,4.4L0,2.3L-3.2,4.4L-2.2,0.7L-5,-1.5L-1.5,-1.6Z",
}


def render(report: ParityReport) -> str:
    """The page, with figures that follow the reader's light or dark setting."""
    found = sections(report)
    drawn = figures(report)
    names = styles(report.levels)
    missed = ' class="bad"' if report.misses else ""
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s in found)
    body = "\n".join(_section(report, s, drawn.get(s.name), names) for s in found)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title(report))}</title>
<style>
{_asset("page.css")}</style>
<noscript><style>.figure {{ display: none }}</style></noscript>
</head>
<body>
<a class="skip" href="#overview">Skip to the figures</a>
<header>
<h1>{escape(title(report))}</h1>
<p id="verdict"{missed}>{escape(verdict_line(report))}</p>
<noscript><p>Figures need JavaScript; tables do not; report.json has every number.</p></noscript>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
<script>
{_plotly()}
</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


def _section(
    report: ParityReport, section: Section, drawn: go.Figure | None, names: Sequence[Style]
) -> str:
    parts = [f'<section id="{section.name}" aria-labelledby="{section.name}-title">']
    parts.append(f'<h2 id="{section.name}-title">{escape(section.title)}</h2>')
    parts.append(f'<p class="reading"><b>How to read this.</b> {escape(section.reading)}</p>')
    if len(section.lines) == 1:
        parts.append(f"<p>{escape(section.lines[0])}</p>")
    elif section.lines:
        parts.append(f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in section.lines)}</ul>")
    if section.code:
        parts.append(f'<pre tabindex="0"><code>{escape(section.code)}</code></pre>')
    if drawn:
        parts += _figure(report, section.name, drawn, names)
    parts += [_table(table) for table in section.tables if table.rows]
    return "\n".join([*parts, "</section>"])


def _figure(
    report: ParityReport, name: str, drawn: go.Figure, names: Sequence[Style]
) -> Iterator[str]:
    yield f'<div class="figure" id="figure-{name}">'
    choices: list[tuple[str, str]] = []
    chosen = ""
    if name == "routing":
        choices = [("identical", "all experts the same"), ("overlap", "experts in common")]
    elif name == "trace":
        traced = [(str(i), result) for i, result in enumerate(report.levels) if result.trace]
        choices = [(i, labels(report.levels)[int(i)]) for i, _ in traced]
        broken = [i for i, result in traced if result.trace and result.trace.first_beyond]
        chosen = broken[0] if broken else ""
    if choices:
        options = "".join(
            f'<option value="{value}"{" selected" * (value == chosen)}>{escape(text)}</option>'
            for value, text in choices
        )
        yield f'<p><label>Show <select autocomplete="off">{options}</select></label></p>'
    style = f'style="height: {drawn.layout.height}px"'
    yield f'<div class="chart" role="img" aria-label="{_DESCRIPTIONS[name]}" {style}></div>'
    if name in ("overview", "pregate", "depth"):
        yield f'<div class="legend" role="group" aria-label="Levels shown">{_legend(names)}</div>'
    # Nothing in it can end the script element.
    yield f'<script type="application/json">{_inert(str(drawn.to_json()))}</script>'
    yield "</div>"


def _legend(names: Sequence[Style]) -> str:
    return "".join(
        f'<button type="button" aria-pressed="true" data-level="{escape(style.label)}" '
        f'style="--c: {style.color}"><svg viewBox="-14 -6 28 12" aria-hidden="true">'
        f'<path class="line{" dashed" * style.dashed}" d="M-14,0H14"/>'
        f'<path class="{"open" if style.dashed else "mark"}" d="{_SHAPES[style.symbol]}"/></svg>'
        f"{escape(style.label)}</button>"
        for style in names
    )


def _table(table: Table) -> str:
    heads = "".join(
        f'<th scope="col"{_align(table, i)}>{escape(text)}</th>'
        for i, text in enumerate(table.header)
    )
    rows = "\n".join(f"<tr>{''.join(_cells(table, row))}</tr>" for row in table.rows)
    caption = escape(table.caption)
    label = caption if table.folded else f"<caption>{caption}</caption>"
    inner = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f"{'' if table.folded else label}\n<thead><tr>{heads}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )
    return f"<details><summary>{label}</summary>{inner}</details>" if table.folded else inner


def _cells(table: Table, row: Sequence[str]) -> Iterator[str]:
    for i, cell in enumerate(row):
        text = escape(cell)
        if isinstance(cell, Bad):
            text = f'<strong class="bad">{text}</strong>'
        if i == 0:
            yield f'<th scope="row">{text}</th>'
        else:
            yield f"<td{_align(table, i)}>{text}</td>"


def _align(table: Table, column: int) -> str:
    return ' class="words"' if column in table.left else ""


def _plotly() -> str:
    # HTML may not hold the control characters that some of its string literals do.
    return re.sub(r"[\x00-\x08\x0e-\x1f]", lambda c: f"\\x{ord(c[0]):02x}", get_plotlyjs())


def _inert(text: str) -> str:
    return json.dumps(json.loads(text)).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
