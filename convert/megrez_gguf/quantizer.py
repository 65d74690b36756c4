"""ggml's quantization routines, and llama.cpp's choice of a type for every tensor.

Both come from the patched llama_cpp, so that a file made here is byte for byte what llama-quantize
makes of the unquantized one.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from megrez_gguf import encode, levels
from megrez_gguf.encode import Encoding
from megrez_gguf.errors import ConfigError, OutputError
from megrez_gguf.gguf_writer import KeyValues, TensorInfo, header
from megrez_gguf.logs import log
from megrez_gguf.patched import require_patched

Overrides = Sequence[tuple[str, str]]
"""Regular expressions searched for in tensor names, and the types of the tensors they match."""


@dataclass(frozen=True, slots=True)
class Types:
    """The type of each tensor, e.g. "Q4_K", and the one wanted where its rows cannot hold that."""

    chosen: Mapping[str, str]
    wanted: Mapping[str, str]


def choose_types(
    values: KeyValues,
    tensors: Sequence[TensorInfo],
    level: str,
    weighted: bool = False,
    overrides: Overrides = (),
) -> Types:
    """What llama-quantize would store each of `tensors` as, at `level`.

    `values` are the key-values of the model's file, `tensors` its unquantized tensors; `weighted`
    tells that there is an importance matrix. `overrides` are llama-quantize's `--tensor-type`.

    Asks the quantizer itself, which gets a header and no data. Raises OutputError when it fails,
    RuntimeUnavailableError without the patched llama_cpp.
    """
    llama = require_patched()
    params = llama.llama_model_quantize_default_params()
    params.ftype = levels.file_type(level)
    kept = []  # what llama.cpp holds bare pointers to
    if weighted:
        # It looks only whether there is one.
        entries = (llama.llama_model_imatrix_data * 2)()
        number = ctypes.c_float(1)
        entries[0].name, entries[0].size, entries[0].data = b"-", 1, ctypes.pointer(number)
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
        kept += [entries, number]
    if overrides:
        types = (llama.llama_model_tensor_override * (len(overrides) + 1))()
        for entry, (pattern, kind) in zip(types, overrides, strict=False):
            entry.pattern, entry.type = pattern.encode(), type_number(kind)
        params.tt_overrides = ctypes.cast(types, type(params.tt_overrides))
        kept.append(types)
    # The vocabulary has no say.
    values = {k: v for k, v in values.items() if not k.startswith("tokenizer.")}
    head, count = header(values, tensors), len(tensors)
    chosen, wanted = (ctypes.c_int * count)(), (ctypes.c_int * count)()
    log.install(llama)
    error = ctypes.create_string_buffer(1024)
    done = _choose(llama)(
        head, len(head), ctypes.byref(params), chosen, wanted, count, error, len(error)
    )
    if not done:
        reason = error.value.decode("utf-8", "replace")
        raise OutputError(f"llama.cpp cannot quantize this model to {level}: {reason}")
    names = {number: name for name, number in _types().items()}
    return Types(
        {t.name: names[kind] for t, kind in zip(tensors, chosen, strict=True)},
        # GGML_TYPE_COUNT, which is no type, says that there is none
        {t.name: names[kind] for t, kind in zip(tensors, wanted, strict=True) if kind in names},
    )


@cache
def _choose(llama: Any) -> Any:
    """llama_quant_choose_types of our llama-quant-types.h."""
    function = llama.llama_cpp._lib.llama_quant_choose_types
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    function.argtypes = [ctypes.c_char_p, size, *[pointer] * 3, size, ctypes.c_char_p, size]
    function.restype = ctypes.c_bool
    return function


# --- types -------------------------------------------------------------------------------------


@cache
def _types() -> Mapping[str, int]:
    from gguf import GGMLQuantizationType

    return {kind.name: int(kind) for kind in GGMLQuantizationType}


def type_number(name: str) -> int:
    """ggml's number of a type named as ggml or gguf name it ("q4_K"). Raises ConfigError."""
    number = _types().get(name.upper())
    if number is None:
        raise ConfigError(f"type {name!r}: expected one of {', '.join(sorted(_types()))}")
    return number


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
def encoding(name: str) -> Encoding:
    """How tensors of the type `name`, e.g. "Q4_K", are written.

    Encoding raises OverflowError where weights are beyond the type's range, and
    RuntimeUnavailableError without the patched llama_cpp. ggml quantizes rows independently of one
    another, so that it does not matter how many are encoded at once.
    """
    if name in encode.FLOATS:
        return encode.FLOATS[name]
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = type_number(name)
    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]

    def quantize(
        values: npt.NDArray[np.float32], importance: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.uint8]:
        lib = _library()
        rows, columns = values.shape
        values = np.ascontiguousarray(values)
        out = np.empty(values.size // block * nbytes, np.uint8)
        weights = None
        if importance is not None:
            weights = np.ascontiguousarray(importance, np.float32)
        written = lib.ggml_quantize_chunk(
            number, values.ctypes.data, out.ctypes.data, 0, rows, columns,
            weights.ctypes.data if weights is not None else None,
        )  # fmt: skip
        assert written == out.nbytes, (name, written, out.nbytes)
        if not lib.ggml_validate_row_data(number, out.ctypes.data, out.nbytes):
            raise OverflowError(name)
        return out

    return Encoding(name, number, block, nbytes, float("inf"), 0.0, quantize)
