"""What layers compute, taken out of vLLM's worker processes: for parity, not for serving.

vLLM mixes `Probe` into its workers (`worker_extension_cls`). Layers must run as they are written:
`enforce_eager`, and no pipeline stages. Only vLLM imports this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank

from megrez_engines.vllm_model import MegrezMoeMLP


class Probe:
    """Methods for `LLM.collective_rpc`."""

    model_runner: Any  # the worker's

    def probe_weights(self) -> int:
        """Bytes of this rank's weights, each counted once."""
        size: int = self.model_runner.model.weight_bytes
        return size

    def probe_start(self) -> None:
        """Keep from now on what `probe_take` gives."""
        self._taken: dict[tuple[str, int], list[torch.Tensor]] = {}
        for i, layer in enumerate(self.model_runner.model.model.layers):
            layer.register_forward_hook(self._keep_states(i))
            if isinstance(layer.mlp, MegrezMoeMLP):
                layer.mlp.experts.router.set_capture_fn(self._keep("ffn_moe_topk", i))

    def _keep(self, name: str, layer: int) -> Any:
        return lambda tensor: self._taken.setdefault((name, layer), []).append(tensor.clone())

    def _keep_states(self, layer: int) -> Any:
        def hook(_: Any, __: Any, output: tuple[torch.Tensor, ...]) -> None:
            x, residual, h = output
            self._keep("l_out", layer)(x + residual)
            self._keep("ffn_norm", layer)(h)

        return hook

    def probe_clear(self) -> None:
        """Forget what was kept."""
        self._taken.clear()

    def probe_take(self, to: str, rows: int) -> list[tuple[str, int]]:
        """Write the first `rows` of each state to TO.NAME.LAYER.npy, and tell which there are.

        Ranks of tensor parallelism have the same; the first writes.
        """
        if get_tensor_model_parallel_rank():
            return []
        for (name, layer), parts in self._taken.items():
            joined = torch.cat(parts)[:rows].cpu()
            kind = torch.int32 if name == "ffn_moe_topk" else torch.float32
            np.save(f"{to}.{name}.{layer}.npy", joined.to(kind).numpy())
        return [*self._taken]
