#!/usr/bin/env python3
"""Prompts and decoding of Megrez2 here against another program's, in one run.

    scripts/benchmarks/bench_peer.py LLAMA_BENCH MODEL.gguf... [--prompt 512,4096] [--rounds 3]

LLAMA_BENCH is the llama-bench of a program that does not know Megrez2, ik_llama.cpp for one. It
runs the twin that bench_decode.py makes: the same bytes as glm4moe, and as many of them read a
token, once with each of --options. A round runs everything once, ours first and last by turns; a
row has the medians, and the median of the rounds' ratios of ours to theirs with the lowest and the
highest. The twin takes three times the disk of the model, beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from bench_builds import bench
from bench_decode import write_twin

Rates = dict[str, float]


def ours(model: Path, prompts: list[int], args: argparse.Namespace) -> Rates:
    options = {"threads": args.threads, "ram": "off"}
    rates = {
        f"prompt of {length}": bench(model, options | {"prompt": length, "tokens": 1})["prompt"]
        for length in prompts
    }
    # theirs has no prompt before it
    alone = bench(model, options | {"prompt": 0, "tokens": args.tokens})
    return rates | {"decode": alone["decode"]}


def theirs(twin: Path, prompts: list[int], options: str, args: argparse.Namespace) -> Rates:
    done = subprocess.run(
        [args.llama_bench, "-m", twin, "-t", str(args.threads), "-r", "1", "-o", "json",
         "-p", ",".join(map(str, prompts)), "-n", str(args.tokens), *options.split()],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    rates: Rates = {}
    for test in json.loads(done.stdout):
        name = f"prompt of {test['n_prompt']}" if test["n_prompt"] else "decode"
        rates[name] = test["avg_ts"]
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("llama_bench", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--prompt", default="512", help="lengths, with commas")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--options", action="append", help="of LLAMA_BENCH [-rtr 1 -fa 0, and -rtr 1 -fa 1]"
    )
    args = parser.parse_args()
    prompts = [int(text) for text in args.prompt.split(",")]
    every = args.options or ["-rtr 1 -fa 0", "-rtr 1 -fa 1"]
    print("| model | what | ours | their options | theirs | ratio |")
    print("|---|---|--:|---|--:|--:|")
    for model in args.models:
        mine: list[Rates] = []
        peers: dict[str, list[Rates]] = {options: [] for options in every}
        with tempfile.TemporaryDirectory(dir=model.resolve().parent) as folder:
            twin = Path(folder, "twin.gguf")
            write_twin(model, twin, biases=True)
            for number in range(args.rounds):
                if number % 2 == 0:
                    mine.append(ours(model, prompts, args))
                for options in every:
                    peers[options].append(theirs(twin, prompts, options, args))
                if number % 2 == 1:
                    mine.append(ours(model, prompts, args))
        for what in mine[0]:
            for options in every:
                pairs = [(a[what], b[what]) for a, b in zip(mine, peers[options], strict=True)]
                ratios = sorted(a / b for a, b in pairs)
                a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
                print(
                    f"| {model.stem} | {what} | {a:.1f} | {options} | {b:.1f} "
                    f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
