#!/usr/bin/env python3
"""Show that the parity check can fail: sabotage a model in every way others have got it wrong.

    scripts/development/sabotage.py                    # the pocket checkpoint
    scripts/development/sabotage.py CKPT --text FILE

Each sabotaged file is judged against the unharmed checkpoint by the same code as `megrez-gguf
parity --trace`. Prints a table; exits 1 if an unharmed file misses a threshold, a sabotage passes,
or the trace names another tensor than the one harmed first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megrez_gguf.errors import MegrezError
from megrez_parity.results import LevelResult

# The library is where the tests, which use it most, import it from.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.judging import UNHARMED, judge, named
from support.paths import POCKET
from support.sabotages import SABOTAGES, Sabotage


def row(sabotage: Sabotage, result: LevelResult) -> str:
    """A line of the table."""
    m = result.metrics
    caught = [miss.removeprefix(f"{result.level}: ").split()[0] for miss in result.misses]
    cells = (
        sabotage.name,
        sabotage.level,
        f"{m.nmse.value:.1e}",
        f"{m.mean_kld.value:.2g}",
        f"{m.same_top_p.value:.1%}",
        ", ".join(name for name in caught if "-" not in name) or "-",
        named(result) or "-",
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=POCKET, metavar="CKPT")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--ctx", type=int, default=128, metavar="N", help="tokens a window, at F32")
    args = parser.parse_args()
    good = True
    print("| sabotage | level | NMSE | mean KLD | same top | beyond | trace names |")
    print("|---|---|---|---|---|---|---|")
    try:
        with tempfile.TemporaryDirectory(prefix="sabotage-") as cache:
            for sabotage in (*UNHARMED, *SABOTAGES):
                result = judge(args.checkpoint, sabotage, args.text, args.ctx, Path(cache))
                print(row(sabotage, result), flush=True)
                good &= bool(result.misses) == (sabotage.name != "none")
                good &= named(result) == sabotage.first
    except MegrezError as e:
        print(f"sabotage: {e}", file=sys.stderr)
        return e.exit_code
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
