"""Time the CPU's matrix products of each type, as rows lie in a file and interleaved (repacked).

    scripts/benchmarks/bench_kernels.py [--rows 1,512] [--out 65536] [--threads 2] [--rounds 12]

Weights have 2048 columns and `--out` rows; by turns, the best round counts. With one row of
activations memory decides (GB/s of weights), with many computing (billions of products a second);
"repack" is interleaving itself, by one thread, GB/s. Needs `scripts/development/build_native`, and
`--into` its folder. Quiet machine, please.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,512", help="of activations; several with commas")
    parser.add_argument("--out", type=int, default=65536, help="rows of weights for one row")
    parser.add_argument("--out-many", type=int, default=2048, help="the same for more")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--into", type=Path, default=REPO / "build" / "native")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "kernels"
        include = args.into / "source/vendor/llama.cpp/ggml/include"
        source = Path(__file__).with_name("kernels.cpp")
        build = ["g++", "-std=c++17", "-O2", f"-I{include}", str(source), "-o", str(program)]
        build += [f"-L{args.into / 'bin'}", "-lggml", "-lggml-cpu", "-lggml-base"]
        subprocess.run([*build, f"-Wl,-rpath,{args.into.resolve() / 'bin'}"], check=True)
        for rows in map(int, args.rows.split(",")):
            out = args.out if rows == 1 else args.out_many
            command = [str(program), *map(str, (out, args.threads, rows, args.rounds))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(f"\n{rows} rows of activations, {out} of weights, {args.threads} threads:\n")
            print("| type | | GB/s | products, billions/s | repack, GB/s |\n|---|---|--:|--:|--:|")
            for line in done.stdout.splitlines():
                kind, interleaved, *figures = line.split()
                gb, products, repack = map(float, figures)
                end = f"{repack:.1f}" if interleaved == "1" else ""
                how = "interleaved" if interleaved == "1" else "rows"
                print(f"| {kind} | {how} | {gb:.1f} | {products:.0f} | {end} |")


if __name__ == "__main__":
    main()
