"""How figures and names read, the same in every form of the report."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from megrez_parity.results import Figure, LevelResult

NONE = "–"
# Bits a weight that have a colour of their own; 0 stands for any other.
FAMILIES = (32, 16, 8, 6, 5, 4, 3, 2, 0)


def clean(text: str) -> str:
    """`text` with whatever does not print (escape codes, line ends, bad bytes) spelled out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def number(value: float | None, spec: str = "") -> str:
    """As `spec` says, or else three digits; NONE for None."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value).replace("nan", "NaN")
    if spec:
        return format(value, spec)
    plain = value == 0 or 1e-3 <= abs(value) < 1e4
    return format(value, "#.3g").rstrip(".") if plain else format(value, ".2e")


def percent(value: float | None, digits: int = 2) -> str:
    return number(value, f".{digits}%")


def interval(figure: Figure, unit: str = "") -> str:
    """Value ± half the width of its interval, to two digits of the latter."""
    value, half = figure.value, (figure.high - figure.low) / 2
    if not (math.isfinite(value) and math.isfinite(half)):
        return f"{number(value)}{unit} ± {number(half)}"
    size = max(abs(value), half)
    power = math.floor(math.log10(size)) if size else 0
    if -3 <= power <= 5:
        power = 0
    value, half = value / 10.0**power, half / 10.0**power
    digits = max(1 - math.floor(math.log10(half)), 0) if half else 2
    if digits > 6:
        return f"{value:.6f}{unit} ± {half:.1e}"
    middle, half_width = f"{value:.{digits}f}", f"{half:.{digits}f}"
    if power:
        return f"({middle} ± {half_width})e{power:+03d}{unit}"
    return f"{middle}{unit} ± {half_width}"


def percent_interval(figure: Figure) -> str:
    scaled = Figure(100 * figure.value, 100 * figure.low, 100 * figure.high)
    return interval(scaled, "%")


def mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f}"


def mean(values: Iterable[float]) -> float | None:
    """Mean of the finite ones; None without any."""
    known = [value for value in values if math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None


def experts_agree(result: LevelResult) -> float | None:
    """Share of tokens whose experts are all the reference's, mean over the MoE layers."""
    return mean(layer.identical.value for layer in result.routing)


def verdict(result: LevelResult) -> str:
    return "missed" if result.misses else "ok" if result.thresholds else "no threshold"


def labels(levels: Sequence[LevelResult]) -> list[str]:
    """Short names for figures: of a path its last part, cut in the middle; no two alike."""
    found: list[str] = []
    for result in levels:
        name = clean(PurePath(result.level).name or result.level)
        name = name if len(name) <= 22 else f"{name[:12]}…{name[-9:]}"
        count = 2
        label = name
        while label in found:
            label, count = f"{name} ({count})", count + 1
        found.append(label)
    return found


def family(result: LevelResult) -> int:
    """Bits a weight, as its level's name says."""
    name = result.kind or PurePath(result.level).name
    found = re.search(r"(?<![a-z])(?:b?f|i?q|mxfp)(\d+)", name.lower())
    bits = int(found[1]) if found else 0
    return bits if bits in FAMILIES else 0
