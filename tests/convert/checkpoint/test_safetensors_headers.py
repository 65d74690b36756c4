"""What the safetensors library takes, and nothing else, is a shard."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, safe_open

from megrez_gguf.checkpoint.shards import read_header
from megrez_gguf.errors import CheckpointError

BITS = {
    "F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "U16": 16, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E4M3FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F4": 4, "C64": 64,
    "F9": 8,
}  # fmt: skip


def drawn(draw: random.Random) -> bytes:
    """A file that is whole, or nearly so."""
    entries: dict[str, Any] = {}
    size = 0
    for number in range(draw.randrange(4)):
        dtype = draw.choice(list(BITS))
        shape = [draw.choice([0, 1, 2, 3, 8]) for _ in range(draw.randrange(11))]
        elements = 1
        for dimension in shape:
            elements *= dimension
        if elements > 1 << 16:
            continue
        end = size + elements * BITS[dtype] // 8
        name = draw.choice(["a", "b", "é", "x y", "z\u200b", "n\n"]) + str(number)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, end]}
        size = end
    entries = dict(draw.sample(list(entries.items()), len(entries)))
    for _ in range(draw.choice([0, 0, 1, 2])):
        spoil(entries, draw)
    text = json.dumps(entries, ensure_ascii=draw.random() < 0.5)
    around = ["", " ", "\n\t", "  \r\n", "\0", "x", "\ufeff", "[]"]
    text = draw.choice([*[""] * 20, *around]) + text + draw.choice([*[""] * 20, *around])
    if draw.random() < 0.05:
        text = text.replace("a", "\\ud800", 1)
    header = text.encode()
    length = len(header) + draw.choice([*[0] * 20, 1, -1, 8])
    body = bytes(max(size + draw.choice([*[0] * 20, 1, -1]), 0))
    return length.to_bytes(8, "little") + header + body


def spoil(entries: dict[str, Any], draw: random.Random) -> None:
    metadata: list[Any] = [None, {}, {"format": "pt"}, {"a": 1}, {"a": None}, [], "x", 0, False]
    if not entries or draw.random() < 0.2:
        entries["__metadata__"] = draw.choice(metadata)
        return
    entry = draw.choice(list(entries.values()))
    if not isinstance(entry, dict) or "shape" not in entry:
        return
    if draw.random() < 0.1:
        del entry[draw.choice(list(entry))]
        return
    dimension = draw.choice([0, 1, 2, -1, 2**32, 2**62, 2**63, 2**64, 1.0, True, "1", None])
    shape, offsets = (
        value if isinstance(value := entry.get(key), list) else []
        for key in ("shape", "data_offsets")
    )
    entry |= draw.choice(
        [
            {"more": draw.choice([1, [], {}, None])},
            {"shape": [*shape, dimension]},
            {"shape": [dimension, *shape]},
            {"shape": draw.choice([None, 3, {}, "2"])},
            {"data_offsets": [n + draw.choice([-8, -1, 0, 1, 8]) for n in offsets]},
            {"data_offsets": draw.choice([None, [], [0], [0, 0, 0], {}])},
            {"dtype": draw.choice(["f32", "BF16", 1, None])},
        ]
    )


def taken(path: Path) -> dict[str, list[int]] | str:
    try:
        return {tensor.name: list(tensor.shape) for tensor in read_header(path)[1]}
    except CheckpointError as e:
        return str(e)


def taken_by_the_library(path: Path) -> dict[str, list[int]] | str:
    try:
        with safe_open(path, "np") as shard:
            names: list[str] = [*shard.keys()]
            return {name: list(shard.get_slice(name).get_shape()) for name in names}
    except SafetensorError as e:
        return str(e)


@pytest.mark.parametrize("seed", range(4))
def test_as_the_library(seed: int, tmp_path: Path) -> None:
    path, draw = tmp_path / "model.safetensors", random.Random(seed)
    whole = 0
    for _ in range(1500):
        path.write_bytes(drawn(draw))
        ours, theirs = taken(path), taken_by_the_library(path)
        if isinstance(theirs, dict):
            assert ours == theirs, path.read_bytes()
            whole += 1
        else:
            assert isinstance(ours, str), (theirs, path.read_bytes())
    assert 300 < whole < 1200


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """The library takes the last; another reader may take the first."""
    path = tmp_path / "model.safetensors"
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    header = f'{{"a": {entry}, "a": {entry}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    assert taken_by_the_library(path) == {"a": [0]}
    assert "key 'a' appears twice" in str(taken(path))
