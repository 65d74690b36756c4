"""The `tokenizers` library as the judge of a vocabulary, where it is installed.

What it makes of a tokenizer.json is what the model was trained on, whatever the file seems to say.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.bpe import ALPHABET, BPE
from megrez_gguf.errors import TokenizerError
from megrez_gguf.storage.opening import opened
from megrez_gguf.text import clip

# Tokens that are cut both ways, alone and in pairs: with 128,880 tokens a tenth of the time it
# takes the library to read the file.
_WORDS = 400


def judge(path: Path, bpe: BPE, ids: Mapping[str, int]) -> None:
    """Compare the tokenizer.json at `path`, as `bpe` and `ids` (token -> id), with the library.

    Compared are all ids, and the tokens of words made of the vocabulary's own tokens, as llama.cpp
    would merge them. Nothing is compared without the library.

    Raises TokenizerError: the library refuses the file, or differs.
    """
    try:
        tokenizer = library_tokenizer(path)
    except ImportError:
        return
    library = _library()
    theirs = tokenizer.get_vocab(with_added_tokens=True)
    if different := [t for t in {**ids, **theirs} if theirs.get(t) != ids.get(t)]:
        token = different[0]
        raise TokenizerError(
            f"{path}: {library} gives {clip(token)} {_id(theirs.get(token))}, and read as it "
            f"stands the file gives it {_id(ids.get(token))}"
        )
    merge = _Merge(bpe)
    for word in _words(bpe):
        expected = [token.id for token in tokenizer.model.tokenize(word)]
        if (found := merge(word)) != expected:
            raise TokenizerError(
                f"{path}: {library} cuts {clip(word)} into tokens {expected}, and llama.cpp would "
                f"cut it into {found}"
            )


def library_tokenizer(path: Path) -> Any:
    """The library's `Tokenizer` of the tokenizer.json at `path`, which cuts and pads nothing.

    Raises ImportError without the library; TokenizerError: the library refuses the file.
    """
    from tokenizers import Tokenizer

    with opened(path, TokenizerError) as (file, _):
        raw = file.read().removeprefix(codecs.BOM_UTF8)  # which changes nothing
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # a panic of the library is no Exception
        raise TokenizerError(
            f"{path}: {_library()} refuses it: {e}; save it again with a current transformers, or "
            "install a current tokenizers if this one is older than the file"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _library() -> str:
    return f"the tokenizers library ({metadata.version('tokenizers')})"


def _id(i: int | None) -> str:
    return "no id" if i is None else f"id {i}"


def _words(bpe: BPE) -> Iterator[str]:
    """Every byte, and some tokens of the vocabulary, each alone and before another one."""
    yield from sorted(ALPHABET)
    spelled = [t for t in bpe.vocab if t and ALPHABET.issuperset(t)]
    some = spelled[:: len(spelled) // _WORDS + 1]
    yield from some
    yield from map("".join, pairwise(some))


class _Merge:
    """A word's tokens, as llama.cpp makes them of what the GGUF will say."""

    def __init__(self, bpe: BPE) -> None:
        self.vocab, self.ignore_merges = bpe.vocab, bpe.ignore_merges
        self.ranks = {merge: rank for rank, merge in enumerate(bpe.merges)}

    def __call__(self, word: str) -> list[int]:
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        parts = list(word)
        while len(parts) > 1:
            rank, at = min((self._rank(pair), i) for i, pair in enumerate(pairwise(parts)))
            if rank == len(self.ranks):
                break
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        # What has no token is passed over, as the library does without model.unk_token.
        return [self.vocab[part] for part in parts if part in self.vocab]

    def _rank(self, pair: Sequence[str]) -> int:
        return self.ranks.get(" ".join(pair), len(self.ranks))
