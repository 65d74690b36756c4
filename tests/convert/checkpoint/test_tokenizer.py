"""What the tokenizer files say, and what cannot be said in GGUF."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.tokenizer import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from megrez_gguf.errors import TokenizerError
from support.checkpoints import edit_json
from support.commands import cli

SIZE = 320
Edit = Callable[[dict[str, Any]], Any]


def edit(checkpoint: Path, change: Edit, name: str = "tokenizer.json") -> None:
    edit_json(checkpoint / name, change)


def read(checkpoint: Path, size: int = SIZE) -> Vocabulary:
    return read_vocabulary(Documents.read(checkpoint), size)


def added(text: str, i: int, **flags: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | flags
    return {"id": i, "content": text, "special": False, **flags}


def grow(*entries: dict[str, Any]) -> Edit:
    return lambda t: t["added_tokens"].extend(entries)


def test_types_and_special_ids(checkpoint: Path) -> None:
    edit(checkpoint, grow(added("[user]", SIZE)))
    v = read(checkpoint, SIZE + 3)
    ids = {t: i for i, t in enumerate(v.tokens)}
    assert v.pre == "megrez"
    assert v.types[ids["a"]] == NORMAL
    assert v.types[ids["<|role_start|>"]] == CONTROL
    assert v.types[ids["[user]"]] == USER_DEFINED
    assert v.tokens[SIZE + 1 :] == (f"[PAD{SIZE + 1}]", f"[PAD{SIZE + 2}]")
    assert v.types[SIZE + 1 :] == (UNUSED, UNUSED)
    assert v.padding == 2
    assert v.special["eos"] == ids["<|turn_end|>"]
    assert not v.add_bos
    assert not v.add_eos
    assert "<|role_start|>" in v.templates["default"]


def test_padding_never_collides(checkpoint: Path) -> None:
    edit(checkpoint, grow(added(f"[PAD{SIZE + 1}]", SIZE)))
    v = read(checkpoint, SIZE + 2)
    assert v.tokens[SIZE:] == (f"[PAD{SIZE + 1}]", f"[[PAD{SIZE + 1}]]")
    assert len(set(v.tokens)) == len(v.tokens)


def test_merges_as_strings_or_pairs(checkpoint: Path) -> None:
    merges = read(checkpoint).merges
    edit(
        checkpoint, lambda t: t["model"].update(merges=[" ".join(m) for m in t["model"]["merges"]])
    )
    assert read(checkpoint).merges == merges
    assert all(m.count(" ") == 1 for m in merges)


def test_expression_with_real_line_breaks(checkpoint: Path) -> None:
    def change(t: dict[str, Any]) -> None:
        pattern = t["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace(r"\r", "\r").replace(r"\n", "\n")

    edit(checkpoint, change)
    assert read(checkpoint).pre == "megrez"


def test_nfc_is_warned_about(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t.update(normalizer={"type": "NFC"}))
    assert any("NFC" in w for w in read(checkpoint).warnings)


def test_bos_by_the_post_processor(checkpoint: Path) -> None:
    def change(t: dict[str, Any]) -> None:
        bos = next(e for e in t["added_tokens"] if e["content"] == "<|begin_of_text|>")
        name = bos["content"]
        t["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": name, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": side, "type_id": 0}} for side in "AB"],
            "special_tokens": {name: {"id": name, "ids": [bos["id"]], "tokens": [name]}},
        }

    edit(checkpoint, change)
    edit(checkpoint, lambda c: c.update(bos_token="<|begin_of_text|>"), "tokenizer_config.json")
    assert read(checkpoint).add_bos
    edit(checkpoint, lambda c: c.update(add_bos_token=False), "tokenizer_config.json")
    v = read(checkpoint)
    assert v.add_bos
    assert any("add_bos_token = false" in w for w in v.warnings)
    edit(checkpoint, lambda c: c.update(bos_token="<|end_of_text|>"), "tokenizer_config.json")
    with pytest.raises(TokenizerError, match="adds other tokens than bos before"):
        read(checkpoint)


def test_template_file_wins(checkpoint: Path) -> None:
    (checkpoint / "chat_template.json").write_text('{"chat_template": "from json"}')
    assert read(checkpoint).templates == {"default": "from json"}
    (checkpoint / "chat_template.jinja").write_text("from jinja", encoding="utf-8")
    assert read(checkpoint).templates == {"default": "from jinja"}


def test_named_templates(checkpoint: Path) -> None:
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    edit(checkpoint, lambda c: c.update(chat_template=named), "tokenizer_config.json")
    values = read(checkpoint).key_values()
    assert values["tokenizer.chat_template"] == "a"
    assert values["tokenizer.chat_template.tool_use"] == "b"
    assert values["tokenizer.chat_templates"] == ["tool_use"]


def test_no_template_is_warned_about(checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c.pop("chat_template") and None, "tokenizer_config.json")
    v = read(checkpoint)
    assert "tokenizer.chat_template" not in v.key_values()
    assert any("no chat template" in w for w in v.warnings)


def test_several_ends(checkpoint: Path) -> None:
    ids = {t: i for i, t in enumerate(read(checkpoint).tokens)}
    end, turn = ids["<|end_of_text|>"], ids["<|turn_end|>"]
    ends = [end, ids["a"], ids["b"]]
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    edit(checkpoint, lambda c: c.update(eos_token="<|end_of_text|>"), "tokenizer_config.json")
    v = read(checkpoint)
    # The template's end of turn comes first, although no list named it.
    assert (v.special["eos"], v.special["eot"], v.special["eom"]) == (end, turn, ids["a"])
    assert any("left out" in w for w in v.warnings)


def test_added_tokens_of_the_config(checkpoint: Path) -> None:
    """transformers adds them when it loads the tokenizer."""
    decoder = {str(SIZE): {"content": "[late]", "special": True}}
    edit(checkpoint, lambda c: c.update(added_tokens_decoder=decoder), "tokenizer_config.json")
    v = read(checkpoint, SIZE + 1)
    assert v.tokens[SIZE] == "[late]"
    assert v.types[SIZE] == CONTROL


def test_overlapping_added_tokens_are_warned_about(checkpoint: Path) -> None:
    edit(checkpoint, grow(added("xab", SIZE), added("abcd", SIZE + 1)))
    assert any("ends like another begins" in w for w in read(checkpoint, SIZE + 2).warnings)


def model(**fields: Any) -> Edit:
    return lambda t: t["model"].update(fields)


def split(regex: str) -> Edit:
    return lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=regex)


REFUSED: dict[str, tuple[Edit, str]] = {
    "no model": (lambda t: t.pop("model") and None, "only byte-level BPE is supported"),
    "another model": (model(type="Unigram"), "the model is 'Unigram'; only byte-level BPE"),
    "unknown expression": (split(r"\w+"), r"llama\.cpp has none known to split like"),
    "ignore_merges": (model(ignore_merges=True), "with ignore_merges true"),
    "dropout": (model(dropout=0.1), r"model\.dropout = 0\.1 is not supported"),
    "suffix": (model(end_of_word_suffix="</w>"), r"end_of_word_suffix = '</w>' is not supported"),
    "lower case": (
        lambda t: t.update(normalizer={"type": "Lowercase"}),
        "normalizer 'Lowercase': llama.cpp does not normalise",
    ),
    "NFKC": (
        lambda t: t.update(
            normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFKC"}]}
        ),
        "normalizer 'NFKC'",
    ),
    "no pre-tokenizer": (lambda t: t.update(pre_tokenizer=None), "does not end in ByteLevel"),
    "metaspace": (
        lambda t: t.update(pre_tokenizer={"type": "Metaspace"}),
        "step 'Metaspace' is not supported",
    ),
    "space prefix": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "add_prefix_space is not supported",
    ),
    "merged with previous": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithPrevious"),
        "MergedWithPrevious.* is not supported",
    ),
    "post-processor": (
        lambda t: t.update(post_processor={"type": "BertProcessing"}),
        "post_processor: 'BertProcessing' is not supported",
    ),
    "merge of strangers": (
        model(merges=[["a", "\u2603"]]),
        "names or makes a token that is not in",
    ),
    "merge of three": (model(merges=["a b c"]), "'a b c' is not a pair of tokens"),
    "merges are no list": (model(merges={}), r"model\.merges: expected a list"),
    "id of two tokens": (
        lambda t: t["model"]["vocab"].update({"zz": 0}),
        "id 0 belongs to both '.+' and 'zz'",
    ),
    "too many": (
        grow(added("[more]", SIZE)),
        rf"321 tokens.* config.json has vocab_size = {SIZE}.* resize_token_embeddings",
    ),
    "added token with another id": (grow(added("a", SIZE)), "added token 'a' has id 320, and id"),
    "added twice": (
        lambda t: t["added_tokens"].append(t["added_tokens"][0]),
        "two entries share an id or a text",
    ),
    "added is malformed": (
        grow({"id": "x"}),
        "expected a list of objects with an id and a content",
    ),
    "vocab of strings": (model(vocab={"a": "0"}), "expected an object of token -> id"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, checkpoint: Path) -> None:
    change, message = REFUSED[case]
    edit(checkpoint, change)
    size = SIZE if case == "too many" else SIZE + 1
    with pytest.raises(TokenizerError, match=message):
        read(checkpoint, size)


# --- what changes nothing is converted, with a warning ---


def flagged(**flags: bool) -> Edit:
    return grow(added("[flag]", SIZE, **flags))


def without_a_byte(t: dict[str, Any]) -> None:
    """The byte 0xff becomes a token that is no byte."""
    vocab = t["model"]["vocab"]
    vocab["\u2603"] = vocab.pop("\u00ff")
    t["model"]["merges"] = [m for m in t["model"]["merges"] if "\u00ff" not in "".join(m)]


HARMLESS: dict[str, tuple[Edit, str | None]] = {
    "no type": (lambda t: t["model"].pop("type") and None, None),
    "null ignore_merges": (model(ignore_merges=None), None),
    "no dropout": (model(dropout=0.0), None),
    "no suffix": (model(end_of_word_suffix=None, continuing_subword_prefix=None), None),
    "unknown token": (model(unk_token="a"), r"model\.unk_token = 'a' has no effect"),
    "fused unknown": (model(fuse_unk=True), r"model\.fuse_unk = True has no effect"),
    "byte fallback": (model(byte_fallback=True), r"model\.byte_fallback = True has no effect"),
    "empty normalizer": (
        lambda t: t.update(normalizer={"type": "Sequence", "normalizers": []}),
        None,
    ),
    "nested": (
        lambda t: t.update(
            pre_tokenizer={"type": "Sequence", "pretokenizers": [t["pre_tokenizer"]]}
        ),
        None,
    ),
    "truncation": (
        lambda t: t.update(
            truncation={
                "direction": "Right",
                "max_length": 5,
                "strategy": "LongestFirst",
                "stride": 0,
            }
        ),
        "sets truncation",
    ),
    "padding": (
        lambda t: t.update(
            padding={
                "strategy": {"Fixed": 8},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            }
        ),
        "sets padding",
    ),
    "merge twice": (
        lambda t: t["model"]["merges"].append(t["model"]["merges"][0]),
        "1 merges are listed twice; the later place counts",
    ),
    "merge version": (
        lambda t: t["model"].update(
            merges=["#version: 0.2", *(" ".join(m) for m in t["model"]["merges"])]
        ),
        None,
    ),
    "lstrip": (flagged(lstrip=True), r"'\[flag\]' has lstrip, which llama.cpp ignores"),
    "rstrip": (flagged(rstrip=True, single_word=True), "has rstrip and single_word"),
    "added and empty": (grow(added("", SIZE)), "an added token is empty"),
    "hole before an added token": (
        grow(added("[far]", SIZE + 3)),
        r"'\[far\]' has id 323, .* gives it 320, because there is a hole",
    ),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_harmless(case: str, checkpoint: Path) -> None:
    before = read(checkpoint, SIZE + 8)
    change, warning = HARMLESS[case]
    edit(checkpoint, change)
    v = read(checkpoint, SIZE + 8)
    assert (v.tokens[:SIZE], v.types[:SIZE]) == (before.tokens[:SIZE], before.types[:SIZE])
    assert (v.special, v.pre) == (before.special, before.pre)
    assert set(v.merges) == set(before.merges)
    more = [w for w in v.warnings if w not in before.warnings]
    assert bool(more) == (warning is not None)
    assert warning is None or any(re.search(warning, w) for w in more)


@pytest.mark.parametrize("field", ["unk_token", "fuse_unk", "byte_fallback"])
def test_what_is_done_with_unknown_bytes_matters_where_there_are_any(
    checkpoint: Path, field: str
) -> None:
    edit(checkpoint, without_a_byte)
    assert read(checkpoint).tokens.count("\u2603") == 1
    edit(checkpoint, model(**{field: "a" if field == "unk_token" else True}))
    with pytest.raises(
        TokenizerError, match=rf"model\.{field} = .* no token stands for the byte \xff"
    ):
        read(checkpoint)


def test_a_flag_matters_on_a_token_of_the_template(checkpoint: Path) -> None:
    edit(checkpoint, lambda t: t["added_tokens"][-1].update(rstrip=True))
    with pytest.raises(
        TokenizerError, match=r"'<\|turn_end\|>' has rstrip; llama.cpp ignores that"
    ):
        read(checkpoint)


def test_a_hole_that_the_library_closes_is_told(checkpoint: Path) -> None:
    """It numbers added tokens from the size of the vocab, where the file has them elsewhere."""

    def change(t: dict[str, Any]) -> None:
        vocab = t["model"]["vocab"]
        del vocab[next(text for text, i in vocab.items() if i == 300)]
        t["model"]["merges"] = [
            m for m in t["model"]["merges"] if all(p in vocab for p in (*m, "".join(m)))
        ]

    before = read(checkpoint)
    edit(checkpoint, change)
    v = read(checkpoint)
    assert v.tokens == (*before.tokens[:300], "[PAD300]", *before.tokens[301:])
    assert any(re.search(r"has id 315, and the .* library, .* gives it 314", w) for w in v.warnings)
    assert any("no token has id 300; unused tokens fill the holes" in w for w in v.warnings)


def test_holes_are_filled_with_unused_tokens(checkpoint: Path) -> None:
    """Also where the library agrees, because the added tokens are in the vocab as well."""

    def change(t: dict[str, Any]) -> None:
        vocab = t["model"]["vocab"]
        last = vocab.pop(next(text for text, i in vocab.items() if i == 300))
        t["model"]["merges"] = [
            m for m in t["model"]["merges"] if all(p in vocab for p in (*m, "".join(m)))
        ]
        vocab |= {e["content"]: e["id"] for e in t["added_tokens"]}
        vocab["[far]"] = SIZE + 2
        assert last == 300

    edit(checkpoint, change)
    v = read(checkpoint, SIZE + 4)
    unused = [i for i, kind in enumerate(v.types) if kind == UNUSED]
    assert unused == [300, SIZE, SIZE + 1, SIZE + 3]
    assert [v.tokens[i] for i in unused] == [f"[PAD{i}]" for i in unused]
    assert (v.tokens[SIZE + 2], v.types[SIZE + 2]) == ("[far]", NORMAL)
    assert any("no token has id 300, 320, 321; unused tokens fill" in w for w in v.warnings)
    assert not any("library" in w for w in v.warnings)


def test_refused_on_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    edit(checkpoint, split(r"\w+"))
    result = cli("convert", checkpoint, "-o", tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert not (tmp_path / "x.gguf").exists()


CONFIG_REFUSED: dict[str, tuple[Edit, str]] = {
    "eos is no token": (lambda c: c.update(eos_token="nope"), "eos_token 'nope' is not a token"),
    "decoder disagrees": (
        lambda c: c.update(added_tokens_decoder={"3": {"content": "<|turn_end|>"}}),
        "gives id 3 to '<|turn_end|>'; tokenizer.json disagrees",
    ),
    "decoder is malformed": (
        lambda c: c.update(added_tokens_decoder={"x": {}}),
        "added_tokens_decoder: 'x' is malformed",
    ),
    "template is malformed": (lambda c: c.update(chat_template=[1]), "chat_template: expected"),
}


@pytest.mark.parametrize("case", CONFIG_REFUSED)
def test_config_refused(case: str, checkpoint: Path) -> None:
    change, message = CONFIG_REFUSED[case]
    edit(checkpoint, change, "tokenizer_config.json")
    with pytest.raises(TokenizerError, match=message):
        read(checkpoint)


def test_no_end(checkpoint: Path) -> None:
    edit(checkpoint, lambda c: c.pop("eos_token") and None, "tokenizer_config.json")
    (checkpoint / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match="no end-of-text token"):
        read(checkpoint)


@pytest.mark.parametrize("ids", ["[]", '"x"', "[1, 99999]", "-1"])
def test_ends_are_no_ids(checkpoint: Path, ids: str) -> None:
    (checkpoint / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    if ids == "[]":
        assert "eot" not in read(checkpoint).special
        return
    with pytest.raises(TokenizerError, match="not a token id, or a list of them"):
        read(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.json"])
def test_damaged_files(checkpoint: Path, name: str) -> None:
    (checkpoint / name).write_text("[1, 2")
    with pytest.raises(TokenizerError, match=f"{name}: cannot be read as JSON"):
        read(checkpoint)
    (checkpoint / name).write_text("[1, 2]")
    with pytest.raises(TokenizerError, match=f"{name}: expected a JSON object, found list"):
        read(checkpoint)
