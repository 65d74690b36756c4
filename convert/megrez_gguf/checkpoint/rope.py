"""The rotary embedding's settings, as `transformers` reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megrez_gguf.checkpoint.settings import Settings

# What each type reads beside rope_theta; any of the others has no effect with it.
_READS = {
    "default": frozenset[str](),
    "linear": frozenset({"rope_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "rope_factor",
            "original_max_position_embeddings",
            "attention_factor",
            "mscale",
            "rope_truncate",
            "beta_fast",
            "beta_slow",
        }
    ),
}


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Context extension of the rotary embedding.

    `linear` divides every position by `factor`. `yarn` is arXiv 2309.00071 as `transformers` has
    it: interpolation by `factor` of the slow dimensions only, and cos/sin times `attention_factor`.
    """

    kind: Literal["linear", "yarn"]
    factor: float
    original_context_length: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


def read_rope(r: Settings, head_dim: int, context: int) -> tuple[float, RopeScaling | None]:
    """The base, and the scaling if there is one, of a model of `context` positions.

    Raises ConfigError for a type or a value that is not supported, or that readers of such files
    take differently.
    """
    theta = r.number("rope_theta", positive=True)
    kind = r.choice("rope_type", tuple(_READS), default="default")
    for name in sorted(_READS["yarn"] - _READS[kind]):
        for where in r.ignore(name):
            r.remarks.append(f"{where} has no effect where the rope_type is {kind}")
    if kind == "default":
        for where in r.ignore("mscale_all_dim"):
            r.remarks.append(f"{where} has no effect where the rope_type is default")
        return theta, None
    factor = _factor(r, context if kind == "yarn" else None)
    # DeepSeek's attention also rescales its softmax by it; no Megrez2 code is known to.
    if r.number("mscale_all_dim", default=0.0) != 0 and factor > 1:
        r.fail(r.where("mscale_all_dim"), "a rescaled softmax is not supported; supported: 0, null")
    original = r.integer("original_max_position_embeddings", default=context, minimum=1)
    if kind == "linear":
        return theta, RopeScaling("linear", factor, original)
    if not r.has("original_max_position_embeddings"):
        r.remarks.append(
            f"yarn without original_max_position_embeddings: max_position_embeddings = {context} "
            "is taken, as transformers does"
        )
    scaling = RopeScaling(
        "yarn",
        factor,
        original,
        attention_factor=_attention_factor(r, factor),
        beta_fast=r.number("beta_fast", default=32.0, positive=True),
        beta_slow=r.number("beta_slow", default=1.0, positive=True),
    )
    _check_ramp(r, theta, head_dim, scaling)
    return theta, scaling


def _factor(r: Settings, context: int | None) -> float:
    """`factor`; without one what the two context lengths say, where `context` may tell."""
    if context and not r.has("rope_factor") and r.has("original_max_position_embeddings"):
        factor = context / r.integer("original_max_position_embeddings", minimum=1)
        r.remarks.append(
            f"yarn without factor: {factor:g} is taken, max_position_embeddings / "
            "original_max_position_embeddings, as transformers does"
        )
    else:
        factor = r.number("rope_factor", positive=True)
    if factor < 1:
        r.fail(r.where("rope_factor"), f"{factor:g} is below 1")
    return factor


def _attention_factor(r: Settings, factor: float) -> float:
    mscale = r.number("mscale", default=1.0)
    if r.has("attention_factor"):
        return r.number("attention_factor", positive=True)
    if factor > 1 and mscale != 1:
        r.fail(
            r.where("mscale"),
            f"{mscale:g} without mscale_all_dim: DeepSeek's code scales by it, transformers and "
            "vLLM do not; write the attention_factor that is meant",
        )
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _check_ramp(r: Settings, theta: float, head_dim: int, scaling: RopeScaling) -> None:
    """Refuse what transformers and llama.cpp compute differently."""
    if scaling.factor == 1:
        r.ignore("rope_truncate")
        return
    if not r.boolean("rope_truncate", default=True):
        r.fail(
            r.where("rope_truncate"),
            "only yarn with whole-numbered ramp bounds (true) is supported",
        )
    if theta <= 1:
        r.fail(r.where("rope_theta"), f"{theta:g} leaves yarn no ramp; expected more than 1")

    def pair(times: float) -> float:
        """The (fractional) pair that turns `times` times over the original context."""
        period = scaling.original_context_length / (times * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
    if low > high:
        r.fail(
            r.where("original_max_position_embeddings"),
            f"{scaling.original_context_length} with beta_fast = {scaling.beta_fast:g} and "
            f"beta_slow = {scaling.beta_slow:g} gives yarn a ramp that ends (at pair {high}) "
            f"before it begins ({low}), which programs compute differently",
        )
