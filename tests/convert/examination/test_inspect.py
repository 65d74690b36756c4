"""`inspect`: what it shows, and GGUF files that are damaged, hostile or foreign."""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

import megrez_gguf
from megrez_gguf.errors import GGUFError
from megrez_gguf.examination.inspection import Group
from megrez_gguf.format.reader import MAX_HEADER, GGUFFile
from support.checkpoints import Make, bf16, edit_json, merge
from support.commands import cli


@pytest.fixture
def model(checkpoint: Path, tmp_path: Path) -> Path:
    return megrez_gguf.convert(checkpoint, tmp_path / "tiny.gguf").path


def test_checkpoint_and_file_agree(checkpoint: Path, model: Path) -> None:
    a, b = megrez_gguf.inspect(checkpoint), megrez_gguf.inspect(model)
    assert (a.kind, b.kind) == ("checkpoint", "gguf")
    assert a.groups == b.groups == (Group(2, (2, 3)), Group(4, (4,)))
    assert a.dense_layers == b.dense_layers == (0, 1)
    assert a.parameters == b.parameters
    assert a.hyperparameters.keys() == b.hyperparameters.keys()
    assert a.hyperparameters["experts_shared_frequency"] == 2
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    assert [t.role for t in a.tensors] == [t.role for t in b.tensors]
    assert [t.shape for t in a.tensors] == [t.shape for t in b.tensors]
    assert "other" not in b.roles
    assert sum(b.roles.values()) == b.nbytes
    assert b.warnings == []
    pool = next(t for t in a.tensors if t.name == "blk.2.ffn_down_exps.weight")
    assert (pool.shape, pool.type, pool.role) == ((4, 64, 32), "BF16", "experts")


@pytest.mark.parametrize("kind", ["checkpoint", "gguf"])
def test_counts(make: Make, tmp_path: Path, kind: str) -> None:
    values = np.ones((320, 64), dtype=np.float32)
    values[0, :5] = [2.0**17, -(2.0**16), 2.0**-30, 2.0**-25, 2.0**-24]
    folder = merge(
        make(), lambda t: t.update({"lm_head.weight": ("BF16", (320, 64), bf16(values))})
    )
    path = folder
    if kind == "gguf":
        path = megrez_gguf.convert(folder, tmp_path / "x.gguf").path
    before = megrez_gguf.inspect(path)
    head = next(t for t in before.tensors if t.name == "output.weight")
    assert (head.non_finite, head.f16_overflow, head.f16_flushed) == (0, 2, 2)
    assert before.f16_overflow == 2


def test_non_finite_weights_are_counted(checkpoint: Path) -> None:
    data = bf16(np.r_[np.nan, -np.inf, np.inf, np.ones(61)])
    merge(checkpoint, lambda t: t.update({"model.norm.weight": ("BF16", (64,), data)}))
    report = megrez_gguf.inspect(checkpoint)
    assert report.non_finite == 3
    norm = next(t for t in report.tensors if t.name == "output_norm.weight")
    assert (norm.non_finite, norm.f16_overflow) == (3, 0)
    assert "3 NaN or infinite" in cli("inspect", checkpoint).stdout


def test_json_and_text(model: Path) -> None:
    result = cli("inspect", model, "--json")
    assert result.exit_code == 0
    raw = json.loads(result.stdout)
    assert raw["groups"] == [{"pool": 2, "layers": [2, 3]}, {"pool": 4, "layers": [4]}]
    assert raw["non_finite"] == 0
    text = cli("inspect", model).stdout
    assert "experts of layer 2: used by 2-3" in text
    assert "dense: 0-1" in text


def test_no_scan_reads_no_weights(checkpoint: Path) -> None:
    raw = json.loads(cli("inspect", checkpoint, "--json", "--no-scan").stdout)
    assert raw["non_finite"] is None
    assert raw["tensors"][0]["f16_overflow"] is None


def test_quantized_tensors_are_not_counted(checkpoint: Path, tmp_path: Path) -> None:
    path = megrez_gguf.convert(checkpoint, tmp_path / "q.gguf", outtype="q8_0").path
    report = megrez_gguf.inspect(path)
    kinds = {t.type: t.non_finite for t in report.tensors}
    assert kinds == {"Q8_0": None, "F32": 0}


def write(path: Path, values: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Path:
    writer = GGUFWriter(path, values.get("general.architecture", "megrez-moe"))
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_uint32(key, value)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def old(layers: int = 3, pools: tuple[int, ...] = (1,), **values: Any) -> dict[str, Any]:
    shapes: dict[str, tuple[int, ...]]
    shapes = {f"blk.{i}.ffn_gate_inp.weight": (4, 8) for i in range(1, layers)}
    shapes |= {f"blk.{i}.ffn_gate_exps.weight": (4, 8, 8) for i in pools}
    return {"values": {"megrez-moe.block_count": layers, **values}, "shapes": shapes}


def test_a_file_without_our_keys(tmp_path: Path) -> None:
    report = megrez_gguf.inspect(write(tmp_path / "x.gguf", **old(6, (1, 4))))
    assert report.groups == (Group(1, (1, 2, 3)), Group(4, (4, 5)))
    assert len(report.warnings) == 2


def test_a_file_that_contradicts_itself(tmp_path: Path) -> None:
    content = old(6, (1, 4), **{"megrez-moe.experts_shared_frequency": 2})
    report = megrez_gguf.inspect(write(tmp_path / "x.gguf", **content))
    assert any("puts expert pools in layers [1, 3, 5]; the file has them in [1, 4]" in w
               for w in report.warnings)  # fmt: skip


def test_foreign_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"general.architecture": "llama"}, {"a": (2,)})
    with pytest.raises(GGUFError, match=r"general\.architecture is 'llama', not 'megrez-moe'"):
        megrez_gguf.inspect(path)


@pytest.mark.parametrize("count", [0, "many"])
def test_bad_block_count(tmp_path: Path, count: Any) -> None:
    content = old()
    content["values"]["megrez-moe.block_count"] = count
    with pytest.raises(GGUFError, match="block_count: expected an integer from 1 to 512"):
        megrez_gguf.inspect(write(tmp_path / "x.gguf", **content))


def test_no_experts(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="no expert pool for layer 1"):
        megrez_gguf.inspect(write(tmp_path / "x.gguf", **old(pools=(2,))))


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def pair(key: str, kind: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def head(tensors: int, values: int, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty: the download"),
    "other magic": (b"PKZ" + bytes(60), "not a GGUF file"),
    "magic only": (b"GGUF", "the version: 4 bytes announced, 0 left"),
    "big endian": (b"GGUF\0\0\0\3" + bytes(16), "GGUF version 50331648 is not supported"),
    "version 1": (head(0, 0, version=1), "GGUF version 1 is not supported"),
    "37 bytes": (head(1, 1, bytes(13)), "announces 1 tensors and 1 keys, more than its 37 bytes"),
    "2^60 keys": (head(0, 2**60, bytes(99)), "announces 0 tensors and 1152921504606846976 keys"),
    "2^63 tensors": (head(2**63, 0, bytes(99)), "announces 9223372036854775808 tensors"),
    "key of 2^63 bytes": (
        head(0, 1, struct.pack("<Q", 2**63), bytes(99)),
        "a key: 9223372036854775808 bytes announced",
    ),
    "key twice": (
        head(0, 2, pair("a", 0, b"1"), pair("a", 0, b"1"), bytes(9)),
        "key 'a' appears tw",
    ),
    "key is no UTF-8": (
        head(0, 1, struct.pack("<Q", 2) + b"\xff\xfe", bytes(99)),
        "a key: not valid UTF-8",
    ),
    "unknown value type": (
        head(0, 1, pair("a", 99, b""), bytes(9)),
        "key 'a': unknown value type 99",
    ),
    "nested array": (
        head(0, 1, pair("a", 9, struct.pack("<IQ", 9, 1)), bytes(9)),
        "key 'a': arrays of value type 9 are not supported",
    ),
    "array of 2^60 bytes": (
        head(0, 1, pair("a", 9, struct.pack("<IQ", 0, 2**60)), bytes(9)),
        "a: 1152921504606846976 bytes announced",
    ),
    "array of 2^60 strings": (
        head(0, 1, pair("a", 9, struct.pack("<IQ", 8, 2**60)), bytes(9)),
        "announces 1152921504606846976 strings",
    ),
    "no dimensions": (head(1, 0, tensor("t", ()), bytes(99)), "tensor t: has 0 dimensions"),
    "many dimensions": (head(1, 0, tensor("t", (1,) * 9), bytes(99)), "tensor t: has 9 dimensions"),
    "unknown type": (head(1, 0, tensor("t", (1,), 250), bytes(99)), "tensor t: unknown type 250"),
    "half a block": (head(1, 0, tensor("t", (33,), 8), bytes(99)), "rows of 33 do not fill Q8_0"),
    "huge tensor": (head(1, 0, tensor("t", (2**62, 2**62)), bytes(99)), "truncated or damaged"),
    "offset out of the file": (head(1, 0, tensor("t", (1,), 0, 2**40), bytes(99)), "truncated or"),
    "offset off its alignment": (head(1, 0, tensor("t", (1,), 0, 4), bytes(99)), "truncated or"),
    "overlap": (
        head(2, 0, tensor("t", (16,)), tensor("u", (8,), 0, 32), bytes(200)),
        "tensors t and u overlap",
    ),
    "tensor twice": (
        head(2, 0, tensor("t", (1,)), tensor("t", (1,)), bytes(200)),
        "t appears twice",
    ),
    "a name too long": (head(1, 0, tensor("t" * 64, (1,)), bytes(99)), "longer than 63 bytes"),
    "a side of 0": (head(1, 0, tensor("t", (4, 0)), bytes(99)), "t: is empty, of shape (0, 4)"),
    "alignment 24": (
        head(0, 1, pair("general.alignment", 4, struct.pack("<I", 24)), bytes(99)),
        "general.alignment: 24 is not a power of two",
    ),
    "alignment 0": (
        head(0, 1, pair("general.alignment", 4, bytes(4)), bytes(99)),
        "general.alignment: 0 is not a power of two",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, tmp_path: Path) -> None:
    data, message = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    result = cli("inspect", path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ")
    assert message in result.stderr
    assert result.stdout == ""


def repeated(kind: int, element: bytes) -> bytes:
    count = (1 << 18) // len(element)
    array = struct.pack("<IQ", kind, count) + element * count
    return head(0, 1, pair("a", 9, array), bytes(99))


GREEDY: dict[str, Callable[[], bytes]] = {
    "bytes": lambda: repeated(0, b"\xff"),
    "flags": lambda: repeated(7, b"\1"),
    "numbers": lambda: repeated(4, b"\xff" * 4),
    "floats": lambda: repeated(6, b"abcd"),
    "doubles": lambda: repeated(12, b"abcdefgh"),
    "empty strings": lambda: repeated(8, text("")),
    "short strings": lambda: repeated(8, text("ab")),
    "keys": lambda: head(0, 12000, *(pair(f"{i:x}", 0, b"1") for i in range(12000))),
    "tensors": lambda: head(6000, 0, *(tensor(f"{i:x}", (1,)) for i in range(6000)), bytes(99)),
}


@pytest.mark.parametrize("case", GREEDY)
def test_memory_is_bounded_by_the_file(case: str, tmp_path: Path) -> None:
    data = GREEDY[case]()
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with suppress(GGUFError):
        GGUFFile.open(path)
    tracemalloc.start()
    try:
        with suppress(GGUFError):
            GGUFFile.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(data)


def test_header_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head(0, 1, pair("a", 9, struct.pack("<IQ", 0, MAX_HEADER))))
    with path.open("r+b") as file:
        file.truncate(2 * MAX_HEADER)
    with pytest.raises(GGUFError, match="a: goes beyond 64 MiB of header"):
        GGUFFile.open(path)


def test_truncated_anywhere(model: Path, tmp_path: Path) -> None:
    """Every length up to the data, then some: a message each time, and never a crash."""
    data = model.read_bytes()
    path = tmp_path / "cut.gguf"
    for keep in [*range(0, 3000, 7), *range(3000, len(data), 4999), len(data) - 1]:
        path.write_bytes(data[:keep])
        with pytest.raises(GGUFError):
            megrez_gguf.inspect(path, scan=False)


def test_bit_flips(model: Path, tmp_path: Path) -> None:
    """Damage in the head ends in a report or in GGUFError, never in anything else."""
    data = bytearray(model.read_bytes())
    rng = np.random.default_rng(0)
    path = tmp_path / "flipped.gguf"
    start = data.find(b"token_embd.weight")
    spans = [(0, 1500), (start - 100, start + 3000)]
    for _ in range(400):
        first, last = spans[rng.integers(2)]
        at, bit = int(rng.integers(first, last)), int(rng.integers(8))
        data[at] ^= 1 << bit
        path.write_bytes(data)
        with suppress(GGUFError):
            megrez_gguf.inspect(path, scan=False)
        data[at] ^= 1 << bit


def test_not_there(tmp_path: Path) -> None:
    result = cli("inspect", tmp_path / "none.gguf")
    assert result.exit_code == 2
    assert "none.gguf: no such" in result.stderr


def test_a_bad_checkpoint(checkpoint: Path) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(vocab_size=321))
    assert cli("inspect", checkpoint).exit_code == 2
