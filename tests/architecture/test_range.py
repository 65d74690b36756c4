"""Activations far beyond F16's 65504, before each kind of down projection."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megrez_gguf import convert
from support.configurations import FOR_K_QUANTS
from support.llama import logits, nmse, quantize
from support.random_checkpoint import make_checkpoint
from support.samples import TOKENS, Sample

KINDS = {
    "dense": r"\.mlp\.(gate|up|down)_proj",
    "shared experts": r"\.mlp\.shared_experts\.(gate|up|down)_proj",
    "routed experts": r"\.mlp\.experts\.\d+\.(gate|up|down)_proj",
}
FACTORS = {"gate": 2.0**8, "up": 2.0**12, "down": 2.0**-8}  # the weights themselves fit F16


@pytest.mark.parametrize("kind", KINDS)
def test_large_activations(kind: str, tmp_path: Path) -> None:
    make_checkpoint(FOR_K_QUANTS, tmp_path / "checkpoint", dtype="float32")
    path = tmp_path / "checkpoint" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if match := re.search(KINDS[kind], name):
            tensor *= FACTORS[match[1]]
    save_file(tensors, path)
    model = Sample(tmp_path / "checkpoint", tmp_path / "f32.gguf")
    convert(model.checkpoint, model.gguf, outtype="f32")

    largest = 0.0

    def watch(name: str, layer: int, x: torch.Tensor) -> None:
        nonlocal largest
        if name.endswith("swiglu"):
            largest = max(largest, float(x.abs().max()))

    expected = model.reference(trace=watch)
    assert largest > 1e6
    assert nmse(expected, logits(model.gguf, TOKENS)) < 1e-8
    for outtype, limit in (("f16", 1e-4), ("q4_1", 1.0), ("q5_1", 0.5)):
        # Q4_1 and Q5_1 keep the sum of each 32 activations as F16.
        quantize(model.gguf, tmp_path / "narrow.gguf", outtype)
        found = logits(tmp_path / "narrow.gguf", TOKENS)
        assert np.isfinite(found).all(), outtype
        assert nmse(expected, found) < limit, outtype
