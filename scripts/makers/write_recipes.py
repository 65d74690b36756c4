#!/usr/bin/env python3
"""Search for the recipes that this project ships, and write them into the package.

    scripts/make_checkpoint.py EMPTY --size full --empty --tokenizer-vocab 4000
    scripts/makers/write_recipes.py --also EMPTY --work FOLDER

The search is that of `megrez-gguf search` on the pocket checkpoint and its own texts. With --also
the recipes are no larger than their level at full size, too.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from megrez_gguf.errors import MegrezError
from megrez_gguf.quantization import recipe
from megrez_parity.recipe_search import judge, search
from megrez_parity.report import prepare, print_table, write

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "tests" / "data" / "pocket"
TARGET = Path(recipe.__file__).with_name("recipes")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--also", type=Path, action="append", default=[], metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is measured")
    args = parser.parse_args()
    try:
        prepare(args.work / "report")
        found = search(POCKET, args.work, also=args.also, say=say)
        for one in found:
            shutil.copyfile(one.path, TARGET / one.path.name)
        names = [one.path.stem for one in found]
        report = judge(POCKET, names, command=shlex.join(sys.argv), say=say)
        for path in write(report, args.work / "report"):
            say(f"wrote {path}")
    except MegrezError as e:
        say(f"write_recipes: {e}")
        return e.exit_code
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
