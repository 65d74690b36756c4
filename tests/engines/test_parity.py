"""`parity --engine`: transformers passes, and harmed it does not."""

import sys
from pathlib import Path

import pytest

from megrez_gguf.errors import ConfigError, RuntimeUnavailableError
from megrez_parity.engines import EngineProcess, EngineSpec
from megrez_parity.harness import measure
from megrez_parity.reference import CheckpointWeights
from megrez_parity.results import LevelResult
from support.engine_sabotage import SABOTAGES, harmed
from support.paths import POCKET


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text((POCKET.parent / "heldout" / "en.txt").read_text()[:4000])
    return path


def judged(text: Path, engine: str = "transformers") -> LevelResult:
    report = measure(POCKET, levels=(), texts=[text], engines=[engine], n_ctx=64, n_windows=4)
    (result,) = report.levels
    return result


def test_it_is_the_same_model(text: Path) -> None:
    result = judged(text)
    assert result.misses == []
    assert result.metrics.nmse.value < 1e-11
    assert result.tokenizer_agreement == 1
    assert result.thresholds.keys() >= {"nmse", "tokenizer_agreement", "unfaithful"}
    assert [layer.identical.value for layer in result.routing] == [1.0] * 6
    assert len(result.depth["l_out"]) == 7
    assert result.types == {"f32": result.file_bytes}
    assert result.file_bytes == 4 * CheckpointWeights(POCKET).parameters  # each pool once


def test_bfloat16_is_held_to_its_own_bounds(text: Path) -> None:
    result = judged(text, "transformers:dtype=bfloat16")
    assert result.kind == "bf16"
    assert 1e-9 < result.metrics.nmse.value < 1e-2


@pytest.mark.parametrize("name", SABOTAGES)
def test_harmed_it_is_caught(
    text: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(harmed(name, tmp_path)))
    result = judged(text)
    assert any("nmse" in miss for miss in result.misses)
    assert result.metrics.nmse.value > 1e-6


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("jax", "known: transformers, vllm, sglang"),
        ("vllm:tp", "tp=..."),
        ("vllm:tp=two", "number"),
        ("sglang:chunked_prefill_size=0", "number"),
        ("transformers:tp=2", "no option of transformers"),
        ("transformers:dtype=int8", "dtype is one of"),
    ],
)
def test_what_nobody_knows_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineSpec.parse(spec)


def test_a_python_without_it_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')
    python.chmod(0o755)
    spec = EngineSpec.parse(f"transformers:python={python}")
    with pytest.raises(RuntimeUnavailableError, match="No module named"):
        EngineProcess(spec, POCKET, 64, tmp_path)


def test_a_checkpoint_it_cannot_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"transformers: .*"):
        EngineProcess(EngineSpec.parse("transformers"), tmp_path, 64, tmp_path)
