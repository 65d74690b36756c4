"""The judge of ids, and the files beside tokenizer.json: what each may say, and which one wins."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import tokenizers
from hypothesis import given

import megrez_gguf.checkpoint.tokenizer_judge as judging
from megrez_gguf.checkpoint.bpe import read_bpe
from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.tokenizer import (
    _SETTINGS,
    CONTROL,
    NORMAL,
    UNUSED,
    Vocabulary,
    read_vocabulary,
)
from megrez_gguf.errors import TokenizerError
from support.checkpoints import edit_json, set_json
from support.marks import DRAWN

SIZE = 320
ROOM = 12


def read(checkpoint: Path, size: int = SIZE + ROOM) -> Vocabulary:
    return read_vocabulary(Documents.read(checkpoint), size)


def added(text: str, i: int, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": text, "special": special, **flags}


# --- the judge ---

# Where the drawn entries of tokenizer.json stand; ids that may collide, leave holes, or go back.
ENTRIES = st.lists(
    st.tuples(st.sampled_from(["[x]", "[y]", "[z]", "a", "ey"]), st.integers(SIZE - 4, SIZE + 4)),
    max_size=3,
    unique_by=lambda e: e[0],
)


@DRAWN
@given(
    entries=ENTRIES, dropped=st.sets(st.integers(200, SIZE - 6), max_size=2), listed=st.booleans()
)
def test_ids_are_those_of_the_library_or_it_is_said(
    checkpoint: Path, entries: list[tuple[str, int]], dropped: set[int], listed: bool
) -> None:
    """Every way to number tokens converts to the library's ids, or is refused or warned about."""
    path = checkpoint / "tokenizer.json"
    original = path.read_text("utf-8")
    content = json.loads(original)
    model = content["model"]
    model["vocab"] = {t: i for t, i in model["vocab"].items() if i not in dropped}
    model["merges"] = [
        m for m in model["merges"] if all(t in model["vocab"] for t in (*m, "".join(m)))
    ]
    content["added_tokens"] += [added(*entry) for entry in entries]
    if listed:
        model["vocab"] |= {e["content"]: e["id"] for e in content["added_tokens"]}
    try:
        path.write_text(json.dumps(content), "utf-8")
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
        v = read(checkpoint)
    except TokenizerError:
        return
    finally:
        path.write_text(original, "utf-8")
    ids = {
        t: i for i, (t, kind) in enumerate(zip(v.tokens, v.types, strict=True)) if kind != UNUSED
    }
    theirs = library.get_vocab(with_added_tokens=True)
    assert ids.keys() == theirs.keys()
    assert ids == theirs or any("the tokenizers library" in w for w in v.warnings)


def test_added_tokens_in_another_order_are_refused(checkpoint: Path) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda t: t["added_tokens"].reverse())
    with pytest.raises(TokenizerError, match=r"gives it 315: list the added tokens by their ids"):
        read(checkpoint)


@pytest.mark.parametrize("damage", ["merges", "ids", "ignore_merges"])
def test_the_judge_notices_what_we_read_otherwise(checkpoint: Path, damage: str) -> None:
    path = checkpoint / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    ids = tokenizers.Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    model = raw["model"]
    judging.judge(path, read_bpe(raw, path), ids)
    if damage == "merges":
        model["merges"].reverse()
    elif damage == "ids":
        ids["ey"], ids["a"] = ids["a"], ids["ey"]
    else:
        model["merges"] = model["merges"][:20]
    with pytest.raises(TokenizerError, match=r"the tokenizers library \(\d.* (gives|cuts) "):
        judging.judge(path, read_bpe(raw, path), ids)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update(version="7.0"),
        lambda t: t.update(surprise=1),
        lambda t: t["added_tokens"][0].pop("lstrip"),
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].pop("add_prefix_space"),
    ],
)
def test_what_the_library_refuses_is_refused(
    checkpoint: Path, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edit(content: dict[str, Any]) -> None:
        change(content)

    edit_json(checkpoint / "tokenizer.json", edit)
    with pytest.raises(TokenizerError, match=r"the tokenizers library \(\d.*\) refuses it: "):
        read(checkpoint)
    # Where it is not installed the file is taken at its word.
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert len(read(checkpoint).tokens) == SIZE + ROOM


# --- special tokens ---


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
def test_tokens_that_a_companion_calls_special(checkpoint: Path, name: str, key: str) -> None:
    (checkpoint / "special_tokens_map.json").write_text("{}")
    assert read(checkpoint).types[read(checkpoint).tokens.index("ey")] == NORMAL
    named: Any = ["ey", {"content": "[nowhere]"}]
    for value in (named, dict(zip("ab", named, strict=True))):
        set_json(checkpoint / name, **{key: value})
        v = read(checkpoint)
        assert v.types[v.tokens.index("ey")] == CONTROL
        assert any(w.startswith(f"{name}: special token '[nowhere]'") for w in v.warnings)
    set_json(checkpoint / name, **{key: [1]})
    with pytest.raises(TokenizerError, match=rf"{name}: {key}: 1 is not a token"):
        read(checkpoint)


def test_an_end_that_is_an_ordinary_token_becomes_special(checkpoint: Path) -> None:
    set_json(checkpoint / "tokenizer_config.json", eos_token="ey")
    v = read(checkpoint)
    assert v.types[v.special["eos"]] == CONTROL


@pytest.mark.parametrize("key", ["pad", "unk"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_padding_and_unknown_need_not_be_tokens(checkpoint: Path, key: str, name: str) -> None:
    (checkpoint / "special_tokens_map.json").write_text("{}")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        set_json(checkpoint / file, pad_token=None, unk_token=None)
    set_json(checkpoint / name, **{f"{key}_token": "[nope]"})
    for file in ("config.json", "generation_config.json"):
        set_json(checkpoint / file, pad_token_id=None)
    v = read(checkpoint)
    assert {"pad": "padding", "unk": "unknown"}[key] not in v.special
    assert any(w.startswith(f"{name}: {key}_token '[nope]' is not a token") for w in v.warnings)


@pytest.mark.parametrize("key", ["bos", "eos"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_begin_or_end_has_to_be_one(checkpoint: Path, key: str, name: str) -> None:
    (checkpoint / "special_tokens_map.json").write_text("{}")
    set_json(checkpoint / name, **{f"{key}_token": "[nope]"})
    with pytest.raises(TokenizerError, match=rf"{name}: {key}_token '\[nope\]' is not a token"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_bad_id_is_blamed_on_its_file(checkpoint: Path, name: str) -> None:
    (checkpoint / "generation_config.json").write_text("{}")
    set_json(checkpoint / name, eos_token_id=[1, 99999])
    with pytest.raises(TokenizerError, match=rf"/{name}: eos_token_id \[1, 99999\]: not a token"):
        read(checkpoint)
    set_json(checkpoint / name, eos_token_id=1, bos_token_id=-3, pad_token_id="x")
    set_json(checkpoint / "tokenizer_config.json", pad_token=None)
    v = read(checkpoint)
    assert [w for w in v.warnings if w.startswith(f"{name}: bos_token_id -3 is not a token id")]
    assert [w for w in v.warnings if w.startswith(f"{name}: pad_token_id 'x' is not a token id")]


def test_two_files_that_name_two_ends(checkpoint: Path) -> None:
    set_json(checkpoint / "tokenizer_config.json", eos_token="<|turn_end|>")
    (checkpoint / "special_tokens_map.json").write_text('{"eos_token": "<|end_of_text|>"}')
    v = read(checkpoint)
    assert v.tokens[v.special["eos"]] == "<|turn_end|>"
    assert any("eos_token is '<|turn_end|>' in tokenizer_config.json and" in w for w in v.warnings)


@pytest.mark.parametrize("key", _SETTINGS)
def test_settings_that_gguf_cannot_hold_are_told(checkpoint: Path, key: str) -> None:
    set_json(checkpoint / "tokenizer_config.json", **{key: False})
    before = read(checkpoint).warnings
    set_json(checkpoint / "tokenizer_config.json", **{key: True})
    (warning,) = set(read(checkpoint).warnings) - set(before)
    assert warning.startswith(f"tokenizer_config.json sets {key}, which llama.cpp does not follow")


# --- older forms ---


@pytest.mark.parametrize("name", ["vocab.json", "added_tokens.json", "merges.txt"])
def test_older_files_that_differ_are_told(checkpoint: Path, name: str) -> None:
    model = json.loads((checkpoint / "tokenizer.json").read_text("utf-8"))["model"]
    merges = ["#version: 0.2", *(" ".join(m) for m in model["merges"])]
    same = {
        "vocab.json": json.dumps(model["vocab"]),
        "added_tokens.json": '{"<|turn_end|>": 319}',
        "merges.txt": "\n".join(merges) + "\n",
    }
    before = read(checkpoint).warnings
    (checkpoint / name).write_text(same[name], "utf-8")
    assert read(checkpoint).warnings == before
    other = {
        "vocab.json": '{"ey": 7}',
        "added_tokens.json": '{"[new]": 319}',
        "merges.txt": "\n".join(reversed(merges)),
    }
    (checkpoint / name).write_text(other[name], "utf-8")
    (warning,) = set(read(checkpoint).warnings) - set(before)
    assert re.match(rf"{name} .*differs from tokenizer.json, which is followed", warning)


def test_without_a_tokenizer_what_there_is_is_named(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json; save the tokenizer with"):
        read(checkpoint)
    for name in ("tokenizer.model", "qwen.tiktoken", "vocab.json"):
        (checkpoint / name).touch()
        with pytest.raises(
            TokenizerError, match=rf"only .*{name}.*; save the tokenizer .*save_pretrained"
        ):
            read(checkpoint)


@pytest.mark.parametrize("where", ["vocab", "added"])
def test_half_a_character_is_no_token(checkpoint: Path, where: str) -> None:
    def change(t: dict[str, Any]) -> None:
        if where == "vocab":
            t["model"]["vocab"]["\ud800"] = t["model"]["vocab"].pop("ey")
            t["model"]["merges"] = []
        else:
            t["added_tokens"].append(added("\ud800", SIZE))

    edit_json(checkpoint / "tokenizer.json", change)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*half of a surrogate pair"):
        read(checkpoint)
