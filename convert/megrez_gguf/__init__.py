"""Megrez2 checkpoints to GGUF.

`convert(checkpoint, ...)`, `quantize(file, ...)`, `verify(file, ...)` and `inspect(path)` are
loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megrez_gguf.conversion.convert import convert, quantize
    from megrez_gguf.examination.inspection import inspect
    from megrez_gguf.examination.verification import verify

__all__ = ["convert", "inspect", "quantize", "verify"]

# No module here may be called after a function below: importing `megrez_gguf.convert` as a module
# would replace the function of that name.
_EXPORTS = {
    "convert": "megrez_gguf.conversion.convert",
    "inspect": "megrez_gguf.examination.inspection",
    "quantize": "megrez_gguf.conversion.convert",
    "verify": "megrez_gguf.examination.verification",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
