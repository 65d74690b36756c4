"""Every level in one pass: byte for byte what llama.cpp's own quantizer makes."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from checkpoints import Make, cli

import megrez_gguf
from megrez_gguf import levels
from megrez_gguf.gguf_file import GGUFFile
from megrez_gguf.imatrix import Imatrix

WIDE = {"hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 512}
WEIGHTED = [*levels.EITHER, *levels.WEIGHTED]


def content(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        t.name: (t.type, t.shard.path.read_bytes()[t.begin : t.begin + t.nbytes])
        for t in GGUFFile.open(path).tensors
    }


def by_llama_cpp(source: Path, target: Path, level: str, weights: Imatrix | None) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = levels.file_type(level)
    if weights:
        entries = (llama_cpp.llama_model_imatrix_data * (len(weights.means) + 1))()
        for entry, (name, values) in zip(entries, weights.means.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, type(params.imatrix))
    names = str(source).encode(), str(target).encode()
    assert llama_cpp.llama_model_quantize(*names, ctypes.byref(params)) == 0
    return target


def importance(source: Path) -> Imatrix:
    rng = np.random.default_rng(0)
    sums, counts = {}, {}
    for t in GGUFFile.open(source).tensors:
        if t.name.startswith("blk.") and len(t.shape) > 1:
            matrices = int(np.prod(t.shape[:-2]))
            sums[t.name] = rng.random((matrices, t.shape[-1]), dtype=np.float32)
            counts[t.name] = np.arange(1, matrices + 1)
    return Imatrix(sums, counts)


@pytest.mark.parametrize("level", levels.LEVELS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
def test_equals_llama_quantize(make: Make, tmp_path: Path, level: str, weighted: bool) -> None:
    if level in (levels.PLAIN if weighted else levels.WEIGHTED):
        with pytest.raises(megrez_gguf.errors.ConfigError, match="importance matrix"):
            levels.check_weighted(level, weighted)
        return
    folder = make(**WIDE)
    source = megrez_gguf.convert(folder, tmp_path / "bf16.gguf").path
    weights = importance(source) if weighted else None
    theirs = content(by_llama_cpp(source, tmp_path / "theirs.gguf", level, weights))
    ours = megrez_gguf.convert(folder, tmp_path / "ours.gguf", level, imatrix=weights)
    assert content(ours.path) == theirs
    again = megrez_gguf.quantize(source, tmp_path / "again.gguf", level, imatrix=weights)
    assert content(again.path) == theirs
    assert GGUFFile.open(again.path).values["general.file_type"] == levels.file_type(level)


def test_split(make: Make, tmp_path: Path) -> None:
    folder = make(**WIDE)
    whole = megrez_gguf.convert(folder, tmp_path / "whole.gguf", "q8_0")
    result = cli(
        "convert", folder, "-o", tmp_path / "x.gguf", "--outtype", "q8_0", "--split-max-size", "2M"
    )
    assert result.exit_code == 0, result.stderr
    first = Path(result.stdout.strip())
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert first == parts[0]
    assert len(parts) > 1
    assert content(first) == content(whole.path)
    model = llama_cpp.llama_model_load_from_file(
        str(first).encode(), llama_cpp.llama_model_default_params()
    )
    assert model
    llama_cpp.llama_model_free(model)
    parts[1].unlink()
    inspected = cli("inspect", first)
    assert inspected.exit_code == 2
    assert "missing" in inspected.stderr


def test_recipe(make: Make, tmp_path: Path) -> None:
    mix = tmp_path / "mine.toml"
    mix.write_text('level = "q4_k_m"\n[types]\n"ffn_down_exps" = "iq4_nl"\n')
    result = cli("convert", make(**WIDE), "-o", tmp_path / "x.gguf", "--recipe", mix)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = {n: t for n, (t, _) in content(tmp_path / "x.gguf").items()}
    assert {t for n, t in found.items() if "ffn_down_exps" in n} == {"IQ4_NL"}
    mix.write_text('level = "q4_k_m"\n[types]\n"nothing_like_it" = "iq4_nl"\n')
    result = cli("convert", make(**WIDE), "-o", tmp_path / "y.gguf", "--recipe", mix)
    assert result.exit_code == 2
    assert "matches no tensor" in result.stderr


def test_recorded_hashes(make: Make, tmp_path: Path) -> None:
    import hashlib

    path = megrez_gguf.convert(make(**WIDE), tmp_path / "x.gguf", "q4_k_m").path
    expected = [f"{n} {t} {hashlib.sha256(d).hexdigest()}" for n, (t, d) in content(path).items()]
    assert GGUFFile.open(path).values["megrez-gguf.sha256"] == expected


def test_what_a_killed_process_left_is_removed(make: Make, tmp_path: Path) -> None:
    left = tmp_path / ".megrez-gguf-left.part"
    left.write_bytes(b"x")
    megrez_gguf.convert(make(), tmp_path / "x.gguf")
    assert not left.exists()


@pytest.mark.parametrize("arguments", [["--outtype", "q4_k_m"], ["--split-max-size", "2M"]])
def test_dry_run(make: Make, tmp_path: Path, arguments: list[str]) -> None:
    folder, out = make(**WIDE), tmp_path / "x.gguf"
    before = sorted(tmp_path.iterdir())
    told = json.loads(cli("convert", folder, "-o", out, *arguments, "--dry-run", "--json").stdout)
    assert sorted(tmp_path.iterdir()) == before
    done = json.loads(cli("convert", folder, "-o", out, *arguments, "--json").stdout)
    for key in ("parts", "nbytes", "types", "fallbacks", "parameters"):
        assert told[key] == done[key], key
    assert told["nbytes"] == sum(Path(part).stat().st_size for part in told["parts"])
    assert 0 < told["seconds"] < 60
    found = {n: {"type": t, "nbytes": len(d)} for n, (t, d) in content(Path(done["path"])).items()}
    assert told["tensors"] == found
    text = cli("convert", folder, "-o", out, *arguments, "--dry-run").stdout
    assert all(name in text for name in found)


def test_killed(make: Make, tmp_path: Path) -> None:
    """SIGKILL in the middle of the weights: nothing under the name, and the next run is clean."""
    folder, out = make(**WIDE), tmp_path / "out"
    out.mkdir()
    code = (
        "import time\n"
        "from megrez_gguf import pipeline\n"
        "end = pipeline._Writer.end\n"
        "pipeline._Writer.end = lambda *a: (end(*a), time.sleep(0.05))\n"
        "from megrez_gguf.cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "convert", str(folder), "-o", str(out / "x.gguf")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size > 20_000 for p in out.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # A living process's file is left alone by another run in the same folder.
    megrez_gguf.convert(folder, out / "y.gguf")
    assert len(list(out.glob(".megrez-gguf-*.part"))) == 1
    process.kill()
    process.wait()
    assert not (out / "x.gguf").exists()
    megrez_gguf.convert(folder, out / "x.gguf")
    assert sorted(p.name for p in out.iterdir()) == ["x.gguf", "y.gguf"]
