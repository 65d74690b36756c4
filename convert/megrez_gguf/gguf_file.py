"""Reads the head of a GGUF file, trusting nothing in it.

`gguf.GGUFReader` believes every count it finds; a damaged file makes it run away or raise whatever
comes first.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megrez_gguf.checkpoint import Shard
from megrez_gguf.errors import GGUFError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# GGUF value type -> struct code.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table; `shape` is in numpy's order, slowest axis first."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """Key-values and tensor table of one file."""

    shard: Shard
    version: int
    values: Mapping[str, Any]
    tensors: tuple[GGUFTensor, ...]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read and check everything before the tensor data.

        Raises GGUFError: not a GGUF, another version or byte order, truncated, counts or lengths
        beyond the file, a key or tensor twice, or tensors that overlap or leave the file.
        """
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise GGUFError(f"{path}: not a regular file")
                shard = Shard(path, status.st_size, status.st_mtime_ns, status.st_ino)
                return _Reader(file, shard).read()
        except OSError as e:
            raise GGUFError(f"{path}: cannot be read: {e.strerror or e}") from None


class _Reader:
    def __init__(self, file: BinaryIO, shard: Shard) -> None:
        self.file, self.shard, self.position = file, shard, 0

    def fail(self, reason: str) -> NoReturn:
        raise GGUFError(f"{self.shard.path}: {reason}")

    def read(self) -> GGUFFile:
        if self.shard.size < 4 or self.take(4, "the magic") != MAGIC:
            self.fail("does not start with GGUF: not a GGUF file")
        version = self.number("I", "the version")
        if version not in VERSIONS:
            self.fail(f"GGUF version {version} is not supported; supported: {VERSIONS}")
        tensor_count = self.number("Q", "the tensor count")
        value_count = self.number("Q", "the key count")
        # The shortest key takes 13 bytes and the shortest tensor entry 32.
        if tensor_count * 32 + value_count * 13 > self.shard.size - self.position:
            self.fail(
                f"announces {tensor_count} tensors and {value_count} keys, more than its "
                f"{self.shard.size} bytes can hold: damaged"
            )
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string("a key")
            if key in values:
                self.fail(f"key {key!r} appears twice")
            values[key] = self.value(self.number("I", key), key)
        entries = [self.entry() for _ in range(tensor_count)]
        return GGUFFile(self.shard, version, values, self.place(entries, values))

    def take(self, count: int, what: str) -> bytes:
        if count > self.shard.size - self.position:
            self.fail(
                f"{what}: {count} bytes announced, {self.shard.size - self.position} left: "
                "truncated or damaged"
            )
        data = self.file.read(count)
        if len(data) != count:
            self.fail(f"{what}: the file ended early; it shrank while it was read")
        self.position += count
        return data

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what}: not valid UTF-8")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        if kind != _ARRAY:
            self.fail(f"key {key!r}: unknown value type {kind}")
        kind, count = self.number("I", key), self.number("Q", key)
        if kind == _STRING:
            if count * 8 > self.shard.size - self.position:
                self.fail(f"key {key!r}: announces {count} strings, more than the file can hold")
            return [self.string(key) for _ in range(count)]
        if kind not in _SCALARS:
            self.fail(f"key {key!r}: arrays of value type {kind} are not supported")
        code = _SCALARS[kind]
        data = self.take(count * struct.calcsize(f"<{code}"), key)
        return list(struct.unpack(f"<{count}{code}", data))

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.string("a tensor name")
        rank = self.number("I", name)
        if not 0 < rank <= 4:
            self.fail(f"tensor {name}: has {rank} dimensions; expected 1 to 4")
        shape = tuple(reversed([self.number("Q", name) for _ in range(rank)]))
        return name, shape, self.number("I", name), self.number("Q", name)

    def place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], values: Mapping[str, Any]
    ) -> tuple[GGUFTensor, ...]:
        """Turn offsets into places in the file, and check that they are good."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment % 8:
            self.fail(f"general.alignment: {alignment!r} is not a multiple of 8")
        start = -(-self.position // alignment) * alignment
        tensors: list[GGUFTensor] = []
        names: set[str] = set()
        for name, shape, number, offset in entries:
            if name in names:
                self.fail(f"tensor {name} appears twice")
            names.add(name)
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                self.fail(f"tensor {name}: unknown type {number}")
            block, size = GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                self.fail(f"tensor {name}: rows of {shape[-1]} do not fill {kind.name} blocks")
            nbytes = math.prod(shape) // block * size
            if offset % alignment or start + offset + nbytes > self.shard.size:
                self.fail(
                    f"tensor {name}: {nbytes} bytes at {start + offset}, "
                    f"in a file of {self.shard.size}: truncated or damaged"
                )
            tensors.append(GGUFTensor(name, kind.name, shape, start + offset, nbytes))
        end, previous = 0, ""
        for tensor in sorted(tensors, key=lambda t: t.begin):
            if tensor.begin < end:
                self.fail(f"tensors {previous} and {tensor.name} overlap")
            end, previous = tensor.begin + tensor.nbytes, tensor.name
        return tuple(tensors)
