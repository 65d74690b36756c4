"""Every level in one pass: byte for byte what llama.cpp's own quantizer makes."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import megrez_gguf
from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.conversion.plan import Conversion
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization import levels
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.types import Fallback
from megrez_llama.logs import log
from support.checkpoints import Entry, Make, merge
from support.commands import cli
from support.configurations import TINY
from support.marks import SLOW, loop_takes
from support.random_checkpoint import make_checkpoint

WIDE = {"hidden_size": 256, "moe_intermediate_size": 96, "intermediate_size": 512}
# What llama.cpp's choice of types looks at: widths, numbers of layers, experts and heads, and
# whether there is an output matrix. `test_the_models_are_what_they_are_for` tells what each is for.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "wide": (WIDE, {}),
    "odd": (
        {
            "hidden_size": 256,
            "moe_intermediate_size": 352,
            "intermediate_size": 336,
            "n_shared_experts": 1,
            "n_routed_experts": 3,
            "num_key_value_heads": 1,
        },
        {"dtype": "float32"},
    ),
    "tied": (
        {
            "hidden_size": 256,
            "moe_intermediate_size": 32,
            "intermediate_size": 256,
            "n_shared_experts": 8,
            "n_routed_experts": 8,
            "num_key_value_heads": 1,
            "num_hidden_layers": 16,
            "first_k_dense_replace": 1,
            "experts_shared_frequency": 3,
            "tie_word_embeddings": True,
        },
        {"dtype": "float16", "tokenizer_vocab": 300},
    ),
}
PLAIN = [(level, False) for level in (*levels.PLAIN, *levels.EITHER)]
WEIGHTED = [(level, True) for level in (*levels.EITHER, *levels.WEIGHTED)]
# One of each family of encodings is for the loop, of the model whose rows fill the fewest blocks.
FAMILIES = (
    *("f32", "bf16", "q8_0", "q4_0", "q6_k", "q4_k_m", "iq4_xs", "mxfp4_moe"),
    *("q2_k+imatrix", "iq4_nl+imatrix"),
)
CASES = [
    pytest.param(level, weighted, id=name, marks=[] if name in FAMILIES else SLOW)
    for level, weighted in (*PLAIN, *WEIGHTED)
    for name in [level + "+imatrix" * weighted]
]


@dataclass(frozen=True)
class Model:
    """A checkpoint, its file in the checkpoint's own type, and made-up importance."""

    folder: Path
    source: Path
    weights: Imatrix

    def plan(self, level: str, weighted: bool = False) -> Conversion:
        return plan_convert(self.folder, outtype=level, imatrix=self.weights if weighted else None)

    def types(self, level: str, weighted: bool = False) -> dict[str, str]:
        return {item.name: item.encoding.name for item in self.plan(level, weighted).items}


def thin(tensors: dict[str, Entry]) -> None:
    """Keep every eighth row: the search for the best bits of the others would take minutes."""
    for name, (dtype, shape, data) in tensors.items():
        if len(shape) > 1:
            rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1).copy()
            rows[np.arange(shape[0]) % 8 != 0] = 0
            tensors[name] = (dtype, shape, rows.tobytes())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def model(name: str) -> Model:
        if name not in made:
            fields, options = MODELS[name]
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            merge(make_checkpoint(TINY | fields, folder, **options), thin)
            source = megrez_gguf.convert(
                folder, folder.parent / "source.gguf", allow_zeros=True
            ).path
            made[name] = Model(folder, source, importance(source))
        return made[name]

    return model


def content(path: Path) -> dict[str, tuple[str, bytes]]:
    return {
        t.name: (t.dtype, t.shard.path.read_bytes()[t.begin : t.begin + t.nbytes])
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


def fallbacks_in(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What llama.cpp says while it quantizes: the tensor, the type wanted, and the type it got."""
    said = r"warning: (\S+) .*required for type +(\S+)\).* falling back to +(\S+)"
    found = [match.groups() for match in map(re.compile(said).search, lines) if match]
    assert len(found) == sum("falling back" in line for line in lines)
    return {name: (wanted.upper(), got.upper()) for name, wanted, got in found}


def fallbacks_of(fallbacks: Sequence[Fallback]) -> dict[str, tuple[str, str]]:
    return {f.tensor: (f.wanted, f.got) for f in fallbacks}


@pytest.mark.parametrize(("level", "weighted"), CASES)
@pytest.mark.parametrize("name", loop_takes("odd".__eq__, MODELS))
def test_equals_llama_quantize(
    models: Callable[[str], Model], name: str, level: str, weighted: bool
) -> None:
    model = models(name)
    folder = model.source.parent  # one place for all levels, which would take a gigabyte
    weights = model.weights if weighted else None
    log.install(llama_cpp)
    with log.listening() as lines:
        theirs = content(by_llama_cpp(model.source, folder / "theirs.gguf", level, weights))
        said = fallbacks_in(lines())
    options: dict[str, Any] = {"force": True, "imatrix": weights, "allow_zeros": True}
    ours = megrez_gguf.convert(model.folder, folder / "ours.gguf", outtype=level, **options)
    again = megrez_gguf.quantize(model.source, folder / "again.gguf", outtype=level, **options)
    for done in (ours, again):
        assert content(done.path) == theirs
        assert fallbacks_of(done.fallbacks) == said
        assert GGUFFile.open(done.path).values["general.file_type"] == levels.file_type(level)


@pytest.mark.parametrize("level", levels.LEVELS)
def test_levels_know_whether_they_take_importance(level: str) -> None:
    for weighted in (False, True):
        if (level, weighted) in (*PLAIN, *WEIGHTED):
            levels.check_weighted(level, weighted)
        else:
            with pytest.raises(megrez_gguf.errors.ConfigError, match="importance matrix"):
                levels.check_weighted(level, weighted)


def test_the_models_are_what_they_are_for(models: Callable[[str], Model]) -> None:
    wide, odd, tied = (models(name) for name in MODELS)
    assert [m.plan("auto").level for m in (wide, odd, tied)] == ["bf16", "f32", "f16"]
    # The widths of "odd" fill no block of 256, and its dense ones none of 32. Its last group is
    # shorter than the other.
    groups = megrez_gguf.inspect(odd.folder, scan=False).groups
    assert [group.layers for group in groups] == [(2, 3), (4,)]
    for level, weighted in (*PLAIN, *WEIGHTED):
        fallen = fallbacks_of(odd.plan(level, weighted).fallbacks)
        assert bool(fallen) == (level not in levels.FLOATS), level
    fallen = fallbacks_of(odd.plan("q4_k_s").fallbacks)
    assert fallen["blk.4.ffn_down_exps.weight"] == ("Q4_K", "Q5_0")
    assert fallen["blk.1.ffn_down.weight"] == ("Q4_K", "F16")
    # Eight experts have rules of their own, and so have four heads to a key; the layers of "tied"
    # meet every branch of the rule that gives some of them more bits.
    types = tied.types("q4_k_m")
    assert "output.weight" not in types
    assert types["token_embd.weight"] == "Q6_K" != wide.types("q4_k_m")["token_embd.weight"]
    downs = [types[f"blk.{i}.ffn_down_shexp.weight"] for i in range(1, 16)]
    more = [i + 1 for i, kind in enumerate(downs) if kind == "Q6_K"]
    assert (more, {*downs}) == ([1, 4, 7, 10, 13, 14, 15], {"Q6_K", "Q4_K"})
    assert tied.types("q3_k_m")["blk.0.ffn_down.weight"] == "Q5_K"
    assert [m.types("q4_k_m")["blk.0.attn_k.weight"] for m in (wide, tied)] == ["Q4_K", "Q8_0"]
    values = [m.types("iq4_xs")["blk.0.attn_v.weight"] for m in (wide, odd, tied)]
    assert values == ["IQ4_XS", "Q5_K", "Q8_0"]
    assert any("padded by 20 unused tokens" in w for w in tied.plan("bf16").warnings)
    # No level that quantizes treats them all alike.
    for level, weighted in (*PLAIN, *WEIGHTED):
        kinds = [kinds_of(m.types(level, weighted)) for m in (wide, odd, tied)]
        alike = kinds[0] == kinds[1] == kinds[2]
        assert alike == (level in levels.FLOATS), level


def kinds_of(types: dict[str, str]) -> dict[str, set[str]]:
    """The types of each kind of tensor that all models have."""
    kinds: dict[str, set[str]] = {}
    for name, kind in types.items():
        if name != "output.weight":
            kinds.setdefault(re.sub(r"blk\.\d+\.", "", name), set()).add(kind)
    return kinds


def test_split(make: Make, tmp_path: Path) -> None:
    folder = make(**WIDE)
    whole = megrez_gguf.convert(folder, tmp_path / "whole.gguf", outtype="q8_0")
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

    path = megrez_gguf.convert(make(**WIDE), tmp_path / "x.gguf", outtype="q4_k_m").path
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
        "from megrez_gguf.conversion import plan\n"
        "end = plan._Writer.end\n"
        "plan._Writer.end = lambda *a: (end(*a), print(flush=True), time.sleep(60))\n"
        "from megrez_cli import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "convert", str(folder), "-o", str(out / "x.gguf")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"  # a tensor is written
    # A living process's file is left alone by another run in the same folder.
    megrez_gguf.convert(folder, out / "y.gguf")
    assert len(list(out.glob(".megrez-gguf-*.part"))) == 1
    process.kill()
    process.communicate()
    assert not (out / "x.gguf").exists()
    megrez_gguf.convert(folder, out / "x.gguf")
    assert sorted(p.name for p in out.iterdir()) == ["x.gguf", "y.gguf"]
