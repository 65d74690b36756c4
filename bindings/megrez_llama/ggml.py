"""llama.cpp's tensors as its evaluation callback hands them out.

ggml exports no accessors for types, shapes, strides and sources, so `struct ggml_tensor` of the
pinned ggml is declared here. Before anything is read through it, it is held against a tensor that
the library itself has made.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megrez_llama.errors import RuntimeUnavailableError
from megrez_llama.patched import require_patched

F32, I32 = 0, 26  # enum ggml_type
_DTYPES = {F32: np.dtype(np.float32), I32: np.dtype(np.int32)}
_OBJECT_BYTES = 32  # struct ggml_object, which ggml_tensor_overhead() counts too


class Tensor(ctypes.Structure):
    """`struct ggml_tensor`; `ne` and `nb` start with the fastest axis."""

    type: int
    ne: ctypes.Array[ctypes.c_int64]  # elements of each axis
    nb: ctypes.Array[ctypes.c_size_t]  # bytes from one element of each axis to the next
    op: int
    src: ctypes.Array[ctypes.c_void_p]
    view_src: int | None
    view_offs: int
    name: bytes

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )

    def source(self, index: int) -> Tensor:
        """The tensor this one is computed from; the first has index 0."""
        return Tensor.from_address(self.src[index])  # type: ignore[arg-type]


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


@cache
def library() -> Any:
    """The loaded ggml, its layout checked.

    Raises RuntimeUnavailableError when llama_cpp is missing or its tensors are laid out otherwise.
    """
    require_patched()
    lib: Any = importlib.import_module("llama_cpp._ggml").libggml
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
    for name, result, arguments in (
        ("ggml_tensor_overhead", size, []),
        ("ggml_init", pointer, [_InitParams]),
        ("ggml_free", None, [pointer]),
        ("ggml_new_tensor_3d", pointer, [pointer, ctypes.c_int, number, number, number]),
        ("ggml_view_2d", pointer, [pointer, pointer, number, number, size, size]),
        ("ggml_set_name", pointer, [pointer, ctypes.c_char_p]),
        ("ggml_op_name", ctypes.c_char_p, [ctypes.c_int]),
        ("ggml_nbytes", size, [pointer]),
        ("ggml_backend_tensor_get", None, [pointer, pointer, size, size]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    check_layout(lib, Tensor)
    return lib


def check_layout(lib: Any, kind: type[Tensor]) -> None:
    """Raise RuntimeUnavailableError unless `kind` describes the tensors of `lib`."""
    expected = lib.ggml_tensor_overhead() - _OBJECT_BYTES
    found: object = ctypes.sizeof(kind)
    if found == expected:
        context = lib.ggml_init(_InitParams(1 << 16, None, True))
        try:
            whole = lib.ggml_new_tensor_3d(context, I32, 7, 5, 3)
            part = lib.ggml_view_2d(context, whole, 4, 3, 140, 8)
            lib.ggml_set_name(part, b"part")
            view = kind.from_address(part)
            name = lib.ggml_op_name(view.op) if 0 <= view.op < 64 else b""
            found = (view.type, *view.ne, *view.nb, name, view.src[0], view.view_src)
            found = (*found, view.view_offs, view.name)
            expected = (I32, 4, 3, 1, 1, 4, 140, 420, 420, b"VIEW", whole, whole, 8, b"part")
        finally:
            lib.ggml_free(context)
    if found != expected:
        raise RuntimeUnavailableError(
            f"llama.cpp's tensors are not laid out as expected ({found} instead of {expected}): "
            "this llama_cpp is not the pinned version. Reinstall the patched llama-cpp-python"
        )


@cache
def op_name(op: int) -> str:
    """What ggml calls an operation, e.g. "MUL_MAT"."""
    name: bytes = library().ggml_op_name(op)
    return name.decode()


def read(tensor: Tensor) -> NDArray[Any]:
    """A contiguous copy of the elements, 4 axes, slowest first: `[ne3, ne2, ne1, ne0]`.

    Strided views are honoured. Raises TypeError for elements that are neither float32 nor int32.
    """
    dtype = _DTYPES.get(tensor.type)
    if dtype is None:
        raise TypeError(f"{tensor.name.decode()}: ggml type {tensor.type} cannot be captured")
    lib, reference = library(), ctypes.byref(tensor)
    raw = np.empty(lib.ggml_nbytes(reference), np.uint8)
    lib.ggml_backend_tensor_get(reference, raw.ctypes.data, 0, raw.nbytes)
    view = np.ndarray(tensor.ne[::-1], dtype, raw, strides=tensor.nb[::-1])
    return np.ascontiguousarray(view)
