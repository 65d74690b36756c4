"""A parity report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megrez_parity.report.content import Bad
from megrez_parity.report.content import Table as Content
from megrez_parity.report.judgement import glance
from megrez_parity.report.words import clean, mib, number
from megrez_parity.results import ParityReport


def print_table(report: ParityReport) -> None:
    """Print `report` to stdout; outside a terminal as plain, unwrapped text."""
    print_content(glance(report), _remarks(report))


def print_content(content: Content, remarks: Iterable[str] = ()) -> None:
    """Print one table to stdout, and `remarks` below; outside a terminal unwrapped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=100_000)
    table = Table(box=None, pad_edge=False)
    for i, heading in enumerate(content.header):
        table.add_column(heading, justify="left" if i in content.left else "right", no_wrap=i > 0)
    for row in content.rows:
        table.add_row(*(Text(cell, style="bold red" * isinstance(cell, Bad)) for cell in row))
    # A figure is never cut short to fit a narrow terminal.
    width = console.width
    console.width = 100_000
    needed = console.measure(table).maximum
    console.width = max(width, needed)
    console.print(table)
    console.width = width
    for line in remarks:
        console.print(Text(line))


def _remarks(report: ParityReport) -> Iterator[str]:
    windows = sum(text.windows for text in report.texts)
    reference = report.levels[0].metrics.reference_perplexity.value if report.levels else None
    yield (
        f"Reference: torch {report.reference.dtype}, PPL {number(reference, '.4f')}; "
        f"{windows} windows of {report.context} tokens."
    )
    diverged = [
        (sum(layer.first_diverged for layer in result.routing), clean(result.level))
        for result in report.levels
    ]
    if any(count for count, _ in diverged):
        most = sorted(diverged, reverse=True)[:3]
        leavers = ", ".join(f"{level} {count:,}" for count, level in most if count)
        yield f"Tokens that left the reference's experts by more than noise, most: {leavers}."
    for result in report.levels:
        name = clean(result.level)
        if unfaithful := [str(x.layer) for x in result.routing if x.unfaithful]:
            yield f"{name}: does not route as its router says in layers {', '.join(unfaithful)}."
        if not result.tokenizer_agreement >= 1:
            agreement = number(result.tokenizer_agreement, ".4%")
            yield f"{name}: its own tokenizer gives {agreement} of the texts' tokens."
    if any(result.fallbacks for result in report.levels):
        parts = [
            f"{clean(result.level)} {len(result.fallbacks)} "
            f"(+{mib(sum(fallback.extra_bytes for fallback in result.fallbacks))} MiB)"
            for result in report.levels
            if result.fallbacks
        ]
        yield f"Tensors that fell back to a wider type: {', '.join(parts)}."
    traced = [result for result in report.levels if result.trace]
    for result in traced:
        point = result.trace.first_beyond if result.trace else None
        if point:
            above = "" if point.tolerance is None else f" > {number(point.tolerance)}"
            yield (
                f"Trace: {clean(result.level)}: {point} is the first tensor "
                f"beyond its tolerance: {number(point.local_nmse)}{above}."
            )
    if traced and not any(result.trace and result.trace.first_beyond for result in traced):
        yield f"Trace: no tensor beyond its tolerance, {len(traced)} levels."
    if report.audit:
        yield clean(report.audit.verdict)
