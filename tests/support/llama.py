"""llama.cpp through its C interface, with every setting in reach."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Row = tuple[int, int, Sequence[int], bool]
"""Token, position, sequences, whether its logits are wanted."""

_lines: list[str] = []


@C.llama_log_callback
def _collect(level: int, text: bytes, _: Any) -> None:
    if level >= 3:
        _lines.append(text.decode("utf-8", "replace"))


class LlamaError(Exception):
    """llama.cpp refused; the message is what it logged."""


def said() -> str:
    """What llama.cpp has warned of or complained about since the last call; listens from now on."""
    C.llama_log_set(_collect, ctypes.c_void_p(0))
    text = "".join(_lines).strip()
    _lines.clear()
    return text


class _Owner:
    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        raise NotImplementedError


class Model(_Owner):
    """A loaded file; `params` are fields of llama_model_params."""

    def __init__(self, path: Path, **params: Any) -> None:
        self.handle: Any = None
        fields = C.llama_model_default_params()
        for name, value in params.items():
            setattr(fields, name, value)
        said()
        self.handle = C.llama_model_load_from_file(os.fsencode(path), fields)
        if not self.handle:
            raise LlamaError(said())
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.handle))
        self.n_embd = C.llama_model_n_embd(self.handle)

    def close(self) -> None:
        if self.handle:
            C.llama_model_free(self.handle)
        self.handle = None


class Context(_Owner):
    """A context of `model`; `params` are fields of llama_context_params. Exact by default."""

    def __init__(self, model: Model, **params: Any) -> None:
        self.model, self.handle = model, None
        fields = C.llama_context_default_params()
        exact = {
            "n_ctx": 256,
            "n_batch": 256,
            "n_ubatch": 256,
            "n_threads": 2,
            "n_threads_batch": 2,
            "type_k": C.GGML_TYPE_F32,
            "type_v": C.GGML_TYPE_F32,
            "flash_attn_type": C.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        }
        self._params = exact | params  # callbacks must outlive the context
        for name, value in self._params.items():
            setattr(fields, name, value)
        said()
        self.handle = C.llama_init_from_model(model.handle, fields)
        if not self.handle:
            raise LlamaError(said())

    def close(self) -> None:
        if self.handle:
            C.llama_free(self.handle)
        self.handle = None

    @property
    def memory(self) -> Any:
        return C.llama_get_memory(self.handle)

    def rows(self, rows: Iterable[Row], embd: Floats | None = None) -> dict[int, Floats]:
        """Decode one batch; the logits of the wanted rows by row number."""
        rows = list(rows)
        width = 0 if embd is None else embd.shape[1]
        batch = C.llama_batch_init(len(rows), width, 8)
        try:
            batch.n_tokens = len(rows)
            for i, (token, position, sequences, wanted) in enumerate(rows):
                if embd is None:
                    batch.token[i] = token
                else:
                    for j, value in enumerate(embd[i].tolist()):
                        batch.embd[i * width + j] = value
                batch.pos[i], batch.logits[i] = position, wanted
                batch.n_seq_id[i] = len(sequences)
                for j, sequence in enumerate(sequences):
                    batch.seq_id[i][j] = sequence
            said()
            status = C.llama_decode(self.handle, batch)
            if status != 0:
                raise LlamaError(f"llama_decode: {status}: {said()}")
        finally:
            C.llama_batch_free(batch)
        return {i: self._logits(i) for i, row in enumerate(rows) if row[3]}

    def _logits(self, row: int) -> Floats:
        pointer = C.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (self.model.n_vocab,)).copy()

    def embedding(self, row: int) -> Floats:
        pointer = C.llama_get_embeddings_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (self.model.n_embd,)).copy()

    def run(self, tokens: Sequence[int], start: int = 0, sequence: int = 0) -> Floats:
        """Decode `tokens` as one batch; the logits of all of them, `[S, V]`."""
        rows = [(t, start + i, (sequence,), True) for i, t in enumerate(tokens)]
        return np.stack(list(self.rows(rows).values()))


def logits(path: Path, tokens: Sequence[int], **params: Any) -> Floats:
    """Logits `[S, V]` of `tokens` `[S]` in a context with `params`."""
    with Model(path) as model, Context(model, **params) as context:
        result: Floats = context.run(tokens)
        return result


def quantize(source: Path, target: Path, kind: str) -> None:
    """Write `source` as `target`, quantized by llama.cpp to `kind`, e.g. "q4_k_m"."""
    params = C.llama_model_quantize_default_params()
    params.ftype = getattr(C, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    said()
    names = os.fsencode(source), os.fsencode(target)
    if C.llama_model_quantize(*names, ctypes.byref(params)) != 0:
        raise LlamaError(said())


def nmse(expected: Any, found: Any) -> float:
    expected, found = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    return float(((expected - found) ** 2).sum() / (expected**2).sum())


@contextlib.contextmanager
def opened(path: Path, **params: Any) -> Iterator[Context]:
    """Model and context in one."""
    with Model(path) as model, Context(model, **params) as context:
        yield context
