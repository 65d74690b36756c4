"""Every sabotage of the pocket model is caught, by a figure far beyond the threshold."""

from pathlib import Path

import pytest

from megrez_gguf.cli import main
from sabotage import POCKET, SABOTAGES, Sabotage, harm, judge, pre_gate_off


def test_the_unharmed_model_passes() -> None:
    result = judge(POCKET, Sabotage("none"), [], context=128)
    assert result.thresholds["nmse"] <= 1e-9
    assert not result.misses


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda sabotage: sabotage.name)
def test_caught(sabotage: Sabotage) -> None:
    result = judge(POCKET, sabotage, [], context=128)
    assert result.misses
    assert result.metrics.nmse > 1e-6


def test_the_command_says_no(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = harm(POCKET, tmp_path, pre_gate_off)
    arguments = ["parity", str(POCKET), "--gguf", str(gguf), "--windows", "1", "--ctx", "128"]
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "missed" in printed.out
    assert f"error: {gguf}: nmse " in printed.err
    assert "is above 1e-09" in printed.err
