"""Copies of megrez_engines that are wrong in one way, to shadow it by PYTHONPATH.

The ways are those in which implementations of Megrez2 have been wrong.
"""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "bindings" / "megrez_engines"

# What is harmed -> (file, what stands there, what to put in its place)
SABOTAGES: dict[str, list[tuple[str, str, str]]] = {
    "the bias weighs": [
        ("routing.py", "weights = scores.gather(-1, ids)", "weights = choice.gather(-1, ids)")
    ],
    "no pre-gate": [
        (file, "previous if self.pre_gate and previous is not None else h", "h")
        for file in ("transformers_model.py", "vllm_model.py", "sglang_model.py")
    ],
    "sharing shifted": [
        (
            "transformers_model.py",
            "carried.pools[self.mlp.owner]",
            "carried.pools[min(carried.pools)]",
        ),
        (
            "vllm_model.py",
            "pools.get(facts.pool_layer(index), (index, None))",
            "next(iter(pools.values()), (index, None))",
        ),
        (
            "sglang_model.py",
            "pools.get(owner, (layer_id, None))",
            "next(iter(pools.values()), (layer_id, None))",
        ),
    ],
    "the first bias for all": [
        (
            "transformers_model.py",
            "            kwargs[\"experts\"] = ",
            "            self.mlp.gate.e_score_correction_bias = FIRST.setdefault("
            "self.mlp.owner, self.mlp.gate.e_score_correction_bias)\n"
            "            kwargs[\"experts\"] = ",
        ),
        ("transformers_model.py", "@dataclass(slots=True)", "FIRST = {}\n@dataclass(slots=True)"),
        (
            "vllm_model.py",
            "MegrezRouter(config.rule(), n_experts, bias)",
            "MegrezRouter(config.rule(), n_experts, pool.router.bias if pool else bias)",
        ),
        (
            "sglang_model.py",
            "self.rule = config.rule()",
            "self.rule, self.owner = config.rule(), facts.pool_layer(layer_id)",
        ),
        (
            "sglang_model.py",
            "select(self.rule, gating_output, self.e_score_correction_bias)",
            "select(self.rule, gating_output, "
            "FIRST.setdefault(self.owner, self.e_score_correction_bias))",
        ),
        ("sglang_model.py", "LORA_MODULES = (", "FIRST = {}\nLORA_MODULES = ("),
    ],
}  # fmt: skip


def harmed(name: str, folder: Path) -> Path:
    """A folder for PYTHONPATH, in `folder`, whose megrez_engines is harmed as `name` says."""
    shutil.copytree(
        PACKAGE, folder / "megrez_engines", ignore=shutil.ignore_patterns("__pycache__")
    )
    for file, old, new in SABOTAGES[name]:
        path = folder / "megrez_engines" / file
        text = path.read_text()
        assert text.count(old) == 1, (name, file)
        path.write_text(text.replace(old, new))
    return folder
