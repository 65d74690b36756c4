"""Rounding by feedback: the codes of ggml's blocks, the textbook's arithmetic, and who may ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from megrez_gguf import convert
from megrez_gguf.errors import ConfigError, GGUFError
from megrez_gguf.examination.verification import verify
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization import codes, feedback, imatrix
from megrez_gguf.quantization.encode import encoding
from megrez_gguf.quantization.feedback import Entering, Pool, Products
from megrez_gguf.quantization.imatrix import Imatrix, merge
from megrez_gguf.quantization.recipe import Recipe
from support.paths import POCKET

KINDS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
)
Floats = NDArray[np.float32]


def blocks_of(kind: str, values: Floats) -> NDArray[np.uint8]:
    packed: NDArray[np.uint8] = encoding(kind).encode(values, None)
    return packed.reshape(-1, encoding(kind).block_bytes)


def decoded(kind: str, blocks: NDArray[np.uint8]) -> Floats:
    found: Floats = dequantize(blocks, GGMLQuantizationType[kind])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_where_ggml_has_them(kind: str) -> None:
    rng = np.random.default_rng(1)
    block, _ = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = blocks_of(kind, rng.standard_normal((40, block)).astype(np.float32))
    grid = codes.grid(kind, blocks)
    drawn = rng.integers(0, grid.top + 1, (40, block))
    drawn[0], drawn[1] = 0, grid.top
    if grid.table is None:
        wanted = grid.base + drawn.astype(np.float32) * grid.step
    else:
        wanted = np.take_along_axis(grid.table, drawn[..., None], 2)[..., 0]
    found = codes.with_codes(kind, blocks, drawn)
    np.testing.assert_allclose(decoded(kind, found), wanted, atol=1e-5)
    for column in (0, 17, block - 1):
        _, values = grid.nearest(column, wanted[:, column])
        np.testing.assert_allclose(values, wanted[:, column], atol=1e-5)
    # The same codes once more give ggml's own bytes: nothing but codes was touched.
    own = np.stack([grid.nearest(c, decoded(kind, blocks)[:, c])[0] for c in range(block)], 1)
    np.testing.assert_allclose(
        decoded(kind, codes.with_codes(kind, found, own)), decoded(kind, blocks), atol=1e-5
    )


def activations(columns: int, rank: int, seed: int = 0) -> NDArray[np.float64]:
    """Rows whose columns go along: `rank` of them tell the others, but for some noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2000, rank)) @ rng.standard_normal((rank, columns))
    return x + 0.3 * rng.standard_normal(x.shape)


def entering(x: NDArray[np.float64]) -> Entering:
    means = (x**2).mean(0).astype(np.float32)
    return Entering(means, Products((x.T @ x).astype(np.float32)))


def rounded(kind: str, values: Floats, what: Entering | Floats | None) -> Floats:
    blocks = encoding(kind).encode(values, what).reshape(-1, encoding(kind).block_bytes)
    return decoded(kind, blocks).reshape(values.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_nearer(kind: str) -> None:
    x = activations(512, 40)
    values = np.random.default_rng(2).standard_normal((48, 512)).astype(np.float32)
    what = entering(x)
    plain = rounded(kind, values, what.means)
    better = rounded(kind, values, what)

    def error(found: Floats) -> float:
        return float(((x @ (values - found).T) ** 2).sum())

    # With 2 bits there are few values to choose from.
    assert error(better) < (0.6 if kind == "Q2_K" else 0.4) * error(plain)


@pytest.mark.parametrize("kind", ["Q4_0", "Q3_K", "IQ4_XS"])
def test_is_the_textbooks(kind: str) -> None:
    """OBS, column by column, by an inverse that is updated, as GPTQ's paper derives it."""
    x = activations(256, 30)
    values = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    what = entering(x)
    block = encoding(kind).block
    products = (x.T @ x).astype(np.float32).astype(np.float64)
    products[np.diag_indices(256)] += feedback._DAMPING * products.diagonal().mean()
    left = values.astype(np.float64)
    want = np.empty_like(left)
    inverse = np.linalg.inv(products)
    for column in range(256):
        if column % block == 0:
            part = left[:, column : column + block].astype(np.float32)
            scaled = encoding(kind).encode(part, what.means[column : column + block])
            grid = codes.grid(kind, scaled.reshape(8, -1))
        _, want[:, column] = grid.nearest(column % block, left[:, column].astype(np.float32))
        error = (left[:, column] - want[:, column]) / inverse[0, 0]
        left[:, column:] -= np.outer(error, inverse[0])
        inverse = (inverse - np.outer(inverse[0], inverse[0]) / inverse[0, 0])[1:, 1:]
    found = rounded(kind, values, what)
    # A tie may fall the other way, and all after it.
    assert (np.abs(found - want) < 1e-4).mean() > 0.97


def test_columns_that_nothing_links_are_rounded_to_the_nearest() -> None:
    values = np.random.default_rng(4).standard_normal((8, 256)).astype(np.float32)
    means = np.ones(256, np.float32)
    alone = Entering(means, Products(np.eye(256, dtype=np.float32)))
    found = rounded("Q4_K", values, alone)
    grid = codes.grid("Q4_K", blocks_of("Q4_K", values))
    assert np.abs(found - values).max() <= np.abs(grid.step).max() * 0.51 + 0.1
    nothing = Entering(means, Products(np.zeros((256, 256), np.float32)))
    np.testing.assert_array_equal(rounded("Q4_K", values, nothing), found)


def test_groups_of_columns_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations(640, 40)
    values = np.random.default_rng(5).standard_normal((8, 640)).astype(np.float32)
    sums = np.zeros((640, 256), np.float32)
    for begin in range(0, 640, 256):
        part = x[:, begin : begin + 256]
        sums[begin : begin + 256, : part.shape[1]] = part.T @ part
    means = (x**2).mean(0).astype(np.float32)
    found = rounded("Q4_0", values, Entering(means, Products(sums)))
    for begin in range(0, 640, 256):
        mine = slice(begin, begin + 256)
        np.testing.assert_array_equal(
            found[:, mine], rounded("Q4_0", values[:, mine], entering(x[:, mine]))
        )


def test_types_without_codes_are_rounded_plainly() -> None:
    values = np.random.default_rng(6).standard_normal((4, 256)).astype(np.float32)
    what = entering(activations(256, 20))
    np.testing.assert_array_equal(
        rounded("Q8_0", values, what), rounded("Q8_0", values, what.means)
    )


# --- in a conversion ---------------------------------------------------------------------------

MIX = Recipe("mine", "q4_0", ((r"ffn_gate_exps", "q3_K"),))


@pytest.fixture(scope="module")
def learned() -> Imatrix:
    """As of activations that go along, for all matrices of the pocket checkpoint's layers."""
    from megrez_gguf.conversion.convert import plan_convert

    sums, counts, products = {}, {}, {}
    for item in plan_convert(POCKET, "x", outtype="f32").items:
        if not imatrix._is_weighed(item.name, item.shape):
            continue
        columns = item.shape[-1]
        matrices = item.shape[0] if len(item.shape) == 3 else 1
        x = activations(columns, columns // 8)
        each = "down_exps" in item.name
        sums[item.name] = np.tile((x**2).sum(0).astype(np.float32), (matrices, 1))
        counts[item.name] = np.full(matrices, len(x))
        products[item.name] = np.tile((x.T @ x).astype(np.float32), (matrices if each else 1, 1, 1))
    return Imatrix(sums, counts, ("x",), 1, 512, products=products)


def test_a_file_is_verified_by_the_same_matrix(learned: Imatrix, tmp_path: Path) -> None:
    made = convert(POCKET, tmp_path / "x.gguf", recipe=MIX, imatrix=learned).path
    again = convert(POCKET, tmp_path / "y.gguf", recipe=MIX, imatrix=learned, n_threads=1).path
    assert made.read_bytes() == again.read_bytes()
    assert not verify(made, POCKET, imatrix=learned).failures
    without = verify(made, POCKET, imatrix=replace(learned, products=dict(learned.products) | {
        "blk.2.attn_q.weight": learned.products["blk.1.attn_q.weight"] * 0
    }))  # fmt: skip
    assert [failure.split(":")[0] for failure in without.failures] == ["blk.2.attn_q.weight"]


def test_levels_of_llama_cpp_stay_its_own(learned: Imatrix, tmp_path: Path) -> None:
    bare = replace(learned, products={})
    files = [
        convert(POCKET, tmp_path / f"{i}.gguf", outtype="q4_k_m", imatrix=weights).path
        for i, weights in enumerate((learned, bare))
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_products_a_recipe_rounds_as_llama_cpp(learned: Imatrix, tmp_path: Path) -> None:
    bare = replace(learned, products={})
    plain = convert(POCKET, tmp_path / "x.gguf", recipe=MIX, imatrix=bare).path
    made = convert(POCKET, tmp_path / "y.gguf", recipe=MIX, imatrix=learned).path
    key = "megrez-gguf.rounding"
    assert [GGUFFile.open(path).values.get(key) for path in (plain, made)] == [None, "feedback"]
    assert not verify(plain, POCKET, imatrix=learned).failures
    with pytest.raises(ConfigError, match="imatrix --products"):
        verify(made, POCKET, imatrix=bare)


# --- the file ----------------------------------------------------------------------------------


def test_products_are_kept_and_merged(learned: Imatrix, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    learned.save(path)
    assert path.read_bytes() == learned.to_bytes()
    found = imatrix.load(path)
    both = merge([found, found])
    assert found.products.keys() == learned.products.keys()
    for name, values in learned.products.items():
        np.testing.assert_array_equal(found.products[name], values)
        np.testing.assert_array_equal(both.products[name], 2 * values)
    with pytest.raises(ConfigError, match="one has products and the other has not"):
        merge([found, replace(found, products={})])


@pytest.mark.parametrize(
    "change",
    [
        lambda p: {**p, "blk.1.attn_q.weight": p["blk.1.attn_q.weight"][:, :, :8]},
        lambda p: {**p, "blk.1.ffn_down_exps.weight": p["blk.1.ffn_down_exps.weight"][:3]},
        lambda p: {**p, "blk.1.attn_q.weight": p["blk.1.attn_q.weight"][:, :8]},
    ],
)
def test_damaged_products_are_refused(
    learned: Imatrix, tmp_path: Path, change: Callable[[Any], Any]
) -> None:
    path = tmp_path / "m.gguf"
    replace(learned, products=change(dict(learned.products))).save(path)
    with pytest.raises(GGUFError, match=r"products of .* damaged"):
        imatrix.load(path)


def test_a_pools_pieces_share_their_factors() -> None:
    x = activations(64, 8)
    sums = np.stack([(x.T @ x).astype(np.float32)] * 3)
    pool = Pool(np.ones((3, 64), np.float32), sums)
    assert pool[0].products is pool[0].products
    assert pool[0].products is not pool[1].products
    shared = Pool(np.ones((3, 64), np.float32), sums[:1])
    assert shared[0].products is shared[2].products
    assert len(shared) == 3
