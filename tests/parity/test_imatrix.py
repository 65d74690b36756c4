"""Importance matrices are what llama-imatrix collects: held against torch, and against the tool."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from native_tools import run_native
from numpy.typing import NDArray

from megrez_gguf import convert, quantize
from megrez_gguf.config import ModelConfig
from megrez_gguf.errors import GGUFError
from megrez_gguf.gguf_file import GGUFFile
from megrez_parity.engine import Engine
from megrez_parity.imatrix import Imatrix, collect, load
from megrez_parity.levels import level_of
from megrez_parity.reference import CheckpointWeights, forward

DATA = Path(__file__).parents[1] / "data"
POCKET = DATA / "pocket"
CONTEXT = 128


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "f32.gguf"
    convert(POCKET, path, outtype="f32")
    return path


@pytest.fixture(scope="module")
def windows(exact: Path) -> list[NDArray[np.int32]]:
    with Engine(exact, CONTEXT) as engine:
        assert engine.bos is None  # which llama-imatrix would put into each window
        tokens = engine.tokenize((DATA / "heldout" / "zh.txt").read_text("utf-8"))
    return [tokens[start : start + CONTEXT] for start in range(0, 4 * CONTEXT, CONTEXT)]


@pytest.fixture(scope="module")
def collected(exact: Path, windows: list[NDArray[np.int32]]) -> Imatrix:
    return collect(exact, windows, CONTEXT)


def expected_by_torch(windows: list[NDArray[np.int32]]) -> Iterator[tuple[str, Any, Any]]:
    """Name, mean squares and counts of the matrices of one attention, one pool and one MLP."""
    config = ModelConfig.from_folder(POCKET)
    weights = CheckpointWeights(POCKET, torch.float64)
    columns: dict[str, list[torch.Tensor]] = {}
    squares = {"gate": torch.zeros(16, 256).double(), "down": torch.zeros(16, 64).double()}
    counts = torch.zeros(16, dtype=torch.int64)
    chosen = state = torch.empty(0)
    experts: Iterator[int] = iter(())

    def trace(name: str, layer: int, x: torch.Tensor) -> None:
        nonlocal chosen, state, experts
        if name in ("attn_norm", "kqv_out", "ffn_swiglu", "ffn_shexp_swiglu"):
            columns.setdefault(f"{name}-{layer}", []).append(x[0])
        if layer not in (4, 5, 6):  # that share the second pool
            return
        if name == "ffn_norm":
            state = x[0]
        if name == "ffn_moe_topk":
            chosen = x[0]
            experts = iter(chosen.unique().tolist())
        if name == "ffn_moe_swiglu":
            expert = next(experts)
            counts[expert] += len(x)
            squares["down"][expert] += x.square().sum(0)
            squares["gate"][expert] += state[(chosen == expert).any(-1)].square().sum(0)

    for window in windows:
        forward(config, weights, torch.from_numpy(window).long()[None], trace)
    for node, name in {
        "attn_norm-2": "blk.2.attn_q",
        "kqv_out-6": "blk.6.attn_output",
        "ffn_swiglu-0": "blk.0.ffn_down",
        "ffn_shexp_swiglu-3": "blk.3.ffn_down_shexp",
    }.items():
        x = torch.cat(columns[node])
        yield f"{name}.weight", x.square().mean(0, keepdim=True), [len(x)]
    for name, total in squares.items():
        yield f"blk.4.ffn_{name}_exps.weight", total / counts[:, None].clamp(1), counts


def test_agrees_with_torch(collected: Imatrix, windows: list[NDArray[np.int32]]) -> None:
    for name, means, counts in expected_by_torch(windows):
        assert collected.means[name].dtype == np.float32
        np.testing.assert_array_equal(collected.counts[name], counts)
        np.testing.assert_allclose(collected.means[name], means, rtol=1e-4)


def test_has_every_matrix_of_the_layers(collected: Imatrix, exact: Path) -> None:
    tensors = GGUFFile.open(exact).tensors
    matrices = {t.name for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    assert collected.means.keys() == collected.counts.keys() == matrices
    assert sum(collected.counts["blk.1.ffn_up_exps.weight"]) == 3 * 4 * 4 * CONTEXT


def test_experts_no_token_reached_are_neutral(
    exact: Path, windows: list[NDArray[np.int32]]
) -> None:
    few = collect(exact, [windows[0][:2]], CONTEXT)
    counts = few.counts["blk.1.ffn_down_exps.weight"]
    means = few.means["blk.1.ffn_down_exps.weight"]
    assert counts.sum() == 3 * 4 * 2
    unseen = counts == 0
    assert unseen.any()
    assert (means[unseen] == 1).all()
    assert (means[~unseen] != 1).all()


def test_activations_that_are_not_finite(
    exact: Path, windows: list[NDArray[np.int32]], tmp_path: Path
) -> None:
    raw = bytearray(exact.read_bytes())
    (norm,) = (t for t in GGUFFile.open(exact).tensors if t.name == "blk.3.attn_norm.weight")
    raw[norm.begin : norm.begin + 4] = np.float32("inf").tobytes()
    (tmp_path / "inf.gguf").write_bytes(raw)
    expected = r"inf\.gguf: activations entering blk\.3\.attn_q\.weight are not finite"
    with pytest.raises(GGUFError, match=expected):
        collect(tmp_path / "inf.gguf", windows, CONTEXT)


def write(path: Path, tensors: dict[str, NDArray[Any]], kind: str = "imatrix", **keys: int) -> Path:
    """A file in llama-imatrix's form."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["some.txt"])
    for key, value in ({"chunk_count": 1, "chunk_size": 512} | keys).items():
        if value >= 0:
            writer.add_uint32(f"imatrix.{key}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


SUMS = np.array([[2, 4, 6], [0, 0, 0]], np.float32)
COUNTS = np.array([[2], [0]], np.float32)


def test_reads_files(tmp_path: Path) -> None:
    tensors = {
        "blk.1.x.weight.in_sum2": SUMS,
        "blk.1.x.weight.counts": COUNTS,
        "blk.1.counts.counts": COUNTS[:1],
        "blk.1.counts.in_sum2": SUMS[:1],
    }
    found = load(write(tmp_path / "i.gguf", tensors))
    assert found.means.keys() == found.counts.keys() == {"blk.1.x.weight", "blk.1.counts"}
    assert found.means["blk.1.x.weight"].tolist() == [[1, 2, 3], [1, 1, 1]]
    assert found.counts["blk.1.x.weight"].tolist() == [2, 0]
    assert found.means["blk.1.counts"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"x.in_sum2": SUMS, "x.counts": COUNTS}, {"kind": "model"}, "not an importance matrix"),
        ({"x.in_sum2": SUMS, "x.counts": COUNTS}, {"chunk_size": -1}, "not an importance matrix"),
        ({"x.in_sum2": SUMS}, {}, "x.in_sum2 is no half of a pair"),
        ({"x.counts": COUNTS}, {}, "x.counts is no half of a pair"),
        ({"x.in_sum2": SUMS, "x.counts": COUNTS, "x.y": SUMS}, {}, "x.y is no half of a pair"),
        ({"x.in_sum2": SUMS.astype(np.float16), "x.counts": COUNTS}, {}, "no half of a pair"),
        ({"x.in_sum2": SUMS[:1], "x.counts": COUNTS}, {}, "3 sums of 2 matrices x"),
    ],
)
def test_files_that_are_none(
    tensors: dict[str, NDArray[Any]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "i.gguf", tensors, **changes)
    with pytest.raises(GGUFError, match=rf"i\.gguf: .*{message}"):
        load(path)


def test_a_file_of_something_else(tmp_path: Path, exact: Path) -> None:
    with pytest.raises(GGUFError, match="not an importance matrix"):
        load(exact)
    (tmp_path / "old.dat").write_bytes(b"\1\0\0\0" * 20)
    with pytest.raises(GGUFError, match=r"old\.dat: not an importance matrix"):
        load(tmp_path / "old.dat")


@pytest.fixture(scope="module")
def native(exact: Path, windows: list[NDArray[np.int32]], tmp_path_factory: Any) -> Path:
    """What llama-imatrix writes for the same windows."""
    path = tmp_path_factory.mktemp("native") / "imatrix.gguf"
    model = ("-m", exact, "-c", CONTEXT, "-b", CONTEXT, "-ub", CONTEXT, "-ngl", 0, "-t", 2)
    arithmetic = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
    text = ("-f", DATA / "heldout" / "zh.txt", "--parse-special", "--chunks", len(windows))
    run_native("llama-imatrix", *model, *arithmetic, *text, "-o", path, "--no-ppl")
    return path


@pytest.mark.slow
def test_agrees_with_llama_imatrix(collected: Imatrix, native: Path) -> None:
    theirs = load(native)
    assert theirs.means.keys() == collected.means.keys()
    for name, means in theirs.means.items():
        np.testing.assert_array_equal(theirs.counts[name], collected.counts[name])
        # They add up in float32, up to 1536 rows.
        np.testing.assert_allclose(collected.means[name], means, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k_m", "iq2_xs"])
def test_quantizes_like_llama_quantize(
    kind: str, exact: Path, native: Path, tmp_path: Path
) -> None:
    quantize(exact, tmp_path / "ours.gguf", kind, imatrix=load(native))
    run_native("llama-quantize", "--imatrix", native, exact, tmp_path / "theirs.gguf", kind, 2)
    ours, theirs = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    # llama-quantize sorts them by layer.
    pairs = zip(*(sorted(f.tensors, key=lambda t: t.name) for f in (ours, theirs)), strict=True)
    for mine, other in pairs:
        assert (mine.name, mine.type, mine.nbytes) == (other.name, other.type, other.nbytes)
        data = [
            np.fromfile(tensor.shard.path, np.uint8, mine.nbytes, offset=tensor.begin)
            for tensor in (mine, other)
        ]
        np.testing.assert_array_equal(*data)
    assert level_of(tmp_path / "theirs.gguf") == f"{kind}+imatrix"
