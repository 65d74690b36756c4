"""Routing agreement against a transcription of its definitions, token by token, and by hand."""

import math
from collections import defaultdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.results import LayerRouting
from megrez_parity.routing import RoutingComparison, routers
from support.traces import GROUPS, SOME_IN_LOOP, WINDOWS, Nodes, Stored, candidate, model, noisy

GATE = "model.layers.{}.mlp.gate.{}"


def compare(
    config: ModelConfig, folder: Path, weights: dict[str, Tensor], other: dict[str, Tensor]
) -> RoutingComparison:
    """A candidate of weights `other`, over all windows."""
    comparison = RoutingComparison(config, routers(config, folder))
    reference: Any = Stored(config, weights)
    for window in range(len(WINDOWS)):
        comparison.add(reference, window, candidate(config, other, window))
    return comparison


@pytest.mark.parametrize("changes", SOME_IN_LOOP, ids=str)
def test_the_same_model_agrees(changes: dict[str, Any], tmp_path: Path) -> None:
    config, folder, weights = model(changes, tmp_path)
    comparison = compare(config, folder, weights, weights)
    assert [layer.layer for layer in comparison.layers()] == list(config.moe_layers)
    for layer in comparison.layers():
        assert layer.identical.value == layer.identical.high == layer.overlap.value == 1
        assert 0.9 < layer.identical.low < 1
        assert (layer.first_ties, layer.first_diverged, layer.unfaithful) == (0, 0, 0)
        assert layer.noise < 1e-5
        assert max(layer.input_nmse, layer.own_nmse) < 1e-13
    for errors in comparison.depth().values():
        assert len(errors) == config.num_hidden_layers
        assert max(errors) < 1e-13


# --- the definitions, one token at a time, in plain Python --------------------------------------


def selection(config: ModelConfig, weights: dict[str, Tensor], layer: int, h: Any) -> list[float]:
    """Scores that select, for the state `h` of one token, no group left out."""
    logits = (weights[GATE.format(layer, "weight")].numpy() @ np.float64(h)).tolist()
    if config.scoring_func == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(map(math.exp, logits)) for x in logits]
    if config.has_correction_bias:
        bias = weights[GATE.format(layer, "e_score_correction_bias")].tolist()
        scores = [s + b for s, b in zip(scores, bias, strict=True)]
    return scores


def group_scores(config: ModelConfig, scores: list[float]) -> list[float]:
    size = len(scores) // config.n_group
    return [sum(sorted(scores[i : i + size])[-2:]) for i in range(0, len(scores), size)]


def open_experts(config: ModelConfig, scores: list[float]) -> set[int]:
    if config.n_group == 1:
        return set(range(len(scores)))
    size, by_group = len(scores) // config.n_group, group_scores(config, scores)
    kept = sorted(range(config.n_group), key=lambda g: -by_group[g])[: config.topk_group]
    return {g * size + i for g in kept for i in range(size)}


def best(config: ModelConfig, scores: list[float], among: set[int]) -> set[int]:
    return set(sorted(among, key=lambda e: -scores[e])[: config.num_experts_per_tok])


def turned(scores: list[float], lost: set[int], won: set[int]) -> float:
    return max((scores[a] - scores[b] for a, b in product(lost, won)), default=0.0)


def by_hand(
    config: ModelConfig, weights: dict[str, Tensor], other: dict[str, Tensor]
) -> dict[int, dict[str, float]]:
    reference = Stored(config, weights)
    nodes = [candidate(config, other, window) for window in range(len(WINDOWS))]
    left: set[tuple[int, int]] = set()  # (window, position) of tokens that left the reference
    found: dict[int, dict[str, float]] = {}
    for layer in config.moe_layers:
        reads = layer - 1 if config.pre_gate and layer > 0 else layer
        errors, margins, leaving = [], [], set()
        tally: dict[str, float] = defaultdict(float)
        for window, node in enumerate(nodes):
            ids = node["ffn_moe_topk", layer]
            for row in range(-len(ids), 0):
                token = window, row + len(WINDOWS[0])
                full = selection(
                    config, weights, layer, reference.state("ffn_norm", reads, window)[row]
                )
                mine = selection(config, weights, layer, node["ffn_norm", reads][row])
                there, here = open_experts(config, full), open_experts(config, mine)
                expected, chosen = best(config, full, there), set(ids[row].tolist())
                tally["tokens"] += 1
                tally["identical"] += chosen == expected
                tally["overlap"] += len(chosen & expected) / len(chosen)
                tally["unfaithful"] += chosen != best(config, mine, here)
                if token in left:
                    continue
                errors += [mine[e] - full[e] for e in there & here]
                if chosen == expected:
                    continue
                leaving.add(token)
                wanted = best(config, full, here)
                margin = turned(full, wanted - chosen, chosen - wanted)
                if config.n_group > 1:
                    size = len(full) // config.n_group
                    before, after = ({e // size for e in x} for x in (there, here))
                    groups = turned(group_scores(config, full), before - after, after - before)
                    margin = max(margin, groups / math.sqrt(2))
                margins.append(margin if chosen <= here else math.inf)
        left |= leaving
        noise = 3 * math.sqrt(2 * np.mean(np.square(errors))) if errors else 0.0
        found[layer] = {
            "identical": tally["identical"] / tally["tokens"],
            "overlap": tally["overlap"] / tally["tokens"],
            "unfaithful": tally["unfaithful"],
            "noise": noise,
            "first_ties": sum(m <= noise for m in margins),
            "first_diverged": sum(m > noise for m in margins),
            "input_nmse": nmse(config, reference, nodes, "ffn_norm", reads),
            "own_nmse": nmse(config, reference, nodes, "ffn_norm", layer),
        }
    return found


def nmse(
    config: ModelConfig, reference: Stored, nodes: list[Nodes], name: str, layer: int
) -> float:
    error = power = 0.0
    for window, node in enumerate(nodes):
        mine = np.asarray(node[name, layer], np.float64)
        expected = reference.state(name, layer, window)[-len(mine) :]
        error += np.square(mine - expected).sum()
        power += np.square(expected).sum()
    return error / power


def check(found: list[LayerRouting], expected: dict[int, dict[str, float]]) -> None:
    assert [layer.layer for layer in found] == list(expected)
    for layer in found:
        want = expected[layer.layer]
        for name in ("first_ties", "first_diverged", "unfaithful"):
            assert getattr(layer, name) == want[name], (layer.layer, name)
        assert layer.noise == pytest.approx(want["noise"], rel=1e-3, abs=1e-6)  # scores are float32
        for name in ("input_nmse", "own_nmse"):
            assert getattr(layer, name) == pytest.approx(want[name], rel=1e-3, abs=1e-12)
        for figure in (layer.identical, layer.overlap):
            assert 0 <= figure.low <= figure.value <= figure.high <= 1
        assert layer.identical.value == pytest.approx(want["identical"])
        assert layer.overlap.value == pytest.approx(want["overlap"])


@pytest.mark.parametrize("changes", SOME_IN_LOOP, ids=str)
@pytest.mark.parametrize("size", [0.05, 0.5])
def test_equals_the_definitions(changes: dict[str, Any], size: float, tmp_path: Path) -> None:
    config, folder, weights = model(changes, tmp_path)
    other = noisy(weights, size)
    comparison = compare(config, folder, weights, other)
    check(comparison.layers(), by_hand(config, weights, other))
    reference = Stored(config, weights)
    nodes = [candidate(config, other, window) for window in range(len(WINDOWS))]
    for name, errors in comparison.depth().items():
        expected = [
            nmse(config, reference, nodes, name, i) for i in range(config.num_hidden_layers)
        ]
        assert errors == pytest.approx(expected, rel=1e-5)
    if config.num_experts_per_tok < config.n_routed_experts:
        layers = comparison.layers()
        assert sum(layer.first_ties + layer.first_diverged for layer in layers) > 0
        assert sum(layer.unfaithful for layer in layers) == 0


@pytest.mark.parametrize("changes", [{}, {"pre_gate": False}, GROUPS], ids=str)
@pytest.mark.parametrize("part", ["weight", "e_score_correction_bias"])
def test_another_router(changes: dict[str, Any], part: str, tmp_path: Path) -> None:
    config, folder, weights = model(changes, tmp_path)
    mine, theirs = GATE.format(2, part), GATE.format(4, part)
    other = weights | {mine: weights[theirs], theirs: weights[mine]}
    layers = {x.layer: x for x in compare(config, folder, weights, other).layers()}
    check(list(layers.values()), by_hand(config, weights, other))
    assert [i for i, x in layers.items() if x.unfaithful] == [2, 4]
    # Up to the router all is well, so the noise explains nothing.
    assert layers[2].first_ties == 0
    assert layers[2].first_diverged == layers[2].unfaithful > 50


def test_another_state_read(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    comparison = RoutingComparison(config, routers(config, folder))
    reference: Any = Stored(config, weights)
    for window in range(len(WINDOWS)):
        nodes = candidate(config, weights, window)
        for layer in config.moe_layers[:-1]:
            gate, bias = (
                weights[GATE.format(layer, part)] for part in ("weight", "e_score_correction_bias")
            )
            own = torch.from_numpy(nodes["ffn_norm", layer]).double()
            nodes["ffn_moe_topk", layer] = (
                ((own @ gate.T).sigmoid() + bias).topk(3)[1].int().numpy()
            )
        comparison.add(reference, window, nodes)
    assert all(layer.unfaithful > 50 for layer in comparison.layers()[:-1])


# --- one layer whose router is the identity: scores are what the states say ----------------------

IDENTITY: dict[str, Any] = {
    "hidden_size": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "topk_method": "greedy",
}


class Given:
    """A reference of given scores, whose states are the logits."""

    def __init__(self, scores: NDArray[np.float64]) -> None:
        self._scores = scores

    def scores(self, layer: int, window: int) -> NDArray[np.float64]:
        return self._scores

    def state(self, name: str, layer: int, window: int) -> NDArray[np.float64]:
        logits: NDArray[np.float64] = np.log(self._scores / (1 - self._scores))
        return logits


def judged(
    reference: NDArray[np.float64], mine: NDArray[np.float64], ids: NDArray[np.int32]
) -> LayerRouting:
    """A candidate whose scores are `mine` and which chose `ids`."""
    from support.random_checkpoint import SMALL

    config = ModelConfig.from_dict(SMALL | IDENTITY)
    comparison = RoutingComparison(config, {GATE.format(0, "weight"): torch.eye(8)})
    given: Any = Given(reference)
    with np.errstate(invalid="ignore"):
        state = np.log(mine / (1 - mine)).astype(np.float32)
    comparison.add(
        given, 0, {("ffn_norm", 0): state, ("l_out", 0): state, ("ffn_moe_topk", 0): ids}
    )
    (layer,) = comparison.layers()
    return layer


def top(scores: NDArray[np.float64], count: int = 2) -> NDArray[np.int32]:
    return np.argsort(-scores, -1)[:, :count].astype(np.int32)


# 200 tokens whose scores all move by 0.001 either way: noise 0.00424. Experts 0 and 1 lead by far.
CALM = np.tile([0.8, 0.7, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1], (200, 1))
MOVED = CALM + 0.001 * np.tile([1, -1], (200, 4))


@pytest.mark.parametrize(
    ("gap", "verdict"), [(1e-6, (1, 0)), (0.004, (1, 0)), (0.0045, (0, 1)), (0.2, (0, 1))]
)
def test_tie_or_diverged(gap: float, verdict: tuple[int, int]) -> None:
    reference, mine = CALM.copy(), MOVED.copy()
    reference[7, 2] = 0.7 - gap  # second and third are this close
    mine[7, 2] = reference[7, 2] + 0.001
    ids = top(mine)
    ids[7] = [0, 2]
    layer = judged(reference, mine, ids)
    assert layer.noise == pytest.approx(3 * math.sqrt(2) * 0.001, rel=1e-3)
    assert (layer.first_ties, layer.first_diverged) == verdict
    assert layer.identical.value == 1 - 1 / 200
    assert layer.overlap.value == 1 - 0.5 / 200
    assert layer.identical.low < layer.identical.value < layer.identical.high
    # Its own scores say 1 before 2 by the gap less what they moved.
    assert layer.unfaithful == (gap > 0.002)


def test_equal_scores_may_go_either_way() -> None:
    reference = CALM.copy()
    reference[:, 2] = 0.7
    ids = top(CALM)
    ids[::2, 1] = 2
    layer = judged(reference, reference, ids)
    assert layer.identical.value < 1
    assert layer.first_diverged == layer.unfaithful == 0
    assert layer.first_ties + round(200 * layer.identical.value) == 200


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_experts(count: int) -> None:
    layer = judged(CALM, CALM, top(CALM, count))
    assert layer.identical.value == 0
    assert (layer.first_ties, layer.first_diverged, layer.unfaithful) == (0, 200, 200)


def test_nan_is_no_tie() -> None:
    mine = MOVED.copy()
    mine[3] = np.nan
    ids = top(MOVED)
    ids[3] = [6, 7]
    layer = judged(CALM, mine, ids)
    assert (layer.first_ties, layer.first_diverged, layer.unfaithful) == (0, 1, 1)
    assert math.isnan(layer.noise)
    assert math.isnan(layer.own_nmse)


def test_neighbours_that_err_together_are_known_less_well() -> None:
    scattered, together = top(CALM), top(CALM)
    scattered[::10, 0] = 7
    together[:20, 0] = 7
    spread, block = (judged(CALM, MOVED, ids).identical for ids in (scattered, together))
    assert spread.value == block.value == 0.9
    assert spread.high - spread.low < 0.5 * (block.high - block.low)
    assert block.low > 0.5


def test_nothing_compared(tmp_path: Path) -> None:
    config, folder, weights = model({}, tmp_path)
    comparison = RoutingComparison(config, routers(config, folder))
    with pytest.raises(ValueError, match="nothing was compared"):
        comparison.layers()
    reference: Any = Stored(config, weights)
    nodes = candidate(config, weights, 0)
    del nodes["ffn_moe_topk", 3]
    with pytest.raises(ValueError, match="ffn_moe_topk-3 was not captured"):
        comparison.add(reference, 0, nodes)
