"""Texts become windows by the checkpoint's tokenizer, and other tokenizers are told apart."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megrez_cli import console
from megrez_gguf.checkpoint.location import Location
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import ConfigError, TokenizerError
from megrez_llama.engine import Engine
from megrez_parity.windows import Corpus, read_corpus
from support.paths import DATA, POCKET
from support.random_checkpoint import POCKET as CONFIG
from support.random_checkpoint import make_checkpoint
from support.shared import Shared

TEXTS = sorted((DATA / "heldout").glob("*.txt"))


def corpus() -> Corpus:
    return read_corpus(Checkpoint.open(POCKET), TEXTS, n_ctx=64, n_windows=3)


def test_windows_are_consecutive_from_the_start_of_each_text() -> None:
    found = corpus()
    assert [text.domain for text in found.texts] == ["chat", "code", "en", "zh"]
    for text, ids in zip(found.texts, found.ids, strict=True):
        mine = [w.tokens for w in found.windows if w.domain == text.domain]
        assert text.tokens == len(ids)
        assert text.windows == len(mine) == 3
        assert np.concatenate(mine).tolist() == ids[:192].tolist()


def test_calibration_never_sees_what_is_scored() -> None:
    found = corpus()
    for text, ids in zip(found.texts, found.ids, strict=True):
        mine = [w.tokens for w in found.calibration if w.domain == text.domain]
        assert len(mine) == 8
        last = len(ids) // 64
        assert np.concatenate(mine).tolist() == ids[(last - 8) * 64 : last * 64].tolist()
        assert (last - 8) * 64 >= 3 * 64
    (text,) = read_corpus(Checkpoint.open(POCKET), TEXTS[:1], n_ctx=64, n_windows=10**6).texts
    assert text.windows == text.tokens // 64


def test_texts_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "en.txt").write_text("word " * 100, encoding="utf-8")
    paths = [tmp_path / "a" / "en.txt", tmp_path / "b" / "en.txt"]
    found = read_corpus(Checkpoint.open(POCKET), paths, n_ctx=16, n_windows=1)
    assert [text.domain for text in found.texts] == [str(path) for path in paths]


def test_llama_cpp_agrees_on_every_held_out_token(shared: Shared) -> None:
    found = corpus()
    with Engine(shared.pocket(), 64) as engine:
        theirs = [engine.tokenize(content) for content in found.contents]
        assert found.agreement(theirs, engine.bos) == 1.0


def test_a_bos_takes_the_first_place(tmp_path: Path) -> None:
    make_checkpoint(CONFIG | {"num_hidden_layers": 3, "vocab_size": 1024}, tmp_path / "c")
    path = tmp_path / "c" / "tokenizer.json"
    raw = json.loads(path.read_text("utf-8"))
    bos = raw["added_tokens"][0]
    name = bos["content"]
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": name, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {name: {"id": name, "ids": [bos["id"]], "tokens": [name]}},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    settings = tmp_path / "c" / "tokenizer_config.json"
    raw = json.loads(settings.read_text("utf-8"))
    settings.write_text(json.dumps(raw | {"bos_token": name}), encoding="utf-8")
    found = read_corpus(Checkpoint.open(tmp_path / "c"), TEXTS[:1], n_ctx=16, n_windows=2)
    assert found.bos == bos["id"]
    assert [w.tokens[0] for w in found.windows] == [found.bos] * 2
    assert found.windows[1].tokens[1:].tolist() == found.ids[0][17:32].tolist()


def test_agreement_counts_tokens_at_their_places() -> None:
    found = corpus()
    ids = found.ids[0].copy()
    alone = replace(found, ids=[ids])
    assert alone.agreement([ids], found.bos) == 1.0
    other = ids.copy()
    other[5] += 1  # from there on, everything may be elsewhere
    share = alone.agreement([other], found.bos)
    assert 5 / len(ids) <= share < 1.0
    assert alone.agreement([ids[: len(ids) // 2]], found.bos) == pytest.approx(0.5, abs=0.01)
    assert alone.agreement([ids], bos=7) == 0.0


def test_refusals(tmp_path: Path) -> None:
    pocket = Checkpoint.open(POCKET)
    documents = replace(pocket.documents, folder=tmp_path)
    elsewhere = replace(pocket, place=Location(tmp_path), documents=documents)
    with pytest.raises(ConfigError, match="shorter than one window of 100000"):
        read_corpus(pocket, TEXTS, n_ctx=100_000, n_windows=1)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_corpus(pocket, [tmp_path / "nowhere.txt"], n_ctx=16, n_windows=1)
    latin = tmp_path / "latin1.txt"
    latin.write_bytes(b"caf\xe9" * 500)
    with pytest.raises(ConfigError, match="cannot be read as UTF-8 text"):
        read_corpus(pocket, [latin], n_ctx=16, n_windows=1)
    with pytest.raises(TokenizerError):
        read_corpus(elsewhere, TEXTS, n_ctx=16, n_windows=1)
    with pytest.raises(ConfigError, match="name a text") as raised:
        read_corpus(elsewhere, [], n_ctx=16, n_windows=1)
    assert console.hint(raised.value) == " with --text FILE"
