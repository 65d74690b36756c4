"""A parity report as a table for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megrez_parity.harness import Report


def print_table(report: Report) -> None:
    """Print `report` to stdout; outside a terminal as plain, unwrapped text."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    table = Table(box=None, pad_edge=False)
    table.add_column("level")
    for heading in (
        "MiB",
        "NMSE",
        "mean KLD",
        "99% KLD",
        "max KLD",
        "same top",
        "PPL",
        "PPL ratio",
    ):
        table.add_column(heading, justify="right")
    table.add_column("")
    for result in report.levels:
        m = result.metrics
        verdict = "missed" if result.misses else "ok" if result.thresholds else "no threshold"
        table.add_row(
            result.level,
            f"{result.file_bytes / 2**20:.2f}",
            f"{m.nmse:.2e}",
            f"{m.mean_kld:.3g}",
            f"{m.kld_99:.3g}",
            f"{m.max_kld:.3g}",
            f"{m.same_top_p:.2%}",
            f"{m.perplexity:.4f}",
            f"{m.perplexity_ratio:.5f}",
            verdict,
        )
    console.print(table)
    console.print(
        f"Reference: torch {report.reference_dtype}, PPL {report.reference_perplexity:.4f}; "
        f"{report.windows} windows of {report.context} tokens."
    )
