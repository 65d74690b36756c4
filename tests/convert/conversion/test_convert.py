"""The conversion: every value, every type, every variant, and files that appear whole or not."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize

import megrez_gguf
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion import layout
from megrez_gguf.conversion import plan as plans
from megrez_gguf.conversion.plan import ConvertResult
from megrez_gguf.errors import CheckpointError, ConfigError, MegrezError, OutputError
from support.checkpoints import Make, as_f32, edit_json, merge, read_all, shards
from support.commands import cli
from support.configurations import TINY

GOLDEN = Path(__file__).parent / "golden.json"
DENSE = ("gate", "up", "down")


def convert(folder: Path, outtype: str = "auto", **options: Any) -> ConvertResult:
    out = folder.parent / f"{outtype}.gguf"
    return megrez_gguf.convert(folder, out, outtype=outtype, **options)


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in GGUFReader(path).tensors}


def values(path: Path) -> dict[str, Any]:
    return {k: f.contents() for k, f in GGUFReader(path).fields.items()}


def expected(config: ModelConfig, source: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """GGUF name -> float32 values, written out by hand rather than from the table under test."""
    f = {name: as_f32(entry) for name, entry in source.items()}
    out = {
        "token_embd.weight": f["model.embed_tokens.weight"],
        "output_norm.weight": f["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        out["output.weight"] = f["lm_head.weight"]
    for i in range(config.num_hidden_layers):
        s, t = f"model.layers.{i}.", f"blk.{i}."
        out[t + "attn_norm.weight"] = f[s + "input_layernorm.weight"]
        out[t + "ffn_norm.weight"] = f[s + "post_attention_layernorm.weight"]
        for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "output")):
            out[f"{t}attn_{b}.weight"] = f[f"{s}self_attn.{a}_proj.weight"]
            if f"{s}self_attn.{a}_proj.bias" in f:
                out[f"{t}attn_{b}.bias"] = f[f"{s}self_attn.{a}_proj.bias"]
        if not config.is_moe(i):
            for p in DENSE:
                out[f"{t}ffn_{p}.weight"] = f[f"{s}mlp.{p}_proj.weight"]
            continue
        out[t + "ffn_gate_inp.weight"] = f[s + "mlp.gate.weight"]
        if config.has_correction_bias:
            out[t + "exp_probs_b.bias"] = f[s + "mlp.gate.e_score_correction_bias"]
        for p in DENSE if config.n_shared_experts else ():
            out[f"{t}ffn_{p}_shexp.weight"] = f[f"{s}mlp.shared_experts.{p}_proj.weight"]
        if config.pool_layer(i) == i:
            for p in DENSE:
                pool = [f[f"{s}mlp.experts.{e}.{p}_proj.weight"] for e in range(4)]
                out[f"{t}ffn_{p}_exps.weight"] = np.stack(pool)
    return out


ALWAYS_F32 = ("norm.weight", "ffn_gate_inp.weight", ".bias")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("outtype", ["auto", "f32", "bf16", "f16", "q8_0"])
def test_every_value(make: Make, dtype: str, outtype: str) -> None:
    folder = make({"dtype": dtype})
    result = convert(folder, outtype)
    own = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[dtype]
    main = GGMLQuantizationType[own if outtype == "auto" else outtype.upper()]
    assert result.outtype == main.name
    found = tensors(result.path)
    want = expected(ModelConfig.from_folder(folder), read_all(folder))
    assert found.keys() == want.keys()
    assert result.tensors == len(want)
    assert result.parameters == sum(w.size for w in want.values())
    for name, reference in want.items():
        kind = GGMLQuantizationType.F32 if name.endswith(ALWAYS_F32) else main
        assert found[name].tensor_type == kind, name
        stored = found[name].data
        exact = quantize(reference, kind)
        np.testing.assert_array_equal(stored.view(np.uint8), exact.view(np.uint8), err_msg=name)
        assert dequantize(stored, kind).reshape(reference.shape).shape == reference.shape


def test_q8_0_equals_ggml_on_hard_values() -> None:
    rng = np.random.default_rng(0)
    data = rng.standard_normal((64, 32), dtype=np.float32)
    data *= np.exp2(rng.integers(-30, 15, (64, 1))).astype(np.float32)
    data[3] = 0
    data[4] = [127] + [k + 0.5 for k in range(-16, 15)]
    from megrez_gguf.quantization.encode import encoding

    ours = encoding("Q8_0").encode(data, None)
    theirs = quantize(data, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(ours, theirs.ravel())


def test_rows_that_q8_0_cannot_hold_fall_back(make: Make) -> None:
    result = convert(make(moe_intermediate_size=40), "q8_0")
    found = tensors(result.path)
    assert found["blk.2.ffn_down_exps.weight"].tensor_type == GGMLQuantizationType.F16
    assert found["blk.2.ffn_gate_exps.weight"].tensor_type == GGMLQuantizationType.Q8_0
    fallen = {f.tensor: (f.wanted, f.got) for f in result.fallbacks}
    assert fallen["blk.2.ffn_down_exps.weight"] == ("Q8_0", "F16")
    assert any("do not fill the blocks of their type" in w for w in result.warnings)


VARIANTS: list[dict[str, Any]] = [
    {"experts_shared_frequency": 1},
    {"experts_shared_frequency": 3, "num_hidden_layers": 6},
    {"experts_shared_frequency": 9},
    {"first_k_dense_replace": 0},
    {"moe_layer_freq": 2, "num_hidden_layers": 7},
    {"pre_gate": False},
    {"n_group": 2, "topk_group": 1},
    {"scoring_func": "softmax"},
    {"topk_method": "greedy"},
    {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    {"attention_bias": True},
    {"tie_word_embeddings": True},
    {"head_dim": 24},
    {"n_shared_experts": 0},
    {"rope_scaling": {"type": "linear", "factor": 4}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_variants(make: Make, fields: dict[str, Any]) -> None:
    folder = make(**fields)
    result = convert(folder)
    want = expected(ModelConfig.from_folder(folder), read_all(folder))
    found = tensors(result.path)
    assert found.keys() == want.keys()
    for name, reference in want.items():
        kind = found[name].tensor_type
        got = dequantize(found[name].data, kind).reshape(reference.shape)
        np.testing.assert_array_equal(got, reference, err_msg=name)


def test_output_bias_without_attention_bias(make: Make) -> None:
    result = convert(make({"output_bias": True}))
    names = tensors(result.path)
    assert "blk.0.attn_output.bias" in names
    assert "blk.0.attn_q.bias" not in names


def test_one_shard_or_many_are_the_same(make: Make) -> None:
    first = convert(make()).path.read_bytes()
    assert len(shards(make())) > 2
    folder = merge(make())
    assert convert(folder, force=True).path.read_bytes() == first


def test_tied_lm_head_may_be_stored_too(make: Make) -> None:
    folder = make(tie_word_embeddings=True)
    merge(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    result = convert(folder)
    assert "output.weight" not in tensors(result.path)
    assert any("tie_word_embeddings" in w for w in result.warnings)


def test_mtp_layers_and_buffers_are_left_out_and_said_so(make: Make) -> None:
    folder = make()

    def add(t: dict[str, Any]) -> None:
        t["model.layers.5.eh_proj.weight"] = t["model.norm.weight"]
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = ("F32", (2,), bytes(8))

    merge(folder, add)
    edit_json(folder / "config.json", lambda c: c.update(num_nextn_predict_layers=1))
    result = convert(folder)
    assert "1 tensors left out: multi-token prediction" in result.warnings
    assert "1 tensors left out: a buffer, not a weight" in result.warnings
    assert not any(n.startswith("blk.5.") for n in tensors(result.path))


def test_unknown_config_fields_are_reported(make: Make) -> None:
    folder = make()
    edit_json(folder / "config.json", lambda c: c.update(brand_new_field=1))
    assert any("brand_new_field" in w for w in convert(folder).warnings)


def test_mixed_types_take_the_commonest(make: Make) -> None:
    folder = make()
    name = "model.layers.2.mlp.gate.e_score_correction_bias"
    value = np.array([1, 2, 3, 4.0625], dtype="<f4")
    merge(folder, lambda t: t.update({name: ("F32", (4,), value.tobytes())}))
    result = convert(folder)
    assert result.outtype == "BF16"
    np.testing.assert_array_equal(tensors(result.path)["blk.2.exp_probs_b.bias"].data, value)


def test_golden(make: Make) -> None:
    """Key-values and tensor hashes of a seeded conversion, as committed.

    After an intended change: MEGREZ_UPDATE_GOLDEN=1 pytest tests/convert -k golden
    """
    path = convert(make(), "q8_0").path
    digest = {
        t.name: [t.tensor_type.name, t.shape.tolist(), hashlib.sha256(t.data).hexdigest()[:16]]
        for t in GGUFReader(path).tensors
    }
    pairs = {
        k: v
        if not isinstance(v, list)
        else {"len": len(v), "sha256": hashlib.sha256(json.dumps(v).encode()).hexdigest()[:16]}
        for k, v in values(path).items()
        if not k.startswith("GGUF.")
    }
    found = {"values": pairs, "tensors": digest}
    if os.environ.get("MEGREZ_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


# --- the ledger --------------------------------------------------------------------------------


def test_ledger_notices_a_tensor_lost_or_used_twice(checkpoint: Path) -> None:
    source = Checkpoint.open(checkpoint)
    plan = layout.plan(source)
    names = [t.name for target in plan.targets for t in target.sources]
    layout.check_ledger(source, plan, names)
    with pytest.raises(CheckpointError, match=r"consumed 0 times"):
        layout.check_ledger(source, plan, names[1:])
    with pytest.raises(CheckpointError, match=r"consumed 2 times"):
        layout.check_ledger(source, plan, [*names, names[0]])


# --- the output --------------------------------------------------------------------------------


def test_output_exists(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    out.write_text("precious")
    result = cli("convert", checkpoint, "-o", out)
    assert result.exit_code == 2
    assert "x.gguf: exists; use --force to replace it" in result.stderr
    assert out.read_text() == "precious"
    result = cli("convert", checkpoint, "-o", out, "--force")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}\n"
    assert tensors(out)


def test_output_that_appears_meanwhile_is_kept(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.gguf"
    monkeypatch.setattr(layout, "check_ledger", lambda *a: out.write_text("precious"))
    with pytest.raises(OutputError, match="exists"):
        megrez_gguf.convert(checkpoint, out)
    assert out.read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "x.gguf"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("no/such/x.gguf", "does not exist"), (".", "is a folder"), ("pipe", "not a regular file")],
)
def test_output_in_a_bad_place(checkpoint: Path, tmp_path: Path, name: str, message: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = cli("convert", checkpoint, "-o", tmp_path / name, "--force")
    assert result.exit_code == 2
    assert message in result.stderr


def test_output_must_not_replace_the_input(checkpoint: Path) -> None:
    shard = shards(checkpoint)[0]
    before = shard.read_bytes()
    with pytest.raises(OutputError, match="is part of the input"):
        megrez_gguf.convert(checkpoint, shard, force=True)
    assert shard.read_bytes() == before


def test_output_name_too_long(checkpoint: Path, tmp_path: Path) -> None:
    result = cli("convert", checkpoint, "-o", tmp_path / ("x" * 300))
    assert result.exit_code == 2
    assert "cannot be written: File name too long" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_output_gets_usual_permissions(checkpoint: Path) -> None:
    umask = os.umask(0o027)
    try:
        assert convert(checkpoint).path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(umask)


def test_default_name(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert megrez_gguf.convert("checkpoint").path == Path("checkpoint-BF16.gguf")
    assert (tmp_path / "checkpoint-BF16.gguf").exists()


def test_unknown_outtype(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"level 'q4': did you mean .*expected one of f32, bf16"):
        megrez_gguf.convert(checkpoint, outtype="q4")
    assert cli("convert", checkpoint, "--outtype", "q4").exit_code == 2


def _limited(code: str, *args: Any) -> subprocess.CompletedProcess[str]:
    script = f"{code}\nfrom megrez_cli import main\nmain()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True
    )


@pytest.mark.parametrize("split", [[], ["--split-max-size", "50K"]], ids=["plain", "split"])
@pytest.mark.parametrize("outtype", ["bf16", "f32"])
def test_disk_full_while_writing(
    checkpoint: Path, tmp_path: Path, outtype: str, split: list[str]
) -> None:
    """ENOSPC from the operating system itself, late: every byte but the last ones fits."""
    out = tmp_path / "out"
    out.mkdir()
    done = convert(checkpoint, outtype, split_max_size=50_000 if split else None)
    needed = max(part.stat().st_size for part in done.parts)
    # A file that cannot grow beyond a limit fails as a full disk does, with EFBIG for ENOSPC.
    code = (
        "import resource, signal, errno\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({needed - 64}, {needed - 64}))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "errno.ENOSPC, errno.EFBIG = errno.EFBIG, errno.ENOSPC"
    )
    result = _limited(
        code, "convert", checkpoint, "-o", out / "x.gguf", "--outtype", outtype, *split
    )
    assert result.returncode == 2, result.stderr
    assert "the disk is full; nothing was left behind" in result.stderr
    assert list(out.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only; the limit above is not")
def test_enospc_has_a_message(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A genuine ENOSPC, from /dev/full."""

    def full(*args: Any) -> int:
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")
        return 0

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match="the disk is full"):
        megrez_gguf.convert(checkpoint, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_disk_too_small_is_noticed_before_writing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda p: type("U", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"needs \d+ bytes and the disk has \d+ left"):
        megrez_gguf.convert(checkpoint, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_read_only_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        megrez_gguf.convert(checkpoint, tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted(checkpoint: Path, tmp_path: Path, number: int, code: int) -> None:
    """A real process, a real signal, in the middle of the weights."""
    out = tmp_path / "out"
    out.mkdir()
    script = (
        "import time\n"
        "from megrez_gguf.storage import output\n"
        "from megrez_gguf.conversion import plan\n"
        "output._BUFFER = 8192\n"
        "end = plan._Writer.end\n"
        "plan._Writer.end = lambda *a: (end(*a), time.sleep(0.05))\n"
        "from megrez_cli import main\n"
        "main()"
    )
    arguments = ["convert", str(checkpoint), "-o", str(out / "x.gguf")]
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not any(p.stat().st_size > 20_000 for p in out.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == code, stderr
    assert "Traceback" not in stderr
    assert list(out.iterdir()) == []


def test_input_that_changes_meanwhile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*args: Any) -> bytes:
        path = shards(checkpoint)[0]
        if not done:  # as by a download that goes on
            done.append(path)
            with path.open("r+b") as file:
                file.seek(-2, os.SEEK_END)
                file.write(b"\x80\x3f" if file.read(2) != b"\x80\x3f" else b"\0\x3f")
        return original(*args)

    done: list[Path] = []

    original: Callable[..., bytes] = getattr(plans, "header")  # noqa: B009, of the module's own
    monkeypatch.setattr(plans, "header", spoil)
    with pytest.raises(CheckpointError, match=r"model-00001-of-.*: changed while it was read"):
        megrez_gguf.convert(checkpoint, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_input_that_shrinks_meanwhile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shrink(*args: Any) -> bytes:
        os.truncate(shards(checkpoint)[0], 5000)
        return original(*args)

    original: Callable[..., bytes] = getattr(plans, "header")  # noqa: B009, of the module's own
    monkeypatch.setattr(plans, "header", shrink)
    with pytest.raises(MegrezError, match="the file ended early"):
        megrez_gguf.convert(checkpoint, tmp_path / "x.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_progress_reaches_the_end(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(checkpoint, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert seen == sorted(seen)


@pytest.mark.slow
def test_memory_stays_small(make: Make, tmp_path: Path) -> None:
    """Streaming: 300 MB of weights, and 100 MB in one tensor, must not cost as much memory."""
    big = make(
        hidden_size=2048, intermediate_size=24576, num_hidden_layers=2, first_k_dense_replace=1
    )
    assert sum(p.stat().st_size for p in shards(big)) > 300_000_000
    code = (
        "import pathlib, resource, sys\n"
        # Judges of tokenizer and template: 10 MB of libraries, whatever the weights.
        "sys.modules['tokenizers'] = sys.modules['jinja2'] = None\n"
        "from megrez_gguf import convert\n"
        "convert(sys.argv[1], sys.argv[2], outtype='f16')\n"
        "status = pathlib.Path('/proc/self/status')\n"
        # ru_maxrss covers the parent before exec as well; Linux tells this program's own peak.
        "if status.exists():\n"
        "    print(status.read_text().split('VmHWM:')[1].split()[0])\n"
        "else:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(big), str(tmp_path / "x.gguf")],
        capture_output=True,
        text=True,
        check=True,
    )
    # 60 MB are Python and its libraries; then come 2 pieces being worked on (20 MB each) and, on a
    # busy machine, as many waiting to be written and hashed as there may be (11 of 2 MB).
    assert int(result.stdout) < 130_000, "KiB"


def test_tiny_is_what_it_says() -> None:
    config = ModelConfig.from_dict(TINY)
    assert config.pool_layers == (2, 4)
    assert config.moe_layers == (2, 3, 4)
