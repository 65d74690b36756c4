#!/usr/bin/env python3
"""Measure the pocket checkpoint and write bindings/megrez_parity/thresholds.json from it.

To be run after the pocket checkpoint or its held-out text changed, never to make a failing parity
pass. Each bound is the figure measured with its distance from perfect doubled: room for other
machines' kernels, too little for a wrong model. F32 is a fixed 1e-9, a thousand times its figure.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from megrez_gguf.errors import MegrezError
from megrez_parity.harness import LEVELS, measure
from megrez_parity.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "bindings" / "megrez_parity" / "thresholds.json"
MARGIN = 2.0


def bounds(metrics: Metrics) -> dict[str, float]:
    """The worst figures that pass where `metrics` was measured; two digits, rounded for the worse.

    Differences below 0.005 in top-p and ratio are a few tokens, so that much is always allowed.
    """
    wrong_top = max(MARGIN * (1 - metrics.same_top_p), 0.005)
    worse_ppl = max(MARGIN * (metrics.perplexity_ratio - 1), 0.005)
    return {
        "nmse": _up(MARGIN * metrics.nmse),
        "mean_kld": _up(MARGIN * metrics.mean_kld),
        "kld_99": _up(MARGIN * metrics.kld_99),
        "same_top_p": round(1 - _up(wrong_top), 6),
        "perplexity_ratio": round(1 + _up(worse_ppl), 6),
    }


def _up(x: float) -> float:
    return float(f"{x * 1.05:.1e}")


def main() -> int:
    try:
        report = measure(
            ROOT / "tests" / "data" / "pocket", say=lambda line: print(line, file=sys.stderr)
        )
    except MegrezError as e:
        print(f"set_thresholds: {e}", file=sys.stderr)
        return e.exit_code
    found = {result.level: bounds(result.metrics) for result in report.levels}
    found["f32"] = {"nmse": 1e-9}
    assert tuple(found) == LEVELS
    lines = (f"  {json.dumps(level)}: {json.dumps(found[level])}" for level in found)
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
