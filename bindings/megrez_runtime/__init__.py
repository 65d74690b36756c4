"""Run Megrez2 GGUF files with the patched llama-cpp-python.

`load(path)` gives an ordinary `llama_cpp.Llama`, and `Session(llm)` a conversation with it.
`load(path, ram="2GiB")` keeps experts that do not fit in the file; `expert_stats(llm)` tells how
that goes. All are loaded on first use, so that importing this package needs nothing installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megrez_llama.expert_store import ExpertStats, expert_stats
    from megrez_runtime.model import load
    from megrez_runtime.session import Sampling, Session

__all__ = ["ExpertStats", "Sampling", "Session", "expert_stats", "load"]

_EXPORTS = {
    "ExpertStats": "megrez_llama.expert_store",
    "expert_stats": "megrez_llama.expert_store",
    "Sampling": "megrez_runtime.session",
    "Session": "megrez_runtime.session",
    "load": "megrez_runtime.model",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
