#!/usr/bin/env python3
"""Search for the recipes that this project ships, and write them into the package.

    scripts/make_checkpoint.py EMPTY --size full --empty
    scripts/makers/write_recipes.py --also EMPTY --work FOLDER

The search is that of `megrez-gguf search` on the pocket checkpoint and its own texts, for the sizes
below, of the checkpoint --also. Rounding learns from the middle of each text: the search sees the
ends, and is judged by the starts. Small files have zeros after the rows of down projections.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.checkpoint.tokenizer_judge import library_tokenizer
from megrez_gguf.conversion.convert import convert
from megrez_gguf.errors import MegrezError
from megrez_gguf.quantization import recipe
from megrez_parity.recipe_search import judge, search
from megrez_parity.report import prepare, print_table, write
from megrez_parity.windows import CALIBRATION, read_corpus
from megrez_runtime.calibration import calibrate

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "tests" / "data" / "pocket"
TARGET = Path(recipe.__file__).with_name("recipes")
CONTEXT, JUDGED = 512, 16  # tokens a window, and windows of each text
SIZES = {False: (4.0, 3.5), True: (3.0, 2.5)}  # GiB, without and with zeros after rows


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def learn(checkpoint: Path, work: Path) -> Path:
    """An importance matrix with products, from what is neither judged by nor searched on."""
    path = work / f"{checkpoint.name}.imatrix.gguf"
    if path.exists():
        return path
    corpus = read_corpus(Checkpoint.open(checkpoint), (), n_ctx=CONTEXT, n_windows=JUDGED)
    tokenizer = library_tokenizer(checkpoint / "tokenizer.json")
    texts = []
    for text, ids in zip(corpus.texts, corpus.ids, strict=True):
        end = (len(ids) // CONTEXT - CALIBRATION) * CONTEXT
        texts.append(work / f"{text.domain}-middle.txt")
        middle = tokenizer.decode(ids[JUDGED * CONTEXT : end].tolist(), skip_special_tokens=False)
        texts[-1].write_text(middle, "utf-8")
    model = work / "source.gguf"
    convert(checkpoint, model, force=True)
    calibrate(model, texts, path, parse_special=True, process_output=True, products=True, say=say)
    model.unlink()
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--also", type=Path, required=True, metavar="CHECKPOINT")
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is measured")
    args = parser.parse_args()
    try:
        prepare(args.work / "report")
        imatrix = learn(POCKET, args.work)
        found = []
        for pad_rows, sizes in SIZES.items():
            found += search(
                POCKET, args.work, also=[args.also], sizes=[int(gib * 2**30) for gib in sizes],
                imatrix=imatrix, pad_rows=pad_rows, say=say,
            )  # fmt: skip
        for one in found:
            shutil.copyfile(one.path, TARGET / one.path.name)
        names = [one.path.stem for one in found]
        report = judge(POCKET, names, imatrix=imatrix, command=shlex.join(sys.argv), say=say)
        for path in write(report, args.work / "report"):
            say(f"wrote {path}")
    except MegrezError as e:
        say(f"write_recipes: {e}")
        return e.exit_code
    print_table(report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
