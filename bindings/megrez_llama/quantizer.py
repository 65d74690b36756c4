"""llama.cpp's quantizer: the type it gives each tensor of a file, and ggml's own encoding of rows.

Both come from the patched llama_cpp, so that what is made with them is byte for byte what
llama-quantize makes.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megrez_llama.patched import require_patched


@cache
def _library() -> Any:
    require_patched()
    lib: Any = importlib.import_module("llama_cpp._ggml").libggml
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    lib.ggml_quantize_chunk.restype = size
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, *[number] * 3, pointer]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, pointer, size]
    return lib


def quantize(
    number: int,
    values: npt.NDArray[np.float32],
    importance: npt.NDArray[np.float32] | None,
    n_bytes: int,
) -> npt.NDArray[np.uint8]:
    """`values` `[rows, columns]` as the `n_bytes` bytes of ggml's type `number`.

    `importance` `[columns]` weighs rounding errors. ggml encodes each row by itself, so it does not
    matter how many come at once. Raises OverflowError: values beyond the type's range;
    RuntimeUnavailableError without the patched llama_cpp.
    """
    lib = _library()
    rows, columns = values.shape
    values = np.ascontiguousarray(values)
    out = np.empty(n_bytes, np.uint8)
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32)
    written = lib.ggml_quantize_chunk(
        number, values.ctypes.data, out.ctypes.data, 0, rows, columns,
        weights.ctypes.data if weights is not None else None,
    )  # fmt: skip
    assert written == out.nbytes, (number, written, out.nbytes)
    if not lib.ggml_validate_row_data(number, out.ctypes.data, out.nbytes):
        raise OverflowError(f"beyond the range of ggml type {number}")
    return out
