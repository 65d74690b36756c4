#!/usr/bin/env python3
"""Many clients: our server, the same with an expert store, and upstream's on its nearest relative.

    scripts/benchmarks/bench_server.py MODEL.gguf --stock build/stock/bin/llama-server --store 50

Every client sends one prompt and reads its answer as a stream: all start together. The table says
how fast all answers came, how fast the slowest client's came, its waiting included, and how
long the first token took. Prompts are random tokens; with --shared, all begin with the same ones.

--stock is llama-server of the pinned source without our patches. It serves the model's twin of
bench_decode.py: the same bytes as upstream's architecture glm4moe, with as many bytes read a token.
All servers run at the same time with the same options, and are asked in turn, so that a machine
whose speed drifts slows all of them; ratios are taken round by round. Loopback only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_decode import write_twin

from megrez_gguf.format.reader import GGUFFile
from megrez_llama.server import program
from megrez_parity.provenance import provenance

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.server import HOST, Server, serve, store_options

SEED = 0
Prompt = list[int]


@dataclass(frozen=True, slots=True)
class Stream:
    """One client's answer: seconds from its request to the first token and to the last."""

    first: float
    whole: float


@dataclass(frozen=True, slots=True)
class Round:
    """All clients' answers, tokens a second; and seconds to the first token."""

    total: float
    slowest: float
    first_median: float
    first_worst: float


async def ask(port: int, prompt: Prompt, tokens: int) -> Stream:
    """Raises RuntimeError when the answer is not whole."""
    body = {"prompt": prompt, "n_predict": tokens, "stream": True, "ignore_eos": True}
    data = json.dumps(body | {"temperature": 1, "top_k": 40, "seed": SEED}).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n"
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer, first = b"", 0.0
        while block := await reader.read(1 << 16):
            answer += block
            if not first and b"data: " in answer:
                first = time.perf_counter() - start
        whole = time.perf_counter() - start
    finally:
        writer.close()
    last = answer.rpartition(b"data: ")[2].partition(b"\n")[0]
    if not answer.startswith(b"HTTP/1.1 200") or json.loads(last)["tokens_predicted"] != tokens:
        raise RuntimeError(f"no whole answer: {answer[:300]!r} ... {answer[-300:]!r}")
    return Stream(first, whole)


async def play(port: int, prompts: Sequence[Prompt], tokens: int) -> Round:
    start = time.perf_counter()
    streams = await asyncio.gather(*(ask(port, prompt, tokens) for prompt in prompts))
    seconds = time.perf_counter() - start
    firsts = [stream.first for stream in streams]
    return Round(
        total=len(prompts) * tokens / seconds,
        slowest=tokens / max(stream.whole for stream in streams),
        first_median=statistics.median(firsts),
        first_worst=max(firsts),
    )


def prompts_for(vocab: int, clients: int, args: argparse.Namespace, round: int) -> list[Prompt]:
    """Prompts that no round has had before, but for what they share."""
    shared = np.random.default_rng(SEED).integers(0, vocab, args.shared)
    own = np.random.default_rng([SEED, clients, round])
    rest = args.prompt - args.shared
    return [[*shared.tolist(), *own.integers(0, vocab, rest).tolist()] for _ in range(clients)]


@contextlib.contextmanager
def contenders(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Server]]:
    """Servers by name; the first is ours."""
    room = (args.prompt + args.tokens + 32) * args.slots
    options = ["--parallel", str(args.slots), "--ctx-size", str(room), "--no-ui"]
    options += ["--threads", str(args.threads), "--threads-http", str(max(args.clients) + 4)]
    commands = {"ours": [args.server, "--model", args.model]}
    if args.store:
        name = f"ours, {args.store}% of the experts"
        store = store_options(args.model, args.store / 100)
        commands[name] = [args.server, "--model", args.model, *store]
    if args.stock:
        twin = folder / "twin.gguf"
        write_twin(args.model, twin)
        commands["upstream, glm4moe"] = [args.stock, "--model", twin]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(serve([*command, *options], folder / f"{number}.log"))
            for number, (name, command) in enumerate(commands.items())
        }


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a megrez-moe GGUF of any type")
    parser.add_argument("--server", type=Path, default=program(), help="ours [the installed]")
    parser.add_argument("--stock", type=Path, help="upstream's llama-server, without our patches")
    parser.add_argument("--store", type=int, metavar="PERCENT", help="also ours, with a store")
    parser.add_argument("--clients", type=numbers, default=[1, 4, 16, 64])
    parser.add_argument("--slots", type=int, default=16, help="answers at a time; others wait")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--shared", type=int, default=0, help="tokens all prompts begin with")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    if args.shared >= args.prompt:
        parser.error("--shared must leave a token of each prompt's own")

    values = GGUFFile.open(args.model).values
    vocab = len(values["tokenizer.ggml.tokens"])
    print("| clients | server | tok/s | to upstream | slowest client | first token | worst |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    with (
        tempfile.TemporaryDirectory(dir=args.model.resolve().parent) as folder,
        contenders(args, Path(folder)) as servers,
    ):
        for server in servers.values():  # warm: pages, threads
            asyncio.run(play(server.port, prompts_for(vocab, 1, args, args.repeats), args.tokens))
        for clients in args.clients:
            rounds: dict[str, list[Round]] = {name: [] for name in servers}
            for repeat in range(args.repeats):
                prompts = prompts_for(vocab, clients, args, repeat)
                for name in list(servers)[:: 1 if repeat % 2 else -1]:
                    played = play(servers[name].port, prompts, args.tokens)
                    rounds[name].append(asyncio.run(played))
            report(clients, rounds)
    print(setting(args))
    return 0


def report(clients: int, rounds: dict[str, list[Round]]) -> None:
    *_, last = rounds
    for name, own in rounds.items():
        ratio = ""
        if last.startswith("upstream"):
            ratios = [a.total / b.total for a, b in zip(own, rounds[last], strict=True)]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        total, slowest, first, worst = (
            statistics.median(getattr(round, field) for round in own)
            for field in ("total", "slowest", "first_median", "first_worst")
        )
        print(
            f"| {clients} | {name} | {total:.1f} | {ratio} | {slowest:.2f} | {first:.2f} s "
            f"| {worst:.2f} s |",
            flush=True,
        )


def setting(args: argparse.Namespace) -> str:
    facts = provenance("", "")
    where = [f"{name} {facts[name]}" for name in ("commit", "llama_cpp", "machine")]
    return (
        f"\nPrompts of {args.prompt} tokens, {args.shared} of them shared, and answers of "
        f"{args.tokens}; {args.slots} slots, {args.threads} threads, seed {SEED}, medians of "
        f"{args.repeats} rounds; {args.model.name}, {args.model.stat().st_size >> 20} MiB; "
        + ", ".join(where)
    )


if __name__ == "__main__":
    raise SystemExit(main())
