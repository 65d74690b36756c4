"""A checkpoint next to its conversion, and what the reference makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import CheckpointWeights, forward
from support.configurations import FOR_K_QUANTS

TOKENS: list[int] = np.random.default_rng(7).integers(0, FOR_K_QUANTS["vocab_size"], 48).tolist()


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
