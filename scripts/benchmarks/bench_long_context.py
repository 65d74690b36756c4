#!/usr/bin/env python3
"""What a long context costs, and what a quantized cache loses in it, by depth.

    scripts/benchmarks/bench_long_context.py f32.gguf q4.gguf --text novel.txt --tokens 32768
    scripts/benchmarks/bench_long_context.py q4.gguf --text novel.txt --caches f16,q8_0 --bins 4096

One text is read from its start, once for each file and each type of KV cache. All are compared with
the first of them: KLD in nats, at `--samples` positions a bin; bits a token are those of every
position. A needle stands where each bin begins: a name and its number. At the end of the text the
number is asked for: so many bits less than one that stands nowhere, for each of its digits.
A quantized cache needs flash attention; f16+fa is F16 with it, to tell the two apart. A model that
was trained on shorter texts shows what the arithmetic does, no more.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from megrez_llama.engine import Engine
from megrez_llama.patched import require_patched
from support.llama import Context, Model

C = require_patched()
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_1": 7, "q4_0": 2}
BATCH = 512
NAMES = ("Adam", "Noah", "Moses", "David", "Sarah", "Ruth", "Peter", "Mary", "Joseph", "Esther")
NOWHERE = "Simon"
SEED = 1
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Needle:
    """`told` stands in the text; after `asked` the likeliest tokens should be `number`."""

    told: list[int]
    asked: list[int]
    number: list[int]


def needles(engine: Engine, count: int) -> list[Needle]:
    """So many, and one more that is asked for and told nowhere."""
    draw = random.Random(SEED)
    found = []
    for name in (*NAMES[:count], NOWHERE):
        begin, number = f"\nThe number of {name} is", "".join(draw.choices("123456789", k=6))
        asked, told = (engine.tokenize(t).tolist() for t in (begin, f"{begin} {number}.\n"))
        digits = engine.tokenize(f" {number}").tolist()
        found.append(Needle(told, asked, digits))
    return found


def log_softmax(logits: Rows) -> NDArray[np.float64]:
    wide = logits.astype(np.float64) - float(logits.max())
    wide -= math.log(float(np.exp(wide).sum()))
    return wide


def ask(context: Context, end: int, needle: Needle) -> float:
    """Bits a token of the number, asked for at position `end`; leaves the cache as it was."""
    tokens = [*needle.asked, *needle.number]
    first = len(needle.asked) - 1
    rows = context.rows((t, end + i, (0,), i >= first) for i, t in enumerate(tokens[:-1]))
    C.llama_memory_seq_rm(context.memory, 0, end, -1)
    bits = 0.0
    for at, logits in rows.items():
        bits -= float(log_softmax(logits)[tokens[at + 1]]) / math.log(2)
    return bits / len(needle.number)


@dataclass
class Bin:
    """Positions from `begin` on: what they cost, and what they lost."""

    begin: int
    end: int
    seconds: float = 0.0
    nll: float = 0.0
    kld: float = math.nan
    needle: float = math.nan


def read(
    path: Path,
    tokens: list[int],
    cache: str,
    edges: list[int],
    threads: int,
    samples: int,
    hidden: list[Needle],
) -> tuple[list[Bin], dict[int, Rows], int]:
    """Bins, log-probabilities `[V]` at the sampled positions, and the cache's bytes."""
    name, _, flash = cache.partition("+")
    quantized = name not in ("f32", "f16")
    params = {
        "n_ctx": len(tokens) + BATCH,
        "n_batch": BATCH,
        "n_ubatch": BATCH,
        "n_threads": threads,
        "n_threads_batch": threads,
        "type_k": TYPES[name],
        "type_v": TYPES[name],
        "flash_attn_type": C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if quantized or flash
        else C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }
    bins = [Bin(a, b) for a, b in pairwise(edges)]
    kept: dict[int, Rows] = {}
    with Model(path) as model, Context(model, **params) as context:
        for one in bins:
            wanted = set(np.linspace(one.begin, one.end - 2, samples, dtype=int).tolist())
            for at in range(one.begin, one.end, BATCH):
                part = tokens[at : min(at + BATCH, one.end)]
                begun = time.perf_counter()
                rows = context.rows((t, at + i, (0,), True) for i, t in enumerate(part))
                one.seconds += time.perf_counter() - begun
                for i, logits in rows.items():
                    wide = log_softmax(logits)
                    if at + i + 1 < len(tokens):
                        one.nll -= float(wide[tokens[at + i + 1]])
                    if at + i in wanted:
                        kept[at + i] = wide.astype(np.float32)
        *inside, outside = hidden
        nowhere = ask(context, len(tokens), outside)
        for one, needle in zip(bins, inside, strict=True):
            one.needle = nowhere - ask(context, len(tokens), needle)
        head = int(C.llama_model_n_embd(model.handle) / C.llama_model_n_head(model.handle))
        width = head * C.llama_model_n_head_kv(model.handle)
        blocks = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32, "q5_1": 24 / 32, "q4_0": 18 / 32}
        size = 2 * len(tokens) * C.llama_model_n_layer(model.handle) * width * blocks[name]
    return bins, kept, int(size)


def compare(bins: list[Bin], kept: dict[int, Rows], reference: dict[int, Rows]) -> None:
    for one in bins:
        at = [position for position in kept if one.begin <= position < one.end]
        klds = []
        for position in at:
            want, got = (x[position].astype(np.float64) for x in (reference, kept))
            klds.append(float((np.exp(want) * (want - got)).sum()))
        one.kld = float(np.mean(klds))


def edges(tokens: int, smallest: int) -> Iterator[int]:
    """0, then doubling from `smallest`, to `tokens`."""
    yield 0
    at = smallest
    while at < tokens:
        yield at
        at *= 2
    yield tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--bins", type=int, default=1024, help="end of the first; others double")
    parser.add_argument("--caches", default="f32,f16,f16+fa,q8_0,q5_1,q4_0")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    with Engine(args.files[0], 8) as engine:
        ids = engine.tokenize(args.text.read_text("utf-8")).tolist()
        bounds = list(edges(args.tokens, args.bins))
        hidden = needles(engine, len(bounds) - 1)
    if len(ids) < args.tokens:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, and {args.tokens} are asked for")
    tokens = ids[: args.tokens]
    for at, needle in zip(bounds, hidden[:-1], strict=False):
        tokens[at : at + len(needle.told)] = needle.told
    spans = " | ".join(f"{a // 1024}k-{b // 1024}k" for a, b in pairwise(bounds))
    print(f"| file | cache | MiB | figure | {spans} |")
    print(f"|---|---|--:|---|{'--:|' * (len(bounds) - 1)}")
    reference: dict[int, Rows] | None = None
    for path in args.files:
        for cache in args.caches.split(","):
            bins, kept, size = read(path, tokens, cache, bounds, args.threads, args.samples, hidden)
            reference = reference if reference is not None else kept
            compare(bins, kept, reference)
            head = f"| {path.stem} | {cache} | {size / 2**20:.1f} |"
            for name, cells in {
                "tok/s": [f"{(b.end - b.begin) / b.seconds:.0f}" for b in bins],
                "bits a token": [f"{b.nll / (b.end - b.begin) / math.log(2):.4f}" for b in bins],
                "KLD": [f"{b.kld:.2e}" for b in bins],
                "needle, bits": [f"{b.needle:+.2f}" for b in bins],
            }.items():
                print(f"{head} {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
