#!/usr/bin/env python3
"""What judging a file costs above llama.cpp's own forward pass over the same windows.

    scripts/benchmarks/bench_parity.py CKPT FILE.gguf --text novel.txt --windows 4 --cache FOLDER

Each repeat runs the windows bare (no capture, nothing compared) and through the parity harness,
in alternating order, and prints both times and their ratio; then the medians. The reference comes
from --cache, made before anything is timed. Reading and hashing files is not in the figures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import MegrezError
from megrez_llama.engine import Engine
from megrez_parity.harness import measure
from megrez_parity.windows import read_corpus


def bare(gguf: Path, checkpoint: Path, texts: list[Path], context: int, windows: int) -> float:
    """Seconds of llama.cpp alone, outputs of the scored half as llama-perplexity asks for."""
    corpus = read_corpus(Checkpoint.open(checkpoint), texts, n_ctx=context, n_windows=windows)
    with Engine(gguf, context) as engine:
        begin = time.perf_counter()
        for window in corpus.windows:
            engine.run(window.tokens, first=context // 2)
        return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("gguf", type=Path, metavar="FILE.gguf")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--ctx", type=int, default=512, metavar="N", help="tokens a window")
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="windows a text")
    parser.add_argument("--cache", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    args = parser.parse_args()
    ratios = []
    try:
        for repeat in range(-1, args.repeats):

            def plain() -> float:
                return bare(args.gguf, args.checkpoint, args.text, args.ctx, args.windows)

            def judged() -> float:
                report = measure(
                    args.checkpoint,
                    levels=(),
                    texts=args.text,
                    files=[args.gguf],
                    n_ctx=args.ctx,
                    n_windows=args.windows,
                    cache=args.cache,
                )
                seconds = report.levels[0].seconds
                return seconds["forward"] + seconds["compare"]

            runs = [plain, judged] if repeat % 2 else [judged, plain]
            seconds = {run.__name__: run() for run in runs}
            if repeat < 0:  # fills the caches: the reference's and the system's
                continue
            ratios.append(seconds["judged"] / seconds["plain"])
            print(
                f"llama.cpp alone {seconds['plain']:.2f} s, judged {seconds['judged']:.2f} s, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    except MegrezError as e:
        print(f"bench_parity: {e}", file=sys.stderr)
        return e.exit_code
    print(f"median ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
