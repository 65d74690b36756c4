"""Small models for a fuzzer to start from: every kind of tensor and key, in a few kilobytes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import megrez_gguf
from megrez_gguf.conversion.metadata import HASHES
from megrez_gguf.format.key_check import RULES
from megrez_gguf.format.vocabulary_check import DECIDING
from support.configurations import TINY
from support.gguf_edit import ARRAY, BOOL, F32, I32, STRING, U32, Gguf, floats
from support.random_checkpoint import make_checkpoint

LEAST = TINY | {
    "experts_shared_frequency": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "n_shared_experts": 1,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "vocab_size": 300,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "least": {},
    "groups": {
        "attention_bias": True,
        "n_group": 2,
        "n_routed_experts": 8,
        "topk_group": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
    "own output": {"pre_gate": False, "tie_word_embeddings": False, "scoring_func": "softmax"},
}
UNUSUAL = ("megrez-moe.rope.scaling.type", "megrez-moe.attention.causal")
"""Keys whose usual value is to be left out."""
WORDS = 24
"""Tokens of the models with a short vocabulary: a mutation then seldom meets an ordinary word."""


def write_models(folder: Path) -> list[Path]:
    """Write the models, each with its whole vocabulary and with a short one."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = make_checkpoint(LEAST | changes, Path(scratch) / "model", dtype="float32")
            whole = folder / f"{name}.gguf"
            megrez_gguf.convert(checkpoint, whole, outtype="f32", force=True)
        file = Gguf.read(whole)
        _shorten(file, WORDS)
        _complete(file)
        written += [whole, file.write(folder / f"{name}, short.gguf")]
    return written


def _complete(file: Gguf) -> None:
    """Every key that is ever read, so that its value can be changed; and none that is not."""
    del file.values[HASHES]
    usual = {"u32": (U32, 0), "f32": (F32, 1.0), "bool": (BOOL, False), "str": (STRING, "")}
    file.values |= {
        key: usual[rule.types[0]]
        for key, rule in RULES.items()
        if key not in file.values and rule.types[0] in usual and key not in UNUSUAL
    }
    count = len(file.values["tokenizer.ggml.tokens"][1][1])
    file.values["tokenizer.ggml.scores"] = ARRAY, (F32, [0.0] * count)
    file.values["tokenizer.ggml.suppress_tokens"] = ARRAY, (I32, [1, 2])
    for name in DECIDING:
        file.values.setdefault(f"tokenizer.ggml.{name}_token_id", (U32, count - 1))


def _shorten(file: Gguf, words: int) -> None:
    """Keep the first tokens and the special ones, at new places."""
    types = file.values["tokenizer.ggml.token_type"][1][1]
    kept = [i for i, kind in enumerate(types) if i < words or kind != 1]
    for name, (kind, value) in file.values.items():
        if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            file.values[name] = kind, (value[0], [value[1][i] for i in kept])
        elif name == "tokenizer.ggml.merges":
            file.values[name] = kind, (value[0], value[1][:words])
        elif name.endswith("_token_id"):
            file.values[name] = kind, kept.index(value)
        elif name.endswith("vocab_size"):
            file.values[name] = kind, len(kept)
    for name in ("token_embd.weight", "output.weight"):
        if name in file.tensors:
            file.tensors[name] = floats(file.tensors[name].floats()[kept])
