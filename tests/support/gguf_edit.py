"""A GGUF file taken apart and put together again, with whatever a test wants wrong in it."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

ALIGNMENT = 32
U32, I32, F32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass
class Tensor:
    """`shape` is in ggml's order, fastest axis first; `data` is as stored."""

    type: int
    shape: tuple[int, ...]
    data: bytes

    def floats(self) -> np.ndarray[Any, Any]:
        assert self.type == GGMLQuantizationType.F32
        return np.frombuffer(self.data, np.float32).reshape(self.shape[::-1])

    def cast(self, kind: GGMLQuantizationType) -> Tensor:
        """The same shape as `kind`; the values only where numpy can cast them."""
        block, size = GGML_QUANT_SIZES[kind] if kind.name != "Q8_1" else (32, 36)  # gguf says 40
        dtype = {"F64": "<f8", "F16": "<f2", "I32": "<i4"}.get(kind.name)
        data = bytes(math.prod(self.shape) // block * size)
        if dtype:
            data = self.floats().astype(dtype).tobytes()
        return Tensor(kind, self.shape, data)


def floats(values: Any) -> Tensor:
    array = np.ascontiguousarray(values, dtype="<f4")
    return Tensor(GGMLQuantizationType.F32, array.shape[::-1], array.tobytes())


class Gguf:
    """Key-values as name -> (type, value), an array's value as (type, list); tensors by name."""

    def __init__(self) -> None:
        self.values: dict[str, tuple[int, Any]] = {}
        self.tensors: dict[str, Tensor] = {}

    @classmethod
    def read(cls, path: Path) -> Gguf:
        return cls.parse(path.read_bytes())

    @classmethod
    def parse(cls, raw: bytes) -> Gguf:
        """Of a sound file: what is damaged raises whatever comes first."""
        file, at = cls(), 8

        def take(code: str) -> Any:
            nonlocal at
            (value,) = struct.unpack_from("<" + code, raw, at)
            at += struct.calcsize("<" + code)
            return value

        def string() -> str:
            nonlocal at
            length = take("Q")
            at += length
            return raw[at - length : at].decode()

        def value(kind: int) -> Any:
            if kind == STRING:
                return string()
            if kind != ARRAY:
                return take(_CODES[kind])
            kind, count = take("I"), take("Q")
            return kind, [value(kind) for _ in range(count)]

        n_tensors, n_values = take("Q"), take("Q")
        for _ in range(n_values):
            name, kind = string(), take("I")
            file.values[name] = kind, value(kind)
        infos = []
        for _ in range(n_tensors):
            name = string()
            shape = tuple(take("Q") for _ in range(take("I")))
            infos.append((name, shape, take("I"), take("Q")))
        start = -(-at // ALIGNMENT) * ALIGNMENT
        for name, shape, kind, offset in infos:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            length = math.prod(shape) // block * size
            data = raw[start + offset : start + offset + length]
            file.tensors[name] = Tensor(kind, shape, data)
        return file

    def header(self) -> bytes:
        """Everything before the tensor data."""
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.values))]

        def string(text: str) -> None:
            out.append(struct.pack("<Q", len(text.encode())) + text.encode())

        def value(kind: int, content: Any) -> None:
            if kind == STRING:
                string(content)
            elif kind == ARRAY:
                inner, items = content
                out.append(struct.pack("<IQ", inner, len(items)))
                for item in items:
                    value(inner, item)
            else:
                out.append(struct.pack("<" + _CODES[kind], content))

        for name, (kind, content) in self.values.items():
            string(name)
            out.append(struct.pack("<I", kind))
            value(kind, content)
        offset = 0
        for name, tensor in self.tensors.items():
            string(name)
            out.append(struct.pack("<I", len(tensor.shape)))
            out.append(struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape))
            out.append(struct.pack("<IQ", tensor.type, offset))
            offset += -(-len(tensor.data) // ALIGNMENT) * ALIGNMENT
        return _padded(b"".join(out))

    def to_bytes(self) -> bytes:
        return self.header() + b"".join(_padded(t.data) for t in self.tensors.values())

    def write(self, path: Path) -> Path:
        path.write_bytes(self.to_bytes())
        return path

    def drop(self, *keys: str) -> None:
        """Remove keys of our architecture."""
        for key in keys:
            del self.values["megrez-moe." + key]

    def set(self, key: str, value: Any, kind: int | None = None) -> None:
        """Change a key of our architecture; its type stays, unless given."""
        name = "megrez-moe." + key
        self.values[name] = (self.values[name][0] if kind is None else kind, value)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def with_padded_rows(
    source: Path,
    path: Path,
    columns: int,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    filling: float = 0.0,
) -> Path:
    """The F32 model `source` as `path`: the pools' down projections in `kind`, so much wider."""
    file = Gguf.read(source)
    for name, tensor in file.tensors.items():
        if "ffn_down_exps" in name:
            values = tensor.floats()
            missing = [(0, 0), (0, 0), (0, columns - values.shape[-1])]
            wide = np.pad(values, missing, constant_values=filling)
            file.tensors[name] = Tensor(kind, wide.shape[::-1], quantize(wide, kind).tobytes())
    return file.write(path)
