#!/usr/bin/env python3
"""Time conversion of a large checkpoint: ours, cp, and upstream's converter with llama-quantize.

    scripts/make_checkpoint.py CKPT --size full
    scripts/benchmarks/bench_convert.py CKPT --work FOLDER --levels bf16,q4_0,q4_k_m --repeats 2

Upstream's programs are built from the same patched tree into build/native. Every run is a process
of its own that begins with an empty page cache (as root; --warm leaves the cache alone) and ends
with what it wrote on disk; the order of a pair alternates. Files are compared tensor for tensor,
then removed: FOLDER needs room for two copies of the checkpoint. Figures are one Markdown table;
ratios are of the same repeat, their median.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.format.reader import GGUFFile
from megrez_parity.provenance import provenance

REPO = Path(__file__).resolve().parents[2]
NATIVE = REPO / "build" / "native"


@dataclass(frozen=True, slots=True)
class Run:
    """One process: wall seconds until everything is on disk, peak RSS and disk traffic in bytes."""

    seconds: float
    rss: int
    read: int
    written: int

    def __add__(self, other: Run) -> Run:
        return Run(
            self.seconds + other.seconds,
            max(self.rss, other.rss),
            self.read + other.read,
            self.written + other.written,
        )


def run(command: list[str], env: dict[str, str], cold: bool) -> Run:
    os.sync()
    if cold:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    begin = time.perf_counter()
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    seconds = time.perf_counter() - begin
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{errors.decode('utf-8', 'replace')[-3000:]}")
    # ru_inblock and ru_oublock are in units of 512 bytes.
    return Run(seconds, usage.ru_maxrss * 1024, usage.ru_inblock * 512, usage.ru_oublock * 512)


def differing(one: Path, two: Path) -> int:
    """How many tensors of two files are not the same in type and bytes."""
    a, b = (({t.name: t for t in GGUFFile.open(p).tensors}) for p in (one, two))
    if a.keys() != b.keys():
        sys.exit(f"{one} and {two} do not hold the same tensors")
    count = 0
    for name, x in a.items():
        y = b[name]
        same = (x.dtype, x.shape, x.nbytes) == (y.dtype, y.shape, y.nbytes)
        with x.shard.path.open("rb") as f, y.shard.path.open("rb") as g:
            f.seek(x.begin)
            g.seek(y.begin)
            left = x.nbytes if same else 0
            while left:
                step = min(left, 16 << 20)
                if f.read(step) != g.read(step):
                    same = False
                    break
                left -= step
        count += not same
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files written")
    parser.add_argument("--levels", default="bf16,q4_0,q4_k_m")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--warm", action="store_true")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    build = [sys.executable, str(REPO / "scripts/development/build_native"), "llama-quantize"]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    llama = NATIVE / "source" / "vendor" / "llama.cpp"
    env = os.environ | {"PYTHONPATH": str(llama / "gguf-py"), "HF_HUB_OFFLINE": "1"}
    ours, theirs, middle = (args.work / f"{n}.gguf" for n in ("ours", "theirs", "middle"))
    copy = args.work / "copy"
    cold = not args.warm

    def us(level: str) -> Run:
        program = str(Path(sys.executable).with_name("megrez-gguf"))
        command = [program, "convert", str(args.checkpoint), "--outtype", level, "-o", str(ours)]
        return run([*command, "--force"], dict(os.environ), cold)

    def cp(level: str) -> Run:
        copy.mkdir()
        shards = sorted(map(str, args.checkpoint.glob("*.safetensors")))
        done = run(["cp", *shards, str(copy)], dict(os.environ), cold)
        shutil.rmtree(copy)
        return done

    def upstream(level: str) -> Run:
        script = [sys.executable, str(llama / "convert_hf_to_gguf.py"), str(args.checkpoint)]
        to = theirs if level == "bf16" else middle
        done = run([*script, "--outtype", "bf16", "--outfile", str(to)], env, cold)
        if level != "bf16":
            command = [str(NATIVE / "bin" / "llama-quantize"), str(middle), str(theirs), level]
            done += run([*command, str(os.cpu_count())], env, cold)
            middle.unlink()
        return done

    rows = []
    for level in args.levels.split(","):
        others: dict[str, Callable[[str], Run]] = {"upstream": upstream}
        if level == "bf16":
            others = {"cp": cp} | others
        found: dict[str, list[Run]] = {name: [] for name in ("ours", *others)}
        for repeat in range(args.repeats):
            order = ["ours", *others][:: 1 if repeat % 2 == 0 else -1]
            for name in order:
                found[name].append((us if name == "ours" else others[name])(level))
                print(level, name, found[name][-1], file=sys.stderr, flush=True)
        unequal = differing(ours, theirs)
        for path in (ours, theirs):
            path.unlink()
        for name, runs in found.items():
            ratio = statistics.median(
                a.seconds / b.seconds for a, b in zip(runs, found["ours"], strict=True)
            )
            figures = [statistics.median(getattr(r, f) for r in runs) for f in Run.__slots__]
            seconds, rss, read, written = figures
            same = {"upstream": f"{unequal} differ", "ours": "", "cp": ""}[name]
            rows.append(
                f"| {level} | {name} | {seconds:.1f} | {ratio:.2f} | {rss / 2**20:.0f} | "
                f"{read / 2**30:.2f} | {written / 2**30:.2f} | {same} |"
            )
    print(
        "| level | who | s | ratio to ours | peak RSS, MiB | read, GiB | written, GiB | tensors |"
    )
    print("|---|---|--:|--:|--:|--:|--:|---|")
    print("\n".join(rows))
    facts = provenance("", "")
    named = ("commit", "llama_cpp", "numpy", "python", "machine")
    print(f"\n{args.repeats} repeats, {'cold' if cold else 'warm'} cache; ", end="")
    print(", ".join(f"{name} {facts[name]}" for name in named if name in facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
