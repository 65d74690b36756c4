"""Every sabotage of the pocket model is caught, and traced to what it harmed first."""

from pathlib import Path

import pytest

from megrez_cli import main
from support.judging import UNHARMED, harm, judge, named
from support.marks import loop_takes
from support.paths import POCKET
from support.sabotages import SABOTAGES, Sabotage


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize(
    "control", loop_takes(lambda s: s.level == "f32", UNHARMED), ids=lambda s: s.level
)
def test_the_unharmed_model_passes(control: Sabotage, cache: Path) -> None:
    result = judge(POCKET, control, cache=cache)
    assert result.kind == control.level
    assert not result.misses
    assert result.trace
    assert all(point.tolerance is not None for point in result.trace.points)


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.level} {s.name}")
def test_caught(sabotage: Sabotage, cache: Path) -> None:
    result = judge(POCKET, sabotage, cache=cache)
    assert result.misses
    assert named(result) == sabotage.first


def test_the_command_says_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sabotage,) = (s for s in SABOTAGES if s.name == "pre-gate off")
    gguf = harm(POCKET, tmp_path, sabotage)
    arguments = ["parity", str(POCKET), "--gguf", str(gguf), "--windows", "1", "--ctx", "128"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--trace"])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "missed" in printed.out
    assert f"error: {gguf}: nmse " in printed.err
    assert f"{gguf}: ffn_moe_logits-1 is the first tensor to err by itself" in printed.err
