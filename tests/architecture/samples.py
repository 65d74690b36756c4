"""A tiny configuration, and a checkpoint next to its conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from make_checkpoint import FULL
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import CheckpointWeights, forward

# One dense layer, a full group of three, a short one of two. Rows of 256 take K-quants; 96 do not.
TINY: dict[str, Any] = FULL | {
    "hidden_size": 256,
    "intermediate_size": 160,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 96,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "vocab_size": 384,
}
TOKENS: list[int] = np.random.default_rng(7).integers(0, TINY["vocab_size"], 48).tolist()


@dataclass(frozen=True)
class Sample:
    """A checkpoint and its F32 conversion."""

    checkpoint: Path
    gguf: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_folder(self.checkpoint)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return dict(CheckpointWeights(self.checkpoint, torch.float64))

    def reference(
        self,
        tokens: list[int] = TOKENS,
        weights: dict[str, torch.Tensor] | None = None,
        trace: Callable[[str, int, torch.Tensor], None] | None = None,
    ) -> np.ndarray[Any, Any]:
        """The reference's float64 logits `[S, V]`."""
        ids = torch.tensor(tokens)[None]
        return forward(self.config, weights or self.weights, ids, trace)[0].numpy()
