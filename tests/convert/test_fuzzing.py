"""Readers of foreign files return or refuse, whatever the bytes, with memory in proportion.

The long run is scripts/development/fuzz_readers; here are a moment of it, and what it found.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.fuzzing.targets import ALLOWANCE, MULTIPLE, TARGETS, Checker, Target, bundle
from support.gguf_edit import ARRAY, STRING, Gguf
from support.paths import REPO

by_target = pytest.mark.parametrize("name", TARGETS)


@by_target
def test_inputs_to_start_from_are_sound(name: str, tmp_path: Path) -> None:
    check = Checker(TARGETS[name], tmp_path, every=1)
    assert all(check(data) for data in TARGETS[name].seeds())


@by_target
def test_random_damage(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    target, check = TARGETS[name], Checker(TARGETS[name], tmp_path, every=8)
    seeds = target.seeds()
    for _ in range(150):
        data = draw.choice(seeds)
        for _ in range(draw.randint(1, 3)):
            data = target.mutate(data, draw)
        check(data)


def _recipe(pattern: str) -> bytes:
    return f"level = 'q4_0'\n[types]\n'{pattern}' = 'q8_0'\n".encode()


def _model(key: str, value: tuple[int, object]) -> bytes:
    file = Gguf.parse(TARGETS["model"].seeds()[0])
    file.values[f"megrez-moe.{key}"] = value
    return file.to_bytes()


def _changed(name: str, old: bytes, new: bytes) -> bytes:
    data = next(data for data in TARGETS[name].seeds() if old in data)
    return data.replace(old, new, 1)


FOUND: list[tuple[str, Callable[[], bytes]]] = [
    ("size", lambda: b"9" * 400 + b"G"),
    ("recipe", lambda: _recipe("a{99999999999}")),
    ("recipe", lambda: _recipe("(" * 5000 + ")" * 5000)),
    ("recipe", lambda: _recipe("(.+)+x")),
    ("recipe", lambda: _recipe("(.|.)" * 30 + "x")),
    ("recipe", lambda: b"level = " + b"9" * 5000),
    ("thresholds", lambda: b"[" * 50_000),
    ("thresholds", lambda: b'{"levels":{"f32":{"nmse":1%s}}}' % (b"0" * 400)),
    ("log", lambda: b"{}\n"),
    ("log", lambda: b'{"types":[["a"]],"mean_kld":1}\n'),
    ("log", lambda: b"[" * 50_000 + b"\n"),
    ("record", lambda: b'{"files":[]}'),
    ("record", lambda: b'{"files":{},"maxima":{"a":1%s}}' % (b"0" * 400)),
    ("listing", lambda: b"model-1-of-999999999.safetensors"),
    ("model", lambda: _model("leading_dense_block_count", (STRING, "x"))),
    ("model", lambda: _model("attention.layer_norm_rms_epsilon", (STRING, "x"))),
    ("model", lambda: _model("attention.layer_norm_rms_epsilon", (ARRAY, (4, [1])))),
    ("model", lambda: _model("leading_dense_block_count", (11, -(2**62)))),
    ("model", lambda: _model("nextn_predict_layers", (11, -(2**62)))),
    ("model", lambda: _model("block_count", (4, 2**32 - 1))),
    ("config", lambda: _changed("config", b"5000000.0", b"1" + b"0" * 400)),
    ("config", lambda: _changed("config", b'layers": 3', b'layers": 2147483647')),
    ("config", lambda: _changed("config", b'_size": 32', b'_size": 2147483647')),
    ("tokenizer", lambda: _changed("tokenizer", b'["a", "b"]', b'[["a"], {}]')),
    ("tokenizer", lambda: _changed("tokenizer", b'"normalizers": [', b'"normalizers": 1, "x": [')),
    ("tokenizer", lambda: _changed("tokenizer", b'"7": {', b'"%s": {' % (b"7" * 5000))),
    ("tokenizer", lambda: _changed("tokenizer", b"0.7", b"1" + b"0" * 400)),
    ("tokenizer", lambda: _changed("tokenizer", b"0.7", b"1e39")),
    ("tokenizer", lambda: _changed("tokenizer", b"{% for", b"{{ 'x'|center(99999999) }}{% for")),
    ("tokenizer", lambda: _changed("tokenizer", b"{% for", b"{{ 'x' * 99999999 }}{% for")),
    ("tokenizer", lambda: _changed("tokenizer", b'"top_k": 20', b'"top_k": 1e999')),
    ("tokenizer", lambda: _changed("tokenizer", b'"top_k": 20', b'"top_k": 4294967296')),
]


@pytest.mark.parametrize("found", range(len(FOUND)), ids=lambda i: f"{i}-{FOUND[i][0]}")
def test_what_was_found(found: int, tmp_path: Path) -> None:
    name, data = FOUND[found]
    check = Checker(TARGETS[name], tmp_path, every=1)
    check.accepts(TARGETS[name].seeds()[0])  # what is imported counts no more
    check(data())


BROKEN: dict[str, Callable[[Path], object]] = {
    "another error": lambda folder: {"a": 1}["b"],
    "a file": lambda folder: (folder / "new").write_text("x"),
    "a folder": lambda folder: (folder / "new").mkdir(),
    "memory": lambda folder: bytes(ALLOWANCE + 100 * MULTIPLE),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_reader_is_noticed(broken: str, tmp_path: Path) -> None:
    target = replace(TARGETS["readme"], read=BROKEN[broken])
    check = Checker(target, tmp_path, every=1)
    with pytest.raises((KeyError, AssertionError)):
        check(target.seeds()[0])


def test_a_missing_file_is_an_input_too(tmp_path: Path) -> None:
    target = Target("x", ("a", "b"), lambda f: (f / "b").stat(), list, (), (FileNotFoundError,))
    check = Checker(target, tmp_path)
    assert not check(bundle(("a", "b"), {"a": b"1"}))
    assert check(bundle(("a", "b"), {"a": b"1", "b": b"2"}))


def test_the_script(tmp_path: Path) -> None:
    script = REPO / "scripts/development/fuzz_readers"
    command = [sys.executable, str(script), "size", "readme", "--runs", "400"]
    done = subprocess.run([*command, "--work", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 findings" in done.stdout
