"""What a failed download leaves in place of a file is named, wherever a file is opened."""

from __future__ import annotations

import gzip
import io
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.shards import read_header
from megrez_gguf.errors import MegrezError
from megrez_gguf.format.reader import GGUFFile


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", "x")
    return buffer.getvalue()


def pointer(draw: random.Random) -> bytes:
    digest = f"{draw.getrandbits(256):064x}"
    size = draw.randrange(1, 2**40)
    return (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    )


def page(draw: random.Random) -> bytes:
    start = draw.choice(["<!DOCTYPE html>\n", "<html lang='en'>", "\n  <!doctype HTML>", "<HTML>"])
    return (draw.choice(["", "\ufeff"]) + start + "<title>Sign in</title>").encode()


LEFT: dict[str, tuple[Callable[[random.Random], bytes], str]] = {
    "a pointer": (pointer, "Git LFS pointer.*git lfs pull"),
    "a page": (page, "web page.*hf download"),
    "nothing": (lambda draw: b"", "empty: .*hf download"),
    "zeros": (lambda draw: bytes(draw.randrange(64, 5000)), "zeros: .*hf download"),
    "a refusal": (
        lambda draw: draw.choice([b"Entry not found", b"Invalid username or password."]),
        "server's refusal.*hf auth login",
    ),
    "a gzip": (lambda draw: gzip.compress(draw.randbytes(99)), "compressed file; unpack"),
    "a zip": (lambda draw: zipped(), "ZIP archive"),
    "a pickle": (
        lambda draw: pickle.dumps([draw.random()], draw.choice([2, 3, 4, 5])),
        "Python pickle",
    ),
}

OPENERS: dict[str, Callable[[Path], object]] = {
    "model.safetensors": read_header,
    "model.gguf": GGUFFile.open,
    "config.json": lambda path: Documents.read(path.parent),
}


@pytest.mark.parametrize("name", OPENERS)
@pytest.mark.parametrize("kind", LEFT)
def test_named(kind: str, name: str, tmp_path: Path) -> None:
    make, expected = LEFT[kind]
    for seed in range(5):
        path = tmp_path / name
        path.write_bytes(make(random.Random(seed)))
        with pytest.raises(MegrezError, match=f"(?s){name}: .*{expected}"):
            OPENERS[name](path)


def test_sound_file_that_begins_like_a_pickle(tmp_path: Path) -> None:
    header = b"{}".ljust(0x280)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_header(path)[1] == []
