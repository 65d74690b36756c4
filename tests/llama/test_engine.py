"""What llama.cpp computes on its way is handed out as it is, and looking changes nothing."""

import ctypes
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megrez_gguf import convert, quantize
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import GGUFError, RuntimeUnavailableError
from megrez_gguf.format.reader import GGUFFile
from megrez_llama import ggml
from megrez_llama.engine import Engine
from megrez_llama.ggml import Tensor, check_layout, library
from megrez_llama.patched import require_patched
from megrez_parity.reference import CheckpointWeights, forward
from support.paths import POCKET
from support.random_checkpoint import POCKET as RANDOM
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

CONTEXT, FIRST = 64, 48
ROUTING = {"ffn_moe_logits", "ffn_moe_probs_biased", "ffn_moe_topk", "ffn_moe_weights"}
NAMES = ROUTING | {
    *("attn_norm", "kqv_out", "ffn_inp", "ffn_norm", "ffn_moe_swiglu", "ffn_moe_out", "ffn_shexp"),
    *("ffn_swiglu", "ffn_out", "l_out", "result_norm"),
}
# Of the last layer, all others but these have only the rows that outputs need.
WHOLE = {"attn_norm", "kqv_out"}


@pytest.fixture(scope="module")
def pocket(shared: Shared) -> Path:
    return shared.pocket("f32")


@pytest.fixture(scope="module")
def engine(pocket: Path) -> Iterator[Engine]:
    with Engine(pocket, CONTEXT) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokens() -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 2800, CONTEXT, dtype=np.int32)


def nmse(expected: NDArray[Any], found: NDArray[Any]) -> float:
    assert expected.shape == found.shape
    np.testing.assert_array_equal(np.isneginf(expected), np.isneginf(found))
    known = np.isfinite(expected)
    expected, found = expected[known], found[known]
    return float(np.square(expected - found).sum() / np.square(expected).sum())


def reference(
    folder: Path, tokens: NDArray[np.int32]
) -> tuple[ModelConfig, dict[tuple[str, int], NDArray[Any]]]:
    """Everything the reference shows, under the names of llama.cpp's graph."""
    config = ModelConfig.from_folder(folder)
    seen = defaultdict(list)

    def trace(name: str, layer: int, x: torch.Tensor) -> None:
        name = "ffn_swiglu" if name == "ffn_shexp_swiglu" else name
        seen[name, layer].append(x.numpy() if name == "ffn_moe_swiglu" else x[0].numpy())

    weights = CheckpointWeights(folder, torch.float64)
    forward(config, weights, torch.from_numpy(tokens).long()[None], trace)
    return config, {key: np.concatenate(parts) for key, parts in seen.items()}


def compare(folder: Path, gguf: Path, tokens: NDArray[np.int32]) -> set[str]:
    """Hold every captured node against the reference; the names there were."""
    config, expected = reference(folder, tokens)
    with Engine(gguf, CONTEXT) as engine:
        nodes = engine.run(tokens, first=FIRST, capture=NAMES).nodes
    last = config.num_hidden_layers - 1
    for (name, layer), found in nodes.items():
        n = CONTEXT - FIRST if layer in (last, -1) and name not in WHOLE else CONTEXT
        assert len(found) == n, (name, layer)
        if name == "ffn_moe_topk":
            assert found.dtype == np.int32
            np.testing.assert_array_equal(found, expected[name, layer][-n:])
            continue
        assert found.dtype == np.float32
        if name == "ffn_moe_swiglu":
            # The reference goes from expert to expert, and in each from token to token.
            ids = expected["ffn_moe_topk", layer].ravel()
            wanted = np.empty_like(expected[name, layer])
            wanted[ids.argsort(kind="stable")] = expected[name, layer]
            wanted = wanted.reshape(CONTEXT, config.num_experts_per_tok, -1)
        else:
            wanted = expected[name, layer]
        assert nmse(wanted[-n:], found) < 1e-9, (name, layer)
    # Neither may one layer of a name be missing, nor one have been taken for another.
    assert {key for key in expected if key[0] in {name for name, _ in nodes}} == nodes.keys()
    return {name for name, _ in nodes}


def test_nodes_are_the_reference(pocket: Path, tokens: NDArray[np.int32]) -> None:
    assert compare(POCKET, pocket, tokens) == NAMES


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}, set()),
        ({"norm_topk_prob": False, "num_experts_per_tok": 2}, set()),
        ({"num_experts_per_tok": 1, "pre_gate": False}, set()),
        ({"scoring_func": "softmax", "topk_method": "greedy"}, set()),
        # Without shared experts the routed ones' sum is the FFN's output.
        ({"n_shared_experts": 0}, {"ffn_moe_out", "ffn_shexp"}),
    ],
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_nodes_of_other_configurations(
    changes: dict[str, Any], absent: set[str], tmp_path: Path, tokens: NDArray[np.int32]
) -> None:
    make_checkpoint(RANDOM | {"num_hidden_layers": 4} | changes, tmp_path / "c")
    convert(tmp_path / "c", tmp_path / "f32.gguf", outtype="f32")
    assert compare(tmp_path / "c", tmp_path / "f32.gguf", tokens % 2000) == NAMES - absent


def test_the_last_outputs_only(engine: Engine, tokens: NDArray[np.int32]) -> None:
    whole, part = engine.run(tokens), engine.run(tokens, first=FIRST)
    assert part.logits.shape == (CONTEXT - FIRST, engine.vocab_size)
    assert not part.nodes
    np.testing.assert_array_equal(part.logits, whole.logits[FIRST:])
    np.testing.assert_array_equal(engine.logits(tokens), whole.logits)
    one = engine.run(
        tokens, first=CONTEXT - 1, capture=["ffn_moe_swiglu", "ffn_moe_weights", "l_out"]
    ).nodes
    last = max(layer for _, layer in one)
    shapes = {name: one[name, last].shape for name, _ in one}
    assert shapes == {
        "ffn_moe_swiglu": (1, 4, 64),
        "ffn_moe_weights": (1, 4),
        "l_out": (1, 256),
    }


def test_expert_ids_are_a_strided_view(engine: Engine, tokens: NDArray[np.int32]) -> None:
    strides = {}

    def watch(node: Tensor, ask: bool) -> bool:
        if node.name == b"ffn_moe_topk-1":
            strides["ids"] = [*node.nb[:2]], node.ne[0]
        return False

    engine.observe(tokens, 0, watch)
    (element, row), used = strides["ids"]
    assert row > element * used  # the test of the values above is one of strides too


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_k_m", "q4_0"])
def test_looking_changes_no_bit(
    kind: str, pocket: Path, tokens: NDArray[np.int32], tmp_path: Path
) -> None:
    path = pocket
    if kind != "f32":
        quantize(pocket, path := tmp_path / "x.gguf", outtype=kind)

    class Blind(Engine):
        def _context_params(self) -> Any:
            params = super()._context_params()
            params.cb_eval = type(params.cb_eval)()
            return params

    with Blind(path, CONTEXT) as engine:
        blind = engine.run(tokens, first=FIRST, capture=NAMES)
        assert not blind.nodes
    with Engine(path, CONTEXT) as engine:
        unasked = engine.run(tokens, first=FIRST).logits
        some = engine.run(tokens, first=FIRST, capture=ROUTING).logits
        all_of_it = engine.run(tokens, first=FIRST, capture=NAMES).logits
    for logits in (unasked, some, all_of_it):
        np.testing.assert_array_equal(logits, blind.logits)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "computed"])
@pytest.mark.parametrize("error", [ZeroDivisionError("here"), KeyboardInterrupt()], ids=repr)
def test_what_a_watcher_raises_is_raised(
    asked: bool, error: BaseException, pocket: Path, tokens: NDArray[np.int32]
) -> None:
    calls = 0

    class Counting(Engine):
        def _evaluated(self, *arguments: Any) -> bool:
            nonlocal calls
            calls += 1
            return super()._evaluated(*arguments)

    def watch(node: Tensor, ask: bool) -> bool:
        if node.name == b"ffn_norm-2" and ask == asked:
            raise error
        return node.name == b"ffn_norm-2"

    with Counting(pocket, CONTEXT) as engine:
        before = engine.logits(tokens)
        whole, calls = calls, 0
        with pytest.raises(type(error)) as raised:
            engine.observe(tokens, 0, watch)
        assert raised.value is error
        assert calls < whole / 2  # nothing was evaluated after it
        np.testing.assert_array_equal(engine.logits(tokens), before)


def test_bad_requests(engine: Engine, tokens: NDArray[np.int32]) -> None:
    with pytest.raises(ValueError, match="65 tokens for a context of 64"):
        engine.run(np.append(tokens, tokens[:1]))
    with pytest.raises(ValueError, match="outputs from position 64 on, of 64"):
        engine.run(tokens, first=CONTEXT)
    with pytest.raises(GGUFError, match=r"f32\.gguf: llama\.cpp cannot decode with it: .*token"):
        engine.run(tokens + 2880)


def test_types_that_cannot_be_captured(engine: Engine, tokens: NDArray[np.int32]) -> None:
    def watch(node: Tensor, ask: bool) -> bool:
        if not ask and node.name == b"ffn_norm-0":
            fake = Tensor.from_buffer_copy(node)
            fake.type = 1
            ggml.read(fake)
        return node.name == b"ffn_norm-0"

    with pytest.raises(TypeError, match="ffn_norm-0: ggml type 1 cannot be captured"):
        engine.observe(tokens, 0, watch)


def test_pieces(engine: Engine, pocket: Path) -> None:
    tokens = GGUFFile.open(pocket).values["tokenizer.ggml.tokens"]
    assert [piece.decode() for piece in engine.pieces()] == tokens


def renamed(**others: str) -> type[Tensor]:
    """The structure with the names of fields exchanged: of the same size, and wrong."""
    fields = tuple((others.get(name, name), kind) for name, kind in Tensor._fields_)
    return type("Wrong", (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    "layout",
    [
        type("Short", (ctypes.Structure,), {"_fields_": Tensor._fields_[:-1]}),
        renamed(ne="nb", nb="ne"),
        renamed(op="flags", flags="op"),
        renamed(view_src="data", data="view_src"),
        renamed(view_offs="view_src", view_src="view_offs"),
        renamed(type="op", op="type"),
    ],
    ids=["short", "ne", "op", "data", "offset", "type"],
)
def test_another_layout_is_noticed(layout: type[Tensor]) -> None:
    check_layout(library(), Tensor)
    with pytest.raises(RuntimeUnavailableError, match="not laid out as expected"):
        check_layout(library(), layout)


def test_the_layout_is_checked_before_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "Tensor", renamed(ne="nb", nb="ne"))
    library.cache_clear()
    with pytest.raises(RuntimeUnavailableError, match="Reinstall the patched llama-cpp-python"):
        library()


@pytest.mark.parametrize("size", [1, 7, 48])
def test_batches_give_the_same(
    pocket: Path, engine: Engine, tokens: NDArray[np.int32], size: int
) -> None:
    expected = engine.run(tokens, first=FIRST, capture=NAMES)
    with Engine(pocket, CONTEXT, batch_size=size) as batched:
        found = batched.run(tokens, first=FIRST, capture=NAMES)
    assert nmse(expected.logits, found.logits) < 1e-9
    assert expected.nodes.keys() == found.nodes.keys()
    for key, node in expected.nodes.items():
        assert nmse(node, found.nodes[key]) < 1e-9, key


def test_a_gpu_that_is_not_there_is_no_cpu(pocket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = require_patched()
    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(RuntimeUnavailableError, match="CMAKE_ARGS"):
        Engine(pocket, CONTEXT, n_gpu_layers=-1)


def test_layers_for_a_gpu_reach_llama_cpp(pocket: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = require_patched()
    load, seen = llama.llama_model_load_from_file, []

    def recorded(path: bytes, params: Any) -> Any:
        seen.append(params.n_gpu_layers)
        return load(path, params)

    monkeypatch.setattr(llama, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(llama, "llama_model_load_from_file", recorded)
    for n_gpu_layers in (-1, 3, 0):
        with Engine(pocket, CONTEXT, n_gpu_layers=n_gpu_layers):
            pass
    assert seen == [-1, 3, 0]


def test_a_margin_selects_and_does_not_weigh(pocket: Path, tokens: NDArray[np.int32]) -> None:
    """Weights are those of the chosen experts' own scores, whatever was added to choose them."""
    capture = {"ffn_moe_logits", "ffn_moe_topk", "ffn_moe_weights"}
    cache = {"expert_cache": 1 << 20, "batch_size": 1}
    with Engine(pocket, CONTEXT, expert_margin=0.3, **cache) as engine:
        nodes = engine.run(tokens, capture=capture).nodes
    with Engine(pocket, CONTEXT, **cache) as engine:
        exact = engine.run(tokens, capture=capture).nodes
    for layer in range(1, 7):
        scores = 1 / (1 + np.exp(-nodes["ffn_moe_logits", layer].astype(np.float64)))
        chosen = np.take_along_axis(scores, nodes["ffn_moe_topk", layer], axis=1)
        expected = chosen / chosen.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(nodes["ffn_moe_weights", layer], expected, rtol=1e-5)
    assert any(not np.array_equal(nodes[key], exact[key]) for key in nodes)
