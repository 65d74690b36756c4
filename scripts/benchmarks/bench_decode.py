#!/usr/bin/env python3
"""Decode and prefill speed of Megrez2 against upstream's nearest shape-alike, in one run.

    scripts/benchmarks/bench_decode.py MODEL-Q4_0.gguf [--threads 2] [--repeats 5] [--json]

The twin is upstream's glm4moe (sigmoid routing with a selection bias, one dense layer, shared
experts), made from the same file with the same bytes: every tensor is copied, and a pool that three
layers share is written once for each of them, as that architecture needs. Both read the same bytes
a token. The two run in turn, so that a machine whose speed drifts slows both; the ratio is taken
pair by pair and its median reported.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np

OURS, TWIN = "megrez-moe", "glm4moe"
DROPPED = {f"{OURS}.experts_shared_frequency", f"{OURS}.pre_gate"}


def write_twin(source: Path, target: Path, *, biases: bool = False) -> None:
    """The GGUF `source` as a `glm4moe` model, each layer with a copy of the pool it shares.

    `biases` adds those of attention, all 0, which other programs ask for.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, TWIN)
    period = int(reader.fields[f"{OURS}.experts_shared_frequency"].contents())
    lead = int(reader.fields[f"{OURS}.leading_dense_block_count"].contents())
    layers = int(reader.fields[f"{OURS}.block_count"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in DROPPED or key == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(
            key.replace(OURS, TWIN, 1), field.contents(), field.types[0], sub_type=inner
        )
    for tensor in reader.tensors:
        name = tensor.name.replace("ffn_norm", "post_attention_norm")
        names = [name]
        if "_exps." in name:
            first = int(name.split(".")[1])
            users = range(first, min(first + period, layers)) if first >= lead else [first]
            names = [name.replace(f"blk.{first}.", f"blk.{user}.", 1) for user in users]
        for each in names:
            writer.add_tensor(each, tensor.data, raw_dtype=tensor.tensor_type)
            if biases and each.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight")):
                zeros = np.zeros(int(tensor.shape[1]), np.float32)
                writer.add_tensor(each.replace(".weight", ".bias"), zeros)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A loaded model and context; `prefill` and `decode` return tokens per second."""

    def __init__(self, llama: Any, path: Path, threads: int, prompt: int, answer: int) -> None:
        self.llama = llama
        self.model = llama.llama_model_load_from_file(
            os.fsencode(path), llama.llama_model_default_params()
        )
        if not self.model:
            raise SystemExit(f"error: {path} cannot be loaded")
        params = llama.llama_context_default_params()
        params.n_ctx = max(prompt, answer) + 64
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, params)
        vocab = llama.llama_model_get_vocab(self.model)
        self.vocab_size = llama.llama_vocab_n_tokens(vocab)

    def _decode(self, tokens: list[int]) -> None:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.llama.llama_decode(self.context, self.llama.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("error: llama_decode failed")
        self.llama.llama_synchronize(self.context)

    def run(self, tokens: list[int], batch: int) -> float:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        start = time.perf_counter()
        for at in range(0, len(tokens), batch):
            self._decode(tokens[at : at + batch])
        return len(tokens) / (time.perf_counter() - start)


def summary(ours: list[float], twin: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, twin, strict=True)]
    return {
        OURS: statistics.median(ours),
        TWIN: statistics.median(twin),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a megrez-moe GGUF of any type")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prefill run")
    parser.add_argument("--answer", type=int, default=48, help="tokens of a decode run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    import llama_cpp as llama

    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory(dir=args.model.resolve().parent) as folder:
        twin_path = Path(folder, "twin.gguf")
        write_twin(args.model, twin_path)
        models = [
            Model(llama, path, args.threads, args.prompt, args.answer)
            for path in (args.model, twin_path)
        ]
    seed = 0
    tokens = np.random.default_rng(seed).integers(0, models[0].vocab_size, 512).tolist()
    result: dict[str, Any] = {}
    for name, count, batch in (("prefill", args.prompt, 512), ("decode", args.answer, 1)):
        for model in models:
            model.run(tokens[:count], batch)  # warm: pages, threads, graph
        speeds: list[list[float]] = [[], []]
        for repeat in range(args.repeats):
            for which in (0, 1) if repeat % 2 else (1, 0):  # neither is always first
                speeds[which].append(models[which].run(tokens[:count], batch))
        result[name] = summary(*speeds)
    result["setting"] = {
        "llama_cpp": llama.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "file": args.model.name,
        "file_mib": round(args.model.stat().st_size / 2**20),
        "threads": args.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "tokens": {"prefill": args.prompt, "decode": args.answer},
        "repeats": args.repeats,
        "seed": seed,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return 0
    print(f"{'tok/s':10}{OURS:>12}{TWIN:>12}{'ratio':>9}   (lowest to highest)")
    for name in ("prefill", "decode"):
        r = result[name]
        span = f"({r['ratio_min']:.3f} to {r['ratio_max']:.3f})"
        print(f"{name:10}{r[OURS]:12.2f}{r[TWIN]:12.2f}{r['ratio']:9.3f}   {span}")
    print(json.dumps(result["setting"]), file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
