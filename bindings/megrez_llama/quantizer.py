"""llama.cpp's quantizer: the type it gives each tensor of a file, and ggml's own encoding of rows.

Both come from the patched llama_cpp, so that what is made with them is byte for byte what
llama-quantize makes.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megrez_llama.logs import log
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


@cache
def _chooser() -> Any:
    """llama_quant_choose_types, of our own llama-quant-types.h."""
    function = require_patched().llama_cpp._lib.llama_quant_choose_types
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, size, *[pointer] * 3, size, ctypes.c_char_p, size]
    function.restype = ctypes.c_bool
    return function


def choose_types(
    head: bytes,
    n_tensors: int,
    file_type: int,
    *,
    weighted: bool = False,
    overrides: Sequence[tuple[str, int]] = (),
) -> list[tuple[int, int]]:
    """The ggml types llama-quantize would give the tensors of a file that begins with `head`.

    Of each tensor, in the file's order, the type chosen and the one it should have had where its
    rows do not fill that one's blocks; elsewhere a number that is no type's. `file_type` is
    llama.cpp's number of the level, `weighted` tells that there is an importance matrix,
    `overrides` are regular expressions searched for in tensor names and the types of the tensors
    they match.

    Raises ValueError with llama.cpp's reason; RuntimeUnavailableError without the patched
    llama_cpp.
    """
    llama = require_patched()
    params = llama.llama_model_quantize_default_params()
    params.ftype = file_type
    kept: list[Any] = []  # what llama.cpp holds bare pointers to
    if weighted:
        # It looks only whether there is one.
        entries, number = (llama.llama_model_imatrix_data * 2)(), ctypes.c_float(1)
        entries[0].name, entries[0].size, entries[0].data = b"-", 1, ctypes.pointer(number)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
        kept += [entries, number]
    if overrides:
        types = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for entry, (pattern, kind) in zip(types, overrides, strict=False):
            entry.pattern, entry.type = pattern.encode(), kind
        params.tt_overrides = ctypes.cast(types, type(params.tt_overrides))
        kept.append(types)
    log.install(llama)
    chosen, wanted = (ctypes.c_int * n_tensors)(), (ctypes.c_int * n_tensors)()
    error = ctypes.create_string_buffer(1024)
    done = _chooser()(
        head, len(head), ctypes.byref(params), chosen, wanted, n_tensors, error, len(error)
    )
    if not done:
        raise ValueError(error.value.decode("utf-8", "replace"))
    return list(zip(chosen, wanted, strict=True))


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
