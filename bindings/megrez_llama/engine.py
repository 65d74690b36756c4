"""llama.cpp as the parity checks need it: exact settings, logits and the states on their way.

Levels are compared for their weights, so everything else is kept exact: CPU only, a float32 KV
cache, no flash attention. Activations are still narrowed by the kernels of the weights' type, as
in any run of such a file.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megrez_llama import nodes
from megrez_llama.errors import GGUFError
from megrez_llama.expert_store import cache_override
from megrez_llama.ggml import Tensor, library, read
from megrez_llama.logs import log
from megrez_llama.patched import require_gpu, require_patched
from megrez_llama.threads import thread_count

Watch = Callable[[Tensor, bool], bool]
"""Called for each node of the graph: before it is computed with True, to say whether to stop at
it; if so, called again with False once it is computed, its sources still being there."""

Nodes = dict[tuple[str, int], NDArray[Any]]
"""Captured tensors by name and layer; layer -1 for those outside layers."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What one window gives: `logits` `[S - first, V]`, and the captured nodes.

    Nodes are float32 `[rows, D]`: `rows` is S, or S - first where only the rows that outputs need
    are computed, in the last layer from its ffn_inp on. ffn_moe_topk holds int32 `[rows, K]`,
    ffn_moe_weights `[rows, K]`, ffn_moe_swiglu `[rows, K, F]`.
    """

    logits: NDArray[np.float32]
    nodes: Nodes


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """Rows of all batches; those of one are not copied, as a window's nodes take 800 MB."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _failure(path: Path, doing: str) -> GGUFError:
    reason = log.take_errors() or "llama.cpp gives no reason"
    return GGUFError(f"{path}: llama.cpp cannot {doing} it: {reason}")


class Engine:
    """One GGUF file, loaded to give the logits of whole windows of at most `context` tokens.

    With `expert_cache`, only so many bytes of experts are in memory at once; `expert_margin` is as
    for `expert_store.cache_override`. A window is evaluated in one batch, or with `batch_size` in
    batches of so many tokens: 1 is how answers are. `n_threads` is all CPUs this process may run
    on unless given. `n_gpu_layers` are computed by a GPU, with their part of the KV cache; -1 is
    all. A context manager; the model is freed on leaving.

    Raises GGUFError when the file is missing or cannot be loaded, RuntimeUnavailableError when
    llama_cpp is missing or not the patched one or has no GPU for `n_gpu_layers`, MegrezError for
    more threads than ggml can use.
    """

    def __init__(
        self,
        path: Path,
        context: int,
        *,
        expert_cache: int | None = None,
        expert_margin: float = 0.0,
        batch_size: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
    ) -> None:
        self.path, self.context = path, context
        self._batch_size = batch_size or context
        self._n_gpu_layers = n_gpu_layers
        self._n_threads = thread_count(n_threads, _affinity())
        self._llama = llama = require_patched()
        if n_gpu_layers:
            require_gpu()
        self._context: Any = None
        self._begin = 0  # of the batch that is evaluated
        self._watch: Watch | None = None
        self._error: BaseException | None = None
        # llama.cpp keeps the bare pointer, so the callback has to live as long as the context.
        self._callback = llama.ggml_backend_sched_eval_callback(self._evaluated)
        if not path.is_file():
            raise GGUFError(f"{path}: no such file")
        params = llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        if expert_cache is not None:
            params.kv_overrides = cache_override(expert_cache, expert_margin)
        log.install(llama)
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise _failure(path, "load")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))

    def _make_context(self) -> None:
        # Not at loading: a text too short for an absurd context should be the complaint.
        self._context = self._llama.llama_init_from_model(self._model, self._context_params())
        if not self._context:
            raise _failure(self.path, f"make a context of {self.context} tokens for")

    def _context_params(self) -> Any:
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = self.context
        params.n_batch = params.n_ubatch = self._batch_size
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.offload_kqv = self._n_gpu_layers != 0
        params.op_offload = False
        params.cb_eval = self._callback
        return params

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; may be called twice."""
        if self._context:
            self._llama.llama_free(self._context)
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = self._context = None

    @property
    def bos(self) -> int | None:
        """The token every window starts with, if the file asks for one."""
        if not self._llama.llama_vocab_get_add_bos(self._vocab):
            return None
        return int(self._llama.llama_vocab_bos(self._vocab))

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """Token ids of `text`, special tokens in it recognised, without BOS or EOS."""
        raw = text.encode("utf-8")
        room = len(raw) + 8
        ids = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(self._vocab, raw, len(raw), ids, room, False, True)
        if count < 0:
            raise GGUFError(f"{self.path}: its tokenizer needs more tokens than a text has bytes")
        return np.array(ids[:count], dtype=np.int32)

    def pieces(self) -> list[bytes]:
        """The text of every token as the file spells it, in the order of ids."""
        text = self._llama.llama_vocab_get_text
        return [text(self._vocab, token) for token in range(self.vocab_size)]

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits `[S, V]` of all positions of a fresh sequence `tokens` `[S]`, as `run` raises."""
        return self.run(tokens).logits

    def run(
        self, tokens: NDArray[np.int32], *, first: int = 0, capture: Collection[str] = ()
    ) -> Outputs:
        """Evaluate a fresh sequence `tokens` `[S]`; outputs are those of positions `first` on.

        `capture` holds names of graph nodes without their layer, e.g. "ffn_norm"; a name that the
        model's graph lacks is absent from the result. ffn_moe_weights are the weights experts are
        summed with, ffn_moe_probs_biased the scores they are selected by, -inf where masked.
        Raises GGUFError when llama.cpp fails to decode, ValueError for more than `context` tokens
        or `first` beyond them.
        """
        found: dict[tuple[str, int], dict[int, NDArray[Any]]] = {}  # and by beginning of the batch
        wanted = {step: name for name in capture for step in nodes.STEPS.get(name, (name,))}

        def watch(tensor: Tensor, ask: bool) -> bool:
            step, layer = nodes.name_of(tensor)
            if step not in wanted:
                return False
            if not ask:
                x = read(tensor)  # [1, 1, rows, D], of nodes.BY_EXPERT [1, rows, K, D]
                rows = x.shape[2:] if step in nodes.BY_EXPERT else x.shape[3:]
                x = x.reshape(-1, *rows)
                if wanted[step] == "ffn_moe_weights":
                    x = x.reshape(len(x), math.prod(x.shape[1:]))
                found.setdefault((wanted[step], layer), {})[self._begin] = x
            return True

        logits = self.observe(tokens, first, watch if wanted else None)
        return Outputs(logits, {key: _joined([*parts.values()]) for key, parts in found.items()})

    def observe(
        self, tokens: NDArray[np.int32], first: int, watch: Watch | None
    ) -> NDArray[np.float32]:
        """Logits `[S - first, V]` as `run` gives and raises; `watch` sees the graphs evaluated.

        There is one graph a batch. What `watch` raises ends the evaluation and is raised here.
        """
        llama, length = self._llama, len(tokens)
        if not 0 < length <= self.context:
            raise ValueError(f"{length} tokens for a context of {self.context}")
        if not 0 <= first < length:
            raise ValueError(f"outputs from position {first} on, of {length}")
        if watch:
            library()  # checks the layout of what it will be shown
        if not self._context:
            self._make_context()
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        size = min(self._batch_size, length)
        logits = np.empty((length - first, self.vocab_size), np.float32)
        batch = llama.llama_batch_init(size, 0, 1)
        self._watch, self._error = watch, None
        try:
            for begin in range(0, length, size):
                self._begin = begin
                part = tokens[begin : begin + size].tolist()
                batch.n_tokens = len(part)
                for i, token in enumerate(part):
                    at = begin + i
                    batch.token[i], batch.pos[i], batch.logits[i] = token, at, at >= first
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                status = llama.llama_decode(self._context, batch)
                if self._error is not None:
                    raise self._error
                if status != 0:
                    raise _failure(self.path, "decode with")
                end = begin + len(part)
                if end > first:
                    rows = logits[max(begin - first, 0) : end - first]
                    pointer = llama.llama_get_logits(self._context)
                    rows[:] = np.ctypeslib.as_array(pointer, shape=rows.shape)
            return logits
        finally:
            self._watch = self._error = None
            llama.llama_batch_free(batch)

    def _evaluated(self, address: int, ask: bool, _: Any) -> bool:
        # Nothing can be raised through llama.cpp. To stop at a node and answer False when it is
        # computed ends the evaluation.
        if self._watch is None or self._error is not None:
            return False
        try:
            return self._watch(Tensor.from_address(address), ask)
        except BaseException as error:
            self._error = error
            return ask
