"""Recipes that put zeros after the rows of down projections, for types of larger blocks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from megrez_gguf import convert, quantize
from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.conversion.metadata import HASHES
from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.examination.inspection import inspect
from megrez_gguf.examination.verification import verify
from megrez_gguf.quantization import imatrix, recipe
from megrez_gguf.quantization.imatrix import Imatrix
from megrez_gguf.quantization.recipe import Recipe
from megrez_runtime.calibration import calibrate
from support.commands import cli
from support.configurations import FOR_K_QUANTS
from support.gguf_edit import Gguf
from support.llama import logits, nmse
from support.paths import POCKET
from support.random_checkpoint import make_checkpoint
from support.samples import TOKENS
from support.shared import Shared

DOWN = "blk.1.ffn_down_exps.weight"
MIX = Recipe("mine", "q4_k_m", (("ffn_down_exps", "q3_K"),), pad_rows=True)
"""The pocket checkpoint's experts are 64 wide."""


def rows(path: Path, name: str = DOWN) -> NDArray[np.float32]:
    tensor = next(t for t in GGUFReader(path).tensors if t.name == name)
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(POCKET, tmp_path_factory.mktemp("made") / "x.gguf", recipe=MIX).path


@pytest.fixture(scope="module")
def learned(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Imatrix:
    return learn(shared.pocket("f32"), tmp_path_factory.mktemp("learned") / "m.gguf")


def learn(model: Path, path: Path) -> Imatrix:
    texts = [POCKET.parent / "heldout" / "en.txt"]
    calibrate(model, texts, path, products=True, n_ctx=256, n_chunks=4)
    return imatrix.load(path)


def test_only_what_lacks_the_room_is_wider(made: Path) -> None:
    plan = plan_convert(POCKET, "x", recipe=MIX)
    plain = plan_convert(POCKET, "x", recipe=replace(MIX, pad_rows=False))
    shapes = {i.name: i.shape for i in plan.items}
    for item in plain.items:
        if "ffn_down_exps" in item.name:
            assert shapes[item.name] == (16, 256, 256)
            assert item.shape == (16, 256, 64)
            assert item.encoding.name == "Q4_0"
        else:
            assert shapes[item.name] == item.shape
    assert plan.parameters == plain.parameters
    # The dense layer's cannot be wider.
    assert {f.tensor for f in plan.fallbacks} == {"blk.0.ffn_down.weight"}
    assert made.stat().st_size == plan.nbytes
    fits = replace(MIX, types=(("ffn_down_exps", "iq4_nl"),))
    downs = [i for i in plan_convert(POCKET, "x", recipe=fits).items if "down_exps" in i.name]
    assert {i.shape for i in downs} == {(16, 256, 64)}


def test_holds_the_checkpoints_weights_and_zeros(made: Path, shared: Shared) -> None:
    weights = rows(shared.pocket("f32"))
    found = rows(made)
    assert not found[..., 64:].any()
    assert 1e-4 < nmse(weights, found[..., :64]) < 0.03


def test_is_the_file_of_a_wider_checkpoint(tmp_path: Path) -> None:
    """One whose experts are as wide, with weights of zero: byte for byte, and in what it says."""
    narrow = make_checkpoint(FOR_K_QUANTS, tmp_path / "narrow", dtype="float32")
    source = Gguf.read(convert(narrow, tmp_path / "f32.gguf", outtype="f32").path)
    for name, tensor in source.tensors.items():
        if "_exps" in name:
            values = tensor.floats()
            missing = [(0, 0), (0, 256 - values.shape[1]), (0, 256 - values.shape[2])]
            wider = np.pad(values, missing)
            source.tensors[name] = replace(tensor, shape=wider.shape[::-1], data=wider.tobytes())
    source.set("expert_feed_forward_length", 256)
    del source.values[HASHES]
    source.write(tmp_path / "wide.gguf")
    wide = quantize(tmp_path / "wide.gguf", tmp_path / "a.gguf", recipe=MIX, allow_zeros=True).path
    path = convert(narrow, tmp_path / "b.gguf", recipe=MIX).path
    mine, theirs = (Gguf.read(p).tensors for p in (path, wide))
    assert mine[DOWN].data == theirs[DOWN].data
    np.testing.assert_array_equal(logits(path, TOKENS), logits(wide, TOKENS))


def test_importance_is_of_the_columns_there_are(
    made: Path, learned: Imatrix, shared: Shared, tmp_path: Path
) -> None:
    """Each way to round loses less than the one before, of what comes out of the experts."""
    exact = rows(shared.pocket("f32"))
    sums = learned.products[DOWN]
    lost = []
    for weights in (None, replace(learned, products={}), learned):
        path = made
        if weights:
            path = convert(
                POCKET, tmp_path / "x.gguf", recipe=MIX, imatrix=weights, force=True
            ).path
            assert not verify(path, POCKET, imatrix=weights).failures
        found = rows(path)
        assert not found[..., 64:].any()
        errors = found[..., :64] - exact
        lost.append(float(((errors @ sums) * errors).sum()))
    assert lost[1] < 0.95 * lost[0]
    assert lost[2] < 0.8 * lost[1]


def test_is_verified_against_its_checkpoint(made: Path, tmp_path: Path) -> None:
    assert not verify(made, POCKET).failures
    file = Gguf.read(made)
    tensor = file.tensors[DOWN]
    data = bytearray(tensor.data)
    data[-110 * 3] ^= 1  # in the third row from the end
    file.tensors[DOWN] = replace(tensor, data=bytes(data))
    found = verify(file.write(tmp_path / "y.gguf"), POCKET).failures
    assert any("differs from row [15, 253] on" in failure for failure in found)
    # Rows of another width are not the checkpoint's.
    file = Gguf.read(made)
    shape = file.tensors[DOWN].shape
    file.tensors[DOWN] = replace(tensor, shape=(512, shape[1] // 2, shape[2]))
    found = verify(file.write(tmp_path / "z.gguf"), POCKET).failures
    assert any("has shape [16, 128, 512]" in failure for failure in found)


def test_what_is_learned_from_such_a_file(made: Path, learned: Imatrix, tmp_path: Path) -> None:
    """Is of the columns there are, and may round a file anew."""
    found = learn(made, tmp_path / "m.gguf")
    assert found.sums[DOWN].shape == learned.sums[DOWN].shape == (16, 64)
    assert found.products[DOWN].shape == learned.products[DOWN].shape
    seen = np.minimum(found.counts[DOWN], learned.counts[DOWN]) > 50
    assert seen.any()
    assert nmse(learned.means[DOWN][seen], found.means[DOWN][seen]) < 0.1
    convert(POCKET, tmp_path / "x.gguf", recipe=MIX, imatrix=found)


def test_what_is_shown_of_it(made: Path) -> None:
    report = inspect(made)
    down = next(t for t in report.tensors if t.name == DOWN)
    assert down.shape == (16, 256, 256)


def test_is_not_quantized_again(made: Path, tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="already"):
        quantize(made, tmp_path / "x.gguf", outtype="q4_0")


@pytest.mark.parametrize("value", ["1", '"yes"', "[]"])
def test_is_on_or_off(tmp_path: Path, value: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'level = "q4_k_m"\npad_rows = {value}\n[types]\n"down_exps" = "q3_K"\n')
    with pytest.raises(ConfigError, match="pad_rows: expected true or false"):
        recipe.load(path)


def test_by_the_command(tmp_path: Path) -> None:
    path, out = tmp_path / "r.toml", tmp_path / "x.gguf"
    path.write_text('level = "q4_k_m"\npad_rows = true\n[types]\n"ffn_down_exps" = "q2_K"\n')
    result = cli("convert", POCKET, "-o", out, "--recipe", path)
    assert result.exit_code == 0, result.output
    assert {i.shape for i in inspect(out).tensors if "down_exps" in i.name} == {(16, 256, 256)}
    assert json.loads(cli("verify", out, POCKET, "--json").stdout)["failures"] == []
