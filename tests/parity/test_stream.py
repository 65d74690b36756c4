"""The stored reference is the reference: whole, streamed, interrupted, resumed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import CheckpointError, MegrezError, OutputError
from megrez_parity import reference, reference_store
from megrez_parity.reference import CheckpointWeights, forward
from megrez_parity.reference_store import StoredReference, cache_key
from support.marks import SLOW
from support.odd_configs import BASE, random_case
from support.paths import POCKET
from support.random_checkpoint import SMALL, make_checkpoint

CONFIG: dict[str, Any] = SMALL | {"num_hidden_layers": 5}
STAGES = [f"layer-{i:02}" for i in range(5)] + ["head"]


def some_windows(vocab: int, count: int = 3, length: int = 33) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, vocab, (count, length), dtype=np.int32))


def stored(
    checkpoint: Path,
    folder: Path,
    windows: list[np.ndarray] | None = None,
    weights: str = "weights",
    say: Callable[[str], None] = lambda line: None,
) -> StoredReference:
    config = ModelConfig.from_folder(checkpoint)
    windows = windows or some_windows(config.vocab_size)
    return StoredReference(config, checkpoint, windows, folder, weights, say)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.npy"))}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_checkpoint(CONFIG, tmp_path / "small", shard_bytes=200_000)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages that a test computes, as they begin."""
    stages: list[str] = []
    layer, head = StoredReference._layer, StoredReference._head

    def watched_layer(self: StoredReference, out: Path, i: int) -> dict[str, float]:
        stages.append(f"layer-{i:02}")
        return layer(self, out, i)

    def watched_head(self: StoredReference, out: Path) -> dict[str, float]:
        stages.append("head")
        return head(self, out)

    monkeypatch.setattr(StoredReference, "_layer", watched_layer)
    monkeypatch.setattr(StoredReference, "_head", watched_head)
    return stages


def check_against_forward(
    checkpoint: Path, folder: Path, dtype: torch.dtype, tolerance: float
) -> StoredReference:
    """Everything a stored reference holds against one pass of the reference in `dtype`."""
    config = ModelConfig.from_folder(checkpoint)
    windows = some_windows(config.vocab_size)
    seen: dict[tuple[str, int], Tensor] = {}
    largest: dict[tuple[str, int], float] = {}

    def keep(name: str, layer: int, tensor: Tensor) -> None:
        seen[name, layer] = tensor
        largest[name, layer] = max(largest.get((name, layer), 0), float(tensor.abs().max()))

    tokens = torch.from_numpy(np.stack(windows)).long()
    with torch.no_grad():
        logits = forward(config, CheckpointWeights(checkpoint, dtype), tokens, keep)
    found = stored(checkpoint, folder, windows)
    found.run()

    def same(actual: np.ndarray, expected: Tensor) -> None:
        assert actual.dtype == expected.numpy().dtype
        np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=tolerance)

    scored = slice(33 // 2, 32)
    for window in range(3):
        same(found.logits(window), logits[window, scored])
        for layer in range(config.num_hidden_layers):
            for name in ("ffn_norm", "l_out"):
                same(found.state(name, layer, window), seen[name, layer][window])
            if config.is_moe(layer):
                same(found.scores(layer, window), seen["ffn_moe_probs_biased", layer][window])
    largest["result_norm", -1] = float(seen["result_norm", -1][:, scored].abs().max())
    names = {name for name, _ in found.maxima}
    assert found.maxima == {
        key: pytest.approx(largest[key], rel=tolerance) for key in largest if key[0] in names
    }
    dense = {"ffn_swiglu"} if config.first_k_dense_replace or config.moe_layer_freq > 1 else set()
    shared = {"ffn_shexp_swiglu"} if config.n_shared_experts else set()
    entering = {"attn_norm", "kqv_out", "ffn_norm", "ffn_moe_swiglu", "result_norm"}
    assert names == entering | dense | shared
    return found


def test_equals_the_reference_on_the_pocket_checkpoint(tmp_path: Path) -> None:
    found = check_against_forward(POCKET, tmp_path / "cache", torch.float64, 1e-12)
    assert (found.dtype, found.cached) == ("float64", False)
    assert 0 < found.seconds < 600
    assert 50e6 < found.peak_rss < 50e9


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"experts_shared_frequency": 4, "pre_gate": False},
        {"first_k_dense_replace": 0, "n_group": 4, "topk_group": 2},
        {"tie_word_embeddings": True, "n_shared_experts": 0},
        {"first_k_dense_replace": 2, "moe_layer_freq": 2, "experts_shared_frequency": 2},
        *(random_case(seed).changes for seed in range(4)),
    ],
    ids=str,
)
def test_equals_the_reference_window_by_window(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of one window: what every odd configuration keeps does not depend on the others."""
    monkeypatch.setattr(reference_store, "_WORKING_BYTES", 1)
    make_checkpoint(BASE | changes, tmp_path / "checkpoint", shard_bytes=300_000)
    check_against_forward(tmp_path / "checkpoint", tmp_path / "cache", torch.float64, 1e-12)


def test_large_models_run_in_float32(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_store, "DOUBLE_LIMIT", 1000)
    found = check_against_forward(small, tmp_path / "cache", torch.float32, 1e-5)
    assert found.dtype == "float32"
    monkeypatch.setattr(reference_store, "DOUBLE_LIMIT", 10**9)
    double = stored(small, tmp_path / "double")
    double.run()
    error = found.logits(0) - double.logits(0)
    assert 0 < np.square(error).mean() / np.square(double.logits(0)).mean() < 1e-11


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity import reference_store

checkpoint, folder, stage, half = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
save = reference_store._save

def die(out, name, batch, tensor):
    if out.name.startswith(stage):
        if half:
            save(out, name, batch, tensor)
            os.truncate(out / f"{name}-0.npy", 200)
        os.kill(os.getpid(), signal.SIGKILL)
    save(out, name, batch, tensor)

reference_store._save = die
windows = list(np.random.default_rng(0).integers(0, 300, (3, 33), dtype=np.int32))
config = ModelConfig.from_folder(checkpoint)
reference_store.StoredReference(config, checkpoint, windows, folder, "weights", print).run()
"""


@pytest.mark.parametrize(
    ("stage", "half"),
    [
        pytest.param("layer-00", "", marks=SLOW),
        ("layer-03", "half"),
        pytest.param("head", "", marks=SLOW),
    ],
)
def test_a_killed_run_goes_on(
    stage: str, half: str, small: Path, tmp_path: Path, computed: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    stored(small, whole).run()
    assert computed == STAGES
    command = [sys.executable, "-c", KILLED, str(small), str(resumed), stage, half]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    left = sorted(path.name for path in resumed.iterdir())
    assert left == sorted(
        [*STAGES[: STAGES.index(stage)], stage + ".partial", "lock", "manifest.json"]
    )
    assert len(list((resumed / (stage + ".partial")).iterdir())) == (3 if half else 0)
    computed.clear()
    after = stored(small, resumed)
    after.run()
    assert computed == STAGES[STAGES.index(stage) :]
    assert not after.cached
    assert contents(resumed) == contents(whole)
    assert not list(resumed.glob("*.partial"))
    assert after.maxima == stored_again(small, whole).maxima


def stored_again(checkpoint: Path, folder: Path) -> StoredReference:
    found = stored(checkpoint, folder)
    found.run()
    assert found.cached
    return found


def test_a_cached_run_reads_no_weights(
    small: Path, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = stored(small, tmp_path / "cache")
    first.run()
    before = contents(tmp_path / "cache")
    computed.clear()

    def refuse(self: CheckpointWeights, name: str) -> Tensor:
        raise AssertionError(name)

    monkeypatch.setattr(CheckpointWeights, "__getitem__", refuse)
    again = stored_again(small, tmp_path / "cache")
    assert computed == []
    assert contents(tmp_path / "cache") == before
    assert again.seconds == first.seconds > 0
    assert (again.maxima, again.peak_rss) == (first.maxima, first.peak_rss)


@pytest.mark.parametrize(
    ("stage", "file"),
    [("layer-02", "l_out-1.npy"), ("layer-04", "record.json"), ("head", "logits-0.npy")],
)
def test_a_damaged_file_is_computed_anew(
    stage: str, file: str, small: Path, tmp_path: Path, computed: list[str]
) -> None:
    cache = tmp_path / "cache"
    stored(small, cache).run()
    before = contents(cache)
    computed.clear()
    os.truncate(cache / stage / file, (cache / stage / file).stat().st_size - 1)
    said: list[str] = []
    stored(small, cache, say=said.append).run()
    assert computed == [stage]
    assert any(f"{stage} was damaged" in line for line in said)
    assert contents(cache) == before
    (cache / stage / file).unlink()
    stored(small, cache).run()
    assert contents(cache) == before


def test_a_cache_of_something_else_is_refused(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    stored(small, cache).run()
    before = contents(cache)
    windows = some_windows(300)
    keys = [cache_key(ModelConfig.from_folder(small), small, windows, "weights")]

    def refused(match: str, **changes: Any) -> None:
        with pytest.raises(MegrezError, match=match) as caught:
            stored(small, cache, **changes)
        assert caught.value.exit_code == 2
        assert "remove the folder or choose another" in str(caught.value)
        assert contents(cache) == before

    refused(r"cache of other weights \('weights', here 'others'\); ", weights="others")
    refused(r"cache of other text \('\w{16}', here '\w{16}'\); ", windows=windows[:2])
    shorter = [window[:20] for window in windows]
    refused(r"cache of other context \(33, here 20\), other text", windows=shorter)
    with monkeypatch.context() as changed:
        changed.setattr(reference_store, "DOUBLE_LIMIT", 1)
        refused(r"cache of other dtype \('float64', here 'float32'\); ")
        keys.append(cache_key(ModelConfig.from_folder(small), small, windows, "weights"))
    with monkeypatch.context() as changed:
        (tmp_path / "other.py").write_text("# another version of the code")
        changed.setattr(reference, "__file__", str(tmp_path / "other.py"))
        refused(r"cache of other code \('\w{16}', here '\w{16}'\); ")
        keys.append(cache_key(ModelConfig.from_folder(small), small, windows, "weights"))
    raw = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(raw | {"rope_theta": 5000.0}))
    refused(r"cache of other configuration")
    keys.append(cache_key(ModelConfig.from_folder(small), small, windows, "weights"))
    assert len(set(keys)) == 4


def test_a_folder_of_something_else_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(OutputError, match=r"full: holds files and no manifest\.json"):
        stored(small, tmp_path / "full")
    with pytest.raises(OutputError, match=r"thesis\.txt: no folder to keep a reference"):
        stored(small, tmp_path / "full" / "thesis.txt")
    for text in ("{", "[]", "\udcff"):
        (tmp_path / "damaged").mkdir(exist_ok=True)
        (tmp_path / "damaged" / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(OutputError, match=r"manifest\.json: damaged"):
            stored(small, tmp_path / "damaged")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    stored(small, tmp_path / "empty").run()


def test_a_full_disk_is_reported_and_no_loss(
    small: Path, tmp_path: Path, computed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, array: np.ndarray) -> None:
        assert torch.get_num_threads() == 1
        if "layer-02" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        np_save(file, array)

    np_save = np.save
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(reference_store, "available_cpus", lambda: 1)
    with monkeypatch.context() as changed:
        changed.setattr(np, "save", full)
        with pytest.raises(OutputError, match="cannot be kept: No space left on device"):
            stored(small, tmp_path / "cache").run()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    computed.clear()
    stored(small, tmp_path / "cache").run()
    assert computed == STAGES[2:]


def test_a_missing_tensor_is_named(small: Path, tmp_path: Path) -> None:
    raw = CONFIG | {"experts_shared_frequency": 1}
    (small / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"tensors model\.layers\.2\.mlp\.experts\.\d"):
        stored(small, tmp_path / "cache").run()


def test_two_runs_do_not_compute_the_same(small: Path, tmp_path: Path, computed: list[str]) -> None:
    cache = tmp_path / "cache"
    stored(small, cache).run()
    (cache / "head" / "record.json").unlink()
    computed.clear()
    waits, said = threading.Event(), []

    def say(line: str) -> None:
        said.append(line)
        waits.set()

    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=stored(small, cache, say=say).run)
        other.start()
        assert waits.wait(60)
        assert "waiting for another run" in said[0]
        assert computed == []
    other.join(60)
    assert computed == ["head"]


@pytest.mark.parametrize("lengths", [(), (2,), (8, 9)])
def test_windows_of_one_length(lengths: tuple[int, ...], small: Path, tmp_path: Path) -> None:
    windows = [np.zeros(length, np.int32) for length in lengths]
    config = ModelConfig.from_folder(small)
    with pytest.raises(ValueError, match="windows of one length"):
        StoredReference(config, small, windows, tmp_path / "cache", "weights", print)


@pytest.mark.slow
def test_memory_is_one_pool(tmp_path: Path) -> None:
    """Six pools of 50 MB and 50 MB of embeddings are read; no two may be resident at a time."""
    wide = CONFIG | {
        "experts_shared_frequency": 1,
        "hidden_size": 512,
        "moe_intermediate_size": 512,
        "n_routed_experts": 32,
        "num_hidden_layers": 7,
    }
    make_checkpoint(wide, tmp_path / "wide")
    assert (tmp_path / "wide" / "model.safetensors").stat().st_size > 300e6
    code = (
        "import sys, pathlib, numpy as np\n"
        "from megrez_gguf.checkpoint.config import ModelConfig\n"
        "from megrez_parity import reference_store\n"
        "before, checkpoint = reference_store._peak_rss(), pathlib.Path(sys.argv[1])\n"
        "windows = list(np.random.default_rng(0).integers(0, 300, (3, 33), dtype=np.int32))\n"
        "config = ModelConfig.from_folder(checkpoint)\n"
        "found = reference_store.StoredReference(config, checkpoint, windows,\n"
        "                               pathlib.Path(sys.argv[2]), '', lambda line: None)\n"
        "found.run()\n"
        "print(found.peak_rss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "wide"), str(tmp_path / "cache")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 150e6
