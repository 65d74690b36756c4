"""The parity command from the outside: what it prints, what it refuses, what it leaves behind."""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megrez_cli import main
from megrez_gguf import convert
from megrez_gguf.errors import CheckpointError, ConfigError, RuntimeUnavailableError
from megrez_gguf.format.reader import GGUFFile
from megrez_llama.engine import Engine
from megrez_llama.patched import require_patched
from megrez_parity import harness
from megrez_parity.harness import measure
from megrez_parity.level_files import LEVELS
from megrez_parity.results import Figure, LevelResult, Metrics, Trace, TracePoint
from support.random_checkpoint import POCKET, make_checkpoint

CONFIG = POCKET | {"num_hidden_layers": 3, "vocab_size": 1024}
TEXT = "To be, or not to be, that is the question: 世界上最高的山峰是珠穆朗玛峰。\n" * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parity") / "checkpoint"
    make_checkpoint(CONFIG, folder)
    (folder / "heldout").mkdir()
    (folder / "heldout" / "some.txt").write_text(TEXT, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder the command is given, to see what it leaves there."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_copies_that_differ_are_refused_for_files_too(checkpoint: Path, tmp_path: Path) -> None:
    """Before anything is computed: the reference may have read the one, and the file the other."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if ".mlp.experts." in n)
    tensors[name.replace("layers.1", "layers.2")] = tensors[name] * 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from .*, and layers share experts"):
        measure(folder, levels=(), files=[tmp_path / "any.gguf"])


def bounds_file(folder: Path, levels: dict[str, dict[str, float]]) -> Path:
    path = folder / "bounds.json"
    path.write_text(json.dumps({"levels": levels}), encoding="utf-8")
    return path


@pytest.mark.slow
def test_every_level(
    checkpoint: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside: set[str] = set()

    def watched(self: Engine, path: Path, context: int, **options: Any) -> None:
        beside.update(found.name for found in path.parent.glob("*.gguf") if found != path)
        opened(self, path, context, **options)

    opened = Engine.__init__
    monkeypatch.setattr(Engine, "__init__", watched)
    assert run("parity", checkpoint, "--ctx", 64, "--windows", 2, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "converting" in printed.err
    assert [level["level"] for level in report["levels"]] == list(LEVELS)
    assert len(LEVELS) == 27
    assert report["passed"]
    assert [text["windows"] for text in report["texts"]] == [2]
    assert report["reference"]["dtype"] == "float64"
    assert report["reference"]["cache"] == ""
    assert "+megrez." in report["provenance"]["llama_cpp"]
    by_level = {level["level"]: level for level in report["levels"]}
    for level in report["levels"]:
        assert sum(level["types"].values()) < level["file_bytes"]
        assert [layer["layer"] for layer in level["routing"]] == [1, 2]
        assert len(level["depth"]["l_out"]) == 3
        assert level["tokenizer_agreement"] == 1.0
    sizes = [by_level[name]["file_bytes"] for name in ("f32", "bf16", "q8_0", "q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    error = {name: level["metrics"]["nmse"]["value"] for name, level in by_level.items()}
    assert error["f32"] < 1e-9 < error["f16"] < error["q8_0"] < error["q4_k_m"] < error["q2_k"]
    assert by_level["f32"]["metrics"]["positions"] == 2 * 31
    assert by_level["q2_k"]["fallbacks"]
    assert by_level["q2_k+imatrix"]["sha256"] != by_level["q2_k"]["sha256"]
    assert not beside  # one level on the disk at a time
    assert not list(scratch.iterdir())


def test_a_second_run_gives_the_same_figures(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first run computes the reference in the folder; the second one reads it."""
    reports = []
    for _ in range(2):
        arguments = ("--levels", "q8_0,q2_k", "--ctx", 64, "--cache", tmp_path / "kept", "--json")
        assert run("parity", checkpoint, *arguments) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert [report["reference"]["cached"] for report in reports] == [False, True]
    for first, second in zip(reports[0]["levels"], reports[1]["levels"], strict=True):
        for timed in (first, second):
            del timed["seconds"]
        assert first == second


def test_a_cache_of_another_reference(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--levels", "f32", "--ctx", 64, "--windows", 1, "--cache", tmp_path / "kept")
    assert run("parity", checkpoint, *arguments) == 0
    make_checkpoint(CONFIG, tmp_path / "other", seed=1)
    text = checkpoint / "heldout" / "some.txt"
    assert run("parity", tmp_path / "other", *arguments, "--text", text) == 2
    assert "a cache of other weights" in capsys.readouterr().err
    longer = tmp_path / "longer.txt"
    longer.write_text("Not to be. " + TEXT, encoding="utf-8")
    assert run("parity", checkpoint, *arguments, "--text", longer) == 2
    assert "a cache of other text" in capsys.readouterr().err


def test_large_checkpoints_keep_their_reference(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr(harness, "_KEEP_BYTES", 1)
    opened: list[Path] = []
    original = Engine.__init__

    def watched(self: Engine, path: Path, context: int, **options: Any) -> None:
        opened.append(path)
        original(self, path, context, **options)

    monkeypatch.setattr(Engine, "__init__", watched)
    for cached in (False, True):
        report = measure(checkpoint, levels=["f32"], n_ctx=64, n_windows=1)
        assert report.reference.cached == cached
        # Not where memory may be the disk.
        assert opened[-1].parents[1] == tmp_path / "cache/megrez-gguf/parity"
        assert not opened[-1].parent.exists()
        assert Path(report.reference.cache).parent == tmp_path / "cache/megrez-gguf/parity"
    other = measure(checkpoint, levels=["f32"], n_ctx=32, n_windows=1)
    assert other.reference.cache != report.reference.cache


def test_what_a_margin_costs(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="expert margins need an expert cache"):
        measure(checkpoint, levels=["f32"], expert_margins=[0.1])
    report = measure(
        checkpoint,
        levels=["f32"],
        n_ctx=64,
        n_windows=1,
        expert_cache=3 << 19,
        expert_margins=[0, 10],
    )
    plain, exact, costly = report.levels
    assert [row.level for row in report.levels] == ["f32", "f32, margin 0", "f32, margin 10"]
    assert exact.metrics.nmse.value < 1e-9
    assert costly.metrics.nmse.value > 1e3 * exact.metrics.nmse.value
    assert costly.metrics.mean_kld.value > exact.metrics.mean_kld.value
    assert exact.thresholds == plain.thresholds != {}
    assert not costly.thresholds
    assert all(layer.overlap.value == 1 for layer in exact.routing)
    assert min(layer.overlap.value for layer in costly.routing) < 0.9


def test_a_gpu_that_is_not_there_is_told_before_anything_is_computed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(require_patched(), "llama_supports_gpu_offload", lambda: False)
    said: list[str] = []
    with pytest.raises(RuntimeUnavailableError, match="finds no GPU"):
        measure(checkpoint, levels=["f32"], n_gpu_layers=-1, say=said.append)
    assert not said


def test_table_is_for_pipes_too(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("parity", checkpoint, "--ctx", 64, "--windows", 1, "--levels", "f32") == 0
    printed = capsys.readouterr().out
    assert printed.split()[:3] == ["level", "MiB", "NMSE"]
    assert "f32 " in printed
    assert "\x1b" not in printed


def test_reports_are_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "reports" / "today"
    arguments = ("--ctx", 64, "--windows", 1, "--levels", "f32,q4_0", "--trace", "--report", folder)
    bounds = bounds_file(tmp_path, {})
    assert run("parity", checkpoint, *arguments, "--thresholds", bounds) == 0
    assert {p.name for p in folder.iterdir()} == {"report.html", "report.json", "report.md"}
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert report["levels"][1]["trace"]["points"]
    assert capsys.readouterr().err.count("wrote ") == 3


def test_a_report_that_cannot_be_written_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert run("parity", checkpoint, "--levels", "f32", "--report", tmp_path / "file") == 2
    printed = capsys.readouterr().err
    assert "converting" not in printed
    assert str(tmp_path / "file") in printed


def test_a_missed_threshold_exits_1_and_says_which(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds = {"q4_0": {"nmse": 1e-9, "same_top_p": 2.0, "max_kld": 1e9}}
    options = ("--ctx", 64, "--windows", 1, "--thresholds", bounds_file(tmp_path, bounds))
    assert run("parity", checkpoint, "--levels", "f32,q4_0", *options) == 1
    printed = capsys.readouterr()
    assert "missed" in printed.out
    message = printed.err.splitlines()[-1]
    assert message.startswith("error: q4_0: nmse ")
    assert "is above 1e-09; q4_0: same_top_p " in message
    assert message.endswith("is below 2")


def test_the_trace_names_the_first_tensor_beyond_tolerance(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bounds: Any = {"q4_0": {"trace": {"ffn_moe_logits": 1.0, "ffn_moe_out": 1e-9}}}
    options = ("--ctx", 64, "--windows", 1, "--thresholds", bounds_file(tmp_path, bounds))
    assert run("parity", checkpoint, "--levels", "q4_0", "--trace", *options) == 1
    assert "q4_0: ffn_moe_out-1 is the first tensor to err by itself" in capsys.readouterr().err


def test_nan_misses() -> None:
    nan = Figure(*[float("nan")] * 3)
    figures = {name: nan for name in Metrics.__dataclass_fields__ if name != "positions"}
    point = TracePoint("l_out", 1, float("nan"), float("nan"), 1e-9)
    result = LevelResult(
        level="f32",
        kind="f32",
        file_bytes=1,
        sha256="",
        types={},
        fallbacks=[],
        metrics=Metrics(**figures, positions=1),
        domains={},
        kld_percentiles=[],
        routing=[],
        depth={},
        tokenizer_agreement=1.0,
        trace=Trace([point]),
        thresholds={"nmse": 1e-9, "same_top_p": 0.9},
        seconds={},
    )
    assert len(result.misses) == 4
    assert replace(result, thresholds={}, trace=None).misses == [
        "f32: it computes logits that are not finite"
    ]


def test_an_existing_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "mine.gguf"
    convert(checkpoint, gguf, outtype="f32")
    command = ("parity", checkpoint, "--gguf", gguf, "--ctx", 64, "--windows", 1, "--json")
    assert run(*command) == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["level"] == str(gguf)
    assert level["kind"] == "f32"
    assert level["thresholds"]["nmse"] == 1e-9
    assert gguf.exists()


@pytest.mark.parametrize(
    ("level", "complaint"),
    [
        ("bf16", "it computes logits that are not finite"),
        # llama.cpp rounds NaN to a number where it quantizes activations.
        ("q8_0", "result_norm is the first tensor to err by itself: local NMSE nan"),
    ],
)
def test_a_file_that_computes_nonsense(
    level: Literal["bf16", "q8_0"],
    complaint: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is not a number misses, also at a level without thresholds."""
    gguf = tmp_path / "mine.gguf"
    convert(checkpoint, gguf, outtype=level)
    (norm,) = (t for t in GGUFFile.open(gguf).tensors if t.name == "output_norm.weight")
    with gguf.open("r+b") as file:
        file.seek(norm.begin)
        file.write(np.float32("nan").tobytes())
    command = ("parity", checkpoint, "--gguf", gguf, "--ctx", 64, "--windows", 1)
    assert run(*command, "--trace", "--report", tmp_path / "report") == 1
    printed = capsys.readouterr()
    assert complaint in printed.err
    assert "missed" in printed.out


def test_a_file_without_our_keys(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Infinigence publishes them."""
    convert(checkpoint, tmp_path / "mine.gguf", outtype="f32")
    data = (tmp_path / "mine.gguf").read_bytes()
    for name in (b"megrez-moe.experts_shared_frequency", b"megrez-moe.pre_gate"):
        assert data.count(name) == 1
        data = data.replace(name, b"x" * len(name))  # a key that nobody reads
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(data)
    assert run("parity", checkpoint, "--gguf", bare, "--ctx", 64, "--windows", 1, "--json") == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["metrics"]["nmse"]["value"] < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "q3"], "unknown level 'q3'; known: f32, bf16"),
        (["--levels", ""], "expected a level"),
        (["--ctx", "3"], "4 windows of 3 tokens"),
        (["--windows", "0"], "0 windows of 512 tokens"),
        (["--ctx", "100000"], "shorter than one window of 100000"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        (["--gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["--thresholds", "nowhere.json"], "nowhere.json: cannot be read as thresholds"),
        (["--levels", "q4_0+imatrix", "--imatrix", "nowhere.gguf"], "nowhere.gguf: "),
        (["--levels", "q4_0+imatrix", "--windows", "1000"], "needs an importance matrix"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_requests(
    arguments: list[str],
    message: str,
    checkpoint: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--levels" not in arguments and "--gguf" not in arguments:
        arguments = [*arguments, "--levels", "f32"]
    assert run("parity", checkpoint, *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
    assert not list(scratch.iterdir())


def test_a_text_that_is_not_utf8(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "latin1.txt"
    text.write_bytes(b"caf\xe9" * 500)
    assert run("parity", checkpoint, "--levels", "f32", "--text", text) == 2
    assert "cannot be read as UTF-8 text" in capsys.readouterr().err


def test_no_text_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(CONFIG, tmp_path / "bare")
    assert run("parity", tmp_path / "bare", "--levels", "f32") == 2
    assert "name a text with --text FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 1000}, "1000 tokens in its vocabulary, expected the checkpoint's 1024"),
        ({"num_hidden_layers": 4}, "block_count is 4, the checkpoint's is 3: another model"),
        ({"n_routed_experts": 12}, "expert_count is 12, the checkpoint's is 16: another model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_file_of_another_model(
    change: dict[str, int],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_checkpoint(CONFIG | change, tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "other.gguf")
    assert run("parity", checkpoint, "--gguf", tmp_path / "other.gguf", "--ctx", 64) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_that_lacks_a_tensor(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the reference stumbles over it; nothing is converted here."""
    convert(checkpoint, tmp_path / "mine.gguf")
    shutil.copytree(checkpoint, tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.safetensors"):
        tensors = load_file(shard)
        tensors.pop("model.layers.2.mlp.gate.weight", None)
        save_file(tensors, shard)
    index = tmp_path / "damaged" / "model.safetensors.index.json"
    index.unlink(missing_ok=True)
    assert run("parity", tmp_path / "damaged", "--gguf", tmp_path / "mine.gguf", "--ctx", 64) == 2
    assert "model.layers.2.mlp.gate.weight" in capsys.readouterr().err


def test_a_file_of_another_architecture(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(checkpoint, tmp_path / "mine.gguf")
    data = (tmp_path / "mine.gguf").read_bytes()
    (tmp_path / "other.gguf").write_bytes(data.replace(b"megrez-moe", b"bailingmoe"))
    assert run("parity", checkpoint, "--gguf", tmp_path / "other.gguf", "--ctx", 64) == 2
    assert "general.architecture is 'bailingmoe', not 'megrez-moe'" in capsys.readouterr().err


def test_a_file_with_another_vocabulary_of_the_same_size(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other)
    path = other / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    vocab = raw["model"]["vocab"]
    a, b = (token for token, i in vocab.items() if i in (300, 301))
    vocab[a], vocab[b] = vocab[b], vocab[a]
    path.write_text(json.dumps(raw), encoding="utf-8")
    convert(other, tmp_path / "other.gguf")
    assert run("parity", checkpoint, "--gguf", tmp_path / "other.gguf", "--ctx", 64) == 2
    assert "token 300 is " in capsys.readouterr().err


def test_a_file_that_is_no_gguf(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 1000)
    assert run("parity", checkpoint, "--gguf", tmp_path / "junk.gguf") == 2
    assert "junk.gguf: does not start with GGUF" in capsys.readouterr().err


def test_without_llama_cpp(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(RuntimeUnavailableError, match="bindings/llama-cpp-python"):
        measure(checkpoint, levels=["f32"])
