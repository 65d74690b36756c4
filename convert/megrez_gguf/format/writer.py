"""The head of a GGUF file: magic, key-values and tensor table, as bytes.

`gguf.GGUFWriter` writes to files of its own making, guesses the types of arrays, and cannot pass on
the key-values of another file as they are.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megrez_gguf.format.reader import MAGIC, RawValue

ALIGNMENT = 32
VERSION = 3
_BOOL, _STRING, _ARRAY, _U32, _F32 = 7, 8, 9, 4, 6

KeyValues = Mapping[str, Any]
"""Values by key: int stands for uint32, float for float32, bool, str, a list of strings or of
ints (int32) for an array; a `RawValue` is written as it was read."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor table; `shape` in numpy's order, `number` is ggml's of its type."""

    name: str
    shape: tuple[int, ...]
    number: int
    nbytes: int


def header(values: KeyValues, tensors: Sequence[TensorInfo]) -> bytes:
    """Everything before the data of the first tensor; tensors follow in order, each aligned.

    Empty arrays are left out: they could not say what they are arrays of.
    """
    values = {key: value for key, value in values.items() if value != []}
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    for key, value in values.items():
        parts += [_string(key), _value(value)]
    offset = 0
    for t in tensors:
        dimensions = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        parts += [_string(t.name), dimensions, struct.pack("<IQ", t.number, offset)]
        offset += padded(t.nbytes)
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def padded(nbytes: int) -> int:
    """`nbytes` up to the next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if isinstance(value, RawValue):
        return value.data
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], str):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack(f"<IIQ{len(value)}i", _ARRAY, 5, len(value), *value)
