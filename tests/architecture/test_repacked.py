"""Repacked weights have kernels of their own for one token and for a batch: all must agree."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from support.llama import Context, Model, nmse
from support.samples import TOKENS, Sample

# Activations become 8-bit integers, and a sum in another order may round them to the next one: up
# to 3e-4 here, between any two ways to compute it. A wrong row gives 0.1 and more.
ROUNDING = 1e-3
KINDS = ("q4_0", "q2_k", "q3_k_s", "q4_k_s", "iq4_nl", "q5_0", "q8_0", "mxfp4_moe")


@pytest.mark.parametrize("outtype", KINDS)
@pytest.mark.parametrize("experts", [8, 3])
def test_prompts_and_single_tokens(
    sample: Callable[..., Sample], outtype: str, experts: int
) -> None:
    """Eight experts get rows in fours and rows left over; with three of three, each gets all."""
    path = sample(outtype, n_routed_experts=experts).gguf
    with Model(path, use_extra_bufts=False) as model, Context(model) as context:
        plain = context.run(TOKENS)
    with Model(path) as model, Context(model) as context:
        prompt = context.run(TOKENS)
    with Model(path) as model, Context(model) as context:
        single = np.concatenate([context.run([token], i) for i, token in enumerate(TOKENS)])
    assert nmse(single, prompt) < ROUNDING
    assert nmse(plain, prompt) < ROUNDING
