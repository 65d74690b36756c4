#!/usr/bin/env python3
"""Measure the pocket checkpoint at every level and write the tables between the results markers.

scripts/makers/results.py            write them: all levels into scripts/benchmarks/README.md,
                                     the usual ones into README.md
scripts/makers/results.py --print    only print the table of all levels
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

from megrez_parity.harness import measure
from megrez_parity.level_files import LEVELS
from megrez_parity.results import ParityReport

ROOT = Path(__file__).resolve().parents[2]
POCKET = Path("tests/data/pocket")
WINDOWS = 16
# In the README: those a user chooses among.
USUAL = ("f32", "bf16", "q8_0", "q4_k_m", "recipe:megrez-q4", "q3_k_m", "recipe:megrez-q3")
BLOCK = re.compile(r"(?s)(<!-- results:begin[^\n]*-->\n).*?(<!-- results:end -->)")


def markdown(report: ParityReport, shown: Collection[str]) -> str:
    """A table of the levels `shown`, and where its figures come from."""
    windows = sum(text.windows for text in report.texts)
    lines = [
        f"The pocket checkpoint against the torch reference ({report.reference.dtype}), over "
        f"{windows} windows of",
        f"{report.context} tokens of held-out English, Chinese, code and chat, with the 95% "
        "interval of the mean KLD;",
        "*experts* is the share of tokens whose set of experts is the reference's, in the mean "
        "and the worst layer:",
        "",
        "| level | MiB | NMSE of logits | mean KLD | 99% KLD | same top | PPL ratio | experts |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    levels = {level.level: level for level in report.levels}
    for level in (levels[name] for name in shown):
        m = level.metrics
        same = [layer.identical.value for layer in level.routing]
        lines.append(
            f"| {level.level} | {level.file_bytes / 2**20:.2f} | {m.nmse.value:.1e} "
            f"| {m.mean_kld.value:.2g} ({m.mean_kld.low:.2g} to {m.mean_kld.high:.2g}) "
            f"| {m.kld_99.value:.2g} | {m.same_top_p.value:.2%} | {m.perplexity_ratio.value:.4f} "
            f"| {sum(same) / len(same):.1%}, {min(same):.1%} |"
        )
    names = ("commit", "llama_cpp", "torch", "python", "machine", "seed")
    made = ", ".join(f"{name} {report.provenance[name]}" for name in names)
    lines += ["", *textwrap.wrap(f"`scripts/makers/results.py`; {made}.", 100), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args()
    report = measure(POCKET, n_windows=WINDOWS, say=lambda line: print(line, file=sys.stderr))
    whole = markdown(report, LEVELS)
    if args.only_print:
        print(whole, end="")
        return 0
    for name, block in (
        ("README.md", markdown(report, USUAL)),
        ("scripts/benchmarks/README.md", whole),
    ):
        page = ROOT / name
        text = page.read_text("utf-8")
        found = list(BLOCK.finditer(text))
        if len(found) != 1:
            print(f"error: {name} has no results markers", file=sys.stderr)
            return 1
        page.write_text(text[: found[0].end(1)] + block + text[found[0].start(2) :], "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
