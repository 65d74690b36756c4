"""The gate: every level of the pocket checkpoint passes its committed thresholds, reproducibly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from megrez_cli import main
from megrez_parity.level_files import LEVELS
from support.paths import POCKET

# One of each family of kernels, and of what is made with an importance matrix.
AGAIN = ("f32", "f16", "q5_k_m", "iq4_nl", "mxfp4_moe", "q2_k+imatrix")
# What two runs of a level may differ in.
VARYING = {"seconds"}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The levels in the JSON of `megrez-gguf parity --trace`, which must exit with 0."""
    with pytest.raises(SystemExit) as stop:
        main(["parity", str(POCKET), "--trace", "--json", *arguments])
    printed = capsys.readouterr()
    assert not stop.value.code, printed.err
    report = json.loads(printed.out)
    assert report["passed"]
    return {level["level"]: level for level in report["levels"]}


@pytest.mark.slow
def test_all_levels_pass_and_once_more(capsys: pytest.CaptureFixture[str]) -> None:
    first = run(capsys)
    assert tuple(first) == LEVELS
    assert len(LEVELS) >= 14
    for name, level in first.items():
        assert {"nmse", "tokenizer_agreement"} <= level["thresholds"].keys(), name
        assert all(point["tolerance"] for point in level["trace"]["points"]), name
    second = run(capsys, "--levels", ",".join(AGAIN))
    assert list(differences({name: first[name] for name in AGAIN}, second)) == []


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two reports differ by more than 1e-6, relatively."""
    if isinstance(one, dict) and one.keys() == other.keys():
        for name in one.keys() - VARYING:
            yield from differences(one[name], other[name], f"{at}/{name}")
    elif isinstance(one, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, f"{at}/{i}")
    elif other != (pytest.approx(one, rel=1e-6, abs=0) if isinstance(one, float) else one):
        yield f"{at}: {one} and {other}"
