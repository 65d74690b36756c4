#!/usr/bin/env python3
"""Decode and prefill when a model does not fit: the expert store against stock mmap.

    scripts/benchmarks/bench_expert_store.py MODEL-Q4_0.gguf [--work FOLDER] [--out results.json]

Each run is a process in a memory cgroup, page cache counted, that starts cold. Its limit is a share
of the file's size. Compared are
  store       megrez-gguf's loader with --ram at the limit
  mmap        llama.cpp's own mapping of the file, with this machine's readahead
  mmap 128K   the same with 128 KiB of readahead, which suits random access better
(mapped weights cannot be repacked, as the copies would not fit), and two rooflines: the same model
all in memory, and the disk: its bandwidth over the bytes a token misses. The former is run again
next to every run of the store; the bandwidth is measured between blocks of tokens, by as many
threads reading as much at a time as the store does: both change while one looks. Where all
is in memory, the store is compared with the same library without it, block by block in one process.
"Stolen" is processor time that a virtual machine's host took, to move what is read among others.

Two routings: that of the file, and, with --skewed, one in which some experts are used much more
than others (noise on the selection bias, in a copy of the file).

Needs root: a writable memory controller of cgroup version 1, and control of caches and readahead.
Quiet machine, please. --plot draws a results file (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

CGROUP = Path("/sys/fs/cgroup/memory/megrez-bench")
LIMITS = (100, 75, 60, 50, 40)
STOCK = (("mmap", None), ("mmap 128K", 128))
PROMPT = 512
SEED = 0
MIB = 1 << 20


# -- in the process that is measured -----------------------------------------------------------


def run_store(args: argparse.Namespace) -> dict[str, Any]:
    """One run of megrez-gguf's loader; `ram` 0 is all in memory.

    Tokens are decoded in blocks, with direct reads between them that tell what the disk gives then:
    it changes from one second to the next.
    """
    from megrez_gguf.machine import resident_memory
    from megrez_llama.expert_store import expert_stats
    from megrez_runtime import load

    options: dict[str, Any] = {"ram": args.ram or "off"}
    if args.io_threads:
        options["kv_overrides"] = {"megrez-moe.expert_cache.threads": args.io_threads}
    context = max(args.prompt, args.warmup + args.tokens) + 1
    llm = load(args.model, n_ctx=context, n_threads=args.threads, **options)
    ids = tokens_for(llm.n_vocab(), context)
    for token in ids[: 0 if args.prompt else args.warmup]:
        llm.eval([token])

    first = expert_stats(llm)
    stolen = 0.0
    seconds, disk = 0.0, Disk(args.model, args.piece, args.readers)
    size = args.prompt or args.block
    ids = ids[args.warmup :][: args.tokens] if not args.prompt else ids[: args.prompt]
    for begin in range(0, len(ids), size):
        if args.piece:
            disk.probe()
        before, start = stolen_seconds(), time.perf_counter()
        if args.prompt:
            llm.eval(ids)
        else:
            for token in ids[begin : begin + size]:
                llm.eval([token])
        seconds += time.perf_counter() - start
        stolen += stolen_seconds() - before
    row: dict[str, Any] = {
        "rate": len(ids) / seconds,
        "disk": disk.rate,
        "stolen": stolen / seconds / (os.cpu_count() or 1),
        "resident_mib": (resident_memory() or 0) / MIB,
    }
    last = expert_stats(llm)
    if first and last:
        experts = last.since(first)
        row |= {
            "hit_rate": experts.hit_rate,
            "missed_bytes": experts.bytes_read / len(ids),
            "waiting": experts.wait_us / 1e6 / seconds,
            "wasted": last.wasted,
            "slots": last.slots,
            "experts": last.experts,
        }
    return row


def run_pair(args: argparse.Namespace) -> dict[str, Any]:
    """All experts in memory, with a store and without: ratio of speeds, block by block."""
    from megrez_runtime import load

    context = args.warmup + args.tokens + 1
    models = [
        load(args.model, n_ctx=context, n_threads=args.threads, **options)
        for options in ({"expert_cache": args.ram}, {"ram": "off"})
    ]
    ids = tokens_for(models[0].n_vocab(), context)
    for llm in models:
        for token in ids[: args.warmup]:
            llm.eval([token])
    # Every expert once, so that nothing is left to read.
    models[0].eval(tokens_for(models[0].n_vocab(), 512)[: context - 1 - args.warmup])
    for llm in models:
        llm.reset()
    ratios = []
    for begin in range(0, args.tokens, args.block):
        seconds = []
        for llm in models if begin // args.block % 2 else models[::-1]:
            start = time.perf_counter()
            for token in ids[begin : begin + args.block]:
                llm.eval([token])
            seconds.append(time.perf_counter() - start)
        ours, theirs = seconds if begin // args.block % 2 else seconds[::-1]
        ratios.append(theirs / ours)
    quarters = statistics.quantiles(ratios, n=4)
    return {"ratio": statistics.median(ratios), "quartiles": quarters[::2], "blocks": len(ratios)}


def stolen_seconds() -> float:
    """Seconds of all processors that the machine below this virtual one took for itself."""
    return int(Path("/proc/stat").read_text().split()[8]) / os.sysconf("SC_CLK_TCK")


def run_disk(args: argparse.Namespace) -> dict[str, Any]:
    """What the disk gives to idle processors, and to busy ones: a virtual disk is work for them."""
    result = {}
    for name, count in (("idle", 0), ("busy", os.cpu_count() or 1)):
        spin = [sys.executable, "-c", "while True: pass"]
        busy = [subprocess.Popen(spin) for _ in range(count)]
        disk, before = Disk(args.model, args.piece, args.readers), stolen_seconds()
        disk.probe(2 << 30)
        stolen = stolen_seconds() - before
        result[name] = {"rate": disk.rate, "stolen_per_gb": stolen / disk.bytes * 1e9}
        for process in busy:
            process.kill()
            process.wait()
    return result


def tokens_for(vocab: int, count: int) -> list[int]:
    return list(map(int, np.random.default_rng(SEED).integers(0, vocab, count)))


class Disk:
    """Direct reads of `size` bytes at random places of a file, by `threads` threads."""

    def __init__(self, path: Path, size: int, threads: int) -> None:
        self.size, self.seconds, self.bytes = size // 4096 * 4096, 0.0, 0
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self._last = (os.fstat(self._fd).st_size - self.size) // 4096
        self._rng = random.Random(time.time_ns())
        self._buffers = [mmap.mmap(-1, max(4096, self.size)) for _ in range(threads)]

    def probe(self, total: int = 256 << 20) -> None:
        """Read `total` bytes, and keep count."""
        offsets = iter([self._rng.randrange(self._last) * 4096 for _ in range(total // self.size)])
        lock = threading.Lock()

        def read(block: mmap.mmap) -> None:
            while True:
                with lock:
                    offset = next(offsets, None)
                if offset is None:
                    return
                os.preadv(self._fd, [block], offset)

        workers = [threading.Thread(target=read, args=(block,)) for block in self._buffers]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        self.seconds += time.perf_counter() - start
        self.bytes += total // self.size * self.size

    @property
    def rate(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


def run_stock(args: argparse.Namespace) -> dict[str, Any]:
    """One run of llama.cpp as it is, the file mapped and weights left where they are."""
    import ctypes

    import llama_cpp as llama

    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    params = llama.llama_model_default_params()
    params.use_extra_bufts = False
    model = llama.llama_model_load_from_file(os.fsencode(args.model), params)
    fields = llama.llama_context_default_params()
    fields.n_ctx = max(args.prompt, args.warmup + args.tokens) + 1
    fields.n_threads = fields.n_threads_batch = args.threads
    context = llama.llama_init_from_model(model, fields)
    vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    ids = tokens_for(vocab, fields.n_ctx - 1)

    def decode(tokens: list[int]) -> None:
        array = (ctypes.c_int32 * len(tokens))(*tokens)  # the batch only points to it
        if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
            raise SystemExit("error: llama_decode failed")

    steps = [ids[: args.prompt]] if args.prompt else [[token] for token in ids]
    for step in steps[: -args.tokens] if not args.prompt else ():
        decode(step)
    measured = steps if args.prompt else steps[-args.tokens :]
    start = time.perf_counter()
    for step in measured:
        decode(step)
    return {"rate": sum(map(len, measured)) / (time.perf_counter() - start)}


RUNS = {"store": run_store, "stock": run_stock, "pair": run_pair, "disk": run_disk}


# -- around it ---------------------------------------------------------------------------------


def device_of(path: Path) -> Path:
    """The queue settings of the block device that holds `path`."""
    number = path.stat().st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    queue = device / "queue"
    return queue if queue.is_dir() else device.parent / "queue"


@contextmanager
def readahead(path: Path, kib: int | None) -> Iterator[None]:
    setting = device_of(path) / "read_ahead_kb"
    before = setting.read_text()
    try:
        if kib is not None:
            setting.write_text(str(kib))
        yield
    finally:
        setting.write_text(before)


def measure(kind: str, model: Path, limit: int | None, **options: Any) -> dict[str, Any]:
    """The figures of one cold run of this script as `kind`, within `limit` bytes."""
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("3")
    words = [sys.executable, __file__, str(model), "--run", kind]
    words += [f"--{name}={value}" for name, value in options.items()]
    script = 'exec "$@"'
    if limit is not None:
        (CGROUP / "memory.limit_in_bytes").write_text(str(limit))
        script = f'echo $$ > {CGROUP}/cgroup.procs; exec "$@"'
    done = subprocess.run(["bash", "-c", script, "bash", *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"error: {kind} within {limit} bytes ended with {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def skewed_copy(model: Path, target: Path, sd: float) -> Path:
    """`model` with normal noise of deviation `sd` added to the bias that selects experts."""
    from megrez_gguf.format.reader import GGUFFile

    shutil.copyfile(model, target)
    rng = np.random.default_rng(SEED)
    with target.open("r+b") as file:
        for tensor in GGUFFile.open(target).tensors:
            if tensor.name.endswith("exp_probs_b.bias"):
                file.seek(tensor.begin)
                bias = np.frombuffer(file.read(tensor.nbytes), np.float32)
                file.seek(tensor.begin)
                noise = rng.normal(0, sd, bias.shape)
                file.write((bias + noise).astype(np.float32).tobytes())
    return target


def favourites(model: Path) -> float:
    """Share of routing that goes to the most used quarter of experts, mean over layers."""
    from megrez_llama.engine import Engine

    with Engine(model, 256) as engine:
        ids = np.random.default_rng(SEED).integers(0, engine.vocab_size, 256, dtype=np.int32)
        nodes = engine.run(ids, first=255, capture=["ffn_moe_topk"]).nodes
    shares = []
    for chosen in nodes.values():
        counts = np.sort(np.bincount(chosen.ravel(), minlength=64))[::-1]
        shares.append(counts[: len(counts) // 4].sum() / counts.sum())
    return float(np.mean(shares[:-1]))  # of the last layer only one row is computed


def compare(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All runs for one file."""
    from megrez_gguf.format.reader import GGUFFile
    from megrez_llama.expert_store import CACHE_KEY  # noqa: F401  (fails early where not installed)
    from megrez_runtime.memory import Needs

    needs = Needs.of(GGUFFile.open(model), model)
    common = {"threads": args.threads, "prompt": 0}
    decode = common | {"tokens": args.tokens, "warmup": args.warmup, "readers": args.readers}
    decode |= {"io-threads": args.io_threads, "block": args.block}
    quick = decode | {"warmup": args.block, "tokens": args.memory_tokens}
    slow = common | {"tokens": args.stock_tokens, "warmup": args.stock_tokens // 2}

    def progress(text: str) -> None:
        print(f"{model.name}: {text}", file=sys.stderr, flush=True)

    progress("disk")
    disk = measure("disk", model, None, piece=needs.slot_bytes // 3, readers=args.readers)
    rows = []
    for percent in args.limits:
        limit = model.stat().st_size * percent // 100
        progress(f"{percent}%, {limit / MIB:.0f} MiB")
        runs = []
        for _ in range(args.repeats):
            memory = measure("store", model, None, ram=0, **quick)["rate"]
            run = measure("store", model, limit, ram=limit, piece=needs.slot_bytes // 3, **decode)
            missed = run["missed_bytes"]
            roof = min(memory, run["disk"] / missed) if missed else memory
            runs.append(
                run | {"in_memory": memory, "roofline": roof, "of_roofline": run["rate"] / roof}
            )
        ours = sorted(runs, key=lambda run: run["of_roofline"])[len(runs) // 2]
        stock = {}
        for name, kib in STOCK:
            with readahead(model, kib):
                stock[name] = measure("stock", model, limit, **slow)["rate"]
        progress(f"store {ours['rate']:.2f}, {stock}, {ours['of_roofline']:.0%} of the roofline")
        row = {"percent": percent, "limit_mib": limit / MIB, "store": ours, "runs": runs}
        rows.append(row | stock)
    in_memory = statistics.median(run["in_memory"] for row in rows for run in row["runs"])
    result: dict[str, Any] = {"disk": disk, "in_memory": in_memory, "decode": rows}
    if args.pair:
        progress("all in memory, with a store and without, side by side")
        pair = decode | {"tokens": args.pair * args.block}
        result["pair"] = measure(
            "pair", model, None, ram=needs.n_experts * needs.slot_bytes, **pair
        )
    if args.prefill in args.limits:
        progress(f"prompt of {PROMPT} at {args.prefill}%")
        limit = model.stat().st_size * args.prefill // 100
        whole = {"threads": args.threads, "prompt": PROMPT, "tokens": 1, "warmup": 0}
        prefill: dict[str, Any] = {"percent": args.prefill}
        prefill["in_memory"] = measure("store", model, None, ram=0, **whole)["rate"]
        prefill["store"] = measure("store", model, limit, ram=limit, **whole)
        for name, kib in STOCK:
            with readahead(model, kib):
                prefill[name] = measure("stock", model, limit, **whole)["rate"]
        result["prefill"] = prefill
    return result


def setting(args: argparse.Namespace) -> dict[str, Any]:
    import llama_cpp

    commit = ["git", "rev-parse", "--short", "HEAD"]
    return {
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        "llama_cpp": llama_cpp.__version__,
        "machine": f"{platform.machine()}, {processor()}, {os.cpu_count()} CPUs",
        "read_ahead_kb": int((device_of(args.model) / "read_ahead_kb").read_text()),
        "file_mib": args.model.stat().st_size / MIB,
        "threads": args.threads,
        "io_threads": args.io_threads or "default",
        "tokens": {
            "store": args.tokens,
            "memory": args.memory_tokens,
            "stock": args.stock_tokens,
            "prompt": PROMPT,
        },
        "repeats": args.repeats,
        "seed": SEED,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown processor"


# -- results -----------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    lines = []
    for routing, result in results["routings"].items():
        lines += [
            f"{routing} routing ({result['favourites']:.0%} of it to a quarter of the experts); "
            f"all in memory {result['in_memory']:.2f} tok/s",
            "",
            "| limit | store, tok/s | in memory | mmap | mmap 128K | over mmap | over 128K | hits "
            "| read a token | disk | of roofline | waiting | stolen | wasted |",
            "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["decode"]:
            s, stock, tuned = row["store"], row["mmap"], row["mmap 128K"]
            lines.append(
                f"| {row['percent']}%, {row['limit_mib']:.0f} MiB | {s['rate']:.2f} "
                f"| {s['in_memory']:.2f} | {stock:.2f} | {tuned:.2f} "
                f"| {s['rate'] / stock:.1f} | {s['rate'] / tuned:.1f} "
                f"| {s['hit_rate']:.0%} | {s['missed_bytes'] / MIB:.0f} MiB "
                f"| {s['disk'] / 1e9:.2f} GB/s | {s['of_roofline']:.0%} "
                f"| {s['waiting']:.0%} | {s['stolen']:.0%} | {s['wasted']} |"
            )
        lines.append("")
        idle, busy = result["disk"]["idle"], result["disk"]["busy"]
        lines += [
            f"The disk: {idle['rate'] / 1e9:.2f} GB/s; while all processors compute "
            f"{busy['rate'] / 1e9:.2f} GB/s, and {busy['stolen_per_gb']:.2f} s stolen a GB.",
            "",
        ]
        if pair := result.get("pair"):
            low, high = pair["quartiles"]
            lines += [
                f"Everything in memory, store over none: {pair['ratio']:.3f} (quartiles {low:.3f} "
                f"and {high:.3f} of {pair['blocks']} pairs of blocks).",
                "",
            ]
        if prefill := result.get("prefill"):
            s = prefill["store"]["rate"]
            lines += [
                f"Prompt of {PROMPT} tokens at {prefill['percent']}%: store {s:.1f} tok/s, mmap "
                f"{prefill['mmap']:.1f} ({s / prefill['mmap']:.1f}), mmap 128K "
                f"{prefill['mmap 128K']:.1f} ({s / prefill['mmap 128K']:.1f}), all in memory "
                f"{prefill['in_memory']:.1f}.",
                "",
            ]
    return "\n".join(lines)


def plot(results: dict[str, Any], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "megrez", "font.family": "sans-serif"}
    import matplotlib.pyplot as plt

    routings = results["routings"]
    top = max(row["store"]["roofline"] for r in routings.values() for row in r["decode"])
    figure, axes = plt.subplots(1, len(routings), figsize=(5 * len(routings), 3.6), sharey=True)
    for axis, (name, result) in zip(np.atleast_1d(axes), routings.items(), strict=True):
        x = [row["percent"] for row in result["decode"]]
        axis.plot(x, [r["store"]["roofline"] for r in result["decode"]], "k:", label="roofline")
        axis.axhline(result["in_memory"], color="0.7", linewidth=1, label="all in memory")
        axis.plot(x, [r["store"]["rate"] for r in result["decode"]], "o-", label="expert store")
        for label, marker in (("mmap 128K", "s-"), ("mmap", "^-")):
            axis.plot(x, [r[label] for r in result["decode"]], marker, label=label)
        axis.set_title(f"{name} routing", fontsize=10)
        axis.set_xlabel("memory of the process, % of the file")
        axis.grid(alpha=0.3)
        axis.set_ylim(0, 1.05 * top)
    np.atleast_1d(axes)[0].set_ylabel("tokens a second")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(out, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="GGUF file, or with --plot a results file")
    parser.add_argument("--work", type=Path, help="folder for the skewed copy [the model's own]")
    parser.add_argument("--out", type=Path, default=Path("expert_store.json"))
    parser.add_argument("--plot", type=Path, help="draw the results in MODEL into this SVG file")
    parser.add_argument("--limits", type=lambda t: [int(x) for x in t.split(",")], default=LIMITS)
    parser.add_argument("--skewed", action="store_true", help="a second file, with skewed routing")
    parser.add_argument("--skew", type=float, default=0.2, help="deviation of the noise")
    parser.add_argument("--prefill", type=int, default=50, help="limit of the prompt's run, in %%")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=32)
    parser.add_argument("--memory-tokens", type=int, default=32)
    parser.add_argument("--stock-tokens", type=int, default=16)
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        help="of the store and of all in memory, by turns; the median share of the roofline counts",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--readers", type=int, default=4, help="threads that measure the disk")
    parser.add_argument("--io-threads", type=int, default=0, help="of the store [its own choice]")
    parser.add_argument("--block", type=int, default=8, help="tokens between looks at the disk")
    parser.add_argument("--pair", type=int, default=24, help="pairs of blocks, all in memory")
    parser.add_argument("--run", choices=tuple(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--piece", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ram", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--prompt", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(RUNS[args.run](args)))
        return 0
    if args.plot:
        plot(json.loads(args.model.read_text()), args.plot)
        return 0
    try:
        CGROUP.mkdir(exist_ok=True)
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as e:
        print(f"error: memory cannot be limited and caches not dropped: {e}", file=sys.stderr)
        return 2
    files = {"random": args.model}
    if args.skewed:
        folder = args.work or args.model.parent
        files["skewed"] = skewed_copy(args.model, folder / f"skewed-{args.model.name}", args.skew)
    results: dict[str, Any] = {"setting": setting(args), "routings": {}}
    try:
        for routing, model in files.items():
            share = favourites(model)
            results["routings"][routing] = compare(model, args) | {"favourites": share}
    finally:
        for model in set(files.values()) - {args.model}:
            model.unlink(missing_ok=True)
        CGROUP.rmdir()
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    print(json.dumps(results["setting"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
