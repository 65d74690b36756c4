"""What happens inside: the sections on experts, hidden states and the trace."""

from __future__ import annotations

import math
from collections.abc import Callable

from megrez_parity.report.content import Bad, Section, Table, by_layer
from megrez_parity.report.words import NONE, clean, experts_agree, mean, number, percent
from megrez_parity.results import LayerRouting, LevelResult, ParityReport


def routing(report: ParityReport) -> Section:
    rows = []
    for result in report.levels:
        known = [x for x in result.routing if math.isfinite(x.identical.value)]
        worst = min(known, key=lambda x: x.identical.value, default=None)
        diverged = [x for x in result.routing if x.first_diverged]
        unfaithful = sum(x.unfaithful for x in result.routing)
        rows.append(
            [
                clean(result.level),
                percent(experts_agree(result)),
                f"{percent(worst.identical.value)} in layer {worst.layer}" if worst else NONE,
                percent(mean(x.overlap.value for x in result.routing)),
                f"{sum(x.first_ties for x in result.routing):,}",
                f"{sum(x.first_diverged for x in diverged):,}",
                f"layer {diverged[0].layer}" if diverged else NONE,
                Bad(f"{unfaithful:,}") if unfaithful else "0",
            ]
        )
    header = ["level", "experts agree", "lowest", "overlap"]
    header += ["first left by a tie", "first diverged", "from", "unfaithful"]

    def cell(show: Callable[[LayerRouting], str]) -> Callable[[LevelResult], dict[int, str]]:
        return lambda result: {x.layer: show(x) for x in result.routing}

    layers = _routed_layers(report)
    return Section(
        "routing",
        "Which experts run",
        "Share of tokens whose set of experts is exactly the reference's (or, chosen above the "
        "figure, the mean share of experts in common), by layer and level; stronger colour is less "
        "agreement. A token that first leaves the reference's set where its margin is within the "
        "noise of the level is a tie; by more, it has diverged (dots mark such layers). A cross, "
        "or a count under unfaithful, is a layer that did not route as its own router says: a "
        "defect, not rounding.",
        [] if layers else ["No layer routes, or routing was not captured."],
        tables=[
            Table("Routing, all layers", header, rows if layers else []),
            by_layer(
                "Tokens whose experts are all the reference's, by layer",
                report,
                layers,
                cell(lambda x: percent(x.identical.value, 1)),
            ),
            by_layer(
                "Experts in common, by layer",
                report,
                layers,
                cell(lambda x: percent(x.overlap.value, 1)),
            ),
            by_layer(
                "First disagreements by layer: ties / diverged",
                report,
                layers,
                cell(lambda x: f"{x.first_ties} / {x.first_diverged}"),
            ),
        ],
    )


def pregate(report: ParityReport) -> Section:
    rows = []
    for result in report.levels:
        ratios = {
            x.layer: x.input_nmse / x.own_nmse
            for x in result.routing
            if x.own_nmse > 0 and x.input_nmse > 0 and math.isfinite(x.input_nmse / x.own_nmse)
        }
        middle = mean(map(math.log, ratios.values()))
        top = max(ratios, key=ratios.__getitem__, default=None)
        rows.append(
            [
                clean(result.level),
                number(mean(x.input_nmse for x in result.routing), ".2e"),
                number(mean(x.own_nmse for x in result.routing), ".2e"),
                NONE if middle is None else number(math.exp(middle)),
                NONE if top is None else f"{number(ratios[top])} in layer {top}",
            ]
        )
    header = ("level", "NMSE of the input", "NMSE of the own state", "ratio", "greatest ratio")
    layers = _routed_layers(report)
    return Section(
        "pregate",
        "What the router reads",
        "With pre-gating a router reads the normed state of the layer before, so it does not see "
        "the error its own layer's attention adds. Above: the error of what it reads. Below: that "
        "error over the error of its own layer's state, which it would read without pre-gating; "
        "under 1, pre-gating shields routing. The ratio in the table is the geometric mean over "
        "layers.",
        [] if layers else ["No layer routes, or routing was not captured."],
        tables=[
            Table("Error of the routing input", header, rows if layers else []),
            by_layer(
                "NMSE of the routing input, by layer",
                report,
                layers,
                lambda result: {x.layer: number(x.input_nmse, ".1e") for x in result.routing},
            ),
            by_layer(
                "NMSE of the layer's own state, by layer",
                report,
                layers,
                lambda result: {x.layer: number(x.own_nmse, ".1e") for x in result.routing},
            ),
        ],
    )


def depth_names(report: ParityReport) -> list[str]:
    """Tensors whose error by depth is known, in the order of first mention."""
    return list(dict.fromkeys(name for result in report.levels for name in result.depth))


def depth(report: ParityReport) -> Section:
    def folded(name: str) -> Table:
        lengths = [len(result.depth.get(name, ())) for result in report.levels]
        return by_layer(
            f"NMSE of {name}, by layer",
            report,
            range(max(lengths, default=0)),
            lambda result: {
                i: number(value, ".1e") for i, value in enumerate(result.depth.get(name, ()))
            },
        )

    names = depth_names(report)
    return Section(
        "depth",
        "Error by depth",
        "Error of each layer's state against the reference's (squared error over mean square), "
        "with all error from the layers before: ffn_norm is what a layer's experts read, l_out "
        "what it hands on. A level that is sound rises smoothly; a step that other levels lack is "
        "a layer at fault. Where the error is exactly 0 the line has a gap.",
        [] if names else ["Hidden states were not captured."],
        tables=[folded(name) for name in names],
    )


def trace(report: ParityReport) -> Section:
    rows = []
    for result in report.levels:
        if result.trace is None:
            continue
        first, points = result.trace.first_beyond, result.trace.points
        known = [x for x in points if math.isfinite(x.local_nmse)]
        worst = max(known, key=lambda x: x.local_nmse, default=None)
        bounded = [x for x in points if x.tolerance is not None]
        beyond = sum(x.is_beyond for x in bounded)
        rows.append(
            [
                clean(result.level),
                Bad(str(first)) if first else "none",
                number(first.local_nmse) if first else NONE,
                number(first.tolerance) if first else NONE,
                Bad(f"{beyond} of {len(bounded)}") if beyond else f"0 of {len(bounded)}",
                f"{worst}: {number(worst.local_nmse)}" if worst else NONE,
                number(points[-1].nmse) if points else NONE,
            ]
        )
    header = ["level", "first beyond", "local NMSE", "tolerance", "beyond"]
    header += ["greatest local NMSE", "NMSE at the end"]
    return Section(
        "trace",
        "Where it breaks",
        "Tensors in the order they are computed. The total error is against the reference; the "
        "local error is against the reference's layer fed with this file's own input, so that it "
        "shows what this place adds and nothing from before. The first tensor whose local error is "
        "beyond its tolerance is where to look.",
        [] if rows else ["Not traced: the option --trace does it."],
        tables=[Table("First tensor beyond tolerance", header, rows, frozenset({0, 1}))],
    )


def _routed_layers(report: ParityReport) -> list[int]:
    return sorted({x.layer for result in report.levels for x in result.routing})
