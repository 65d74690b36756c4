"""The F16 audit: what it counts, what it finds, and the line it draws."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_parity.audit import audit
from megrez_parity.results import Audit
from support.traces import model

CALM = {
    ("attn_norm", 0): 3.0,
    ("kqv_out", 0): 2.0,
    ("ffn_norm", 0): 4.0,
    ("ffn_swiglu", 0): 9.0,
    ("attn_norm", 1): 3.0,
    ("ffn_norm", 1): 4.0,
    ("ffn_moe_swiglu", 1): 20.0,
    ("ffn_shexp_swiglu", 1): 8.0,
    ("result_norm", -1): 7.0,
}


def audited(config: ModelConfig, folder: Path, maxima: dict[tuple[str, int], float]) -> Audit:
    reference: Any = SimpleNamespace(maxima=maxima)
    return audit(Checkpoint.open(folder), reference)


def edit(folder: Path, name: str, values: list[float]) -> None:
    """Make `values` the first elements of a tensor."""
    (path,) = [p for p in folder.glob("*.safetensors") if name in load_file(p)]
    tensors = load_file(path)
    tensors[name].view(-1)[: len(values)] = torch.tensor(values, dtype=torch.float32)
    save_file(tensors, path, {"format": "pt"})


def test_a_calm_model(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    found = audited(config, folder, CALM)
    assert len(found.activations) == len(CALM)
    entered = {(a.name, a.layer): a.enters for a in found.activations}
    assert entered["attn_norm", 0] == "attn_q, attn_k, attn_v"
    assert entered["ffn_norm", 0] == "ffn_gate, ffn_up"
    assert entered["ffn_norm", 1] == "ffn_gate_exps, ffn_up_exps, ffn_gate_shexp, ffn_up_shexp"
    assert entered["ffn_moe_swiglu", 1] == "ffn_down_exps"
    assert entered["result_norm", None] == "output"
    assert found.overflowing_weights == 0
    matrices = [t for n, t in weights.items() if t.ndim == 2 and ".mlp.gate." not in n]
    assert found.weights == sum(t.numel() for t in matrices)
    # Counted by rounding to F16 and back.
    rounded = [np.float16(t.numpy()) for t in matrices]
    tiny = np.finfo(np.float16).tiny
    assert found.flushed_weights == sum(int(np.sum(r == 0)) for r in rounded)
    small = sum(int(np.sum((np.abs(t.numpy()) < tiny) & (t.numpy() != 0))) for t in matrices)
    assert found.subnormal_weights + found.flushed_weights == small
    assert found.verdict == (
        "F16 holds this model: the largest activation, 20 (ffn_moe_swiglu into ffn_down_exps of "
        f"layer 1), is 3,275 times below 65504; of {found.weights:,} weights 0 overflow, "
        f"{found.flushed_weights:,} become 0 and {found.subnormal_weights:,} keep fewer bits"
    )


@pytest.mark.parametrize(
    ("key", "size", "answer", "rest"),
    [
        (("ffn_norm", 1), 65504.0, "F16 holds this model:", "is 1.00 times below 65504"),
        (("ffn_norm", 1), 65536.0, "F16 does not hold this model:", "is 1.00 times 65504"),
        (
            ("result_norm", -1),
            1e6,
            "F16 does not hold this model:",
            "1e+06 (result_norm into output)",
        ),
        (
            ("ffn_moe_swiglu", 1),
            131008.0,
            "F16 holds this model only where down projections are rescaled, as here:",
            "131,008 (ffn_moe_swiglu into ffn_down_exps of layer 1), is 2.00 times 65504",
        ),
        (
            ("kqv_out", 0),
            float("inf"),
            "F16 does not hold this model:",
            "inf (kqv_out into attn_output",
        ),
        (
            ("ffn_swiglu", 0),
            float("nan"),
            "F16 holds this model only",
            "nan (ffn_swiglu into ffn_down",
        ),
    ],
)
def test_an_activation_overflows(
    key: tuple[str, int], size: float, answer: str, rest: str, tmp_path: Path
) -> None:
    config, folder, _ = model({}, tmp_path)
    verdict = audited(config, folder, CALM | {key: size}).verdict
    assert verdict.startswith(answer)
    assert rest in verdict
    assert "\n" not in verdict


def test_weights_are_lost(tmp_path: Path) -> None:
    config, folder, _ = model({}, tmp_path)
    before = audited(config, folder, CALM)
    # A norm stays F32 in every file.
    edit(folder, "model.norm.weight", [1e30, 1e-30])
    assert audited(config, folder, CALM) == before
    edit(folder, "model.layers.1.mlp.experts.3.up_proj.weight", [1e5, -7e4, 1e-9, 3e-5, 0.0])
    after = audited(config, folder, CALM)
    assert after.overflowing_weights == 2
    assert after.flushed_weights == before.flushed_weights + 1
    assert after.subnormal_weights - before.subnormal_weights in (0, 1)
    assert after.verdict.startswith("F16 does not hold this model: the largest activation, 20 ")
    assert "2 overflow" in after.verdict


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    _, folder, _ = model({}, tmp_path)
    calls: list[tuple[int, int]] = []
    reference: Any = SimpleNamespace(maxima=CALM)
    audit(
        Checkpoint.open(folder),
        reference,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1][0] == calls[-1][1] > 0
    assert calls == sorted(calls)
