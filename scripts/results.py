#!/usr/bin/env python3
"""Measure the pocket checkpoint at every level and write the table into README.md.

scripts/results.py            rewrite the block between the results markers
scripts/results.py --print    only print it
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

from megrez_parity.harness import Report, measure

ROOT = Path(__file__).resolve().parents[1]
POCKET = Path("tests/data/pocket")
WINDOWS = 16
BLOCK = re.compile(r"(?s)(<!-- results:begin[^\n]*-->\n).*?(<!-- results:end -->)")


def markdown(report: Report) -> str:
    """The README's block: a table and where its figures come from."""
    lines = [
        f"The pocket checkpoint against the torch reference ({report.reference_dtype}), over "
        f"{report.windows} windows of",
        f"{report.context} tokens of held-out English, Chinese, code and chat:",
        "",
        "| level | MiB | NMSE of logits | mean KLD | 99% KLD | max KLD | same top | PPL ratio |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for level in report.levels:
        m = level.metrics
        lines.append(
            f"| {level.level} | {level.file_bytes / 2**20:.2f} | {m.nmse:.1e} | {m.mean_kld:.2g} | "
            f"{m.kld_99:.2g} | {m.max_kld:.2g} | {m.same_top_p:.2%} | {m.perplexity_ratio:.4f} |"
        )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    made_with = {"commit": commit, "cores": str(os.cpu_count()), **report.made_with}
    made = ", ".join(f"{name} {value}" for name, value in made_with.items())
    lines += ["", *textwrap.wrap(f"`scripts/results.py`; {made}. Nothing is random.", 100), ""]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--print", action="store_true", dest="only_print")
    args = parser.parse_args()
    report = measure(POCKET, windows=WINDOWS, say=lambda line: print(line, file=sys.stderr))
    block = markdown(report)
    if args.only_print:
        print(block, end="")
        return 0
    readme = ROOT / "README.md"
    text, count = BLOCK.subn(lambda m: m[1] + block + m[2], readme.read_text("utf-8"))
    if count != 1:
        print("error: README.md has no results markers", file=sys.stderr)
        return 1
    readme.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
