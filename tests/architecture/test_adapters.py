"""LoRA adapters, control vectors and weight scales, against the reference with changed weights."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp as C
import numpy as np
import pytest
import torch
from torch import Tensor

from support.configurations import FOR_K_QUANTS
from support.gguf_edit import F32, STRING, Gguf, floats, with_padded_rows
from support.llama import Context, Model, nmse, opened, said
from support.samples import TOKENS, Sample

RANK, ALPHA, SCALE = 4, 6.0, 0.7
EXPERTS = FOR_K_QUANTS["n_routed_experts"]
# GGUF name -> published names; several are the experts of a stack
TARGETS = {
    **{f"blk.2.attn_{x}": [f"model.layers.2.self_attn.{x}_proj"] for x in "qkv"},
    "blk.0.attn_output": ["model.layers.0.self_attn.o_proj"],
    **{f"blk.0.ffn_{x}": [f"model.layers.0.mlp.{x}_proj"] for x in ("gate", "up", "down")},
    "blk.1.ffn_gate_inp": ["model.layers.1.mlp.gate"],
    "blk.5.ffn_gate_inp": ["model.layers.5.mlp.gate"],
    **{
        f"blk.3.ffn_{x}_shexp": [f"model.layers.3.mlp.shared_experts.{x}_proj"]
        for x in ("gate", "up", "down")
    },
    **{
        f"blk.1.ffn_{x}_exps": [f"model.layers.1.mlp.experts.{e}.{x}_proj" for e in range(EXPERTS)]
        for x in ("gate", "up", "down")
    },
    "output": ["lm_head"],
}
GROUPS = {
    "attention": ("attn",),
    "router": ("gate_inp",),
    "dense": ("blk.0.ffn",),
    "shared experts": ("shexp",),
    "expert pool": ("exps",),
    "all": ("",),
}


def make_lora(
    path: Path, weights: dict[str, Tensor], pick: tuple[str, ...], seed: int
) -> tuple[Path, dict[str, Tensor]]:
    """An adapter for the picked targets, and what it adds to each published weight at scale 1."""
    rng, file, added = np.random.default_rng(seed), Gguf(), {}
    file.values = {
        "general.type": (STRING, "adapter"),
        "general.architecture": (STRING, "megrez-moe"),
        "adapter.type": (STRING, "lora"),
        "adapter.lora.alpha": (F32, ALPHA),
    }
    for target, sources in TARGETS.items():
        if not any(part in target for part in pick):
            continue
        stack = np.stack([weights[f"{name}.weight"].numpy() for name in sources])
        outputs, inputs = stack.shape[1:]
        # changes of about a third of the weights
        a = rng.normal(size=(len(sources), RANK, inputs)) * stack.std()
        b = rng.normal(size=(len(sources), outputs, RANK)) * 0.15
        a, b = a.astype(np.float32), b.astype(np.float32)
        for i, name in enumerate(sources):
            added[f"{name}.weight"] = torch.from_numpy(b[i].astype(np.float64) @ a[i]) * (
                ALPHA / RANK
            )
        whole = slice(None) if "exps" in target else 0
        file.tensors[f"{target}.weight.lora_a"] = floats(a[whole])
        file.tensors[f"{target}.weight.lora_b"] = floats(b[whole])
    return file.write(path), added


def attach(model: Model, paths: list[Path]) -> ctypes.Array[ctypes.c_void_p]:
    adapters: ctypes.Array[ctypes.c_void_p]
    adapters = (C.llama_adapter_lora_p_ctypes * len(paths))()
    for i, path in enumerate(paths):
        adapters[i] = C.llama_adapter_lora_init(model.handle, str(path).encode())
        assert adapters[i], said()
    return adapters


def merged(weights: dict[str, Tensor], *changes: tuple[dict[str, Tensor], float]) -> None:
    for added, scale in changes:
        for name, delta in added.items():
            weights[name] = weights[name] + scale * delta


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("pre_gate", [True, False])
def test_lora(sample: Callable[..., Sample], tmp_path: Path, group: str, pre_gate: bool) -> None:
    model = sample(pre_gate=pre_gate)
    weights = model.weights
    path, added = make_lora(tmp_path / "lora.gguf", weights, GROUPS[group], seed=1)
    plain = model.reference()
    merged(weights, (added, SCALE))
    expected = model.reference(weights=weights)
    assert nmse(plain, expected) > 1e-3  # the adapter matters
    with Model(model.gguf) as loaded:
        adapters = attach(loaded, [path])
        with Context(loaded) as context:
            scales = (ctypes.c_float * 1)(SCALE)
            C.llama_set_adapters_lora(context.handle, adapters, 1, scales)
            assert nmse(expected, context.run(TOKENS)) < 1e-9
            C.llama_set_adapters_lora(context.handle, None, 0, None)
            C.llama_memory_clear(context.memory, True)
            assert nmse(plain, context.run(TOKENS)) < 1e-9


def test_two_loras_at_f16(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """The F16 down projections divide their input; what adapters add must be scaled back too."""
    model = sample("f16")
    weights = model.weights
    made = [make_lora(tmp_path / f"{s}.gguf", weights, ("",), s) for s in (1, 2)]
    merged(weights, (made[0][1], 0.5), (made[1][1], -0.4))
    expected = model.reference(weights=weights)
    with Model(model.gguf) as loaded:
        adapters = attach(loaded, [path for path, _ in made])
        with Context(loaded) as context:
            scales = (ctypes.c_float * 2)(0.5, -0.4)
            C.llama_set_adapters_lora(context.handle, adapters, 2, scales)
            assert nmse(expected, context.run(TOKENS)) < 1e-5


def test_lora_on_a_pool_of_many_layers(sample: Callable[..., Sample], tmp_path: Path) -> None:
    """Upstream makes room in the graph for each adapter tensor once; here 47 layers use it."""
    model = sample(
        num_hidden_layers=48,
        experts_shared_frequency=100,
        n_shared_experts=0,
        topk_method="greedy",
        num_experts_per_tok=8,
    )
    path, added = make_lora(tmp_path / "lora.gguf", model.weights, ("exps",), seed=1)
    weights = model.weights
    merged(weights, (added, 1.0))
    expected = model.reference(weights=weights)
    with Model(model.gguf) as loaded:
        adapters = attach(loaded, [path])
        with Context(loaded) as context:
            C.llama_set_adapters_lora(context.handle, adapters, 1, (ctypes.c_float * 1)(1.0))
            assert nmse(expected, context.run(TOKENS)) < 1e-9


def test_lora_on_a_pool_of_padded_rows(tiny: Sample, tmp_path: Path) -> None:
    """Refused, by its shape: it would have to be padded as well."""
    path, _ = make_lora(tmp_path / "lora.gguf", tiny.weights, ("down_exps",), seed=1)
    wide = with_padded_rows(tiny.gguf, tmp_path / "wide.gguf", 256)
    with Model(wide) as model:
        said()
        assert not C.llama_adapter_lora_init(model.handle, str(path).encode())
        assert "incorrect shape" in said()


@pytest.mark.parametrize("fields", [{}, {"pre_gate": False}])
def test_control_vector(sample: Callable[..., Sample], fields: dict[str, object]) -> None:
    """Added to the output of layers 2 to 4, as upstream models do."""
    model = sample(**fields)
    layers, width = FOR_K_QUANTS["num_hidden_layers"], FOR_K_QUANTS["hidden_size"]
    vectors = np.random.default_rng(3).normal(size=(layers - 1, width)).astype(np.float32)
    first, last = 2, 4
    weights = model.weights
    expected = _steered(model, weights, vectors, range(first, last + 1))
    assert nmse(model.reference(), expected) > 1e-3
    with opened(model.gguf) as context:
        data = vectors.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        size = vectors.size
        assert C.llama_set_adapter_cvec(context.handle, data, size, width, first, last) == 0
        assert nmse(expected, context.run(TOKENS)) < 1e-9


def _steered(
    model: Sample, weights: dict[str, Tensor], vectors: np.ndarray, layers: range
) -> np.ndarray:
    from megrez_parity import reference

    config = model.config
    x = weights["model.embed_tokens.weight"][torch.tensor(TOKENS)[None]]
    rope = reference.rotary(config, len(TOKENS), x.dtype, x.device)
    previous = None
    for layer in range(config.num_hidden_layers):
        x, previous = reference.block(
            config, weights, layer, x, previous, rope, lambda name, layer, tensor: None
        )
        if layer in layers:
            x = x + torch.from_numpy(vectors[layer - 1].astype(np.float64))
    x = reference.rms_norm(config, weights["model.norm.weight"], x)
    return (x @ weights["lm_head.weight"].T)[0].numpy()


def test_weight_scales(tiny: Sample, tmp_path: Path) -> None:
    """Per-tensor factors, as NVFP4 files carry: a pool's belong to the pool, not to a layer."""
    rng, file, weights = np.random.default_rng(5), Gguf.read(tiny.gguf), tiny.weights
    for target, sources in TARGETS.items():
        if "gate_inp" in target or target == "output":
            continue
        scales = rng.uniform(0.5, 1.5, len(sources)).astype(np.float32)
        file.tensors[f"{target}.scale"] = floats(scales)
        for name, scale in zip(sources, scales.tolist(), strict=True):
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * scale
    path = file.write(tmp_path / "scaled.gguf")
    expected = tiny.reference(weights=weights)
    with opened(path) as context:
        assert nmse(expected, context.run(TOKENS)) < 1e-9
