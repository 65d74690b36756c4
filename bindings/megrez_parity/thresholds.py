"""The figures a level must reach.

How much a level loses depends on the model and on the text, so bounds hold for what they were set
on: the committed ones for the pocket checkpoint and its held-out texts. What depends on arithmetic
alone holds for every model and any text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.json_file import MALFORMED, load_json
from megrez_gguf.errors import ConfigError
from megrez_gguf.text import clip
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
class Scope:
    """What a run measures, or what bounds were set on; there, an empty field holds for any."""

    weights_sha256: str = ""  # of the checkpoint
    context: int = 0  # tokens a window
    texts: Mapping[str, int] = field(default_factory=dict)  # SHA-256 -> windows of it

    def lacks(self, run: Scope) -> str:
        """What these bounds were set on and `run` does not measure; "" if they apply to it.

        More windows of the same texts are no less.
        """
        if self.weights_sha256 not in ("", run.weights_sha256):
            return "the weights of another checkpoint"
        if self.context not in (0, run.context):
            return f"windows of {self.context} tokens"
        if self.texts and self.texts.keys() != run.texts.keys():
            return "other texts"
        if any(run.texts[text] < windows for text, windows in self.texts.items()):
            return f"{max(self.texts.values())} windows a text"
        return ""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Bounds by level: of figures, and of the error each traced tensor may add by itself."""

    scope: Scope
    figures: Mapping[str, Mapping[str, float]]  # level -> figure -> the worst that passes
    local_nmse: Mapping[str, Mapping[str, float]]  # level -> traced tensor's name -> likewise

    @classmethod
    def load(cls, path: Path | None = None) -> Thresholds:
        """The committed bounds, or those in a file of the same form.

        {"weights_sha256": HEX, "context": TOKENS, "texts": {SHA256: WINDOWS}, "levels": {LEVEL:
        {FIGURE: BOUND, ..., "trace": {TENSOR: BOUND, ...}}}}; all but the levels may be left out.
        Raises ConfigError for anything else.
        """
        committed = resources.files("megrez_parity").joinpath("thresholds.json")
        try:
            raw = load_json((path or committed).read_bytes())
            bounds = {name: dict(level) for name, level in raw["levels"].items()}
            local = {name: _numbers(bounds[name].pop("trace", {})) for name in bounds}
            figures = {name: _numbers(level) for name, level in bounds.items()}
            texts = {str(text): int(windows) for text, windows in raw.get("texts", {}).items()}
            weights, context = str(raw.get("weights_sha256", "")), int(raw.get("context", 0))
        except (OSError, *MALFORMED) as e:
            raise ConfigError(f"{path}: cannot be read as thresholds: {clip(e)}") from None
        if unknown := {name for level in figures.values() for name in level} - _NAMES:
            raise ConfigError(
                f"{path}: no figure is called {', '.join(sorted(unknown))}; "
                f"known: {', '.join(sorted(_NAMES))}"
            )
        return cls(Scope(weights, context, texts), figures, local)

    def of(self, level: str, run: Scope) -> dict[str, float]:
        """Bounds for the figures of `level` in this run."""
        measured = {} if self.scope.lacks(run) else self.figures.get(level, {})
        bounds = {**_ANY_MODEL.get(level, {}), **measured}
        return bounds | _ANY_LEVEL | bounds  # in this order, and the level's own prevail

    def tolerances(self, level: str, run: Scope) -> dict[str, float]:
        """Bounds for the local NMSE of traced tensors, likewise."""
        any_model = dict.fromkeys(TRACED if level == "f32" else _ROUTER, 1e-9)
        measured = {} if self.scope.lacks(run) else self.local_nmse.get(level, {})
        return {**any_model, **measured}


def _numbers(raw: Any) -> dict[str, float]:
    return {str(name): float(bound) for name, bound in dict(raw).items()}
