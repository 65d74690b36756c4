"""Routing, trace and audit of the trained pocket checkpoint through llama.cpp itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from megrez_gguf import convert, quantize
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_llama import nodes as node_names
from megrez_llama.engine import Engine
from megrez_parity import routing, tracing
from megrez_parity.audit import audit
from megrez_parity.reference_store import StoredReference
from megrez_parity.results import LayerRouting, TracePoint
from support.marks import SLOW
from support.paths import POCKET
from support.shared import Shared
from support.traces import LENGTH, SOME_IN_LOOP, WINDOWS, model

CONTEXT = 256
CONFIG = ModelConfig.from_folder(POCKET)
# F32 errs by its rounding alone, everywhere.
F32 = dict.fromkeys(node_names.TRACED, 1e-10)


@dataclass
class Pocket:
    """The reference over two windows of each text, and a folder for files."""

    windows: list[NDArray[np.int32]]
    reference: StoredReference
    folder: Path
    routers: dict[str, Tensor]

    def judge(
        self, path: Path, tolerances: dict[str, float]
    ) -> tuple[list[LayerRouting], TracePoint | None]:
        comparison = routing.RoutingComparison(CONFIG, self.routers)
        kept = []
        with Engine(path, CONTEXT) as engine:
            for i, tokens in enumerate(self.windows):
                capture = {*node_names.ROUTING, *node_names.TRACED}
                nodes = engine.run(tokens, first=CONTEXT // 2, capture=capture).nodes
                comparison.add(self.reference, i, nodes)
                kept.append(nodes)
        found = tracing.trace(
            CONFIG, POCKET, self.windows[:2], {"it": kept[:2]}, {"it": tolerances}
        )
        return comparison.layers(), found["it"].first_beyond

    def harmed(self, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
        """The checkpoint with a change, as an F32 file."""
        tensors = {n: t for p in POCKET.glob("*.safetensors") for n, t in load_file(p).items()}
        raw = json.loads((POCKET / "config.json").read_text("utf-8"))
        change(raw, tensors)
        folder = self.folder / "harmed"
        shutil.copytree(POCKET, folder, ignore=shutil.ignore_patterns("model*"))
        (folder / "config.json").write_text(json.dumps(raw), "utf-8")
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
        convert(folder, self.folder / "harmed.gguf", outtype="f32", force=True)
        shutil.rmtree(folder)
        return self.folder / "harmed.gguf"


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Pocket:
    folder = tmp_path_factory.mktemp("pocket")
    tokenizer = Tokenizer.from_file(str(POCKET / "tokenizer.json"))
    windows = []
    for text in sorted((POCKET.parent / "heldout").glob("*.txt")):
        ids = tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False).ids
        windows += [np.array(ids[i : i + CONTEXT], np.int32) for i in (0, CONTEXT)]
    reference = StoredReference(CONFIG, POCKET, windows, folder / "reference", "0" * 64, print)
    reference.run()
    return Pocket(windows, reference, folder, routing.routers(CONFIG, POCKET))


def firsts(layers: list[LayerRouting]) -> tuple[int, int]:
    return sum(x.first_ties for x in layers), sum(x.first_diverged for x in layers)


def test_f32_routes_as_the_reference(pocket: Pocket, shared: Shared) -> None:
    layers, beyond = pocket.judge(shared.pocket("f32"), F32)
    assert all(x.identical.value == 1 and x.unfaithful == 0 for x in layers)
    assert all(x.own_nmse < 1e-10 for x in layers)
    assert beyond is None


@pytest.mark.slow
@pytest.mark.parametrize(("level", "agree"), [("q4_0", 0.7), ("q2_k", 0.3)])
def test_quantizing_turns_ties_round(
    level: str, agree: float, pocket: Pocket, shared: Shared
) -> None:
    quantize(shared.pocket("bf16"), pocket.folder / "quantized.gguf", outtype=level, force=True)
    layers, beyond = pocket.judge(pocket.folder / "quantized.gguf", F32)
    assert all(agree < x.identical.value < 0.95 for x in layers)
    assert not any(x.unfaithful for x in layers)  # routers stay F32
    ties, diverged = firsts(layers)
    assert ties > 500
    assert diverged < 0.03 * ties
    assert beyond is not None
    assert beyond.name == "embd"


@pytest.mark.parametrize("changes", SOME_IN_LOOP, ids=str)
def test_other_configurations(changes: dict[str, Any], tmp_path: Path) -> None:
    config, checkpoint, _ = model(changes, tmp_path)
    convert(checkpoint, tmp_path / "f32.gguf", outtype="f32")
    folder = tmp_path / "reference"
    reference = StoredReference(config, checkpoint, WINDOWS, folder, "0" * 64, print)
    reference.run()
    comparison = routing.RoutingComparison(config, routing.routers(config, checkpoint))
    kept = []
    with Engine(tmp_path / "f32.gguf", LENGTH) as engine:
        for i, tokens in enumerate(WINDOWS):
            capture = {*node_names.ROUTING, *node_names.TRACED}
            kept.append(engine.run(tokens, first=LENGTH // 2, capture=capture).nodes)
            comparison.add(reference, i, kept[i])
    for layer in comparison.layers():
        assert (layer.identical.value, layer.unfaithful) == (1, 0)
    found = tracing.trace(config, checkpoint, WINDOWS, {"it": kept}, {"it": F32})["it"]
    assert found.first_beyond is None
    assert len(found.points) > 5 * config.num_hidden_layers
    assert "F16 holds this model" in audit(Checkpoint.open(checkpoint), reference).verdict


def exchange_routers(raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    a, b = (f"model.layers.{i}.mlp.gate.weight" for i in (3, 5))
    tensors[a], tensors[b] = tensors[b], tensors[a]


def pre_gate_off(raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    raw["pre_gate"] = False


def exchange_experts(raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for part in ("gate", "up", "down"):
        a, b = (f"model.layers.4.mlp.experts.{e}.{part}_proj.weight" for e in (1, 2))
        tensors[a], tensors[b] = tensors[b], tensors[a]


def other_rope_base(raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    raw["rope_theta"] = 1e6


@pytest.mark.parametrize(
    ("change", "first", "unfaithful"),
    [
        (exchange_routers, ("ffn_moe_logits", 3), {3, 5}),
        pytest.param(pre_gate_off, ("ffn_moe_logits", 1), {1, 2, 3, 4, 5, 6}, marks=SLOW),
        pytest.param(exchange_experts, ("ffn_moe_out", 4), set(), marks=SLOW),
        pytest.param(other_rope_base, ("kqv_out", 0), set(), marks=SLOW),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_harmed_model(
    change: Callable[[dict[str, Any], dict[str, Tensor]], None],
    first: tuple[str, int],
    unfaithful: set[int],
    pocket: Pocket,
) -> None:
    layers, beyond = pocket.judge(pocket.harmed(change), F32)
    assert beyond is not None
    assert (beyond.name, beyond.layer) == first
    assert {x.layer for x in layers if x.unfaithful} == unfaithful
    ties, diverged = firsts(layers)
    if unfaithful:
        assert diverged > 20 * ties
    else:  # the noise is the file's own; still, no sound file has as many
        assert diverged > 0.03 * ties


def test_the_pocket_model_fits_f16(pocket: Pocket) -> None:
    found = audit(Checkpoint.open(POCKET), pocket.reference)
    assert found.verdict.startswith("F16 holds this model: ")
    assert max(a.max_abs for a in found.activations) < 1000
