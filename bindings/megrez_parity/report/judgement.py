"""How good each file is: the sections on its probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megrez_parity.report.content import Bad, Section, Table
from megrez_parity.report.words import (
    NONE,
    clean,
    experts_agree,
    interval,
    mib,
    number,
    percent,
    percent_interval,
    verdict,
)
from megrez_parity.results import FLOORS, Figure, LevelResult, Metrics, ParityReport

_INTERVALS = (
    "± is half the width of a 95% interval from resampling blocks of positions: how far the figure "
    "would move with other text of this kind."
)


def glance(report: ParityReport) -> Table:
    """One row a level: the table of the terminal, and the first of every report."""
    header = ["level", "MiB", "NMSE", "mean KLD ± 95%", "99% KLD", "max KLD"]
    header += ["same top", "PPL ratio", "experts agree", "verdict"]
    rows = []
    for result in report.levels:
        m, word = result.metrics, verdict(result)
        rows.append(
            [
                clean(result.level),
                mib(result.file_bytes),
                number(m.nmse.value, ".2e"),
                interval(m.mean_kld),
                number(m.kld_99.value),
                number(m.max_kld.value),
                percent(m.same_top_p.value),
                number(m.perplexity_ratio.value, ".5f"),
                percent(experts_agree(result)),
                Bad(word) if result.misses else word,
            ]
        )
    return Table("Levels at a glance", header, rows, frozenset({0, 9}))


def overview(report: ParityReport) -> Section:
    return Section(
        "overview",
        "Size against divergence",
        "Each point is a file; down and left is better. KLD is the Kullback-Leibler divergence of "
        "the file's next-token probabilities from the reference's, in nats: 0 is the same model. "
        "The line joins the files that no other beats in both size and KLD; bars are 95% "
        "intervals, so points whose bars overlap are not told apart by this text. The axis spans "
        "five decades at most: a triangle on its lower edge lies below it.",
        tables=[glance(report)],
    )


def gate(report: ParityReport) -> Section:
    names = list(dict.fromkeys(name for result in report.levels for name in result.thresholds))
    traced = any(result.trace for result in report.levels)

    def cell(result: LevelResult, name: str) -> str:
        limit = result.thresholds.get(name)
        if limit is None:
            return NONE
        held = result.holds(name)
        # What is not a number is neither more nor less.
        relation = ("" if held else "not ") + ("≥" if name in FLOORS else "≤")
        text = f"{number(result.figure(name), '.5g')} {relation} {limit:g}"
        return text if held else Bad(f"missed: {text}")

    def trace(result: LevelResult) -> str:
        if result.trace is None:
            return NONE
        first = result.trace.first_beyond
        return Bad(f"missed: {first}") if first else "none beyond"

    rows = [
        [clean(result.level), *(cell(result, name) for name in names)]
        + ([trace(result)] if traced else [])
        for result in report.levels
    ]
    header = ["level", *names, *(["traced tensors"] if traced else [])]
    table = Table("Figure and threshold, by level", header, rows if len(header) > 1 else [])
    misses = [clean(miss) for miss in report.misses]
    return Section(
        "gate",
        "Thresholds",
        "Each figure beside the committed threshold of its level. Figures must not rise above it; "
        f"{' and '.join(sorted(FLOORS))} must not fall below. A figure that is not a number "
        "misses any threshold.",
        misses or ["No threshold is missed." if names else "No thresholds apply to these files."],
        tables=[table],
    )


_PLAIN: Sequence[tuple[str, str, Callable[[Figure], str]]] = (
    ("nmse", "NMSE", interval),
    ("mean_kld", "mean KLD", interval),
    ("median_kld", "median KLD", interval),
    ("kld_90", "90% KLD", interval),
    ("kld_99", "99% KLD", interval),
    ("kld_999", "99.9% KLD", interval),
    ("max_kld", "max KLD", lambda figure: number(figure.value)),
    ("mean_delta_p", "mean Δp", percent_interval),
    ("rms_delta_p", "RMS Δp", percent_interval),
    ("same_top_p", "same top", percent_interval),
    ("perplexity", "PPL", interval),
    ("perplexity_ratio", "PPL ratio", interval),
)


def metrics(report: ParityReport) -> Section:
    header = ["level", *(heading for _, heading, _ in _PLAIN), "tokenizer agrees", "positions"]
    rows = [
        [
            clean(result.level),
            *(show(getattr(result.metrics, name)) for name, _, show in _PLAIN),
            percent(result.tokenizer_agreement),
            f"{result.metrics.positions:,}",
        ]
        for result in report.levels
    ]
    reference = report.levels[0].metrics.reference_perplexity if report.levels else None
    return Section(
        "metrics",
        "All figures",
        "Defined as llama-perplexity defines them, and scored where it scores: the second half of "
        "every window. Δp is the probability given to the text's next token less the reference's; "
        "same top is how often both rank the same token first; PPL ratio is the file's perplexity "
        "over the reference's. NMSE is the squared error of the logits over their mean square. "
        f"{_INTERVALS}",
        [f"Perplexity of the reference: {interval(reference)}."] if reference else [],
        tables=[Table("Figures over all texts", header, rows)],
    )


def distribution(report: ParityReport) -> Section:
    shown = (1, 10, 25, 50, 75, 90, 99, 100)
    rows = [
        [clean(result.level), *(number(result.kld_percentiles[p]) for p in shown)]
        for result in report.levels
        if len(result.kld_percentiles) > max(shown)
    ]
    return Section(
        "distribution",
        "Distribution of KLD",
        "How KLD spreads over positions. Half of them lie in the thick bar, 80% in the middle one, "
        "98% in the thin line; the gap in it is the median, the diamond the mean, the cross the "
        "worst position. A mean far right of its thick bar is made by few bad positions. Zeros and "
        "whatever is below the axis are drawn at its left edge.",
        tables=[Table("Percentiles of KLD", ["level", *(f"{p}%" for p in shown)], rows)],
    )


def domains(report: ParityReport) -> Section:
    names = list(dict.fromkeys(name for result in report.levels for name in result.domains))

    def table(caption: str, show: Callable[[Metrics], str], folded: bool = False) -> Table:
        rows = [
            [
                clean(result.level),
                *(show(result.domains[n]) if n in result.domains else NONE for n in names),
            ]
            for result in report.levels
        ]
        header = ["level", *map(clean, names)]
        return Table(caption, header, rows if names else [], folded=folded)

    return Section(
        "domains",
        "By domain",
        "The same figures for each held-out text alone. A level that is fine in one domain and "
        "poor in another was judged by the wrong text somewhere: watch intervals that do not "
        f"overlap. {_INTERVALS}",
        tables=[
            table("Mean KLD ± 95%", lambda m: interval(m.mean_kld)),
            table("Same top ± 95%", lambda m: percent_interval(m.same_top_p)),
            table("PPL ratio ± 95%", lambda m: interval(m.perplexity_ratio)),
            table("99% KLD ± 95%", lambda m: interval(m.kld_99), folded=True),
            table("RMS Δp ± 95%", lambda m: percent_interval(m.rms_delta_p), folded=True),
            table("Positions scored", lambda m: f"{m.positions:,}", folded=True),
        ],
    )
