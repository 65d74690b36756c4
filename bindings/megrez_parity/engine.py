"""llama.cpp as the parity checks need it: exact settings, logits of every position, quantizing.

Levels are compared for their weights, so everything else is kept exact: CPU only, a float32 KV
cache, no flash attention. Activations are still narrowed by the kernels of the weights' type, as
in any run of such a file.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.errors import GGUFError, OutputError
from megrez_runtime.logs import log
from megrez_runtime.model import available_cpus
from megrez_runtime.patched import require_patched


def _failure(path: Path, doing: str) -> GGUFError:
    reason = log.take_errors() or "llama.cpp gives no reason"
    return GGUFError(f"{path}: llama.cpp cannot {doing} it: {reason}")


class Engine:
    """One GGUF file, loaded to give the logits of whole windows of at most `context` tokens.

    A context manager; the model is freed on leaving. Raises GGUFError when the file is missing or
    cannot be loaded, RuntimeUnavailableError when llama_cpp is missing or not the patched one.
    """

    def __init__(self, path: Path, context: int) -> None:
        self.path, self.context = path, context
        self._llama = llama = require_patched()
        self._context: Any = None
        if not path.is_file():
            raise GGUFError(f"{path}: no such file")
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
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
        params.n_ctx = params.n_batch = params.n_ubatch = self.context
        params.n_threads = params.n_threads_batch = available_cpus()
        params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.type_k = params.type_v = llama.GGML_TYPE_F32
        params.offload_kqv = params.op_offload = False
        return params

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
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

    def logits(self, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits `[S, V]` of all positions of a fresh sequence `tokens` `[S]`.

        Raises GGUFError when llama.cpp fails to decode, ValueError for more than `context` tokens.
        """
        llama, length = self._llama, len(tokens)
        if not 0 < length <= self.context:
            raise ValueError(f"{length} tokens for a context of {self.context}")
        if not self._context:
            self._make_context()
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        batch = llama.llama_batch_init(length, 0, 1)
        try:
            batch.n_tokens = length
            for i, token in enumerate(tokens.tolist()):
                batch.token[i], batch.pos[i], batch.logits[i] = token, i, True
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            if llama.llama_decode(self._context, batch) != 0:
                raise _failure(self.path, "decode with")
            pointer = llama.llama_get_logits(self._context)
            view = np.ctypeslib.as_array(pointer, shape=(length, self.vocab_size))
            return view.astype(np.float32, copy=True)
        finally:
            llama.llama_batch_free(batch)


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source` quantized by llama.cpp's own quantizer, e.g. to `kind` "q4_k_m", as `target`.

    Raises OutputError when the quantizer fails.
    """
    llama = require_patched()
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, "LLAMA_FTYPE_MOSTLY_" + kind.upper())
    params.nthread = available_cpus()
    log.install(llama)
    status = llama.llama_model_quantize(
        os.fsencode(source), os.fsencode(target), ctypes.byref(params)
    )
    if status != 0:
        target.unlink(missing_ok=True)
        reason = log.take_errors() or f"status {status}"
        raise OutputError(f"{target}: quantizing {source.name} to {kind} failed: {reason}")
