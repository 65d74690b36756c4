"""What a checkpoint must have, for every engine: the converter's own table says it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.conversion.layout import required
from megrez_gguf.errors import CheckpointError
from megrez_gguf.text import few

Weight = TypeVar("Weight")


def complete(
    weights: Iterable[tuple[str, Weight]], config: ModelConfig
) -> Iterator[tuple[str, Weight]]:
    """`weights` as they come; after the last, CheckpointError names what never came.

    Engines look whether each of their parameters got something. A pool is one parameter of many
    tensors, so they would take one without some of its experts.
    """
    lacking = set(required(config))
    for name, weight in weights:
        lacking.discard(name)
        yield name, weight
    if lacking:
        raise CheckpointError(
            f"the checkpoint lacks {len(lacking)} tensors, {few(sorted(lacking))}: download it "
            "again, and compare it with its index by megrez-gguf verify"
        )
