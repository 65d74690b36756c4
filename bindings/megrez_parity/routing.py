"""Which experts run: a candidate's routing against the reference's, and the error through depth.

Quantization moves the states that routers read, hence the scores, hence now and then which experts
come first. Whether that is all that happened is judged for the FIRST layer at which a token leaves
the reference, since everything after follows from it:

* The MARGIN is the largest difference of two of the reference's selection scores that the candidate
  turned round: its best expert dropped less its worst expert added.
* The NOISE of a layer is 3 * sqrt(2) * RMS of (choice' - choice): `choice` the reference's scores,
  `choice'` those its router gives to the state the candidate's router read, over all experts of the
  tokens still in agreement. The difference of two scores that each err by the RMS is within that.
* TIE: the margin is at most the noise. DIVERGED: it is more.
* UNFAITHFUL: the candidate's experts are not the best of `choice'`, so no error of the state
  explains them: another router, another bias, another state read.

States err with heavier tails than the normal distribution, so of a sound file some 1 in 100 first
disagreements are DIVERGED; with a wrong router, nearly all are. The noise is the file's own: where
something before the router is wrong it is large, and the NMSE of the router's input says so.

With group-limited routing, groups can trade places too. A group scores the sum of its best two, so
its noise is sqrt(2) times an expert's, and so is the margin it may have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import CheckpointWeights, Weights, limit_groups, route
from megrez_parity.results import Figure, LayerRouting

if TYPE_CHECKING:
    from megrez_parity.reference_store import StoredReference

Floats = NDArray[np.floating[Any]]
Nodes = Mapping[tuple[str, int], NDArray[Any]]

_EPSILON = float(np.finfo(np.float32).eps)
_BLOCK = 32  # neighbouring tokens taken as one observation


def routers(config: ModelConfig, checkpoint: Path) -> dict[str, Tensor]:
    """Weights and biases of all routers under their published names, in float32.

    Raises ConfigError and CheckpointError as `CheckpointWeights` does.
    """
    weights = CheckpointWeights(checkpoint)
    parts = ["weight"] + ["e_score_correction_bias"] * config.has_correction_bias
    names = [f"model.layers.{i}.mlp.gate.{part}" for i in config.moe_layers for part in parts]
    return {name: weights[name] for name in names}


def captured(nodes: Nodes, name: str, layer: int) -> NDArray[Any]:
    """One tensor of `nodes`. Raises ValueError naming it when it was not captured."""
    try:
        return nodes[name, layer]
    except KeyError:
        raise ValueError(f"{name}-{layer} was not captured") from None


@dataclass(slots=True)
class Nmse:
    """Mean squared error over the mean square of what was expected, over all arrays added."""

    error: float = 0.0
    power: float = 0.0

    def add(self, candidate: Floats, expected: Floats) -> None:
        """Take in two arrays `[rows, columns]`."""
        self.error += _squares(candidate - expected)
        self.power += _squares(expected)

    @property
    def value(self) -> float:
        """0 where both are zero, infinite for an error where zeros were expected."""
        if self.power:
            return self.error / self.power
        return math.inf if self.error else self.error


def _squares(values: Floats) -> float:
    # A row is short enough to be summed in its own dtype; their sums are not.
    rows: Floats = np.einsum("ij,ij->i", values, values)
    return float(rows.sum(dtype=np.float64))


@dataclass(slots=True)
class _Layer:
    """What is known of one MoE layer so far."""

    identical: list[NDArray[np.float64]] = field(default_factory=list)  # [rows] of each window
    overlap: list[NDArray[np.float64]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)  # of first disagreements, less rounding
    squares: float = 0.0  # of choice' - choice
    count: int = 0
    unfaithful: int = 0

    @property
    def noise(self) -> float:
        return 3 * math.sqrt(2 * self.squares / self.count) if self.count else 0.0


class RoutingComparison:
    """Collects windows of one candidate; `layers()` and `depth()` give the figures over all.

    `routers` are the reference's, from `routers`: load them once for all candidates.
    """

    def __init__(self, config: ModelConfig, routers: Weights) -> None:
        self._config, self._routers = config, routers
        self._ungrouped = replace(config, n_group=1, topk_group=1)
        self._layers = {layer: _Layer() for layer in config.moe_layers}
        self._depth = {
            name: [Nmse() for _ in range(config.num_hidden_layers)]
            for name in ("ffn_norm", "l_out")
        }
        self._largest = {
            layer: float(routers[f"model.layers.{layer}.mlp.gate.weight"].norm(dim=-1).max())
            for layer in self._layers
        }

    def add(self, reference: StoredReference, window: int, nodes: Nodes) -> None:
        """Take in window number `window` of `reference`, and what the candidate computed for it.

        `nodes` holds what `megrez_llama.nodes.ROUTING` names of every layer, by name and layer:
        states `[S, D]` and expert ids `[S, K]`, in the last layer perhaps of the last positions
        only. Raises ValueError for one that is missing.
        """
        for name, by_layer in self._depth.items():
            for layer, nmse in enumerate(by_layer):
                state = captured(nodes, name, layer)
                nmse.add(state, reference.state(name, layer, window)[-len(state) :])
        agreed = torch.ones(len(nodes["ffn_norm", 0]), dtype=torch.bool)  # in all layers so far
        for layer, found in self._layers.items():
            ids = _tensor(captured(nodes, "ffn_moe_topk", layer)).long()
            rows, reads = slice(-len(ids), None), self._reads(layer)
            choice = _tensor(reference.scores(layer, window)[rows])  # [rows, E]
            expected, chosen = self._best(choice), _members(ids, choice)  # [rows, E] each
            same = (chosen == expected).all(-1)
            found.identical.append(same.double().numpy())
            found.overlap.append(((chosen & expected).sum(-1) / ids.shape[-1]).double().numpy())

            mine, rounding = self._scores(layer, nodes["ffn_norm", reads][rows])
            kept = self._kept(mine, chosen, rounding)
            worst = mine.masked_fill(~kept, -math.inf).masked_fill(~chosen, math.inf).amin(-1)
            rival = mine.masked_fill(~kept | chosen, -math.inf).amax(-1)
            faithful = worst >= rival - 2 * rounding
            faithful &= chosen.sum(-1) == self._config.num_experts_per_tok
            found.unfaithful += int((~faithful).sum())

            so_far = agreed[rows]
            usable = kept & (choice > -math.inf) & so_far[:, None]
            found.squares += float((mine - choice)[usable].double().square().sum())
            found.count += int(usable.sum())
            first = so_far & ~same
            if first.any():
                full = choice[first]
                if self._config.n_group > 1:
                    state = reference.state("ffn_norm", reads, window)[rows][first.numpy()]
                    full = self._scores(layer, state)[0]
                margin = self._margin(full, choice[first] > -math.inf, kept[first], chosen[first])
                found.margins += (margin - 2 * rounding[first]).tolist()
            agreed[rows] &= same

    def layers(self) -> list[LayerRouting]:
        """One entry for every MoE layer. Raises ValueError before the first window."""
        return [self._result(layer, found) for layer, found in self._layers.items()]

    def depth(self) -> dict[str, list[float]]:
        """NMSE of the states "ffn_norm" and "l_out" against the reference, after each layer."""
        return {name: [nmse.value for nmse in by_layer] for name, by_layer in self._depth.items()}

    def _result(self, layer: int, found: _Layer) -> LayerRouting:
        if not found.identical:
            raise ValueError("nothing was compared")
        ties = sum(margin <= found.noise for margin in found.margins)
        error = self._depth["ffn_norm"]
        return LayerRouting(
            layer=layer,
            identical=_figure(found.identical),
            overlap=_figure(found.overlap),
            first_ties=ties,
            first_diverged=len(found.margins) - ties,
            noise=found.noise,
            unfaithful=found.unfaithful,
            input_nmse=error[self._reads(layer)].value,
            own_nmse=error[layer].value,
        )

    def _reads(self, layer: int) -> int:
        """The layer whose state the router of `layer` reads."""
        return layer - 1 if self._config.pre_gate and layer else layer

    def _best(self, choice: Tensor) -> Tensor:
        """Which experts `[rows, E]` the scores `choice` `[rows, E]` select."""
        return _members(choice.topk(self._config.num_experts_per_tok, -1).indices, choice)

    def _scores(self, layer: int, state: Floats) -> tuple[Tensor, Tensor]:
        """Selection scores `[rows, E]` for `state` `[rows, D]`, no group left out.

        And `[rows]`, what rounding to float32 may change of one: five standard deviations of the
        error of D products summed in 8 lanes, sqrt(D / 192) epsilons of the product of the two
        norms. A score moves by at most half of what its logit does.
        """
        scores: dict[str, Tensor] = {}
        emit = lambda name, layer, tensor: scores.update({name: tensor[0]})  # noqa: E731
        states = _tensor(state).float()
        route(self._ungrouped, self._routers, layer, states[None], emit)
        choice = scores["ffn_moe_probs_biased"]
        logit = 5 * math.sqrt(states.shape[-1] / 192) * states.norm(dim=-1) * self._largest[layer]
        return choice, _EPSILON * (logit / 2 + 4 * choice.abs().amax(-1))

    def _kept(self, choice: Tensor, chosen: Tensor, rounding: Tensor) -> Tensor:
        """Which experts `[rows, E]` group-limited routing by `choice` leaves to choose from.

        Between groups that rounding can turn round, those of experts in `chosen` are kept.
        """
        if self._config.n_group == 1:
            return torch.ones_like(chosen)
        favoured = self._grouped(chosen).any(-1, keepdim=True).expand_as(self._grouped(chosen))
        raised = choice + 2 * rounding[:, None] * favoured.flatten(-2)
        return limit_groups(raised, self._config.n_group, self._config.topk_group) != -math.inf

    def _margin(self, full: Tensor, expected: Tensor, kept: Tensor, chosen: Tensor) -> Tensor:
        """The largest difference `[rows]` of the reference's scores that was turned round.

        `full` `[rows, E]` are its scores, no group left out. It had the experts `expected` to
        choose from, the candidate had `kept` and took `chosen`, all `[rows, E]`. Infinite where
        those are not among the kept.
        """
        wanted = self._best(full.masked_fill(~kept, -math.inf))
        margin = _turned(full, wanted & ~chosen, chosen & ~wanted)
        if self._config.n_group > 1:
            scores = self._grouped(full).topk(2, -1).values.sum(-1)  # [rows, groups]
            before, after = (self._grouped(mask).any(-1) for mask in (expected, kept))
            by_group = _turned(scores, before & ~after, after & ~before) / math.sqrt(2)
            margin = torch.maximum(margin, by_group)
        return margin.masked_fill((chosen & ~kept).any(-1), math.inf)

    def _grouped(self, values: Tensor) -> Tensor:
        # [rows, E] -> [rows, groups, E / groups]
        return values.view(len(values), self._config.n_group, -1)


def _turned(scores: Tensor, lost: Tensor, won: Tensor) -> Tensor:
    """By how much `[rows]` the best of `lost` was above the worst of `won`, all `[rows, n]`.

    0 where there are neither, infinite where only one: nothing was turned round then.
    """
    best = scores.masked_fill(~lost, -math.inf).amax(-1)
    worst = scores.masked_fill(~won, math.inf).amin(-1)
    one = lost.any(-1) != won.any(-1)
    return (best - worst).clamp(min=0).masked_fill(one, math.inf)


def _members(ids: Tensor, like: Tensor) -> Tensor:
    """Which experts `[rows, E]` are among `ids` `[rows, K]`; `like` is `[rows, E]`."""
    return torch.zeros_like(like, dtype=torch.bool).scatter(-1, ids, True)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))  # a copy: mapped files are not writable


def _figure(windows: list[NDArray[np.float64]]) -> Figure:
    """Mean of a number from 0 to 1 a token, `[rows]` of each window, and its 95% interval.

    By Student's distribution from the means of blocks of neighbours, whose tokens are alike.
    Where no token differs, the interval ends where as many would still agree 2.5% of the time.
    """
    values = np.concatenate(windows)
    mean = float(values.mean())
    if values.min() == values.max():
        end = 0.025 ** (1 / len(values))
        return Figure(mean, min(mean, end), max(mean, 1 - end))
    starts = [np.arange(0, len(window), _BLOCK) for window in windows]
    sums = np.concatenate(
        [np.add.reduceat(w - mean, s) for w, s in zip(windows, starts, strict=True)]
    )
    freedom = max(len(sums) - 1, 1)
    variance = float(np.square(sums).sum()) * len(sums) / freedom
    # Student's quantile, from the normal one: Abramowitz and Stegun 26.7.5.
    half = (1.96 + 2.372 / freedom + 2.823 / freedom**2) * math.sqrt(variance) / len(values)
    return Figure(mean, max(mean - half, 0.0), min(mean + half, 1.0))
