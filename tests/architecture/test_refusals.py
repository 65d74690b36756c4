"""Bad files are refused with a reason, and never end the process."""

from __future__ import annotations

import multiprocessing
import random
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Q

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.key_check import RULES
from megrez_gguf.format.model_check import open_checked
from megrez_gguf.format.vocabulary_check import DECIDING
from support.gguf_edit import ARRAY, BOOL, F32, I32, STRING, U32, Gguf, Tensor, floats
from support.llama import LlamaError, logits
from support.samples import Sample

Edit = Callable[[Gguf], Any]


def attempt(path: Path, reader: bool) -> str:
    """What is said of `path`, "" when it runs; the caller's process may die of it.

    As by `megrez_runtime.load`, llama.cpp is asked after our `reader`; or alone.
    """
    try:
        if reader:
            open_checked(path)
    except GGUFError as e:
        return str(e)
    try:
        logits(path, [1, 2, 3], n_ctx=32, n_threads=1, n_threads_batch=1)
    except LlamaError as e:
        return str(e) or "refused without a reason"
    return ""


class Guard:
    """Runs `attempt` in a child that may die; a new one is made when it does."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def attempts(self, paths: list[Path], reader: bool = True) -> list[str]:
        done: list[Future[str]] = []
        for path in paths:
            if self._pool is None:
                context = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(1, context, initializer=_quiet)
            done.append(self._pool.submit(attempt, path, reader))
        results = []
        for path, future in zip(paths, done, strict=True):
            try:
                results.append(future.result(timeout=120))
            except Exception as e:
                self._pool = None
                raise AssertionError(f"{path.name}: the process died: {e!r}") from None
        return results


def _quiet() -> None:
    """No backtrace by a debugger, which takes seconds, before dying."""
    import os
    import resource

    os.environ["GGML_NO_BACKTRACE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(300)


@pytest.fixture(scope="module")
def guard() -> Iterator[Guard]:
    guard = Guard()
    yield guard
    if guard._pool:
        guard._pool.shutdown()


def retyped(name: str, kind: Q) -> Edit:
    def edit(file: Gguf) -> None:
        file.tensors[name] = file.tensors[name].cast(kind)

    return edit


def key(name: str, value: Any, kind: int | None = None) -> Edit:
    return lambda file: file.set(name, value, kind)


def keys(**values: Any) -> Edit:
    def edit(file: Gguf) -> None:
        for name, value in values.items():
            file.set(name, value)

    return edit


def moved(source: str, target: str) -> Edit:
    def edit(file: Gguf) -> None:
        file.tensors[target] = file.tensors.pop(source)

    return edit


def copied(source: str, target: str) -> Edit:
    def edit(file: Gguf) -> None:
        file.tensors[target] = file.tensors[source]

    return edit


def without(*names: str) -> Edit:
    def edit(file: Gguf) -> None:
        for name in names:
            del file.tensors[name]

    return edit


def pool_in_a_dense_layer(file: Gguf) -> None:
    """Every second layer is dense, and so is the one that holds the first pool."""
    file.set("moe_every_n_layers", 2, U32)
    for layer in (1, 3, 5):
        for part in ("shexp.weight", "gate_inp.weight", "probs_b.bias"):
            for name in [n for n in file.tensors if n.startswith(f"blk.{layer}.") and part in n]:
                del file.tensors[name]
        for part in ("gate", "up", "down"):
            copied(f"blk.0.ffn_{part}.weight", f"blk.{layer}.ffn_{part}.weight")(file)


def narrowed(name: str) -> Edit:
    """One row (or element) less."""

    def edit(file: Gguf) -> None:
        array = file.tensors[name].floats()
        file.tensors[name] = floats(array[..., :-1] if array.ndim == 1 else array[..., :-1, :])

    return edit


ROLES = [
    "token_embd.weight",
    "output_norm.weight",
    *[f"blk.2.attn_{x}.weight" for x in ("norm", "q", "k", "v", "output")],
    "blk.2.ffn_norm.weight",
    *[f"blk.0.ffn_{x}.weight" for x in ("gate", "up", "down")],
    "blk.2.ffn_gate_inp.weight",
    *[f"blk.4.ffn_{x}_exps.weight" for x in ("gate", "up", "down")],
    *[f"blk.3.ffn_{x}_shexp.weight" for x in ("gate", "up", "down")],
]
ROUTER, NORM, BIAS = "blk.2.ffn_gate_inp.weight", "blk.2.ffn_norm.weight", "blk.2.exp_probs_b.bias"

# name -> (what is wrong, what the message must hold)
BAD: dict[str, tuple[Edit, list[str]]] = {
    **{
        f"{kind.name} in {name}": (
            retyped(name, kind),
            [f"'{name}'", "expected f32", f"got {kind.name.lower()}"],
        )
        for name in (ROUTER, NORM, BIAS, "output_norm.weight")
        for kind in (Q.F16, Q.BF16, Q.F64, Q.I32)
    },
    **{
        f"{kind.name} in {name}": (
            retyped(name, kind),
            [f"'{name}'", "wrong type", f"got {kind.name.lower()}"],
        )
        for name in ("blk.1.ffn_up_exps.weight", "token_embd.weight", "blk.0.attn_q.weight")
        for kind in (Q.I32, Q.F64, Q.I8, Q.Q8_K)
    },
    **{f"narrow {name}": (narrowed(name), [name, "expected"]) for name in [*ROLES, BIAS]},
    **{
        f"no {name}": (
            without(name),
            ["ffn_gate_inp", "layers 1, 2, 3, 4, 5", "layers 1, 3, 4, 5"]
            if name == ROUTER
            else ["ffn_gate_exps", "layers 1, 4", "in layers 1"]
            if name == "blk.4.ffn_gate_exps.weight"
            else [name],
        )
        for name in ROLES
    },
    "a pool where it is shared": (
        copied("blk.1.ffn_gate_exps.weight", "blk.2.ffn_gate_exps.weight"),
        ["experts_shared_frequency = 3", "layers 1, 4", "layers 1, 2, 4"],
    ),
    "half a pool where it is shared": (
        copied("blk.1.ffn_up_exps.weight", "blk.2.ffn_up_exps.weight"),
        ["blk.2.ffn_up_exps.weight", "not expected"],
    ),
    "a pool in the wrong layer": (
        moved("blk.4.ffn_gate_exps.weight", "blk.5.ffn_gate_exps.weight"),
        ["layers 1, 4", "layers 1, 5"],
    ),
    "an unknown tensor": (copied(NORM, "blk.2.attn_q_norm.weight"), ["blk.2.attn_q_norm.weight"]),
    "a tensor past the layers": (copied(NORM, "blk.6.ffn_norm.weight"), ["blk.6.ffn_norm.weight"]),
    "no routers": (
        without(*[f"blk.{i}.ffn_gate_inp.weight" for i in range(1, 6)]),
        ["no layer has a router"],
    ),
    "no pools": (
        without("blk.1.ffn_gate_exps.weight", "blk.4.ffn_gate_exps.weight"),
        ["no layer has an expert pool", "ffn_gate_exps"],
    ),
    "period 2": (key("experts_shared_frequency", 2), ["= 2", "layers 1, 3, 5", "layers 1, 4"]),
    "period 0": (key("experts_shared_frequency", 0), ["experts_shared_frequency = 0"]),
    "period 2^32-1": (key("experts_shared_frequency", 2**32 - 1), ["experts_shared_frequency = 4"]),
    "no dense layer": (key("leading_dense_block_count", 0), ["leading_dense_block_count = 0"]),
    "all layers dense": (key("leading_dense_block_count", 6), ["leading_dense_block_count = 6"]),
    "dense beyond int": (key("leading_dense_block_count", 2**32 - 1), ["leading_dense_block_coun"]),
    "freq 2": (key("moe_every_n_layers", 2, U32), ["moe_every_n_layers = 2"]),
    "a pool in a dense layer": (pool_in_a_dense_layer, ["moe_every_n_layers = 2 makes layers 1 "]),
    "9 of 8 experts": (key("expert_used_count", 9), ["n_expert_used_max = 9", "n_expert = 8"]),
    "0 experts used": (key("expert_used_count", 0), ["n_expert_used_max = 0"]),
    "experts used by layer": (
        key("expert_used_count", (U32, [3, 3, 2, 3, 3, 3]), ARRAY),
        ["layer 2", "expert_used_count"],
    ),
    "heads by layer": (
        key("attention.head_count", (U32, [4, 2, 4, 4, 4, 4]), ARRAY),
        ["layer 1", "attention.head_count"],
    ),
    "7 experts": (key("expert_count", 7), ["blk.1.ffn_gate_inp.weight", " 7, got", " 8, "]),
    "2000 experts": (key("expert_count", 2000), ["n_expert = 2000"]),
    "groups do not divide": (key("expert_group_count", 3), ["n_expert_groups = 2"]),
    "groups of one": (key("expert_group_count", 8), ["n_expert_groups = 8"]),
    "5 of 4 groups": (
        keys(expert_group_count=4, expert_group_used_count=5),
        ["n_group_used = 5", "n_expert_groups = 4"],
    ),
    "0 of 4 groups": (
        keys(expert_group_count=4, expert_group_used_count=0),
        ["n_group_used = 0"],
    ),
    "groups too small": (
        keys(expert_group_count=4, expert_group_used_count=1),
        ["expert_group_used_count = 1", "expert_used_count = 3"],
    ),
    "no key heads": (key("attention.head_count_kv", 0), ["attention.head_count_kv = 0"]),
    "3 key heads": (key("attention.head_count_kv", 3), ["head_count = 4", "head_count_kv = 3"]),
    "no heads": (key("attention.head_count", 0), ["attention.head_count = 0"]),
    "5 heads": (key("attention.head_count", 5), ["attention.head_count = 5"]),
    "odd head size": (
        lambda f: (
            [f.set(f"attention.{x}_length", 63) for x in ("key", "value")]
            and f.set("rope.dimension_count", 63)
        ),
        ["rope.dimension_count = 63"],
    ),
    "no head size": (key("attention.key_length", 0), ["key_length = 0"]),
    "wrong head size": (
        lambda f: [f.set(f"attention.{x}_length", 128) for x in ("key", "value")],
        ["blk.0.attn_q.weight", "512", "256"],
    ),
    "key and value sizes differ": (key("attention.value_length", 32), ["64", "32"]),
    "rope beyond the head": (key("rope.dimension_count", 66), ["rope.dimension_count = 66"]),
    "no layers": (key("block_count", 0), ["n_layer_all = 0"]),
    "5 of 6 layers": (key("block_count", 5), ["blk.5.", "not expected"]),
    "7 of 6 layers": (key("block_count", 7), ["layers"]),
    "too many layers": (key("block_count", 2**31), ["n_layer_all = 2147483648", "512"]),
    "softmax after top-k": (key("expert_gating_func", 3), ["expert_gating_func = 3", "expected"]),
    "unknown gating": (key("expert_gating_func", 9), ["expert_gating_func = 9", "expected"]),
    "longrope": (key("rope.scaling.type", "longrope", STRING), ["longrope", "expected"]),
    "unknown rope": (key("rope.scaling.type", "spiral", STRING), ["spiral"]),
    "negative epsilon": (key("attention.layer_norm_rms_epsilon", -1e-3), ["rms_epsilon = -0.001"]),
    "epsilon NaN": (key("attention.layer_norm_rms_epsilon", float("nan")), ["rms_epsilon = nan"]),
    "a string for a number": (
        key("experts_shared_frequency", "3", STRING),
        ["megrez-moe.experts_shared_frequency", "wrong type str", "expected type u32"],
    ),
    "a number for a flag": (key("pre_gate", 1, U32), ["pre_gate", "wrong type u32", "type bool"]),
    "a flag for a number": (key("expert_gating_func", True, BOOL), ["wrong type bool"]),
    "a float for a number": (key("expert_count", 8.0, F32), ["wrong type f32"]),
    "short array": (key("expert_feed_forward_length", (U32, [96, 96]), ARRAY), ["wrong array len"]),
    "wide embeddings": (key("embedding_length", 512), ["token_embd.weight", "512", "256"]),
    "narrow dense": (key("feed_forward_length", 128), ["blk.0.ffn_gate.weight", "128", "160"]),
    "narrow experts": (key("expert_feed_forward_length", 64), ["blk.1.ffn_gate_exps.weight", "64"]),
    "no expert width": (key("expert_feed_forward_length", 0), ["blk.1.ffn_gate_exps.weight"]),
    "narrow shared": (
        key("expert_shared_feed_forward_length", 64),
        ["blk.1.ffn_gate_shexp.weight"],
    ),
    "no shared": (key("expert_shared_feed_forward_length", 0), ["_shexp.weight", "not expected"]),
    "a token too many": (
        lambda f: [
            f.values[f"tokenizer.ggml.{x}"][1][1].append(y)
            for x, y in (("tokens", "zz"), ("token_type", 1))
        ],
        ["token_embd.weight", "385", "384"],
    ),
    "all layers predict": (key("nextn_predict_layers", 6, U32), ["no layer has a router"]),
}


# What only our reader refuses: routers in fewer bits, and models that llama.cpp can run and that
# Megrez2 is not.
RUNS_ALONE = {
    f"F16 in {ROUTER}",
    f"BF16 in {ROUTER}",
    "experts used by layer",
    "groups too small",
    "softmax after top-k",
    "longrope",
}


def words(key: str, change: Callable[[list[Any]], Any]) -> Edit:
    """Change the list in `tokenizer.ggml.KEY`."""
    return lambda file: change(file.values[f"tokenizer.ggml.{key}"][1][1])


def vocabulary(key: str, value: Any, kind: int = U32) -> Edit:
    def edit(file: Gguf) -> None:
        file.values[f"tokenizer.ggml.{key}"] = kind, value

    return edit


def dropped(*names: str) -> Edit:
    def edit(file: Gguf) -> None:
        for name in names:
            file.values.pop(f"tokenizer.ggml.{name}", None)

    return edit


def replaced(place: int, value: Any) -> Callable[[list[Any]], Any]:
    return lambda values: values.__setitem__(place, value)


# name -> (what is wrong with the vocabulary, what the message must hold). Some of it only loses
# text, and llama.cpp alone runs it.
BAD_VOCABULARIES: dict[str, tuple[Edit, str]] = {
    **{
        f"model {name}": (vocabulary("model", name, STRING), f"model is '{name}', expected 'gpt2'")
        for name in (
            *("llama", "bert", "t5", "rwkv", "plamo2", "gemma4", "none", "no_vocab", "test"),
            *("hybriddna", "whitespace", "", "gpt3"),
        )
    },
    "no model": (dropped("model"), "model is None"),
    "no tokens": (dropped("tokens"), "tokens is no list of strings"),
    "tokens empty": (vocabulary("tokens", (STRING, []), ARRAY), "tokens is no list of strings"),
    "tokens of numbers": (vocabulary("tokens", (U32, [1]), ARRAY), "tokens is no list of strings"),
    "tokens a string": (vocabulary("tokens", "abc", STRING), "tokens is no list of strings"),
    "an empty token named by another": (
        lambda f: [words("tokens", replaced(*x))(f) for x in ((3, ""), (9, "[EMPTY_3]"))],
        "tokens 3 and 9 are the same",
    ),
    "a NUL in a token": (words("tokens", replaced(7, "a\0b")), "token 7 has a NUL"),
    "types missing": (words("token_type", list.pop), "token_type is 383 values, expected"),
    "types too many": (words("token_type", lambda v: v.append(1)), "token_type is 385 values"),
    "types a number": (vocabulary("token_type", 1), "token_type is 1, expected"),
    "types of floats": (vocabulary("token_type", (F32, [1.0] * 384), ARRAY), "token_type is 384"),
    "scores missing": (vocabulary("scores", (F32, [1.0] * 3), ARRAY), "scores is 3 values"),
    "scores of strings": (vocabulary("scores", (STRING, ["1"] * 384), ARRAY), "scores is 384"),
    **{
        f"a token of type {kind}": (words("token_type", replaced(2, kind)), f"2 has type {kind}")
        for kind in (-1, 7, 2**31 - 1)
    },
    "a byte that is none": (words("token_type", replaced(2, 6)), "token 2 is to be a byte"),
    "no merges": (dropped("merges"), "merges is no list of strings"),
    "merges of numbers": (vocabulary("merges", (U32, [1]), ARRAY), "merges is no list of strings"),
    **{
        f"a merge {merge!r}": (words("merges", replaced(1, merge)), f"merge 1 is {merge!r}, expe")
        for merge in ("", " ", "ab", " ab", "ab ", "a b c", "a  b")
    },
    "a merge of what is no token": (words("merges", replaced(1, "a zzz")), "'zzz' is no token"),
    "a merge into what is no token": (words("merges", replaced(1, "q x")), "'qx' is no token"),
    "a token that merges need": (
        lambda f: words("tokens", lambda v: v.__setitem__(v.index("\u0120t"), "zzz"))(f),
        "'\u0120t' is no token",
    ),
    **{
        f"{name} is {number}": (vocabulary(f"{name}_token_id", number), f"{name}_token_id is ")
        for name in DECIDING
        for number in (384, 2**31, 2**32 - 1)
    },
    "BOS is added, and is none": (
        lambda f: [dropped("bos_token_id")(f), vocabulary("add_bos_token", True, BOOL)(f)],
        "add_bos_token = true adds a token",
    ),
    "BOS is added by default, and is none": (
        dropped("bos_token_id", "add_bos_token"),
        "add_bos_token = true adds a token",
    ),
    "EOS is added, and is none": (
        lambda f: [dropped("eos_token_id")(f), vocabulary("add_eos_token", True, BOOL)(f)],
        "add_eos_token = true adds a token",
    ),
    "no EOS": (dropped("eos_token_id"), "eos_token_id is missing"),
    "unknown tokens suppressed": (
        vocabulary("suppress_tokens", (I32, [3, 384]), ARRAY),
        "suppress_tokens names others",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(tiny: Sample, tmp_path: Path, guard: Guard, name: str) -> None:
    edit, parts = BAD[name]
    file = Gguf.read(tiny.gguf)
    edit(file)
    (said,) = guard.attempts([file.write(tmp_path / "bad.gguf")])
    assert said, "accepted"
    assert not [part for part in parts if part.lower() not in said.lower()], said


def test_llama_cpp_survives_alone(tiny: Sample, tmp_path: Path, guard: Guard) -> None:
    """Without our reader before it, it refuses all but what is a model of some kind."""
    paths: list[Path] = []
    for number, (edit, _) in enumerate(BAD.values()):
        file = Gguf.read(tiny.gguf)
        edit(file)
        paths.append(file.write(tmp_path / f"{number}.gguf"))
    said = guard.attempts(paths, reader=False)
    accepted = {name for name, text in zip(BAD, said, strict=True) if not text}
    assert accepted == RUNS_ALONE


def test_truncated(tiny: Sample, tmp_path: Path, guard: Guard) -> None:
    raw = tiny.gguf.read_bytes()
    head = len(Gguf.read(tiny.gguf).header())
    draw = random.Random(1)
    cuts = [
        *range(64),
        *draw.sample(range(64, head), 60),
        *draw.sample(range(head, len(raw)), 8),
    ]
    paths: list[Path] = []
    for cut in [*cuts, len(raw) - 1]:
        paths.append(tmp_path / f"{cut}.gguf")
        paths[-1].write_bytes(raw[:cut])
    for reader in (True, False):
        assert all(guard.attempts(paths, reader))


@pytest.mark.parametrize("name", BAD_VOCABULARIES)
def test_bad_vocabulary_is_refused(tiny: Sample, tmp_path: Path, guard: Guard, name: str) -> None:
    edit, part = BAD_VOCABULARIES[name]
    file = Gguf.read(tiny.gguf)
    edit(file)
    path = file.write(tmp_path / "bad.gguf")
    (said,) = guard.attempts([path])
    assert part in said
    guard.attempts([path], reader=False)


def test_any_two_equal_tokens(tiny: Sample, tmp_path: Path, guard: Guard) -> None:
    draw, paths = random.Random(3), []
    for number in range(8):
        file = Gguf.read(tiny.gguf)
        words = file.values["tokenizer.ggml.tokens"][1][1]
        one, other = sorted(draw.sample(range(len(words)), 2))
        words[other] = words[one]
        paths.append(file.write(tmp_path / f"{number} tokens {one} and {other} are the same.gguf"))
    for reader in (True, False):
        for path, said in zip(paths, guard.attempts(paths, reader), strict=True):
            assert path.stem.partition(" ")[2] in said


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_key_has_its_type(tiny: Sample, tmp_path: Path, name: str) -> None:
    kinds = {"u32": (U32, 1), "f32": (F32, 1.0), "bool": (BOOL, True), "str": (STRING, "x")}
    for kind, value in kinds.items():
        if kind not in RULES[name].types:
            file = Gguf.read(tiny.gguf)
            file.values[name] = value
            with pytest.raises(GGUFError, match=rf"{re.escape(name)} .*{kind}|not a Megrez2 model"):
                open_checked(file.write(tmp_path / "bad.gguf"))


@pytest.mark.parametrize("name", sorted(name for name in RULES if RULES[name].types == ("f32",)))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_every_float_is_a_number(tiny: Sample, tmp_path: Path, name: str, value: float) -> None:
    file = Gguf.read(tiny.gguf)
    file.values[name] = F32, value
    with pytest.raises(GGUFError, match=rf"{name.removeprefix('megrez-moe.')} = {value:g}, expec"):
        open_checked(file.write(tmp_path / "bad.gguf"))


def test_damaged_headers(sample: Callable[..., Sample], tmp_path: Path, guard: Guard) -> None:
    """Bytes changed anywhere before the tensor data: refused or run, alive either way."""
    model = sample(num_hidden_layers=3, vocab_size=300)
    raw, head = model.gguf.read_bytes(), len(Gguf.read(model.gguf).header())
    draw, paths = random.Random(2), []
    # Most of a header is vocabulary; a third of the changes goes there.
    words = range(raw.index(b"tokenizer.ggml.tokens"), raw.index(b"output_norm.weight"))
    rest = [place for place in range(head) if place not in words]
    for number in range(300):
        damaged = bytearray(raw)
        for _ in range(draw.choice([1, 1, 1, 2, 4])):
            place = draw.choice(rest if number % 3 else words)
            damaged[place] = draw.choice([0, 1, 255, damaged[place] ^ 1 << draw.randrange(8)])
        paths.append(tmp_path / f"{number}.gguf")
        paths[-1].write_bytes(damaged)
    for reader in (True, False):
        guard.attempts(paths, reader)


@pytest.mark.parametrize("seed", range(4))
def test_one_bit_flipped(
    sample: Callable[..., Sample], tmp_path: Path, guard: Guard, seed: int
) -> None:
    model = sample(num_hidden_layers=3, vocab_size=300)
    raw, head = model.gguf.read_bytes(), len(Gguf.read(model.gguf).header())
    draw, paths = random.Random(seed), []
    for place in draw.sample(range(head), 60):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << draw.randrange(8)
        paths.append(tmp_path / f"{place}.gguf")
        paths[-1].write_bytes(damaged)
    for reader in (True, False):
        guard.attempts(paths, reader)


def test_changed_keys(sample: Callable[..., Sample], tmp_path: Path, guard: Guard) -> None:
    """Every key of ours given strange values, removed, or of another type."""
    model = sample(num_hidden_layers=3, vocab_size=300)
    paths: list[Path] = []
    names = [n for n in Gguf.read(model.gguf).values if n.startswith("megrez-moe.")]
    extra = ["nextn_predict_layers", "embedding_length_out", "rope.scaling.factor"]
    for name in [*names, *(f"megrez-moe.{n}" for n in extra)]:
        kind = Gguf.read(model.gguf).values.get(name, (U32, 0))[0]
        strange: list[tuple[int, Any] | None] = [None, (STRING, ""), (BOOL, True)]
        if kind == F32 or "factor" in name:
            strange += [(F32, v) for v in (0.0, -1.0, 1e38, float("nan"), float("inf"))]
        else:
            strange += [(U32, v) for v in (0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32 - 1)]
        for value in strange:
            file = Gguf.read(model.gguf)
            file.values.pop(name, None)
            if value:
                file.values[name] = value
            paths.append(file.write(tmp_path / f"{len(paths)} {name} {value}.gguf"))
    for reader in (True, False):
        guard.attempts(paths, reader)


def test_infinite_weights_do_not_crash(tiny: Sample, tmp_path: Path, guard: Guard) -> None:
    """NaN logits make no order; the selection must still stay within the experts."""
    paths: list[Path] = []
    for name in (ROUTER, BIAS, "blk.1.ffn_up_exps.weight", "token_embd.weight"):
        for value in ("nan", "inf", "-inf"):
            file = Gguf.read(tiny.gguf)
            array = file.tensors[name].floats() * 0 + float(value)
            file.tensors[name] = Tensor(Q.F32, array.shape[::-1], array.astype("<f4").tobytes())
            paths.append(file.write(tmp_path / f"{name} {value}.gguf"))
    for reader in (True, False):
        guard.attempts(paths, reader)
