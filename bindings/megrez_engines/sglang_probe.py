"""What layers compute, taken out of SGLang's processes: for parity, not for serving.

SGLang hangs `keep` on modules (`forward_hooks`), in each process that has some. Modules must run as
they are written: no CUDA graphs. Only SGLang and the worker import this file.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.logits_processor import LogitsMetadata, LogitsProcessor
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.runtime_context import get_parallel

from megrez_engines.sglang_model import (
    MegrezMoeDecoderLayer,
    MegrezMoeModel,
    MegrezMoeRouter,
)


def hooks(folder: Path) -> list[dict[str, Any]]:
    """SGLang's `forward_hooks`: write into `folder` what each pass through the model computes."""
    factory = f"{__name__}:keep"
    return [
        {
            "name": "parity",
            "target_modules": ["*"],
            "hook_factory": factory,
            "config": {"folder": str(folder)},
        }
    ]


def keep(config: dict[str, Any]) -> Callable[[torch.nn.Module, tuple[Any, ...], Any], None]:
    """A forward hook that writes FOLDER/NAME.LAYER.COUNT.npy, COUNT in the order of passes.

    "logits" `[N, V]`, "ffn_norm" and "l_out" `[N, D]`, "ffn_moe_topk" `[N, K]`; and what this
    process holds of the weights, FOLDER/weights.PART.STAGE.RANK, in bytes.
    """
    folder, count = Path(config["folder"]), itertools.count()

    def save(name: str, layer: int, tensor: torch.Tensor) -> None:
        if get_parallel().tp_rank == 0:  # the others have the same
            kind = torch.int32 if name == "ffn_moe_topk" else torch.float32
            array = tensor.detach().to("cpu", kind).numpy()
            np.save(folder / f"{name}.{layer}.{next(count):06}.npy", array)

    def weigh(name: str, module: torch.nn.Module) -> None:
        here, size = get_parallel(), sum(parameter.nbytes for parameter in module.parameters())
        (folder / f"weights.{name}.{here.pp_rank}.{here.tp_rank}").write_text(str(size))

    def hook(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, MegrezMoeDecoderLayer):
            (x, residual, h), layer = output, module.self_attn.attn.layer_id
            save("l_out", layer, x + residual)
            save("ffn_norm", layer, h)
        elif isinstance(module, MegrezMoeRouter):
            save("ffn_moe_topk", module.topk.layer_id, output.topk_ids)
        elif isinstance(module, LogitsProcessor):  # it was asked for the last position's only
            _, states, head, batch = given
            asked = LogitsMetadata.from_forward_batch(batch)
            save("logits", 0, module._get_logits(states, head, asked, use_logits_buffer=False))
            if isinstance(head, ParallelLMHead):  # and no embeddings, which are counted below
                weigh("head", head)
        elif isinstance(module, MegrezMoeModel):
            weigh("layers", module)

    return hook


def take(folder: Path) -> dict[tuple[str, int], np.ndarray[Any, Any]]:
    """What was written by name and layer, chunks of a prompt joined; the files are gone then."""
    parts: dict[tuple[str, int], list[np.ndarray[Any, Any]]] = {}
    for path in sorted(folder.glob("*.npy"), key=lambda p: int(p.name.split(".")[2])):
        name, layer, _, _ = path.name.split(".")
        parts.setdefault((name, int(layer)), []).append(np.load(path))
        path.unlink()
    return {key: np.concatenate(arrays) for key, arrays in parts.items()}
