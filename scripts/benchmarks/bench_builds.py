#!/usr/bin/env python3
"""Two builds of the libraries against each other: prompts, decoding and memory, in turn.

    scripts/benchmarks/bench_builds.py BEFORE AFTER MODEL.gguf... [--prompt 512] [--rounds 5]

BEFORE and AFTER are folders with libllama.so and its fellows, of the same llama.cpp release: the
`llama_cpp/lib` of an installed package, or the `bin` of a build. Every round runs `megrez-gguf
bench` once with each, the order turning about, so that a machine whose speed drifts slows both. A
row is a model: the medians, and the median of the rounds' ratios with its quartiles. "Of memory" is
AFTER's decoding as a share of what the memory allows: its bandwidth, measured after each round by
as many threads that only read, over the bytes of a token's weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from memory_bandwidth import Memory, bytes_of_token

MIB = 1 << 20


def bench(model: Path, options: dict[str, Any], libraries: Path | None = None) -> dict[str, float]:
    """Tokens a second in the prompt, if there is one, and after it; resident bytes.

    `options` are those of `megrez-gguf bench`, which runs once, with the installed libraries unless
    others are given.
    """
    environment = dict(os.environ)
    if libraries:
        environment["LLAMA_CPP_LIB_PATH"] = str(libraries.resolve(strict=True))
    done = subprocess.run(
        [sys.executable, "-m", "megrez_cli", "bench", str(model), "--json", "--repeats=1",
         *(f"--{name}={value}" for name, value in options.items())],
        env=environment, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    rates = {name: found[name]["rates"][0] for name in ("prompt", "decode") if found[name]}
    return rates | {"resident": found["resident"]}


def ratio(before: list[float], after: list[float]) -> str:
    ratios = [b / a for a, b in zip(before, after, strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ram", default="off", help="memory for the process, e.g. 2GiB")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    options = {name: getattr(args, name) for name in ("prompt", "tokens", "threads", "ram")}
    builds = (args.before, args.after)
    memory = Memory(args.threads)
    print(
        "| model | prompt | after | ratio | decode | after | ratio | of memory | resident | after |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for model in args.models:
        runs: dict[Path, list[dict[str, float]]] = {build: [] for build in builds}
        shares = []
        for number in range(args.rounds):
            for build in builds[:: 1 if number % 2 else -1]:
                runs[build].append(bench(model, options, build))
            possible = memory.read() / bytes_of_token(model)
            shares.append(runs[args.after][-1]["decode"] / possible)
        cells = [model.stem]
        for name in ("prompt", "decode"):
            before, after = ([run[name] for run in runs[build]] for build in builds)
            cells += [f"{statistics.median(rates):.1f}" for rates in (before, after)]
            cells.append(ratio(before, after))
        cells.append(f"{statistics.median(shares):.0%}")
        for build in builds:
            resident = statistics.median(run["resident"] for run in runs[build])
            cells.append(f"{resident / MIB:.0f} MiB")
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
