"""Through the expert store, every level computes what it computes in memory, bit for bit.

What it computes in memory, the gate compares with the reference.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from megrez_gguf.format.reader import GGUFFile
from megrez_llama.engine import Engine
from megrez_parity.level_files import LEVELS, Maker
from megrez_runtime.memory import Needs
from support.marks import loop_takes
from support.paths import POCKET

CONTEXT = 96
NODES = ("ffn_moe_logits", "ffn_moe_topk", "ffn_moe_weights", "ffn_moe_out", "l_out")
# Of the pocket's two pools of 16: one, one and a few, all but one, all.
SLOTS = (16, 19, 31, 32)


@pytest.fixture(scope="module")
def windows() -> list[NDArray[np.int32]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 2800, CONTEXT, dtype=np.int32) for _ in range(4)]


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory, windows: list[NDArray[np.int32]]) -> Maker:
    return Maker(POCKET, tmp_path_factory.mktemp("store"), calibration=windows[1:])


@pytest.mark.parametrize("level", loop_takes({"f32", "q4_0", "q4_k_m"}.__contains__, LEVELS))
def test_bit_identical(level: str, maker: Maker, windows: list[NDArray[np.int32]]) -> None:
    with maker.make(level) as made:
        slot = Needs.of(GGUFFile.open(made.path), made.path).slot_bytes
        with Engine(made.path, CONTEXT) as engine:
            expected = engine.run(windows[0], first=CONTEXT // 2, capture=NODES)
        for slots in SLOTS:
            with Engine(made.path, CONTEXT, expert_cache=slots * slot) as engine:
                for _ in range(2):  # with an empty store, and with one that is full
                    found = engine.run(windows[0], first=CONTEXT // 2, capture=NODES)
                    np.testing.assert_array_equal(found.logits, expected.logits)
                    assert found.nodes.keys() == expected.nodes.keys()
                    for name, node in expected.nodes.items():
                        np.testing.assert_array_equal(found.nodes[name], node, str(name))
