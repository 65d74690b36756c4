"""The expert store of a loaded model: what it did, and how much memory it has.

The store itself is C++ (`patches/overlay`, llama-expert-store.h). It is asked for with a key-value
override of the model, and looked at through three functions that the patched library exports.
"""

from __future__ import annotations

import ctypes
import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from megrez_llama import ARCH
from megrez_llama.patched import require_patched

if TYPE_CHECKING:
    from llama_cpp import Llama

CACHE_KEY = f"{ARCH}.expert_cache"
"""Override that asks for a store; int, bytes of memory for experts."""
MARGIN_KEY = f"{CACHE_KEY}.margin"
"""Override by which routers prefer experts in memory; float, of a router's scores."""
COUNTS_KEY = f"{ARCH}.expert_counts"
"""Override that has each router's choices counted, for the server's GET /experts; bool."""


class _Stats(ctypes.Structure):
    # struct llama_expert_store_stats
    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "hits", "misses", "wasted", "bytes_read", "reads", "wait_us", "settle_us",
            "n_slots", "slot_bytes", "n_experts",
        )
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertStats:
    """Counts since the model was loaded, but for `slots`, `slot_bytes` and `experts`.

    A hit or a miss is an expert that a layer used for one batch: of a token with 6 experts in each
    of 30 layers, 180.
    """

    hits: int
    misses: int
    wasted: int
    """Experts read and dropped before they were used."""
    bytes_read: int
    reads: int
    wait_us: int
    """Microseconds computing stood still for experts, laying them out included."""
    settle_us: int
    """Microseconds spent laying experts out for the kernels, over all threads."""
    slots: int
    """Experts that memory holds."""
    slot_bytes: int
    experts: int
    """Experts in the file."""

    def since(self, before: ExpertStats) -> ExpertStats:
        """What happened after `before`."""
        return self._changed(before, -1)

    def __add__(self, other: ExpertStats) -> ExpertStats:
        """What happened in two spans of time."""
        return self._changed(other, 1)

    def _changed(self, other: ExpertStats, sign: int) -> ExpertStats:
        changes = {
            f.name: getattr(self, f.name) + sign * getattr(other, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("slots", "slot_bytes", "experts")
        }
        return dataclasses.replace(self, **changes)

    @property
    def hit_rate(self) -> float:
        """Share of the experts used that were in memory; 1 if none was used."""
        used = self.hits + self.misses
        return self.hits / used if used else 1.0


@cache
def _library() -> Any:
    library = require_patched().llama_cpp._lib
    pointer, size = ctypes.c_void_p, ctypes.c_uint64
    library.llama_model_expert_store_stats.argtypes = [pointer, ctypes.POINTER(_Stats)]
    library.llama_model_expert_store_stats.restype = ctypes.c_bool
    library.llama_model_expert_store_resize.argtypes = [pointer, size, ctypes.c_uint32]
    library.llama_model_expert_store_resize.restype = ctypes.c_bool
    library.llama_context_compute_bytes.argtypes = [pointer]
    library.llama_context_compute_bytes.restype = size
    return library


def cache_override(nbytes: int, margin: float = 0.0) -> Any:
    """For `llama_model_params.kv_overrides`: asks for a store with at most `nbytes` for experts.

    With a `margin`, an expert in memory is chosen before one whose score is higher by less.
    """
    llama_cpp = require_patched()
    array = (llama_cpp.llama_model_kv_override * 3)()  # the third, empty, ends it
    array[0].key, array[0].tag = CACHE_KEY.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    array[0].value.val_i64 = nbytes
    if margin:
        array[1].key, array[1].tag = MARGIN_KEY.encode(), llama_cpp.LLAMA_KV_OVERRIDE_TYPE_FLOAT
        array[1].value.val_f64 = margin
    return array


def expert_stats(llm: Llama) -> ExpertStats | None:
    """What the expert store of `llm` has done so far; None if all its experts are in memory."""
    raw = _Stats()
    if not _library().llama_model_expert_store_stats(llm.model, ctypes.byref(raw)):
        return None
    return ExpertStats(*(getattr(raw, field[0]) for field in _Stats._fields_))


def resize(llm: Llama, nbytes: int, n_ubatch: int) -> bool:
    """Give the store of `llm` at most `nbytes` of memory, never more than it was loaded with.

    False, and nothing changed, if that is too little for batches of `n_ubatch` tokens.
    """
    return bool(_library().llama_model_expert_store_resize(llm.model, nbytes, n_ubatch))


def compute_bytes(llm: Llama) -> int:
    """Bytes of the buffers that computing with `llm` may use, touched so far or not."""
    return int(_library().llama_context_compute_bytes(llm.ctx))
