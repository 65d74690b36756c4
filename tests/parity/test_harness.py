"""The parity command from the outside: what it prints, what it refuses, what it leaves behind."""

import json
import tempfile
from pathlib import Path

import pytest

from make_checkpoint import POCKET, make_checkpoint
from megrez_gguf import convert
from megrez_gguf.cli import main
from megrez_gguf.errors import OutputError, RuntimeUnavailableError
from megrez_parity import harness
from megrez_parity.engine import Engine, quantize
from megrez_parity.harness import LEVELS, LevelResult, measure, thresholds
from megrez_parity.metrics import Metrics

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


def test_every_level(
    checkpoint: Path,
    scratch: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Random weights are no model to set quantization thresholds by.
    monkeypatch.setattr(harness, "thresholds", lambda: {"f32": {"nmse": 1e-9}})
    beside: set[str] = set()

    def watched(source: Path, target: Path, kind: str) -> None:
        beside.update(path.name for path in target.parent.glob("*.gguf"))
        quantize(source, target, kind)

    monkeypatch.setattr(harness, "quantize", watched)
    assert run("parity", checkpoint, "--ctx", 64, "--windows", 2, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert "quantizing" in printed.err
    assert [level["level"] for level in report["levels"]] == list(LEVELS)
    assert report["passed"]
    assert report["windows"] == 2
    assert report["reference_dtype"] == "float64"
    assert "+megrez." in report["made_with"]["llama_cpp"]
    by_level = {level["level"]: level for level in report["levels"]}
    sizes = [by_level[name]["file_bytes"] for name in ("f32", "bf16", "q8_0", "q4_0")]
    assert sizes == sorted(sizes, reverse=True)
    error = {name: level["metrics"]["nmse"] for name, level in by_level.items()}
    assert error["f32"] < 1e-9 < error["f16"] < error["q8_0"] < error["q4_k_m"]
    assert by_level["f32"]["metrics"]["positions"] == 2 * 31
    assert beside == {"source.gguf"}  # one level on the disk at a time
    assert not list(scratch.iterdir())


def test_table_is_for_pipes_too(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("parity", checkpoint, "--ctx", 64, "--windows", 1, "--levels", "f32") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["level", "MiB", "NMSE"]
    assert lines[1].startswith("f32 ")
    assert lines[1].rstrip().endswith("ok")
    assert "\x1b" not in "".join(lines)


def test_a_missed_threshold_exits_1_and_says_which(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = {"q4_0": {"nmse": 1e-9, "same_top_p": 2.0, "max_kld": 1e9}}
    monkeypatch.setattr(harness, "thresholds", lambda: bounds)
    assert run("parity", checkpoint, "--ctx", 64, "--windows", 1, "--levels", "f32,q4_0") == 1
    printed = capsys.readouterr()
    assert "missed" in printed.out
    message = printed.err.splitlines()[-1]
    assert message.startswith("error: q4_0: nmse ")
    assert "is above 1e-09; q4_0: same_top_p " in message
    assert message.endswith("is below 2")


def test_nan_misses() -> None:
    figures = dict.fromkeys(Metrics.__dataclass_fields__, float("nan"))
    result = LevelResult("f32", 1, Metrics(**figures), {"nmse": 1e-9, "same_top_p": 0.9})
    assert len(result.misses) == 2


def test_every_level_has_thresholds_that_exist() -> None:
    bounds = thresholds()
    assert list(bounds) == list(LEVELS)
    for level in bounds.values():
        assert level.keys() <= Metrics.__dataclass_fields__.keys()
        assert "nmse" in level


def test_an_existing_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf = tmp_path / "mine.gguf"
    convert(checkpoint, gguf, outtype="f32")
    command = ("parity", checkpoint, "--gguf", gguf, "--ctx", 64, "--windows", 1, "--json")
    assert run(*command) == 0
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert level["level"] == str(gguf)
    assert level["thresholds"] == thresholds()["f32"]
    assert gguf.exists()


def test_windows_are_consecutive_and_per_text(checkpoint: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "f32.gguf"
    convert(checkpoint, gguf, outtype="f32")
    texts = {Path("one"): TEXT, Path("two"): TEXT[:80]}
    with Engine(gguf, 32) as engine:
        long, short = engine.tokenize(TEXT).tolist(), engine.tokenize(TEXT[:80]).tolist()
        windows = harness._windows(engine, texts, 32, 3)
    assert 64 <= len(short) < 96
    expected = [long[:32], long[32:64], long[64:96], short[:32], short[32:64]]
    assert [window.tolist() for window in windows] == expected


def test_big_checkpoints_are_streamed_in_float32(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"levels": ["f32"], "context": 64, "windows": 3}
    exact = measure(checkpoint, **options)
    monkeypatch.setattr(harness, "_DOUBLE_LIMIT", 1000)
    monkeypatch.setattr(harness, "_WORKING_BYTES", 1)
    streamed = measure(checkpoint, **options)
    assert streamed.reference_dtype == "float32"
    assert not streamed.misses
    assert streamed.reference_perplexity == pytest.approx(exact.reference_perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--levels", "q3"], "unknown level 'q3'; known: f32, bf16"),
        (["--levels", ""], "unknown level ''"),
        (["--ctx", "3"], "4 windows of 3 tokens"),
        (["--windows", "0"], "0 windows of 512 tokens"),
        (["--ctx", "100000"], "shorter than one window of 100000"),
        (["--text", "nowhere.txt"], "nowhere.txt: cannot be read as UTF-8 text"),
        (["--gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
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


def test_a_file_of_another_model(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(CONFIG | {"vocab_size": 1000}, tmp_path / "other")
    convert(tmp_path / "other", tmp_path / "other.gguf")
    assert run("parity", checkpoint, "--gguf", tmp_path / "other.gguf", "--ctx", 64) == 2
    assert (
        "1000 tokens in its vocabulary, expected the checkpoint's 1024" in capsys.readouterr().err
    )


def test_a_file_that_is_no_gguf(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk.gguf").write_bytes(b"junk" * 1000)
    assert run("parity", checkpoint, "--gguf", tmp_path / "junk.gguf") == 2
    assert "junk.gguf: llama.cpp cannot load it: " in capsys.readouterr().err


def test_quantizer_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"quantizing nowhere\.gguf to q4_0 failed: "):
        quantize(tmp_path / "nowhere.gguf", tmp_path / "out.gguf", "q4_0")
    assert not list(tmp_path.glob("out*"))


def test_without_llama_cpp(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(RuntimeUnavailableError, match="bindings/llama-cpp-python"):
        measure(checkpoint, ["f32"])
