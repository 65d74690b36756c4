"""Reads the head of a GGUF file, or of all parts of a split one, trusting nothing in it.

`gguf.GGUFReader` believes every count it finds; a damaged file makes it run away or raise whatever
comes first.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from megrez_gguf.errors import GGUFError
from megrez_gguf.storage.opening import opened
from megrez_gguf.storage.shard import Shard
from megrez_gguf.storage.tensor import Tensor
from megrez_llama import ARCH

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


# What tells the parts of a split file, and that they belong together: number, parts, tensors.
SPLIT = ("split.no", "split.count", "split.tensors.count")
# Real headers take 10 MiB at most; read, one takes up to 40 times its size.
MAX_HEADER = 64 << 20
_MAX_NAME = 63  # GGML_MAX_NAME, without the end of a C string
_PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RawValue:
    """A value as it lies in a file: its type and its bytes."""

    data: bytes

    @property
    def type(self) -> int:
        """Number of the GGUF value type; 9 is an array, of whatever."""
        return int.from_bytes(self.data[:4], "little")


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """Key-values and tensor table of one model, in one file or in the parts of a split one.

    `values` are the first part's, `raw` the same as they lie in the file.
    """

    shards: tuple[Shard, ...]
    version: int
    values: Mapping[str, Any]
    raw: Mapping[str, RawValue]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of all parts."""
        return sum(shard.size for shard in self.shards)

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Read and check everything before the tensor data; of a split file, give the first part.

        Raises GGUFError: not a GGUF, another version or byte order, truncated, counts or lengths
        beyond the file, a key or tensor twice, tensors that overlap or leave the file; a part
        missing, of another file, or not the first.
        """
        first = cls._open_one(path)
        count = first.values.get("split.count", 1)
        if type(count) is not int or count <= 1:
            return first
        return cls._join(path, first, count)

    @classmethod
    def open_model(cls, path: Path) -> GGUFFile:
        """`open`, and refuse what is no Megrez2 model. Raises GGUFError."""
        file = cls.open(path)
        found = file.values.get("general.architecture")
        if found != ARCH:
            raise GGUFError(
                f"{path}: general.architecture is {found!r}, not {ARCH!r}: not a Megrez2 model"
            )
        return file

    @classmethod
    def _join(cls, path: Path, first: GGUFFile, count: int) -> GGUFFile:
        if first.values.get("split.no") != 0:
            raise GGUFError(
                f"{path}: is not the first of the {count} parts of a split file; "
                f"give {part_path(split_prefix(path), 0, count).name}"
            )
        match = _PART.fullmatch(path.name)
        if match is None or int(match["number"]) != 1 or int(match["count"]) != count:
            raise GGUFError(
                f"{path}: is the first of {count} parts, which are found by their names; it should "
                f"be called like {part_path(split_prefix(path), 0, count).name}"
            )
        parts = [first]
        for number in range(1, count):
            other = part_path(split_prefix(path), number, count)
            if not other.exists():
                raise GGUFError(f"{other}: missing; {path.name} is one of {count} parts")
            part = cls._open_one(other)
            if (part.values.get("split.no"), part.values.get("split.count")) != (number, count):
                raise GGUFError(
                    f"{other}: says that it is part {part.values.get('split.no')!r} of "
                    f"{part.values.get('split.count')!r}; expected {number} of {count}"
                )
            parts.append(part)
        tensors = tuple(tensor for part in parts for tensor in part.tensors)
        total = first.values.get("split.tensors.count")
        if total != len(tensors) or len({t.name for t in tensors}) != len(tensors):
            raise GGUFError(
                f"{path}: announces {total!r} tensors in its {count} parts, which hold "
                f"{len(tensors)} with {len({t.name for t in tensors})} names"
            )
        shards = tuple(part.shards[0] for part in parts)
        return cls(shards, first.version, first.values, first.raw, tensors)

    @classmethod
    def _open_one(cls, path: Path) -> GGUFFile:
        with opened(path, GGUFError) as (file, shard):
            return _Reader(file, shard).read()


def part_path(prefix: Path, number: int, count: int) -> Path:
    """Name of a part as llama.cpp forms it; `number` counts from 0."""
    return prefix.with_name(f"{prefix.name}-{number + 1:05}-of-{count:05}.gguf")


def split_prefix(path: Path) -> Path:
    """What the names of all parts begin with, from any of them or from that of the whole."""
    match = _PART.fullmatch(path.name)
    return path.with_name(match["name"] if match else path.name.removesuffix(".gguf"))


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
        raw: dict[str, RawValue] = {}
        for _ in range(value_count):
            key = self.string("a key")
            if key in values:
                self.fail(f"key {key!r} appears twice")
            begin = self.position
            values[key] = self.value(self.number("I", key), key)
            end = self.position
            self.file.seek(begin)
            raw[key] = RawValue(self.file.read(end - begin))
        entries = [self.entry() for _ in range(tensor_count)]
        return GGUFFile((self.shard,), version, values, raw, self.place(entries, values))

    def take(self, count: int, what: str) -> bytes:
        if count > self.shard.size - self.position:
            self.fail(
                f"{what}: {count} bytes announced, {self.shard.size - self.position} left: "
                "truncated or damaged"
            )
        if self.position + count > MAX_HEADER:
            self.fail(f"{what}: goes beyond {MAX_HEADER >> 20} MiB of header: damaged")
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
        if len(name.encode()) > _MAX_NAME:
            self.fail(f"tensor {name[:80]}...: its name is longer than {_MAX_NAME} bytes")
        rank = self.number("I", name)
        if not 0 < rank <= 4:
            self.fail(f"tensor {name}: has {rank} dimensions; expected 1 to 4")
        shape = tuple(reversed([self.number("Q", name) for _ in range(rank)]))
        if 0 in shape:
            self.fail(f"tensor {name}: is empty, of shape {shape}")
        return name, shape, self.number("I", name), self.number("Q", name)

    def place(
        self, entries: list[tuple[str, tuple[int, ...], int, int]], values: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """Turn offsets into places in the file, and check that they are good."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & alignment - 1:
            self.fail(f"general.alignment: {alignment!r} is not a power of two, 8 or more")
        start = -(-self.position // alignment) * alignment
        tensors: list[Tensor] = []
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
            tensors.append(Tensor(name, kind.name, shape, self.shard, start + offset, nbytes))
        end, previous = 0, ""
        for tensor in sorted(tensors, key=lambda t: t.begin):
            if tensor.begin < end:
                self.fail(f"tensors {previous} and {tensor.name} overlap")
            end, previous = tensor.begin + tensor.nbytes, tensor.name
        return tuple(tensors)
