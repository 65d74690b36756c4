"""Which experts a token uses, and what they weigh: one function for every engine.

Plain torch on scores, so that it is the same on any device, compiles, and has gradients. It is held
against the reference (`megrez_parity.reference.route`) in tests, and shares no code with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rule:
    """How scores choose, by the names of `config.json`. K experts of E a token."""

    num_experts_per_tok: int
    scoring_func: str = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """What routers compute in: near ties are decided by the last bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def select(rule: Rule, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights `[N, K]`, float32 or wider, and ids `[N, K]`, int64, for router `logits` `[N, E]`.

    `bias` `[E]` is the layer's correction bias, or None: it takes part in choosing, never in
    weighing (DeepSeek-V3's auxiliary-loss-free balancing, arXiv 2408.15664). With `n_group` > 1 the
    experts of all but the `topk_group` groups whose two best scores sum highest are left out.
    """
    logits = at_least_float32(logits)
    scores = logits.sigmoid() if rule.scoring_func == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if rule.n_group > 1:
        grouped = choice.view(*choice.shape[:-1], rule.n_group, -1)  # [N, groups, E / groups]
        best = grouped.topk(2, -1).values.sum(-1).topk(rule.topk_group, -1).indices  # [N, kept]
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, False)
        # -inf, not 0: a bias may make every score of a kept group negative
        choice = grouped.masked_fill(left_out.unsqueeze(-1), -math.inf).flatten(-2)
    ids = choice.topk(rule.num_experts_per_tok, -1).indices
    weights = scores.gather(-1, ids)
    if rule.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * rule.routed_scaling_factor, ids
