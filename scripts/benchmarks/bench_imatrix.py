#!/usr/bin/env python3
"""Time the collection of an importance matrix: ours against llama-imatrix, on the same file.

    scripts/benchmarks/bench_imatrix.py MODEL-q8_0.gguf --text novel.txt --chunks 8 --repeats 3

llama-imatrix is built from the same patched tree into build/native. Both read the same chunks,
with the same number of threads on the same CPUs, both with a float32 KV cache and without flash
attention, as ours always does, so that the same experts run. Every run is a process of its own,
from a warm page cache; the order alternates. Seconds are those of the whole process, loading
included, so give it enough chunks. Figures are one Markdown table; ratios are of the same repeat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megrez_gguf.machine import available_cpus
from megrez_gguf.quantization.imatrix import Imatrix, load
from megrez_parity.provenance import provenance, sha256

REPO = Path(__file__).resolve().parents[2]
NATIVE = REPO / "build" / "native" / "bin" / "llama-imatrix"
OURS, THEIRS = "megrez-gguf imatrix", "llama-imatrix"


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall and processor seconds, and peak RSS in bytes."""

    seconds: float
    cpu: float
    rss: int


def run(command: list[str], cpus: list[int]) -> Run:
    def pin() -> None:  # ours takes as many threads as it has CPUs
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cpus)

    begin = time.perf_counter()
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(command, stdout=said, stderr=said, preexec_fn=pin) as process,
    ):
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            sys.exit(f"{command[0]} failed:\n{said.read().decode('utf-8', 'replace')[-3000:]}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def difference(ours: Imatrix, theirs: Imatrix) -> tuple[int, float]:
    """How many matrices have other counts, and the largest relative difference of means."""
    if ours.sums.keys() != theirs.sums.keys():
        sys.exit(f"not of the same matrices: {sorted(ours.sums.keys() ^ theirs.sums.keys())}")
    counts, largest = 0, 0.0
    for name, means in theirs.means.items():
        counts += not np.array_equal(ours.counts[name], theirs.counts[name])
        apart = np.abs(ours.means[name].astype(np.float64) - means)
        largest = max(largest, float((apart / np.maximum(means, np.finfo(np.float32).tiny)).max()))
    return counts, largest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=4, metavar="N")
    parser.add_argument("--ctx", type=int, default=512, metavar="N", help="tokens a chunk")
    parser.add_argument("--threads", type=int, default=available_cpus(), metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    args = parser.parse_args()
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 0 < args.threads <= available_cpus():
        parser.error(f"--threads {args.threads}: this machine lets us use {available_cpus()} CPUs")
    cpus = allowed[: args.threads]
    build = [sys.executable, str(REPO / "scripts/development/build_native"), NATIVE.name]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder, f"{name.split('-')[0]}.gguf") for name in (OURS, THEIRS)}

        def collect(who: str, chunks: int) -> Run:
            size, out = str(args.ctx), str(files[who])
            if who == OURS:
                command = [str(Path(sys.executable).with_name("megrez-gguf")), "imatrix"]
                command += [str(args.model), str(args.text), "--ctx", size, "--force"]
            else:
                command = [str(NATIVE), "-m", str(args.model), "-f", str(args.text), "--no-ppl"]
                command += ["-c", size, "-b", size, "-ub", size, "-t", str(args.threads)]
                command += ["-ngl", "0", "-ctk", "f32", "-ctv", "f32", "-fa", "off"]
            return run([*command, "--chunks", str(chunks), "-o", out], cpus)

        for who in files:  # the page cache, and that both work at all
            collect(who, 1)
        found: dict[str, list[Run]] = {who: [] for who in files}
        for repeat in range(args.repeats):
            for who in [*files][:: 1 if repeat % 2 == 0 else -1]:
                found[who].append(collect(who, args.chunks))
                print(who, found[who][-1], file=sys.stderr, flush=True)
        ours, theirs = (load(path) for path in files.values())
    tokens = ours.chunk_count * ours.chunk_size
    counts, largest = difference(ours, theirs)
    print(
        "| who | s | CPU s | tokens/s | ratio to ours | peak RSS, MiB | counts that differ "
        "| largest relative difference of means |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for who, runs in found.items():
        ratios = [a.seconds / b.seconds for a, b in zip(runs, found[OURS], strict=True)]
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        seconds, cpu, rss = (statistics.median(getattr(r, f) for r in runs) for f in Run.__slots__)
        last = f"{counts} of {len(ours.sums)} | {largest:.1e}" if who == THEIRS else "|"
        print(
            f"| {who} | {seconds:.2f} | {cpu:.2f} | {tokens / seconds:.1f} | "
            f"{ratio if who == THEIRS else 1} | {rss / 2**20:.0f} | {last} |"
        )
    facts = provenance("", "")
    named = ("commit", "llama_cpp", "numpy", "python", "machine")
    print(
        f"\n{args.repeats} repeats of {ours.chunk_count} chunks of {ours.chunk_size} tokens, "
        f"{args.threads} threads; {args.model.name}, {args.model.stat().st_size / 2**20:.0f} MiB, "
        f"sha256 {sha256([args.model])[0][:12]}; text sha256 {sha256([args.text])[0][:12]}; ",
        end="",
    )
    print(", ".join(f"{name} {facts[name]}" for name in named if name in facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
