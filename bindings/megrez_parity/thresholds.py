"""The figures a level must reach.

How much a level loses depends on the model, so the committed bounds hold for the weights they were
measured on, the pocket checkpoint's. What depends on arithmetic alone holds for every model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from megrez_gguf.errors import ConfigError
from megrez_llama.nodes import TRACED
from megrez_parity.results import Metrics

# A router is F32 at every level and what it reads is known, so no noise excuses it. llama.cpp's
# tokenizer is the same but for code points newer than its tables. F32 repeats the reference but
# for the order of its sums.
_ANY_LEVEL = {"tokenizer_agreement": 0.999, "unfaithful": 0.0}
_ANY_MODEL = {"f32": {"nmse": 1e-9}}
_ROUTER = ("ffn_moe_logits", "ffn_moe_probs_biased")
_NAMES = {*Metrics.__dataclass_fields__, *_ANY_LEVEL} - {"positions"}


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bounds by level: of figures, and of the error each traced tensor may add by itself."""

    weights_sha256: str  # of the checkpoint they were measured on; "" holds for any
    figures: Mapping[str, Mapping[str, float]]  # level -> figure -> the worst that passes
    local_nmse: Mapping[str, Mapping[str, float]]  # level -> traced tensor's name -> likewise

    @classmethod
    def load(cls, path: Path | None = None) -> Thresholds:
        """The committed bounds, or those in a file of the same form.

        {"weights_sha256": HEX (optional), "levels": {LEVEL: {FIGURE: BOUND, ...,
        "trace": {TENSOR: BOUND, ...}}}}. Raises ConfigError for anything else.
        """
        committed = resources.files("megrez_parity").joinpath("thresholds.json")
        try:
            raw = json.loads((path or committed).read_text("utf-8"))
            bounds = {name: dict(level) for name, level in raw["levels"].items()}
            local = {name: _numbers(bounds[name].pop("trace", {})) for name in bounds}
            figures = {name: _numbers(level) for name, level in bounds.items()}
            weights = str(raw.get("weights_sha256", ""))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise ConfigError(f"{path}: cannot be read as thresholds: {e!r}") from None
        if unknown := {name for level in figures.values() for name in level} - _NAMES:
            raise ConfigError(
                f"{path}: no figure is called {', '.join(sorted(unknown))}; "
                f"known: {', '.join(sorted(_NAMES))}"
            )
        return cls(weights, figures, local)

    def of(self, level: str, weights_sha256: str) -> dict[str, float]:
        """Bounds for the figures of `level`, of a model with these weights."""
        mine = self._measured_on(weights_sha256)
        measured = self.figures.get(level, {}) if mine else {}
        bounds = {**_ANY_MODEL.get(level, {}), **measured}
        return bounds | _ANY_LEVEL | bounds  # in this order, and the level's own prevail

    def tolerances(self, level: str, weights_sha256: str) -> dict[str, float]:
        """Bounds for the local NMSE of traced tensors, likewise."""
        any_model = dict.fromkeys(TRACED if level == "f32" else _ROUTER, 1e-9)
        mine = self._measured_on(weights_sha256)
        return {**any_model, **(self.local_nmse.get(level, {}) if mine else {})}

    def _measured_on(self, weights_sha256: str) -> bool:
        return self.weights_sha256 in ("", weights_sha256)


def _numbers(raw: Any) -> dict[str, float]:
    return {str(name): float(bound) for name, bound in dict(raw).items()}
