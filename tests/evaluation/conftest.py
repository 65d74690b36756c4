"""Tasks of the pocket model's own domain, and its file opened as the harness's model."""

from __future__ import annotations

import os

# Read when the libraries are imported: nothing is fetched.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megrez_eval.gguf_lm import GgufLM
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_parity.reference import CheckpointWeights, forward
from support import eval_tasks
from support.paths import POCKET


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return eval_tasks.write(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def opened(pocket_gguf: Callable[..., Path]) -> Iterator[Callable[..., GgufLM]]:
    """opened(outtype, **options) -> a GgufLM of the pocket checkpoint."""
    made: list[GgufLM] = []

    def make(outtype: str = "f32", **options: Any) -> GgufLM:
        made.append(GgufLM(pocket_gguf(outtype), n_threads=2, **options))
        return made[-1]

    yield make
    for lm in made:
        lm.close()


@pytest.fixture(scope="session")
def reference_score() -> Callable[[list[int], int], tuple[float, bool]]:
    """reference_score(tokens, first): what the torch reference gives `tokens[first:]`, and whether
    each is the likeliest."""
    config = Checkpoint.open(POCKET).config
    weights = dict(CheckpointWeights(POCKET, torch.float64))

    def score(tokens: list[int], first: int) -> tuple[float, bool]:
        logits = forward(config, weights, torch.tensor([tokens]))[0]
        rows = logits.log_softmax(-1)[first - 1 : -1]
        wanted = torch.tensor(tokens[first:])
        total = rows.gather(1, wanted[:, None]).sum()
        return float(total), bool((rows.argmax(-1) == wanted).all())

    return score
