#!/usr/bin/env python3
"""Time a checkpoint in another engine: how fast it starts, reads a prompt and answers.

    PYTHON scripts/benchmarks/bench_engines.py CHECKPOINT transformers
    PYTHON scripts/benchmarks/bench_engines.py CHECKPOINT vllm --threads 2 --rounds 2

PYTHON is that of the environment with the engine; `check_engines` makes build/engines, and SGLang
there wants PYTHONPATH=tests/support/sglang_on_cpu. bfloat16, one sequence, 512 random tokens, then
32 after 16. Memory is what the processes hold at the most, the file's own pages included where an
engine maps it. Quiet machine, please.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# (tokens, how many to answer) -> nothing; the time is taken around it.
Ask = Callable[[list[int], int], None]


def resident() -> int:
    """Bytes resident in this process and those it started."""
    total, parents = 0, {os.getpid()}
    table = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            table.append((int(folder.name), int(fields[1]), int(fields[21])))
        except (OSError, IndexError):  # it ended meanwhile
            continue
    for pid, parent, pages in sorted(table):
        if pid in parents or parent in parents:
            parents.add(pid)
            total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


class Peak(threading.Thread):
    """The most that was resident, looked at five times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.nbytes = 0
        self.start()

    def run(self) -> None:
        while True:
            self.nbytes = max(self.nbytes, resident())
            time.sleep(0.2)


def transformers(checkpoint: str, threads: int) -> tuple[str, Ask]:
    import torch
    import transformers

    import megrez_engines  # noqa: F401

    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="bfloat16").eval()

    def ask(tokens: list[int], answer: int) -> None:
        ids = torch.tensor([tokens])
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=answer,
            min_new_tokens=answer, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    return f"transformers {transformers.__version__}", ask


def vllm(checkpoint: str, threads: int) -> tuple[str, Ask]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    import vllm

    model = vllm.LLM(
        checkpoint, dtype="bfloat16", enforce_eager=True, max_model_len=1024,
        enable_prefix_caching=False,
    )  # fmt: skip

    def ask(tokens: list[int], answer: int) -> None:
        wanted = vllm.SamplingParams(
            max_tokens=answer, min_tokens=answer, temperature=0, ignore_eos=True
        )
        model.generate([{"prompt_token_ids": tokens}], wanted, use_tqdm=False)

    return f"vLLM {vllm.__version__}", ask


def sglang(checkpoint: str, threads: int) -> tuple[str, Ask]:
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")
    import sglang

    model = sglang.Engine(
        model_path=checkpoint, device="cpu", attention_backend="torch_native", dtype="bfloat16",
        mem_fraction_static=0.95, max_total_tokens=2048, context_length=1024,
        disable_radix_cache=True,
    )  # fmt: skip

    def ask(tokens: list[int], answer: int) -> None:
        wanted = {"max_new_tokens": answer, "temperature": 0, "ignore_eos": True}
        model.generate(input_ids=tokens, sampling_params=wanted)

    return f"SGLang {sglang.__version__}", ask


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint")
    engines: dict[str, Any] = {"transformers": transformers, "vllm": vllm, "sglang": sglang}
    parser.add_argument("engine", choices=engines)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"], os.environ["OMP_NUM_THREADS"] = "1", str(args.threads)
    # Its worker would be another process's child, and not be counted.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

    peak, begun = Peak(), time.monotonic()
    version, ask = engines[args.engine](args.checkpoint, args.threads)
    started = time.monotonic() - begun
    draw = random.Random(0)
    tokens = [draw.randrange(10, 2000) for _ in range(512)]

    def timed(*asked: Any) -> float:
        begun = time.monotonic()
        ask(*asked)
        return time.monotonic() - begun

    prompts, answers = [], []
    for _ in range(args.rounds):
        prompts.append(len(tokens) / timed(tokens, 1))
        one = timed(tokens[:16], 1)
        answers.append(32 / (timed(tokens[:16], 33) - one))
    low, high = min(prompts), max(prompts)
    print(
        f"| {version} | {started:.0f} s | {low:.1f} to {high:.1f} | "
        f"{min(answers):.2f} to {max(answers):.2f} | {peak.nbytes / 2**30:.1f} |",
        flush=True,
    )
    os._exit(0)  # engines take their time to end


if __name__ == "__main__":
    main()
