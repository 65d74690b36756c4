"""Down projections of experts with zeros after their rows: the same model, and no other width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from support.gguf_edit import Gguf, Tensor, with_padded_rows
from support.llama import LlamaError, Model, logits, nmse
from support.samples import TOKENS, Sample

WIDTH, PADDED = 96, 256  # of FOR_K_QUANTS


@pytest.mark.parametrize("fields", [{}, {"pre_gate": False}, {"experts_shared_frequency": 1}])
def test_is_the_same_model(
    sample: Callable[..., Sample], tmp_path: Path, fields: dict[str, Any]
) -> None:
    model = sample(**fields)
    path = with_padded_rows(model.gguf, tmp_path / "wide.gguf", PADDED)
    assert nmse(model.reference(), logits(path, TOKENS)) < 1e-10
    # Whatever stands there meets zeros.
    other = with_padded_rows(model.gguf, tmp_path / "other.gguf", PADDED, filling=7.0)
    np.testing.assert_array_equal(logits(path, TOKENS), logits(other, TOKENS))


@pytest.mark.parametrize("kind", [Q.F16, Q.Q8_0, Q.Q4_1], ids=lambda kind: kind.name)
def test_in_types_that_need_no_padding(tiny: Sample, tmp_path: Path, kind: Q) -> None:
    """Those whose input is rescaled are among them: by another scale, which rounds otherwise."""
    wide = with_padded_rows(tiny.gguf, tmp_path / "wide.gguf", PADDED, kind)
    narrow = with_padded_rows(tiny.gguf, tmp_path / "narrow.gguf", WIDTH, kind)
    limit = 1e-10 if kind == Q.Q8_0 else 1e-4
    assert nmse(logits(narrow, TOKENS), logits(wide, TOKENS)) < limit


@pytest.mark.parametrize("to", [WIDTH + 32, 2 * PADDED])
def test_other_widths_are_refused(tiny: Sample, tmp_path: Path, to: int) -> None:
    path = with_padded_rows(tiny.gguf, tmp_path / "wide.gguf", to)
    with pytest.raises(LlamaError, match=rf"ffn_down_exps.*wrong shape.*{WIDTH}.*{to}"):
        Model(path)


def test_only_down_projections_of_pools(tiny: Sample, tmp_path: Path) -> None:
    for name in (
        "blk.0.ffn_down.weight",
        "blk.1.ffn_down_shexp.weight",
        "blk.1.ffn_up_exps.weight",
    ):
        file = Gguf.read(tiny.gguf)
        values = file.tensors[name].floats()
        missing = -values.shape[-1] % 512
        wide = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])
        file.tensors[name] = Tensor(Q.F32, wide.shape[::-1], wide.tobytes())
        with pytest.raises(LlamaError, match=rf"{name}.*wrong shape"):
            Model(file.write(tmp_path / "wide.gguf"))
