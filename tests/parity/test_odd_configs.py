"""Hyper-parameters away from their published values, through the real converter and llama.cpp."""

from pathlib import Path

import pytest

from support.odd_configs import CASES, THRESHOLD, Case, measure, random_case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_named(case: Case, tmp_path: Path) -> None:
    assert measure(case, tmp_path) < THRESHOLD


@pytest.mark.parametrize("seed", range(8))
def test_drawn(seed: int, tmp_path: Path) -> None:
    assert measure(random_case(seed), tmp_path, seed) < THRESHOLD


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 40))
def test_more_drawn(seed: int, tmp_path: Path) -> None:
    assert measure(random_case(seed), tmp_path, seed) < THRESHOLD
