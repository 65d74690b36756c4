"""Experts that stay in the file give the same results, bit for bit, or none."""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as C
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from megrez_gguf import convert
from megrez_gguf.machine import resident_memory
from megrez_llama import ggml
from megrez_llama.expert_store import CACHE_KEY
from support.configurations import FOR_K_QUANTS
from support.gguf_edit import STRING, U32, Gguf, with_padded_rows
from support.llama import Context, LlamaError, Model, Row, opened
from support.marks import loop_takes
from support.samples import TOKENS, Sample

EXPERTS = 8  # in a pool of FOR_K_QUANTS; 3 a token


class Stats(ctypes.Structure):
    names = (
        *("hits", "misses", "wasted", "bytes_read", "reads", "wait_us", "settle_us"),
        *("n_slots", "slot_bytes", "n_experts"),
    )
    _fields_ = [(name, ctypes.c_uint64) for name in names]


def stats(model: Model) -> Stats | None:
    found = Stats()
    function = C.llama_cpp._lib.llama_model_expert_store_stats
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_bool
    return found if function(model.handle, ctypes.byref(found)) else None


def overrides(**values: int | bool | float) -> Any:
    """Key-value overrides; `cache` is the expert cache, all others keys below it."""
    array = (C.llama_model_kv_override * (len(values) + 1))()
    for entry, (name, value) in zip(array, values.items(), strict=False):
        entry.key = (CACHE_KEY if name == "cache" else f"{CACHE_KEY}.{name}").encode()
        if isinstance(value, bool):
            entry.tag, entry.value.val_bool = C.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, float):
            entry.tag, entry.value.val_f64 = C.LLAMA_KV_OVERRIDE_TYPE_FLOAT, value
        else:
            entry.tag, entry.value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, value
    return array


def slot_bytes(path: Path) -> int:
    with Model(path, kv_overrides=overrides(cache=1 << 40)) as model:
        found = stats(model)
        assert found is not None
        return int(found.slot_bytes)


@contextmanager
def cached(
    path: Path, slots: int, n_ubatch: int = 256, n_seq_max: int = 2, **keys: Any
) -> Iterator[Context]:
    """A context of `path` with memory for `slots` experts."""
    params = overrides(cache=slots * slot_bytes(path), **keys)
    with (
        Model(path, kv_overrides=params) as model,
        Context(model, n_ubatch=n_ubatch, n_seq_max=n_seq_max) as context,
    ):
        yield context


def everything(context: Context) -> np.ndarray[Any, Any]:
    """A prompt in one batch, some tokens one by one, several sequences at once, a few outputs."""
    C.llama_memory_clear(context.memory, True)
    half = len(TOKENS) // 2
    parts = [context.run(TOKENS[:half])]
    parts += [context.run([t], half + i) for i, t in enumerate(TOKENS[half:])]
    C.llama_memory_clear(context.memory, True)
    mixed: list[Row] = [(t, i, (i % 2,), i % 5 == 0) for i, t in enumerate(TOKENS)]
    mixed = [(t, at // 2, sequences, wanted) for t, at, sequences, wanted in mixed]
    parts.append(np.stack(list(context.rows(mixed).values())))
    return np.concatenate(parts)


def plain(path: Path, n_ubatch: int = 256) -> np.ndarray[Any, Any]:
    with Model(path) as model, Context(model, n_ubatch=n_ubatch, n_seq_max=2) as context:
        assert stats(model) is None
        return everything(context)


def store(path: Path, slots: int, n_ubatch: int = 256, **keys: Any) -> np.ndarray[Any, Any]:
    with cached(path, slots, n_ubatch, **keys) as context:
        result = everything(context)
        found = stats(context.model)
    assert found is not None
    assert found.n_slots == min(slots, found.n_experts)
    assert found.misses >= min(slots, found.n_experts)
    assert found.wasted == 0
    return result


SHAPES: dict[str, dict[str, Any]] = {
    "as published": {},
    "no pre-gate": {"pre_gate": False},
    "a pool a layer": {"experts_shared_frequency": 1},
    "one pool": {"experts_shared_frequency": 9},
    "groups of experts": {"n_group": 4, "topk_group": 2},
    "no shared expert": {"n_shared_experts": 0},
    "every other layer dense": {"moe_layer_freq": 2, "first_k_dense_replace": 2},
    "one expert a token": {"num_experts_per_tok": 1},
    "all experts a token": {"num_experts_per_tok": EXPERTS},
    "three dense layers": {"first_k_dense_replace": 3},
}


IN_LOOP = {"as published", "no pre-gate", "a pool a layer"}


@pytest.mark.parametrize("shape", loop_takes(IN_LOOP.__contains__, SHAPES))
@pytest.mark.parametrize("outtype", loop_takes("f32".__eq__, ["f32", "q4_0"]))
def test_bit_identical(sample: Callable[..., Sample], shape: str, outtype: str) -> None:
    path = sample(outtype, **SHAPES[shape]).gguf
    expected = plain(path)
    for slots in (EXPERTS, EXPERTS + 3, 2 * EXPERTS, 1000):
        np.testing.assert_array_equal(store(path, slots), expected)
    np.testing.assert_array_equal(store(path, EXPERTS, direct=False), expected)
    np.testing.assert_array_equal(store(path, EXPERTS, threads=1), expected)


def test_rows_with_zeros_after_them(tiny: Sample, tmp_path: Path) -> None:
    path = with_padded_rows(tiny.gguf, tmp_path / "wide.gguf", 256, GGMLQuantizationType.Q8_0)
    assert slot_bytes(path) > slot_bytes(tiny.gguf) // 8
    np.testing.assert_array_equal(store(path, EXPERTS, 1), plain(path, 1))
    other = with_padded_rows(tiny.gguf, tmp_path / "other.gguf", 128)
    with pytest.raises(LlamaError, match=r"ffn_down_exps.*wrong shape.*96.*128"):
        store(other, EXPERTS)


@pytest.mark.parametrize("shape", ["as published", "no pre-gate", "groups of experts"])
def test_a_margin_of_nothing_is_exact(sample: Callable[..., Sample], shape: str) -> None:
    path = sample(**SHAPES[shape]).gguf
    np.testing.assert_array_equal(store(path, EXPERTS, margin=0.0), plain(path))


@pytest.mark.parametrize("shape", ["as published", "no pre-gate", "groups of experts"])
def test_a_margin_spares_reads_of_single_tokens_only(
    sample: Callable[..., Sample], shape: str
) -> None:
    path = sample(**SHAPES[shape]).gguf
    half = len(TOKENS) // 2
    found = {}
    for margin in (0.0, 10.0):
        with cached(path, EXPERTS, margin=margin) as context:
            prompt = context.run(TOKENS[:half])
            before = stats(context.model)
            answer = np.stack([context.run([t], half + i)[0] for i, t in enumerate(TOKENS[half:])])
            after = stats(context.model)
        assert before is not None
        assert after is not None
        assert after.wasted == 0
        found[margin] = prompt, answer, after.misses - before.misses
    np.testing.assert_array_equal(found[0.0][0], found[10.0][0])
    assert not np.array_equal(found[0.0][1], found[10.0][1])
    assert found[10.0][2] < found[0.0][2] / 2


@pytest.mark.parametrize(
    ("margin", "message"),
    [
        (1, r"expert_cache\.margin' must be a number"),
        (-0.1, r"expert_cache\.margin' is -0\.1, expected 0 or more"),
        (float("nan"), r"expert_cache\.margin' is -?nan"),
        (float("inf"), r"expert_cache\.margin' is inf"),
    ],
)
def test_margins_that_are_none(tiny: Sample, margin: float, message: str) -> None:
    with pytest.raises(LlamaError, match=message):
        Model(tiny.gguf, kv_overrides=overrides(cache=1 << 40, margin=margin))


@pytest.mark.parametrize("pre_gate", [True, False])
def test_experts_are_read_a_layer_early(sample: Callable[..., Sample], pre_gate: bool) -> None:
    """When layer 3 is done, those of layer 4, the first of its pool, are there or on their way."""
    path = sample(pre_gate=pre_gate).gguf
    ahead: list[int] = []

    @C.ggml_backend_sched_eval_callback
    def watch(tensor: int, ask: bool, _: Any) -> bool:
        if ask:
            return bool(ggml.Tensor.from_address(tensor).name == b"ffn_moe_out-3")
        for _ in range(200):
            found = stats(model)
            assert found is not None
            ahead[:] = [found.bytes_read - found.misses * expert]
            if ahead[0]:
                break
            time.sleep(0.001)
        return True

    with Model(path, kv_overrides=overrides(cache=1 << 40)) as model:
        expert = 3 * 4 * FOR_K_QUANTS["hidden_size"] * FOR_K_QUANTS["moe_intermediate_size"]
        with Context(model, cb_eval=watch) as context:
            context.run(TOKENS[:1])
    assert (ahead[0] > 0) is pre_gate


def test_the_least_memory_a_token_needs(tiny: Sample) -> None:
    with opened(tiny.gguf, n_ubatch=1) as context:
        expected = context.run(TOKENS)
    for slots in (3, 4, 5, 6):
        with cached(tiny.gguf, slots, n_ubatch=1, n_seq_max=1) as context:
            np.testing.assert_array_equal(context.run(TOKENS), expected)
            found = stats(context.model)
            assert found is not None
            assert found.wasted == 0


def test_split_files(sample: Callable[..., Sample], tiny: Sample, tmp_path: Path) -> None:
    out = tmp_path / "split.gguf"
    result = convert(tiny.checkpoint, out, outtype="f32", split_max_size=1_500_000)
    assert len(list(tmp_path.iterdir())) > 3
    np.testing.assert_array_equal(store(Path(result.path), EXPERTS + 1), plain(tiny.gguf))


def test_files_of_others_at_any_alignment(tiny: Sample, tmp_path: Path) -> None:
    # what comes before the weights moves them
    expected = plain(tiny.gguf)
    for pad in (1, 40, 1000):
        file = Gguf.read(tiny.gguf)
        file.values["general.description"] = STRING, "x" * pad
        path = file.write(tmp_path / f"{pad}.gguf")
        np.testing.assert_array_equal(store(path, EXPERTS + 1), expected)


def test_too_little_memory_is_refused_with_the_least(tiny: Sample) -> None:
    size = slot_bytes(tiny.gguf)
    least = rf"3 are used at once: at least {3 * size} bytes are needed"
    for budget in (0, 1, 2 * size, 3 * size - 1):
        with pytest.raises(LlamaError, match=least):
            Model(tiny.gguf, kv_overrides=overrides(cache=budget))
    with Model(tiny.gguf, kv_overrides=overrides(cache=7 * size)) as model:
        message = rf"can use 8 experts at once.* holds 7: make it {8 * size} bytes, or n_ubatch 2"
        with pytest.raises(LlamaError, match=message):
            Context(model)
        with Context(model, n_ubatch=2) as context:
            context.run(TOKENS)


def test_a_wrong_override_is_refused(tiny: Sample) -> None:
    array = overrides(cache=1 << 30, direct=True)
    array[1].key = f"{CACHE_KEY}.threads".encode()
    with pytest.raises(LlamaError, match=r"expert_cache\.threads' must be an integer"):
        Model(tiny.gguf, kv_overrides=array)
    with pytest.raises(LlamaError, match=r"expert_cache' is negative"):
        Model(tiny.gguf, kv_overrides=overrides(cache=-1))


@pytest.fixture
def copy_of_tiny(tiny: Sample, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny.gguf, tmp_path / "copy.gguf"))


def test_a_file_that_changes_fails_the_decode(copy_of_tiny: Path) -> None:
    with cached(copy_of_tiny, EXPERTS) as context:
        expected = context.run(TOKENS[:4])
        time.sleep(0.02)  # beyond the resolution of time stamps
        with copy_of_tiny.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\0")
        for _ in range(2):
            with pytest.raises(LlamaError, match=r"-3: .*file has changed since it was loaded"):
                context.run(TOKENS, 4)
        # what failed has left nothing behind
        assert C.llama_memory_seq_pos_max(context.memory, 0) == 3
        assert np.isfinite(expected).all()


def test_a_file_that_is_cut_fails_the_decode(copy_of_tiny: Path) -> None:
    with cached(copy_of_tiny, EXPERTS) as context:
        os.truncate(copy_of_tiny, copy_of_tiny.stat().st_size // 2)
        with pytest.raises(LlamaError, match=r"-3: .*file has changed since it was loaded"):
            context.run(TOKENS)


def test_a_file_that_is_replaced_or_removed_is_still_read(
    copy_of_tiny: Path, tmp_path: Path
) -> None:
    expected = plain(copy_of_tiny)
    with cached(copy_of_tiny, EXPERTS) as context:
        other = tmp_path / "other.gguf"
        other.write_bytes(b"something else")
        other.replace(copy_of_tiny)
        copy_of_tiny.unlink()
        np.testing.assert_array_equal(everything(context), expected)


def test_cancelling_leaves_nothing_behind(tiny: Sample) -> None:
    calls = left = 0

    @C.ggml_abort_callback
    def abort(_: Any) -> bool:
        nonlocal calls
        calls += 1
        return calls > left > 0

    expected = plain(tiny.gguf)
    with cached(tiny.gguf, EXPERTS) as context:
        C.llama_set_abort_callback(context.handle, abort, None)
        context.run(TOKENS[:8])
        for last in range(1, calls, 5):
            calls, left = 0, last
            with pytest.raises(LlamaError, match="llama_decode: 2"):
                context.run(TOKENS[:8], 8)
        left = 0
        np.testing.assert_array_equal(everything(context), expected)


def test_contexts_of_one_model_and_of_two_at_the_same_time(tiny: Sample) -> None:
    expected = plain(tiny.gguf)
    params = overrides(cache=(EXPERTS + 2) * slot_bytes(tiny.gguf))
    failures: list[BaseException] = []

    def work(context: Context) -> None:
        try:
            for _ in range(5):
                np.testing.assert_array_equal(everything(context), expected)
        except BaseException as e:
            failures.append(e)

    with (
        Model(tiny.gguf, kv_overrides=params) as one,
        Model(tiny.gguf, kv_overrides=params) as two,
        Context(one, n_seq_max=2, n_threads=1, n_threads_batch=1) as a,
        Context(one, n_seq_max=2) as b,
        Context(two, n_seq_max=2) as c,
    ):
        threads = [threading.Thread(target=work, args=(context,)) for context in (a, b, c)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def test_loading_and_unloading_leaks_nothing(tiny: Sample) -> None:
    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    params = overrides(cache=64 * slot_bytes(tiny.gguf))

    def once() -> None:
        with Model(tiny.gguf, kv_overrides=params) as model:
            for _ in range(3):
                with Context(model) as context:
                    context.run(TOKENS[:4])

    for _ in range(5):
        once()
    before, memory = held(), resident_memory()
    for _ in range(30):
        once()
    assert held() == before
    # 30 leaked stores would be 30 times their experts
    after = resident_memory()
    assert memory is not None
    assert after is not None
    assert after - memory < 10 * slot_bytes(tiny.gguf)


def test_what_a_file_says_does_not_turn_the_store_on(tiny: Sample, tmp_path: Path) -> None:
    file = Gguf.read(tiny.gguf)
    file.values[CACHE_KEY] = U32, 1 << 20
    with Model(file.write(tmp_path / "asks.gguf")) as model:
        assert stats(model) is None
