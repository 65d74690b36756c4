"""Ways to read and damage tiny checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Make = Callable[..., Path]
Entry = tuple[str, tuple[int, ...], bytes]


def read_shard(path: Path) -> dict[str, Entry]:
    """Tensor name -> (dtype, shape, bytes)."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: (e["dtype"], tuple(e["shape"]), body[slice(*e["data_offsets"])])
        for name, e in header.items()
        if name != "__metadata__"
    }


def write_shard(path: Path, tensors: dict[str, Entry]) -> None:
    header, body = {}, b""
    for name, (dtype, shape, data) in tensors.items():
        end = len(body) + len(data)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), end]}
        body += data
    write_raw_shard(path, header, body)


def write_raw_shard(path: Path, header: Any, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_all(folder: Path) -> dict[str, Entry]:
    return {name: entry for path in shards(folder) for name, entry in read_shard(path).items()}


def merge(folder: Path, edit: Callable[[dict[str, Entry]], Any] = lambda tensors: None) -> Path:
    """Rewrite the checkpoint as one shard without an index, after `edit(tensors)` in place."""
    tensors = read_all(folder)
    edit(tensors)
    for path in shards(folder):
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    write_shard(folder / "model.safetensors", tensors)
    return folder


def edit_json(path: Path, edit: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    result = edit(content)
    path.write_text(json.dumps(content if result is None else result), encoding="utf-8")


def set_json(path: Path, **fields: Any) -> None:
    edit_json(path, lambda content: content | fields)


def bf16(values: Any) -> bytes:
    """Truncate to bfloat16; exact for the round numbers tests use."""
    return (np.asarray(values, dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()


def as_f32(entry: Entry) -> np.ndarray[Any, Any]:
    dtype, shape, data = entry
    if dtype == "BF16":
        flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        flat = np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype]).astype("<f4")
    return flat.reshape(shape)
