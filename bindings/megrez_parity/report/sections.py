"""The whole report, section by section, for any form."""

from __future__ import annotations

from megrez_parity.report import judgement, layers, origin
from megrez_parity.report.answers import answered
from megrez_parity.report.content import Section
from megrez_parity.report.words import clean
from megrez_parity.results import ParityReport


def title(report: ParityReport) -> str:
    return f"Parity of {clean(report.checkpoint)}"


def verdict_line(report: ParityReport) -> str:
    judged = sum(bool(result.thresholds) for result in report.levels)
    if report.misses:
        missed = [clean(result.level) for result in report.levels if result.misses]
        return f"Missed: {len(missed)} of {len(report.levels)} levels: {', '.join(missed)}."
    if not judged:
        return f"Measured: {len(report.levels)} levels. No thresholds apply."
    return f"Passed: {judged} of {len(report.levels)} levels have thresholds, and all meet them."


def sections(report: ParityReport) -> list[Section]:
    made = [
        judgement.overview,
        judgement.gate,
        judgement.metrics,
        judgement.distribution,
        judgement.domains,
        layers.routing,
        layers.pregate,
        layers.depth,
        layers.trace,
        origin.fallbacks,
        origin.audit,
        origin.provenance,
    ]
    found = [make(report) for make in made]
    if report.answers:
        found.insert(made.index(layers.routing), answered(report.answers))
    return found
