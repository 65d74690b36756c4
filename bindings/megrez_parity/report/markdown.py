"""A parity report as Markdown (GitHub's)."""

from __future__ import annotations

import re

from megrez_parity.report.content import Bad, Table
from megrez_parity.report.sections import sections, title, verdict_line
from megrez_parity.results import ParityReport

# Underscores only where they could emphasise: q4_k_m stays as it is.
_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")


def render(report: ParityReport) -> str:
    """All tables of `report` and what they mean; the figures are in the HTML form."""
    parts = [f"# {_escape(title(report))}", _escape(verdict_line(report))]
    for section in sections(report):
        parts.append(f"## {_escape(section.title)}")
        parts.append(_escape(section.reading))
        parts += [_escape(line) for line in section.lines]
        parts += [f"    {section.code}"] if section.code else []
        parts += [_table(table) for table in section.tables if table.rows]
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rule = [":--" if i in table.left else "--:" for i in range(len(table.header))]
    rows = [[_escape(cell) for cell in table.header], rule]
    rows += [[_cell(cell) for cell in row] for row in table.rows]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    caption = _escape(table.caption)
    if table.folded:
        return f"<details><summary>{caption}</summary>\n\n{lines}\n\n</details>"
    return f"**{caption}**\n\n{lines}"


def _cell(cell: str) -> str:
    return f"**{_escape(cell)}**" if isinstance(cell, Bad) else _escape(cell)


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\g<0>", text)
