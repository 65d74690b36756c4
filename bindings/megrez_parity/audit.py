"""Would F16 hold this model? Its weights, and what they are multiplied with, against F16's range.

The kernels of F16 weights narrow what enters a product to F16 as well, so an activation beyond
65504 becomes infinite although no weight does. The largest activations enter down projections; the
patched llama.cpp rescales them where weights are F16, so that they fit whatever they are. Stock
llama.cpp does not, nor does any other runtime known here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion import layout
from megrez_gguf.quantization import encode
from megrez_llama import nodes
from megrez_parity.results import Activation, Audit

if TYPE_CHECKING:
    from megrez_parity.reference_store import StoredReference

_LARGEST = 65504.0
# The largest float32 below F16's normal numbers.
_SUBNORMAL = float(np.nextafter(np.float32(2.0**-14), np.float32(0)))


def audit(
    checkpoint: Checkpoint,
    reference: StoredReference,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Count what F16 would lose of the checkpoint's weights; compare activations with its range.

    Activations are `reference.maxima`, of the windows it ran on. Weights are all that an F16 file
    stores as F16, so no norm, bias or router; each is read, and `progress(bytes done, bytes in
    all)` follows. Raises CheckpointError when the checkpoint is not what its configuration requires
    or cannot be read.
    """
    config = checkpoint.config
    activations = [
        Activation(name, _enters(config, name, layer), layer if layer >= 0 else None, largest)
        for (name, layer), largest in reference.maxima.items()
    ]
    tensors = [
        tensor
        for target in layout.plan(checkpoint).targets
        if not target.f32
        for tensor in target.sources
    ]
    total, done = sum(t.nbytes for t in tensors), 0
    overflow = flushed = subnormal = 0
    for tensor in tensors:
        for raw in tensor.chunks():
            magnitude = np.abs(encode.to_f32(raw))
            some, kept, normal, beyond = (
                int(np.count_nonzero(magnitude > limit))
                for limit in (0, encode.F16_FLUSH, _SUBNORMAL, encode.F16_LIMIT)
            )
            overflow += beyond
            flushed += some - kept
            subnormal += kept - normal
            done += raw.nbytes
            if progress:
                progress(done, total)
    weights = sum(t.size for t in tensors)
    return Audit(
        activations=activations,
        overflowing_weights=overflow,
        flushed_weights=flushed,
        subnormal_weights=subnormal,
        weights=weights,
        verdict=f"{_verdict(activations, overflow)}; of {weights:,} weights {overflow:,} overflow, "
        f"{flushed:,} become 0 and {subnormal:,} keep fewer bits",
    )


def _enters(config: ModelConfig, name: str, layer: int) -> str:
    if name == "result_norm":
        return "token_embd" if config.tie_word_embeddings else "output"
    if name != "ffn_norm":
        return ", ".join(nodes.ENTERS[name])
    if not config.is_moe(layer):
        return "ffn_gate, ffn_up"
    shared = ", ffn_gate_shexp, ffn_up_shexp" if config.n_shared_experts else ""
    return f"ffn_gate_exps, ffn_up_exps{shared}"


def _verdict(activations: list[Activation], overflow: int) -> str:
    # NaN is beyond any range.
    beyond = [a for a in activations if not a.max_abs <= encode.F16_LIMIT]
    if overflow or any(a.name not in nodes.RESCALED for a in beyond):
        answer = "F16 does not hold this model"
    elif beyond:
        answer = "F16 holds this model only where down projections are rescaled, as here"
    else:
        answer = "F16 holds this model"
    worst = max(activations, key=lambda a: (math.isnan(a.max_abs), a.max_abs))
    place = "" if worst.layer is None else f" of layer {worst.layer}"
    below = worst.max_abs <= _LARGEST
    ratio = _LARGEST / (worst.max_abs or math.nan) if below else worst.max_abs / _LARGEST
    return (
        f"{answer}: the largest activation, {worst.max_abs:,.6g} ({worst.name} into "
        f"{worst.enters}{place}), is {ratio:,.{0 if ratio >= 10 else 2}f} times "
        f"{'below ' if below else ''}{_LARGEST:.0f}"
    )
