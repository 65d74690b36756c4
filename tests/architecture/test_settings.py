"""Settings of a run that must not change what the model says."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import llama_cpp as C
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from support.llama import Context, Model, logits, nmse, opened, said
from support.samples import TOKENS, Sample

EXACT = 1e-9
CLOSE = 1e-5  # flash attention and an F16 cache narrow to F16 on the way
FLASH = {"flash_attn_type": C.LLAMA_FLASH_ATTN_TYPE_ENABLED}


@pytest.fixture(scope="module")
def expected(tiny: Sample) -> np.ndarray:
    return logits(tiny.gguf, TOKENS)


def test_reference(tiny: Sample, expected: np.ndarray) -> None:
    assert nmse(tiny.reference(), expected) < EXACT


def test_memory_map_makes_no_difference(tiny: Sample) -> None:
    found = []
    for mode in (C.LLAMA_LOAD_MODE_NONE, C.LLAMA_LOAD_MODE_MMAP, C.LLAMA_LOAD_MODE_DIRECT_IO):
        with Model(tiny.gguf, load_mode=mode) as model, Context(model) as context:
            found.append(context.run(TOKENS))
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_gpu_layers_make_no_difference(tiny: Sample, expected: np.ndarray) -> None:
    with Model(tiny.gguf, n_gpu_layers=99) as model, Context(model) as context:
        assert nmse(expected, context.run(TOKENS)) < EXACT


def test_model_size_is_the_files_tensors(tiny: Sample) -> None:
    """The pools are stored once, though several layers use each."""
    from support.gguf_edit import Gguf

    stored = sum(len(t.data) for t in Gguf.read(tiny.gguf).tensors.values())
    with Model(tiny.gguf) as model:
        assert C.llama_model_size(model.handle) == stored


@pytest.mark.parametrize(
    ("key", "value", "flash", "limit"),
    [
        ("F32", "F32", True, CLOSE),
        ("F16", "F16", False, CLOSE),
        ("F16", "F16", True, CLOSE),
        ("BF16", "BF16", True, 5e-3),
        ("Q8_0", "F16", False, 5e-3),
        ("Q8_0", "Q8_0", True, 5e-3),
    ],
)
def test_cache_types(
    tiny: Sample, expected: np.ndarray, key: str, value: str, flash: bool, limit: float
) -> None:
    params = {"type_k": GGMLQuantizationType[key], "type_v": GGMLQuantizationType[value]}
    assert nmse(expected, logits(tiny.gguf, TOKENS, **params, **(FLASH if flash else {}))) < limit


@pytest.mark.parametrize("size", [1, 3, 17])
@pytest.mark.parametrize("flash", [False, True])
def test_micro_batches(tiny: Sample, expected: np.ndarray, size: int, flash: bool) -> None:
    found = logits(tiny.gguf, TOKENS, n_ubatch=size, **(FLASH if flash else {}))
    assert nmse(expected, found) < (CLOSE if flash else EXACT)


def test_token_by_token(tiny: Sample, expected: np.ndarray) -> None:
    with opened(tiny.gguf) as context:
        found = [context.run([token], start=i)[0] for i, token in enumerate(TOKENS)]
    assert nmse(expected, found) < EXACT


@pytest.mark.parametrize("unified", [False, True])
def test_sequences_in_one_batch(tiny: Sample, unified: bool) -> None:
    """Interleaved, of unequal lengths, one forked from another's beginning."""
    texts = [TOKENS[:11], TOKENS[11:30], TOKENS[30:48], TOKENS[:5] + TOKENS[20:30]]
    params = {"n_seq_max": 4, "kv_unified": unified, "n_ubatch": 7}
    with opened(tiny.gguf, n_ctx=512, **params) as context:
        rows = [
            (text[i], i, (s,), True)
            for i in range(max(map(len, texts)))
            for s, text in enumerate(texts)
            if i < len(text)
        ]
        got = context.rows(rows)
        for s, text in enumerate(texts):
            mine = [got[i] for i, row in enumerate(rows) if row[2] == (s,)]
            assert nmse(logits(tiny.gguf, text), mine) < EXACT, s


def test_a_prefix_shared_by_two_sequences(tiny: Sample) -> None:
    common, ends = TOKENS[:9], [TOKENS[9:15], TOKENS[20:27]]
    with opened(tiny.gguf, n_seq_max=2, kv_unified=True) as context:
        context.rows([(t, i, (0, 1), False) for i, t in enumerate(common)])
        for sequence, end in enumerate(ends):
            found = context.run(end, start=len(common), sequence=sequence)
            assert nmse(logits(tiny.gguf, common + end)[len(common) :], found) < EXACT


@pytest.mark.parametrize("fields", [{}, {"first_k_dense_replace": 5}, {"pre_gate": False}])
def test_only_some_rows_wanted(sample: Callable[..., Sample], fields: dict[str, object]) -> None:
    """The last layer computes the wanted rows only, and its router must read the same rows."""
    model = sample(**fields)
    expected = logits(model.gguf, TOKENS)
    for wanted in ([47], [0], [3, 4, 40], [0, 47], list(range(0, 48, 5))):
        for size in (256, 16):
            with opened(model.gguf, n_ubatch=size) as context:
                got = context.rows((t, i, (0,), i in wanted) for i, t in enumerate(TOKENS))
            for i in wanted:
                assert nmse(expected[i], got[i]) < EXACT, (wanted, size, i)


def test_no_row_wanted(sample: Callable[..., Sample]) -> None:
    for fields in ({}, {"n_group": 4, "topk_group": 2}, {"num_experts_per_tok": 1}):
        model = sample(**fields)
        expected = logits(model.gguf, TOKENS)
        with opened(model.gguf) as context:
            assert context.rows((t, i, (0,), False) for i, t in enumerate(TOKENS[:-1])) == {}
            assert nmse(expected[-1:], context.run(TOKENS[-1:], start=47)) < EXACT


def test_embeddings_are_the_normed_state(tiny: Sample, expected: np.ndarray) -> None:
    with opened(tiny.gguf, embeddings=True) as context:
        context.run(TOKENS)
        states = np.stack([context.embedding(i) for i in range(len(TOKENS))])
    head = tiny.weights["lm_head.weight"].numpy()
    assert nmse(tiny.reference(), states @ head.T) < EXACT


def test_pooled_embeddings(tiny: Sample) -> None:
    with opened(tiny.gguf, embeddings=True) as context:
        context.run(TOKENS)
        states = np.stack([context.embedding(i) for i in range(len(TOKENS))])
    with opened(
        tiny.gguf, embeddings=True, pooling_type=C.LLAMA_POOLING_TYPE_MEAN, n_ubatch=64
    ) as context:
        context.rows((t, i, (0,), False) for i, t in enumerate(TOKENS))
        pooled = C.llama_get_embeddings_seq(context.handle, 0)
        found = np.ctypeslib.as_array(pooled, (context.model.n_embd,)).copy()
    assert nmse(states.mean(0), found) < EXACT


def test_states_instead_of_tokens(tiny: Sample, expected: np.ndarray) -> None:
    table = tiny.weights["model.embed_tokens.weight"].numpy().astype(np.float32)
    with opened(tiny.gguf) as context:
        rows = [(0, i, (0,), True) for i in range(len(TOKENS))]
        found = list(context.rows(rows, embd=table[TOKENS]).values())
    assert nmse(expected, found) < EXACT


def test_warm_up_runs_every_expert_and_changes_nothing(
    sample: Callable[..., Sample], expected: np.ndarray
) -> None:
    for fields in ({}, {"n_group": 4, "topk_group": 2}):
        model = sample(**fields)
        with opened(model.gguf) as context:
            C.llama_set_warmup(context.handle, True)
            assert np.isfinite(context.run(TOKENS[:2])).all()
            C.llama_set_warmup(context.handle, False)
            C.llama_memory_clear(context.memory, True)
            assert nmse(model.reference(), context.run(TOKENS)) < EXACT


def test_whole_state_moves_to_another_context(tiny: Sample, expected: np.ndarray) -> None:
    with Model(tiny.gguf) as model:
        with Context(model) as context:
            context.run(TOKENS[:30])
            size = C.llama_state_get_size(context.handle)
            state = (ctypes.c_uint8 * size)()
            assert C.llama_state_get_data(context.handle, state, size) == size
        with Context(model) as context:
            assert C.llama_state_set_data(context.handle, state, size) == size
            assert nmse(expected[30:], context.run(TOKENS[30:], start=30)) < EXACT


def test_one_sequence_moves_to_another_context(tiny: Sample, expected: np.ndarray) -> None:
    with Model(tiny.gguf) as model:
        with Context(model, n_seq_max=2) as context:
            context.run(TOKENS[20:40], sequence=0)
            context.run(TOKENS[:30], sequence=1)
            size = C.llama_state_seq_get_size(context.handle, 1)
            state = (ctypes.c_uint8 * size)()
            assert C.llama_state_seq_get_data(context.handle, state, size, 1) == size
        with Context(model, n_seq_max=2) as context:
            assert C.llama_state_seq_set_data(context.handle, state, size, 0) == size, said()
            assert nmse(expected[30:], context.run(TOKENS[30:], start=30)) < EXACT


def test_state_goes_through_a_file(tiny: Sample, expected: np.ndarray, tmp_path: Path) -> None:
    name = str(tmp_path / "state").encode()
    text = (C.llama_token * 30)(*TOKENS[:30])
    back, count = (C.llama_token * 64)(), ctypes.c_size_t()
    with Model(tiny.gguf) as model:
        with Context(model) as context:
            context.run(TOKENS[:30])
            assert C.llama_state_save_file(context.handle, name, text, 30)
        with Context(model) as context:
            assert C.llama_state_load_file(context.handle, name, back, 64, ctypes.byref(count))
            assert back[: count.value] == TOKENS[:30]
            assert nmse(expected[30:], context.run(TOKENS[30:], start=30)) < EXACT


def test_rolled_back(tiny: Sample, expected: np.ndarray) -> None:
    with opened(tiny.gguf) as context:
        context.run(TOKENS[:20] + TOKENS[:10])
        assert C.llama_memory_seq_rm(context.memory, 0, 20, -1)
        assert nmse(expected[20:], context.run(TOKENS[20:], start=20)) < EXACT


def test_context_shift(sample: Callable[..., Sample]) -> None:
    """What is kept keeps its keys and values, rotated to the new positions.

    In the first layer they depend on nothing but the token, so one layer has a ground truth: the
    text without the removed part. With more, the two orders of shifting must agree.
    """
    one = sample(num_hidden_layers=1, first_k_dense_replace=0)
    for flash in ({}, FLASH):
        with opened(one.gguf, **flash) as context:
            assert C.llama_memory_can_shift(context.memory)
            context.run(TOKENS[:30])
            C.llama_memory_seq_rm(context.memory, 0, 4, 14)
            C.llama_memory_seq_add(context.memory, 0, 14, 30, -10)
            found = context.run(TOKENS[30:], start=20)
        expected = logits(one.gguf, TOKENS[:4] + TOKENS[14:])[20:]
        assert nmse(expected, found) < (CLOSE if flash else EXACT)


def test_shifts_of_a_deep_model_add_up(tiny: Sample) -> None:
    found = []
    for steps in ([-10], [-3, -7], [-20, 10]):
        with opened(tiny.gguf) as context:
            context.run(TOKENS[:30])
            C.llama_memory_seq_rm(context.memory, 0, 0, 20)
            first = 20
            for step in steps:
                C.llama_memory_seq_add(context.memory, 0, first, -1, step)
                first += step
            found.append(context.run(TOKENS[30:], start=20))
    assert nmse(found[0], found[1]) < EXACT
    assert nmse(found[0], found[2]) < EXACT


def test_moved_text_reads_the_same(tiny: Sample, expected: np.ndarray) -> None:
    """Rotary attention sees distances only: a shift of everything changes no later logits."""
    with opened(tiny.gguf) as context:
        context.run(TOKENS[:30])
        C.llama_memory_seq_add(context.memory, 0, 0, -1, 25)
        assert nmse(expected[30:], context.run(TOKENS[30:], start=55)) < EXACT
