#!/usr/bin/env python3
"""Measure the pocket checkpoint and write bindings/megrez_parity/thresholds.json from it.

To be run after the pocket checkpoint or its held-out text changed, never to make a failing parity
pass. Each bound is the figure measured with its distance from perfect doubled, and so is the
largest error that a tensor of any layer adds by itself: room for other machines' kernels, too
little for a wrong model. The ratio of perplexities, which a text may turn either way, counts with
the upper end of its interval. F32 has no loss to double: what the order of sums makes there, NMSE
8e-13 and 3e-12 in the worst tensor, has room of 10 and 30 times. Tensors that other levels keep
exact are held to the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import MegrezError
from megrez_parity.harness import measure
from megrez_parity.level_files import LEVELS
from megrez_parity.provenance import checkpoint_sha256
from megrez_parity.results import Metrics, Trace

ROOT = Path(__file__).resolve().parents[2]
POCKET = ROOT / "tests" / "data" / "pocket"
TARGET = ROOT / "bindings" / "megrez_parity" / "thresholds.json"
MARGIN = 2.0
EXACT, EXACT_LOCAL = 1e-11, 1e-10


def bounds(metrics: Metrics) -> dict[str, float]:
    """The worst figures that pass where `metrics` was measured; two digits, rounded for the worse.

    Differences below 0.005 in top-p and ratio are a few tokens, so that much is always allowed.
    """
    wrong_top = max(MARGIN * (1 - metrics.same_top_p.value), 0.005)
    worse_ppl = max(MARGIN * (metrics.perplexity_ratio.high - 1), 0.005)
    return {
        "nmse": _up(metrics.nmse.value),
        "mean_kld": _up(metrics.mean_kld.value),
        "kld_99": _up(metrics.kld_99.value),
        "same_top_p": round(1 - _rounded(wrong_top), 6),
        "perplexity_ratio": round(1 + _rounded(worse_ppl), 6),
        "tokenizer_agreement": 1.0,
    }


def local_bounds(trace: Trace) -> dict[str, float]:
    """By tensor name, what it may add to the error in any layer."""
    worst: dict[str, float] = {}
    for point in trace.points:
        worst[point.name] = max(point.local_nmse, worst.get(point.name, 0.0))
    return {name: max(_up(error), EXACT_LOCAL) for name, error in worst.items()}


def _up(figure: float) -> float:
    return _rounded(MARGIN * figure)


def _rounded(x: float) -> float:
    return float(f"{x * 1.05:.1e}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> int:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as none:
        none.write('{"levels": {}}')
        none.flush()
        try:
            report = measure(POCKET, trace=True, thresholds=Path(none.name), say=_say)
        except MegrezError as e:
            _say(f"set_thresholds: {e}")
            return e.exit_code
    found: dict[str, dict[str, object]] = {}
    exact: dict[str, float] = {}
    for result in report.levels:
        assert result.trace
        local = local_bounds(result.trace)
        found[result.level] = {**bounds(result.metrics), "trace": local}
        if result.level == "f32":
            exact = dict.fromkeys(local, EXACT_LOCAL)
    found["f32"] = {"nmse": EXACT, "tokenizer_agreement": 1.0, "trace": exact}
    assert tuple(found) == LEVELS
    levels = ",\n".join(f"    {json.dumps(name)}: {json.dumps(found[name])}" for name in found)
    weights = json.dumps(checkpoint_sha256(Checkpoint.open(POCKET)))
    texts = json.dumps({text.sha256: text.windows for text in report.texts})
    scope = f'"weights_sha256": {weights},\n  "context": {report.context},\n  "texts": {texts}'
    text = f'{{\n  {scope},\n  "levels": {{\n{levels}\n  }}\n}}\n'
    TARGET.write_text(text, encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
