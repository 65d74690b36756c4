#!/usr/bin/env python3
"""Convert and run configurations unlike the published one, and compare each with the reference.

    scripts/development/odd_configs.py                 # the named ones
    scripts/development/odd_configs.py --random 40     # and 40 drawn ones

Each is a random float32 checkpoint, converted to F32 by the real converter, run by the patched
llama.cpp, and compared with the float64 reference. Exits 1 if a normalised mean squared error
reaches 1e-9; what is expected is about 1e-12.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

# The library is where the tests, which use it most, import it from.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.odd_configs import CASES, THRESHOLD, measure, random_case


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, default=0, metavar="N", help="also N drawn ones")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and tokens")
    args = parser.parse_args()
    missed = 0
    print("| configuration | NMSE at F32 |\n|---|---|")
    for case in [*CASES, *map(random_case, range(args.random))]:
        with tempfile.TemporaryDirectory(prefix="odd-config-") as folder:
            nmse = measure(case, Path(folder), args.seed)
        good = nmse < THRESHOLD
        missed += not good
        print(f"| {case.name} | {nmse:.1e}{'' if good else ' MISSED'} |", flush=True)
    if missed:
        print(f"{missed} missed the threshold of {THRESHOLD:g}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
