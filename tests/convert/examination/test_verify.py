"""`verify` passes what is sound, and names what is not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megrez_gguf
from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.examination.verification import verify
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization.imatrix import Imatrix
from support.checkpoints import Make, merge
from support.commands import cli

WIDE = {"hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 512}


def tensor(path: Path, name: str) -> Any:
    return next(t for t in GGUFFile.open(path).tensors if t.name == name)


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("level", ["bf16", "f32", "f16", "q8_0", "q4_k_m"])
def test_sound(make: Make, tmp_path: Path, level: str) -> None:
    folder = make(**WIDE)
    path = megrez_gguf.convert(folder, tmp_path / "x.gguf", outtype=level).path
    result = verify(path, folder)
    assert result.failures == ()
    assert result.hashed == result.compared == result.tensors == len(GGUFFile.open(path).tensors)
    alone = verify(path)
    assert (alone.failures, alone.compared) == ((), 0)


def test_split(make: Make, tmp_path: Path) -> None:
    folder = make(**WIDE)
    done = megrez_gguf.convert(folder, tmp_path / "x.gguf", split_max_size=2_000_000)
    assert len(done.parts) > 1
    assert verify(done.path, folder).failures == ()
    hit = tensor(done.path, "output_norm.weight")
    assert hit.shard.path in done.parts
    flip(hit.shard.path, hit.begin)
    assert [f.split(":")[0] for f in verify(done.path).failures] == ["output_norm.weight"]


@pytest.mark.parametrize("level", ["bf16", "q4_k_m"])
def test_damage(make: Make, tmp_path: Path, level: str) -> None:
    folder = make(**WIDE)
    path = megrez_gguf.convert(folder, tmp_path / "x.gguf", outtype=level).path
    hit = tensor(path, "blk.2.ffn_up_exps.weight")
    # In expert 1, row 3.
    row = hit.nbytes // (4 * 96)
    flip(path, hit.begin + (96 + 3) * row + 5)
    result = cli("verify", path)
    assert result.exit_code == 1
    assert result.stdout.startswith("blk.2.ffn_up_exps.weight: its bytes are not those that were")
    result = cli("verify", path, folder, "--json")
    assert result.exit_code == 1
    failures = json.loads(result.stdout)["failures"]
    assert len(failures) == 2
    assert "differs from row [1, 3] on: the file differs from the checkpoint" in failures[1]


def test_other_weights(make: Make, tmp_path: Path) -> None:
    folder = make(**WIDE)
    path = megrez_gguf.convert(folder, tmp_path / "x.gguf", outtype="q8_0").path
    name = "model.layers.3.mlp.shared_experts.up_proj.weight"

    def change(tensors: dict[str, Any]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes([data[0] ^ 64, data[1] ^ 1]) + data[2:])

    merge(folder, change)
    (failure,) = verify(path, folder).failures
    assert failure.startswith("blk.3.ffn_up_shexp.weight: differs from row [0] on: written so")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1000000.0}, "key megrez-moe.rope.freq_base: is 5000000.0"),
        ({"pre_gate": False}, "key megrez-moe.pre_gate: is True; the checkpoint says False"),
    ],
)
def test_other_settings(make: Make, tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = megrez_gguf.convert(make(**WIDE), tmp_path / "x.gguf").path
    failures = verify(path, make(**WIDE | fields)).failures
    assert any(f.startswith(message) for f in failures), failures


def test_importance(make: Make, tmp_path: Path) -> None:
    folder = make(**WIDE)
    plain = megrez_gguf.convert(folder, tmp_path / "plain.gguf")
    rng = np.random.default_rng(0)
    sums, counts = {}, {}
    for t in GGUFFile.open(plain.path).tensors:
        if t.name.startswith("blk.") and len(t.shape) > 1:
            matrices = int(np.prod(t.shape[:-2]))
            sums[t.name] = rng.random((matrices, t.shape[-1]), dtype=np.float32)
            counts[t.name] = np.ones(matrices, np.int64)
    weights, other = (
        Imatrix(sums, counts),
        Imatrix({n: s[:, ::-1] for n, s in sums.items()}, counts),
    )
    path = megrez_gguf.convert(folder, tmp_path / "x.gguf", outtype="q4_k_m", imatrix=weights).path
    assert verify(path, folder, imatrix=weights).failures == ()
    assert all("another importance" in f for f in verify(path, folder, imatrix=other).failures)
    assert len(verify(path, folder, imatrix=other).failures) > 10
    with pytest.raises(ConfigError, match="made with an importance matrix"):
        verify(path, folder)
    with pytest.raises(ConfigError, match="made without an importance matrix"):
        verify(plain.path, folder, imatrix=weights)


def test_a_record_that_another_program_copied(make: Make, tmp_path: Path) -> None:
    """llama-quantize hands on the keys it does not know, and changes the tensors."""
    import ctypes

    import llama_cpp

    folder = make(**WIDE)
    source = megrez_gguf.convert(folder, tmp_path / "x.gguf").path
    target = tmp_path / "theirs.gguf"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    names = str(source).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0
    result = verify(target, folder)
    assert result.failures == ()
    assert result.compared == result.tensors > result.hashed
    assert "another program wrote this file" in result.notes[0]


def _without(record: bytes) -> bytes:
    return record.replace(b"megrez-gguf.sha256", b"megrez-gguf.sha000")


def _garbled(record: bytes) -> bytes:
    return record.replace(b"output_norm.weight F32 ", b"output_norm.weight F32_")


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (_without, ConfigError, "has no hashes of its own; give the checkpoint"),
        (_garbled, GGUFError, "damaged at 'output_norm.weight F32_"),
    ],
)
def test_no_record(
    make: Make,
    tmp_path: Path,
    edit: Callable[[bytes], bytes],
    error: type[Exception],
    message: str,
) -> None:
    path = megrez_gguf.convert(make(), tmp_path / "x.gguf").path
    path.write_bytes(edit(path.read_bytes()))
    with pytest.raises(error, match=message):
        verify(path)


def test_missing_key(make: Make, tmp_path: Path) -> None:
    folder = make()
    path = megrez_gguf.convert(folder, tmp_path / "x.gguf").path
    data = path.read_bytes()
    key = b"megrez-moe.expert_used_count"
    path.write_bytes(data.replace(key, b"megrez-moe.expert_used_c0unt"))
    assert struct.pack("<Q", len(key)) + key in data
    expected = "key megrez-moe.expert_used_count: missing from the file; expected 2"
    assert verify(path, folder).failures == (expected,)
