#!/usr/bin/env python3
"""Show that the parity check can fail: sabotage a model in every way others have got it wrong.

    scripts/sabotage.py                    # the pocket checkpoint
    scripts/sabotage.py CKPT --text FILE

Each sabotaged checkpoint is converted to F32 and judged against the unharmed one by the same code
as `megrez-gguf parity`. Prints a table; exits 1 if the unharmed model fails or a sabotage passes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from megrez_gguf import convert
from megrez_gguf.config import ModelConfig
from megrez_gguf.errors import MegrezError
from megrez_parity import reference
from megrez_parity.harness import LevelResult, measure

POCKET = Path(__file__).resolve().parents[1] / "tests" / "data" / "pocket"

Tensors = dict[str, Tensor]
Change = Callable[[ModelConfig, dict[str, Any], Tensors], None]


def pre_gate_off(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    raw["pre_gate"] = not config.pre_gate


def sharing_shifted(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    """Groups begin a layer early, written out as one pool a layer."""
    raw["experts_shared_frequency"] = 1
    pools = {
        layer: {name: t for name, t in tensors.items() if name.startswith(_experts(layer))}
        for layer in config.pool_layers
    }
    last = config.pool_layers[-1]
    for layer in config.moe_layers:
        owner = min(config.pool_layer(layer + 1), last)
        for name, tensor in pools[owner].items():
            tensors[_experts(layer) + name.removeprefix(_experts(owner))] = tensor.clone()


def first_layers_bias(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    _share_in_group(config, tensors, "e_score_correction_bias")


def first_layers_router(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    _share_in_group(config, tensors, "weight")


def bias_ignored(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    for name in [n for n in tensors if n.endswith("e_score_correction_bias")]:
        tensors[name].zero_()


def normalisation_off(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    raw["norm_topk_prob"] = not config.norm_topk_prob


def scaling_factor_wrong(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    raw["routed_scaling_factor"] = config.routed_scaling_factor * 1.01


def softmax_scores(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    raw["scoring_func"] = "softmax" if config.scoring_func == "sigmoid" else "sigmoid"


def other_rope_base(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    """The published sources disagree on the base by this factor."""
    raw["rope_theta"] = config.rope_theta / 5


def interleaved_rope(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    """Pairs (2i, 2i + 1) instead of (i, i + C / 2)."""
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = tensors[name].view(-1, config.head_dim // 2, 2, config.hidden_size)
            tensors[name] = rows.transpose(1, 2).reshape_as(tensors[name]).contiguous()


def gate_and_up_swapped(config: ModelConfig, raw: dict[str, Any], tensors: Tensors) -> None:
    p = f"{_experts(config.pool_layers[0])}0."
    gate, up = p + "gate_proj.weight", p + "up_proj.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def _experts(layer: int) -> str:
    return f"model.layers.{layer}.mlp.experts."


def _share_in_group(config: ModelConfig, tensors: Tensors, name: str) -> None:
    for layer in config.moe_layers:
        first = tensors[f"model.layers.{config.pool_layer(layer)}.mlp.gate.{name}"]
        tensors[f"model.layers.{layer}.mlp.gate.{name}"] = first.clone()


@contextmanager
def bias_weighs() -> Iterator[None]:
    """No file can ask for this, so here it is the reference that is sabotaged."""
    original = reference.route

    def route(
        config: ModelConfig,
        weights: reference.Weights,
        layer: int,
        state: Tensor,
        emit: reference.Trace,
    ) -> tuple[Tensor, Tensor]:
        ids, _ = original(config, weights, layer, state, emit)
        prefix = f"model.layers.{layer}.mlp.gate."
        scores = (state @ weights[prefix + "weight"].T).sigmoid()
        w = (scores + weights[prefix + "e_score_correction_bias"]).gather(-1, ids)
        return ids, w / w.sum(-1, keepdim=True) * config.routed_scaling_factor

    reference.route = route
    try:
        yield
    finally:
        reference.route = original


@dataclass(frozen=True)
class Sabotage:
    """A way to harm the model: the checkpoint (`change`), or the reference (`patch`)."""

    name: str
    change: Change | None = None
    patch: Callable[[], Any] = nullcontext


SABOTAGES = [
    Sabotage("pre-gate off", pre_gate_off),
    Sabotage("sharing shifted by a layer", sharing_shifted),
    Sabotage("group's first bias for all its layers", first_layers_bias),
    Sabotage("group's first router for all its layers", first_layers_router),
    Sabotage("bias weighs as well as selects", patch=bias_weighs),
    Sabotage("bias ignored", bias_ignored),
    Sabotage("normalisation off", normalisation_off),
    Sabotage("scaling factor 1% off", scaling_factor_wrong),
    Sabotage("softmax instead of sigmoid", softmax_scores),
    Sabotage("rope base a fifth", other_rope_base),
    Sabotage("rope pairs interleaved", interleaved_rope),
    Sabotage("one expert's gate and up swapped", gate_and_up_swapped),
]


def harm(checkpoint: Path, folder: Path, change: Change | None) -> Path:
    """A copy of `checkpoint` in `folder`, changed and converted to F32; returns the GGUF file."""
    copy, gguf = folder / "sabotaged", folder / "sabotaged.gguf"
    copy.mkdir()
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    tensors = {}
    for shard in checkpoint.glob("*.safetensors"):
        tensors.update(load_file(shard))
    if change:
        change(ModelConfig.from_folder(checkpoint), raw, tensors)
    for path in checkpoint.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, copy)
    (copy / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    save_file(tensors, copy / "model.safetensors")
    convert(copy, gguf, outtype="f32")
    return gguf


def judge(checkpoint: Path, sabotage: Sabotage, texts: list[Path], context: int) -> LevelResult:
    """What `megrez-gguf parity --gguf` finds of the sabotaged model."""
    with tempfile.TemporaryDirectory(prefix="sabotage-") as folder, sabotage.patch():
        gguf = harm(checkpoint, Path(folder), sabotage.change)
        report = measure(checkpoint, (), texts, context, windows=1, files=[gguf])
    return report.levels[0]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=POCKET, metavar="CKPT")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--ctx", type=int, default=256, metavar="N", help="tokens a window")
    args = parser.parse_args()
    good = True
    print("| sabotage | NMSE at F32 | mean KLD | same top | |\n|---|---|---|---|---|")
    try:
        for sabotage in [Sabotage("none"), *SABOTAGES]:
            result = judge(args.checkpoint, sabotage, args.text, args.ctx)
            caught, m = bool(result.misses), result.metrics
            good &= caught == (sabotage.name != "none")
            verdict = "caught" if caught else "passes"
            print(
                f"| {sabotage.name} | {m.nmse:.1e} | {m.mean_kld:.2g} | {m.same_top_p:.1%} "
                f"| {verdict} |",
                flush=True,
            )
    except MegrezError as e:
        print(f"sabotage: {e}", file=sys.stderr)
        return e.exit_code
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
