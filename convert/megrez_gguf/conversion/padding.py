"""Zeros after the rows of a pool's down projections, so that blocks of 256 weights fit.

Experts of Megrez2 are 1408 wide: five and a half blocks of a K- or IQ-quant. With 128 zeros after
each row there are 9% more weights, of types that take half the bits of those whose blocks fit. The
patched llama.cpp takes the width of these tensors from the file, and puts zeros after what enters
them: see `llama_model_experts::row_size`. No other tensor may be wider than the model is.
"""

from __future__ import annotations

import re
from dataclasses import replace

from megrez_gguf.conversion.stream import Item

BLOCK = 256
_PADDABLE = re.compile(r"blk\.\d+\.ffn_down_exps\.weight")


def padded(item: Item) -> Item:
    """`item` with rows of whole blocks, if it is a pool's down projections; otherwise `item`."""
    if not _PADDABLE.fullmatch(item.name):
        return item
    return replace(item, shape=(*item.shape[:-1], -(-item.shape[-1] // BLOCK) * BLOCK))
