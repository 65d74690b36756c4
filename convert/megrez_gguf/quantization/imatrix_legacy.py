"""The format llama-imatrix wrote before GGUF, and still does with `--output-format dat`.

Little-endian: int32 number of entries; of each, int32 length, name, int32 calls, int32 size,
float32 values; then, if not left out, int32 chunks, int32 length, name of the text. Values are mean
squares times calls. A pool of experts has one entry, of all its columns in a row.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from megrez_gguf.errors import GGUFError


def read_legacy(path: Path, file: BinaryIO) -> tuple[dict[str, npt.NDArray[np.float32]], str, int]:
    """Means `[1, values]` by tensor name, name of the text ("" if unknown), and chunks.

    Computed as llama-quantize does it, which takes values of 0 calls as they are. `file` is at its
    start, `path` its name. Raises GGUFError when it is not in this format.
    """
    return _Reader(path, file).read()


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.left = path, file, os.fstat(file.fileno()).st_size
        self.last = ""  # the entry being read, or the one before

    def read(self) -> tuple[dict[str, npt.NDArray[np.float32]], str, int]:
        means: dict[str, npt.NDArray[np.float32]] = {}
        for _ in range(self.number(least=1)):
            name = self.last = self.text(least=1)
            calls = self.number()
            values = np.frombuffer(self.take(4 * self.number(least=1)), "<f4")
            if name in means:
                self.fail()
            if calls > 0:
                values = values / np.float32(calls)
            means[name] = values[None]
        chunks = self.number() if self.left else 0
        dataset = self.text() if self.left else ""
        if self.left:
            self.fail()
        return means, dataset, chunks

    def number(self, least: int = 0) -> int:
        value = int.from_bytes(self.take(4), "little", signed=True)
        if value < least:
            self.fail()
        return value

    def text(self, least: int = 0) -> str:
        return self.take(self.number(least)).decode("utf-8", "replace")

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.left else b""
        if len(data) != count:
            self.fail()
        self.left -= count
        return data

    def fail(self) -> NoReturn:
        raise GGUFError(
            f"{self.path}: not an importance matrix of llama-imatrix, neither GGUF nor its old "
            f"format; or damaged{f', in or after {self.last!r}' if self.last else ''}"
        )
