"""Where it breaks: tensor by tensor through the layers, what each adds to a candidate's error.

The TOTAL error of a tensor is against the reference. Its LOCAL error is against the reference's
layer fed with what the candidate fed its own: the residual stream that the layer before left (its
`l_out`) and, with pre-gate, the state that the layer before read (its `ffn_norm`). Errors of the
layers before are in both and cancel, so a layer that is wrong stands out and one that is only fed
wrong does not. Within a layer, the first tensor to err is the one to look at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_llama.nodes import TRACED
from megrez_parity.reference import CheckpointWeights, Weights, block, embed, head, rotary
from megrez_parity.reference_store import precision
from megrez_parity.results import Trace, TracePoint
from megrez_parity.routing import Nmse, Nodes, captured


@torch.no_grad()
def trace(
    config: ModelConfig,
    checkpoint: Path,
    windows: Sequence[NDArray[np.int32]],
    candidates: Mapping[str, Sequence[Nodes]],
    tolerances: Mapping[str, Mapping[str, float]],
) -> dict[str, Trace]:
    """The trace of each candidate, under the names `candidates` gives them.

    `windows` are token ids, `[S]` each, all as long. `candidates[name][w]` holds what that
    candidate computed for window w: `TRACED` by name and layer, `[S, columns]` each, in the last
    layer and after it perhaps of the last positions only; one layer is read at a time, so the
    arrays may be mapped files. `tolerances[name]` bounds local errors by tensor name.

    Takes as long as the reference's forward pass over the windows, for itself and again for each
    candidate. All go through a layer before the next is read, so one group's experts are in memory
    at a time. Raises CheckpointError when the checkpoint cannot be read, ValueError for a tensor
    that was not captured.
    """
    stored = CheckpointWeights(checkpoint)
    weights: Weights = stored  # upcast at each use
    if precision(stored) == torch.float64:
        weights = dict(CheckpointWeights(checkpoint, torch.float64))
    found = {name: _Candidate(config, nodes) for name, nodes in candidates.items()}
    x = embed(weights, torch.from_numpy(np.stack(windows)).long())  # [W, S, D]
    for candidate in found.values():
        candidate.compare("embd", -1, x, x)
    rope = rotary(config, x.shape[1], x.dtype)
    previous = None
    for layer in range(config.num_hidden_layers):
        stored.reopen()  # what the layer before read is mapped, and counts as memory
        true = _Seen()
        x, previous = block(config, weights, layer, x, previous, rope, true)
        for candidate in found.values():
            entering = candidate.states("l_out" if layer else "embd", layer - 1, x.dtype)
            read = candidate.states("ffn_norm", layer - 1, x.dtype) if layer else None
            own = _Seen()
            block(config, weights, layer, entering, read, rope, own)
            for name in own:
                candidate.compare(name, layer, true[name], own[name])
    for candidate in found.values():
        left = candidate.states("l_out", config.num_hidden_layers - 1, x.dtype)
        for w in range(len(windows)):  # logits of all windows would take too much memory
            true, own = _Seen(), _Seen()
            rows = slice(-left.shape[1], None)
            true["result_output"] = head(config, weights, x[w : w + 1, rows], true)
            own["result_output"] = head(config, weights, left[w : w + 1], own)
            for name in own:
                candidate.compare(name, -1, true[name], own[name], first=w)
    return {name: c.trace(tolerances.get(name, {})) for name, c in found.items()}


class _Seen(dict[str, Tensor]):
    """What the reference emits of `TRACED`, in that order."""

    def __call__(self, name: str, layer: int, tensor: Tensor) -> None:
        if name in TRACED:
            self[name] = tensor


class _Candidate:
    """One candidate's tensors and their errors so far."""

    def __init__(self, config: ModelConfig, nodes: Sequence[Nodes]) -> None:
        self._nodes = nodes
        self._errors: dict[tuple[str, int], tuple[Nmse, Nmse]] = {}  # total and local
        # Without shared experts a graph has the experts' sum as `ffn_out` alone.
        self._absent = set() if config.n_shared_experts else {"ffn_moe_out"}

    def states(self, name: str, layer: int, dtype: torch.dtype) -> Tensor:
        """A tensor of all windows, `[W, rows, columns]`."""
        arrays = [captured(nodes, name, layer) for nodes in self._nodes]
        return torch.from_numpy(np.stack(arrays)).to(dtype)

    def compare(self, name: str, layer: int, true: Tensor, own: Tensor, first: int = 0) -> None:
        """Take in a tensor of windows `first`, ...: the reference's `[windows, S, columns]`.

        `true` is of its own forward pass, `own` of its layer with the candidate's input.
        """
        if name in self._absent:
            return
        errors = self._errors.setdefault((name, layer), (Nmse(), Nmse()))
        for nodes, *expected in zip(self._nodes[first:], true.numpy(), own.numpy(), strict=False):
            mine = captured(nodes, name, layer)
            for error, values in zip(errors, expected, strict=True):
                values = values[-len(mine) :]
                # Scores of the groups of experts that either leaves out: both say no more.
                kept = (values != -np.inf) & (mine != -np.inf)
                error.add(np.where(kept, mine, 0), np.where(kept, values, 0))

    def trace(self, tolerances: Mapping[str, float]) -> Trace:
        return Trace(
            [
                TracePoint(name, layer, total.value, local.value, tolerances.get(name))
                for (name, layer), (total, local) in self._errors.items()
            ]
        )
