"""`zero_runs` finds what a plain search finds, however the bytes are cut into pieces."""

from __future__ import annotations

import random
import re
from itertools import pairwise

import numpy as np
import pytest

from megrez_gguf.storage.zeros import Run, joined, zero_runs


def plainly(data: bytes, least: int) -> list[Run]:
    return [m.span() for m in re.finditer(rb"\0+", data) if len(m[0]) >= least]


@pytest.mark.parametrize("seed", range(60))
def test_runs_in_pieces(seed: int) -> None:
    draw = random.Random(seed)
    least = draw.choice([32, 60, 128, 500, 4096])
    size = draw.choice([0, 1, 31, 100, 5000, 30_000])
    data = bytearray(draw.randbytes(size))
    for _ in range(draw.randint(0, 6)):
        begin = draw.choice([0, draw.randint(0, size)])
        length = draw.choice([least - 1, least, least + 1, 3 * least, draw.randint(0, size)])
        data[begin : begin + length] = bytes(min(length, size - begin))
    if draw.random() < 0.1:
        data = bytearray(size)
    cuts = sorted({0, size, *(draw.randint(0, size) for _ in range(draw.randint(0, 5)))})
    found: list[Run] = []
    for begin, end in pairwise(cuts):
        piece = np.frombuffer(bytes(data[begin:end]), np.uint8)
        found = joined(found, zero_runs(piece, least), begin)
    assert [run for run in found if run[1] - run[0] >= least] == plainly(bytes(data), least)
