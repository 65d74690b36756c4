"""Importance matrices are what llama-imatrix collects: held against torch, and against the tool."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megrez_cli import main
from megrez_gguf import convert, quantize
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import GGUFError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.quantization.imatrix import Imatrix, load, merge
from megrez_llama.engine import Engine
from megrez_parity.level_files import level_of
from megrez_parity.reference import CheckpointWeights, forward
from megrez_runtime.calibration import collect
from support.native_tools import native as program
from support.native_tools import run_native
from support.paths import DATA, POCKET
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

TEXT = DATA / "heldout" / "zh.txt"
CONTEXT = 128


@pytest.fixture(scope="module")
def exact(shared: Shared) -> Path:
    return shared.pocket("f32")


@pytest.fixture(scope="module")
def windows(exact: Path) -> list[NDArray[np.int32]]:
    with Engine(exact, CONTEXT) as engine:
        assert engine.bos is None  # which llama-imatrix would put into each window
        tokens = engine.tokenize(TEXT.read_text("utf-8"))
    return [tokens[start : start + CONTEXT] for start in range(0, 4 * CONTEXT, CONTEXT)]


@pytest.fixture(scope="module")
def collected(exact: Path, windows: list[NDArray[np.int32]]) -> Imatrix:
    return collect(exact, windows, n_ctx=CONTEXT)


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


@pytest.mark.slow
def test_a_pool_adds_up_all_layers_that_share_it(exact: Path) -> None:
    """Of one long window, so that more rows meet than are added up at once."""
    layers, experts = (1, 2, 3), 16
    with Engine(exact, 2048) as engine:
        tokens = engine.tokenize(TEXT.read_text("utf-8"))[:2048]
        nodes = engine.run(tokens, capture=("ffn_moe_topk", "ffn_norm", "ffn_moe_swiglu")).nodes
    counts = np.zeros(experts, np.int64)
    sums = {"gate": np.zeros((experts, 256)), "up": np.zeros((experts, 256))}
    sums["down"] = np.zeros((experts, 64))
    for layer in layers:
        for row, chosen in enumerate(nodes["ffn_moe_topk", layer]):
            entering = nodes["ffn_norm", layer][row].astype(np.float64) ** 2
            leaving = nodes["ffn_moe_swiglu", layer][row].astype(np.float64) ** 2
            for place, expert in enumerate(chosen):
                counts[expert] += 1
                sums["gate"][expert] += entering
                sums["up"][expert] += entering
                sums["down"][expert] += leaving[place]
    assert counts.sum() == len(layers) * 4 * 2048
    assert np.bincount(nodes["ffn_moe_topk", 1].ravel()).max() > 512
    found = collect(exact, [tokens], n_ctx=2048)
    for name, expected in sums.items():
        name = f"blk.1.ffn_{name}_exps.weight"
        np.testing.assert_array_equal(found.counts[name], counts)
        np.testing.assert_allclose(found.sums[name], expected, rtol=1e-5)
    entering = (nodes["ffn_norm", 1].astype(np.float64) ** 2).sum(0, keepdims=True)
    np.testing.assert_allclose(found.sums["blk.1.ffn_up_shexp.weight"], entering, rtol=1e-5)


@pytest.mark.parametrize("level", ["f16", "q5_1"])
def test_rescaled_activations_count_as_they_were(
    level: str, collected: Imatrix, windows: list[NDArray[np.int32]], tmp_path: Path
) -> None:
    """Before the patches divide what enters these down projections by its size."""
    path = convert(POCKET, tmp_path / "rescaled.gguf", outtype=level).path
    tensors = {t.name: t.dtype for t in GGUFFile.open(path).tensors}
    found = collect(path, windows, n_ctx=CONTEXT)
    for name in ("blk.0.ffn_down", "blk.4.ffn_down_exps", "blk.6.ffn_down_shexp"):
        assert tensors[f"{name}.weight"] == level.upper()
        total, expected = (i.sums[f"{name}.weight"].sum() for i in (found, collected))
        assert total == pytest.approx(expected, rel=0.05)


def test_has_every_matrix_of_the_layers(collected: Imatrix, exact: Path) -> None:
    tensors = GGUFFile.open(exact).tensors
    matrices = {t.name for t in tensors if t.name.startswith("blk.") and len(t.shape) > 1}
    assert collected.means.keys() == collected.counts.keys() == matrices
    assert sum(collected.counts["blk.1.ffn_up_exps.weight"]) == 3 * 4 * 4 * CONTEXT


def test_experts_no_token_reached_are_neutral(
    exact: Path, windows: list[NDArray[np.int32]]
) -> None:
    few = collect(exact, [windows[0][:2]], n_ctx=CONTEXT)
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
        collect(tmp_path / "inf.gguf", windows, n_ctx=CONTEXT)


@pytest.fixture(scope="module")
def native(
    exact: Path, windows: list[NDArray[np.int32]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What llama-imatrix writes for the same windows."""
    path = tmp_path_factory.mktemp("native") / "imatrix.gguf"
    model = ("-m", exact, "-c", CONTEXT, "-b", CONTEXT, "-ub", CONTEXT, "-ngl", 0, "-t", 2)
    arithmetic = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")
    text = ("-f", TEXT, "--parse-special", "--chunks", len(windows))
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


@pytest.fixture(scope="module")
def ours(collected: Imatrix, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ours") / "imatrix.gguf"
    collected.save(path)
    return path


def by_llama_imatrix(target: Path, *sources: Path, form: str = "gguf") -> Imatrix:
    """What the tool makes of matrices, without a model."""
    files = [argument for source in sources for argument in ("--in-file", source)]
    chunks = ("-c", CONTEXT, "-b", CONTEXT)
    run_native(
        "llama-imatrix", "-m", "none", *files, *chunks, "-o", target, "--output-format", form
    )
    return load(target)


def the_same(one: Imatrix, two: Imatrix) -> None:
    """But for the number of chunks: the tool guesses it of the largest count, of a shared pool's
    experts too, which may be of three layers."""
    assert one.sums.keys() == two.sums.keys()
    for name, sums in one.sums.items():
        np.testing.assert_array_equal(two.counts[name], one.counts[name])
        np.testing.assert_array_equal(two.sums[name], sums)
    assert (one.datasets, one.chunk_size) == (two.datasets, two.chunk_size)


@pytest.mark.slow
def test_llama_imatrix_reads_ours(ours: Path, collected: Imatrix, tmp_path: Path) -> None:
    the_same(by_llama_imatrix(tmp_path / "again.gguf", ours), collected)
    # Its statistics go through a log that may be cut short, so that its exit code has to tell.
    (tmp_path / "cut.gguf").write_bytes(ours.read_bytes()[:-1000])
    codes = [
        subprocess.run(
            [program("llama-imatrix"), "-m", "none", "--in-file", path, "--show-statistics"],
            capture_output=True,
        ).returncode
        for path in (ours, tmp_path / "cut.gguf")
    ]
    assert codes[0] == 0 != codes[1]


@pytest.fixture
def few(exact: Path, windows: list[NDArray[np.int32]], tmp_path: Path) -> Path:
    """A matrix with experts that no token reached."""
    path = tmp_path / "few.gguf"
    collect(exact, [windows[0][:2]], n_ctx=CONTEXT).save(path)
    return path


@pytest.mark.slow
def test_merges_as_llama_imatrix_does(ours: Path, few: Path, tmp_path: Path) -> None:
    assert load(few).unseen()
    files = (few, ours, few)
    the_same(by_llama_imatrix(tmp_path / "theirs.gguf", *files), merge([load(f) for f in files]))


@pytest.mark.slow
def test_reads_the_old_format_of_llama_imatrix(
    native: Path, exact: Path, few: Path, tmp_path: Path
) -> None:
    for path in (native, few):
        old = by_llama_imatrix(tmp_path / "old.dat", path, form="dat")
        new = load(path)
        assert old.counts == {}
        assert old.means.keys() == new.means.keys()
        tensors = GGUFFile.open(exact).tensors
        expected = new.means_for(tensors)
        for name, means in old.means_for(tensors).items():
            # It has multiplied by the number of chunks, too.
            np.testing.assert_allclose(means, expected[name], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "whose"),
    [("q4_k_m", "native"), ("q4_k_m", "ours"), ("q4_k_m", "old"), ("iq2_xs", "ours")],
)
def test_quantizes_like_llama_quantize(
    kind: str, whose: str, exact: Path, native: Path, ours: Path, tmp_path: Path
) -> None:
    matrix = {"native": native, "ours": ours, "old": tmp_path / "old.dat"}[whose]
    if whose == "old":
        by_llama_imatrix(matrix, native, form="dat")
    quantize(exact, tmp_path / "ours.gguf", outtype=kind, imatrix=load(matrix))
    run_native("llama-quantize", "--imatrix", matrix, exact, tmp_path / "theirs.gguf", kind, 2)
    ours_, theirs = (GGUFFile.open(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    # llama-quantize sorts them by layer.
    pairs = zip(*(sorted(f.tensors, key=lambda t: t.name) for f in (ours_, theirs)), strict=True)
    for mine, other in pairs:
        assert (mine.name, mine.dtype, mine.nbytes) == (other.name, other.dtype, other.nbytes)
        ours_data, theirs_data = (
            np.fromfile(tensor.shard.path, np.uint8, mine.nbytes, offset=tensor.begin)
            for tensor in (mine, other)
        )
        np.testing.assert_array_equal(ours_data, theirs_data)
    assert level_of(tmp_path / "theirs.gguf") == f"{kind}+imatrix"


# --- the command -------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["imatrix", *map(str, arguments)])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_collects(
    exact: Path, collected: Imatrix, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i.gguf"
    options = ("--ctx", CONTEXT, "--chunks", 4, "--parse-special")
    assert run(exact, TEXT, "-o", out, *options) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n"
    assert printed.err == f"{TEXT}: 70616 tokens, 4 chunks of {CONTEXT}\n"
    found = load(out)
    assert found.datasets == (str(TEXT),)
    assert found.sums.keys() == collected.sums.keys()
    for name, sums in collected.sums.items():
        np.testing.assert_array_equal(found.sums[name], sums)


def test_the_command_tells_what_it_did(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i.gguf"
    assert run(exact, TEXT, "-o", out, "--ctx", 2, "--chunks", 2, "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report.pop("seconds") > 0
    unseen = report.pop("unseen")
    assert report == {"path": str(out), "chunks": 2, "tokens": 4, "tensors": 61}
    found = load(out).unseen()
    assert unseen == {
        f"blk.{layer}.ffn_{name}_exps.weight": len(found[f"blk.{layer}.ffn_{name}_exps.weight"])
        for layer in (1, 4)
        for name in ("down", "gate", "up")
    }
    for layer in (1, 4):
        names = [f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
        experts = found[names[0]]
        assert 0 < len(experts) < 16
        assert (
            f"{', '.join(names)}: no token reached {len(experts)} of the 16 experts "
            f"({', '.join(map(str, experts))})"
        ) in printed.err


def test_the_output_matrix_is_included_on_request(exact: Path, tmp_path: Path) -> None:
    for options in ((), ("--process-output",)):
        out = tmp_path / f"{len(options)}.gguf"
        assert run(exact, TEXT, "-o", out, "--ctx", 8, "--chunks", 2, *options) == 0
    without, with_ = (load(tmp_path / f"{n}.gguf") for n in (0, 1))
    assert with_.sums.keys() - without.sums.keys() == {"output.weight"}
    assert with_.counts["output.weight"].tolist() == [16]


def test_special_tokens_are_read_on_request(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "special.txt"
    text.write_text("<|turn_end|>" * 64, "utf-8")
    said = []
    for options in ((), ("--parse-special",)):
        out = tmp_path / f"{len(options)}.gguf"
        assert run(exact, text, "-o", out, "--ctx", 64, "--chunks", 1, *options) == 0
        said.append("special.txt: 64 tokens" in capsys.readouterr().err)
    assert said == [False, True]


def test_the_command_merges(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts at once, one after the other, or each by itself, all give the same."""
    one, two = tmp_path / "one.txt", tmp_path / "two.txt"
    text = TEXT.read_text("utf-8")
    one.write_text(text[:3000], "utf-8")
    two.write_text(text[3000:6000], "utf-8")
    options = ("--ctx", 64, "--chunks", 3)
    outs = {name: tmp_path / f"{name}.gguf" for name in ("one", "two", "both", "then", "merged")}
    assert run(exact, one, "-o", outs["one"], *options) == 0
    assert run(exact, two, "-o", outs["two"], *options) == 0
    assert run(exact, one, two, "-o", outs["both"], *options) == 0
    assert run(exact, two, "--merge", outs["one"], "-o", outs["then"], *options) == 0
    capsys.readouterr()
    sources = ("--merge", outs["one"], "--merge", outs["two"])
    assert run(*sources, "-o", outs["merged"], "--json") == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert (report["chunks"], report["tokens"], report["tensors"]) == (6, 6 * 64, 61)
    assert f"{outs['two']}: 3 chunks of 64, merged\n" in printed.err
    assert run(exact, *sources, "-o", tmp_path / "checked.gguf") == 0
    both, then, merged = (load(outs[name]) for name in ("both", "then", "merged"))
    the_same(then, merged)
    assert both.datasets == merged.datasets == (str(one), str(two))
    for name, sums in both.sums.items():
        np.testing.assert_array_equal(merged.counts[name], both.counts[name])
        np.testing.assert_allclose(merged.sums[name], sums, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "0 texts, 0 matrices"),
        (["{model}"], "0 texts, 0 matrices"),
        (["{model}", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        (["nowhere.gguf", "{text}"], "nowhere.gguf: no such file"),
        (["{model}", "{text}", "--ctx", "100000"], "70616 tokens, and one chunk takes 100000"),
        (["--merge", "nowhere.gguf"], "nowhere.gguf: cannot be read"),
        (["--merge", "{model}"], "f32.gguf: not an importance matrix"),
        (["{model}", "{text}", "--merge", "{ours}", "--ctx", "64"], "give --ctx 128"),
        (["{other}", "{text}", "--merge", "{ours}", "--ctx", "128"], "is of another model: "),
        (["{other}", "--merge", "{ours}"], "is of another model: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_requests(
    arguments: list[str],
    message: str,
    exact: Path,
    ours: Path,
    other: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = {"model": exact, "text": TEXT, "ours": ours, "other": other}
    out = tmp_path / "i.gguf"
    assert run(*(a.format(**files) for a in arguments), "-o", out) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same sizes with a layer less."""
    fields = json.loads((POCKET / "config.json").read_text("utf-8")) | {"num_hidden_layers": 6}
    folder = make_checkpoint(fields, tmp_path_factory.mktemp("other") / "checkpoint")
    return convert(folder, folder.parent / "other.gguf").path


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_inputs_are_never_replaced(
    force: list[str], exact: Path, ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(ours.read_bytes())
    assert run("--merge", copy, "-o", copy, *force) == 2
    assert ("is part of the input" if force else "exists; use --force") in capsys.readouterr().err
    assert copy.read_bytes() == ours.read_bytes()


def test_progress_counts_chunks(
    exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    assert run(exact, TEXT, "-o", tmp_path / "i.gguf", "--ctx", 8, "--chunks", 3) == 0
    printed = capsys.readouterr()
    assert "3/3 chunks" in printed.err
    assert "bytes" not in printed.err


def test_products_are_those_of_what_enters(exact: Path, windows: list[NDArray[np.int32]]) -> None:
    found = collect(exact, windows, n_ctx=CONTEXT, products=True, process_output=True)
    want: dict[str, Any] = {"q": 0, "gate": 0, "down": np.zeros((16, 64, 64))}
    names = ("attn_norm", "ffn_norm", "ffn_moe_topk", "ffn_moe_swiglu")
    with Engine(exact, CONTEXT) as engine:
        for window in windows:
            nodes = engine.run(window, capture=names).nodes
            x = nodes["attn_norm", 2].astype(np.float64)
            want["q"] += x.T @ x
            for layer in (4, 5, 6):
                x = nodes["ffn_norm", layer].astype(np.float64)
                want["gate"] += x.T @ x
                for row, chosen in zip(
                    nodes["ffn_moe_swiglu", layer], nodes["ffn_moe_topk", layer], strict=True
                ):
                    for z, expert in zip(row.astype(np.float64), chosen, strict=True):
                        want["down"][expert] += np.outer(z, z)
    for part, products in {
        "blk.2.attn_q": want["q"][None],
        "blk.2.attn_v": want["q"][None],
        "blk.4.ffn_gate_exps": want["gate"][None],
        "blk.4.ffn_up_exps": want["gate"][None],
        "blk.4.ffn_down_exps": want["down"],
    }.items():
        kept = found.products[f"{part}.weight"]
        np.testing.assert_allclose(kept, products, rtol=1e-3, atol=1e-4 * np.abs(products).max())
    assert found.products.keys() == found.sums.keys()
    assert "output.weight" in found.products
    plain = collect(exact, windows, n_ctx=CONTEXT)
    assert not plain.products
    for name, sums in plain.sums.items():
        np.testing.assert_array_equal(found.sums[name], sums)
