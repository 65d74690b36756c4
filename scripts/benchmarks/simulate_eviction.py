#!/usr/bin/env python3
"""Hit rates of ways to choose which expert leaves memory, on routing that is made up or recorded.

    simulate_eviction.py                           made-up routing at full size
    simulate_eviction.py MODEL.gguf --text FILE    what MODEL's own routers choose

Compared are, for a share of all experts in memory,
  lru         the least recently used leaves
  lfu         the least often used leaves
  distance    the one whose pool is visited last leaves
  store       the expert store's way: distance and frequency (llama-expert-store.cpp, take, visit)
  best        the one that is used again last leaves: needs to know the future, so it is the limit

Made-up routing: uniform; skewed, where each layer prefers experts of its own (normal noise on their
scores); drifting, where what it prefers changes as the text goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# The published model: ten pools, three layers each.
POOLS, SHARED, EXPERTS, USED = 10, 3, 64, 6
SHARES = (0.15, 0.22, 0.35, 0.5, 0.65, 0.8)
DECAY, WEIGHT = 0.95, 0.5

Routing = NDArray[np.int64]  # [tokens, steps, experts used]


def made_up(kind: str, tokens: int, rng: np.random.Generator, skew: float) -> Routing:
    steps = POOLS * SHARED
    scores = rng.normal(size=(tokens, steps, EXPERTS))
    if kind != "uniform":
        taste = rng.normal(size=(steps, EXPERTS))
        for token in range(tokens):
            if kind == "drifting":
                taste = 0.99 * taste + math.sqrt(1 - 0.99**2) * rng.normal(size=taste.shape)
            scores[token] += skew * taste
    return np.argpartition(scores, -USED, axis=-1)[..., -USED:]


def recorded(model: Path, text: Path, tokens: int) -> tuple[Routing, list[int]]:
    """What `model` chooses for the first `tokens` tokens of `text`, and the pool of each step."""
    from megrez_gguf.format.reader import GGUFFile
    from megrez_llama.engine import Engine

    names = {tensor.name for tensor in GGUFFile.open(model).tensors}
    with Engine(model, tokens) as engine:
        ids = np.asarray(engine.tokenize(text.read_text("utf-8"))[:tokens], np.int32)
        nodes = engine.run(ids, capture=["ffn_moe_topk"]).nodes
    layers = sorted(nodes, key=lambda node: node[1])
    owners = [f"blk.{layer}.ffn_up_exps.weight" in names for _, layer in layers]
    pools = (np.cumsum(owners) - 1).tolist()
    return np.stack([nodes[layer].astype(np.int64) for layer in layers], axis=1), pools


def hit_rate(routing: Routing, pools: list[int], slots: int, policy: str, warmup: int) -> float:
    """Share of experts used, after `warmup` tokens, that were in memory when they were named."""
    n_steps = len(pools)
    n_pools, n_expert = max(pools) + 1, int(routing.max()) + 1
    key = np.arange(n_pools)[:, None] * n_expert + np.arange(n_expert)  # [pool, expert]
    pool_of = np.repeat(np.arange(n_pools), n_expert)
    # until[step][pool]: how far off the pool's next visit is, as a share of all steps
    until = np.ones((n_steps, n_pools))
    for step in range(n_steps):
        for ahead in range(n_steps, 0, -1):
            until[step, pools[(step + ahead) % n_steps]] = ahead / n_steps

    size = n_pools * n_expert
    freq, seen = np.zeros(size), np.zeros(size, bool)
    last, count = np.full(size, -1.0), np.zeros(size)
    here = np.zeros(size, bool)
    following = next_uses(routing, pools, key) if policy == "best" else None

    def value(step: int, time: int) -> NDArray[np.float64]:
        if policy == "lru":
            return last
        if policy == "lfu":
            return count
        distance: NDArray[np.float64] = until[step, pool_of]
        if policy == "distance":
            return np.negative(distance)
        if policy == "best":
            assert following is not None
            soon: NDArray[np.float64] = -following[time].astype(np.float64)
            return soon
        worth: NDArray[np.float64] = WEIGHT * np.log(freq + 0.3) - distance
        return worth

    hits = uses = 0
    held = np.zeros(0, np.int64)
    for token in range(len(routing)):
        for step, pool in enumerate(pools):
            time = token * n_steps + step
            needed = np.unique(key[pool, routing[token, step]])
            missing = needed[~here[needed]]
            if token >= warmup:
                hits += len(needed) - len(missing)
                uses += len(needed)
            leave = here.sum() + len(missing) - slots
            if leave > 0:
                worth = np.where(here, value(step, time), np.inf)
                worth[needed] = worth[held] = np.inf
                here[np.argsort(worth, kind="stable")[:leave]] = False
            here[needed] = True
            last[needed], held = time, needed
            count[needed] += 1
            seen[needed] = True
            if pools[(step + 1) % n_steps] != pool:
                mine = key[pool]
                freq[mine] = DECAY * freq[mine] + seen[mine]
                seen[mine] = False
    return hits / uses


def next_uses(routing: Routing, pools: list[int], key: NDArray[np.int64]) -> NDArray[np.int64]:
    """[time, expert]: when an expert is used next, after that time."""
    times = routing.shape[0] * len(pools)
    table = np.full((times, key.size), times + 1)
    soonest = np.full(key.size, times + 1)
    for time in reversed(range(times)):
        table[time] = soonest
        token, step = divmod(time, len(pools))
        soonest[key[pools[step], routing[token, step]]] = time
    return table


POLICIES = ("lru", "lfu", "distance", "store", "best")


def table(name: str, routing: Routing, pools: list[int], warmup: int) -> Iterator[str]:
    total = (max(pools) + 1) * (int(routing.max()) + 1)
    yield f"{name} routing, {len(routing)} tokens"
    yield "| in memory | " + " | ".join(POLICIES) + " |"
    yield "|--:|" + "--:|" * len(POLICIES)
    for share in SHARES:
        slots = round(share * total)
        rates = [hit_rate(routing, pools, slots, policy, warmup) for policy in POLICIES]
        yield f"| {slots} of {total} | " + " | ".join(f"{rate:.0%}" for rate in rates) + " |"
    yield ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="GGUF file whose routing is recorded")
    parser.add_argument("--text", type=Path, help="UTF-8 text to record it on")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=64, help="tokens that do not count")
    parser.add_argument("--skew", type=float, default=0.7, help="preference over chance")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model:
        if not args.text:
            parser.error("MODEL needs --text")
        routing, pools = recorded(args.model, args.text, args.tokens)
        sys.stdout.writelines(f"{x}\n" for x in table("recorded", routing, pools, args.warmup))
        return 0
    pools = [step // SHARED for step in range(POOLS * SHARED)]
    for kind in ("uniform", "skewed", "drifting"):
        routing = made_up(kind, args.tokens, np.random.default_rng(args.seed), args.skew)
        sys.stdout.writelines(f"{x}\n" for x in table(kind, routing, pools, args.warmup))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
