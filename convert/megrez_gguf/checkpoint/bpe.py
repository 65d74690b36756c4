"""The byte-level BPE in tokenizer.json: how it splits text, and what it merges.

llama.cpp re-implements byte-level BPE with a fixed list of pre-tokenizers, so the one to name is
chosen by what tokenizer.json *says*, and anything llama.cpp would do differently is refused or, if
it only concerns unusual text, warned about.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megrez_gguf.errors import TokenizerError
from megrez_gguf.text import clip, few

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_WORDS_SPELT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (splitting expressions in order, ignore_merges) -> the name under which llama.cpp does the same.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((rf"{_WORDS}|\p{{N}}|{_REST}",), False): "megrez",
    ((rf"{_WORDS_SPELT}|\p{{N}}|{_REST}",), False): "megrez",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_WORDS_SPELT}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",), False): "smaug-bpe",
    ((rf"{_WORDS_SPELT}|\p{{N}}{{1,3}}|{_REST}",), False): "smaug-bpe",
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
}


# Settings of the model that mean something else than what llama.cpp does.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dropout": (None, 0, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False, True),
}
# Settings that only mean something for a character that is not in the vocabulary.
_FOR_UNKNOWN: dict[str, tuple[Any, ...]] = {
    "unk_token": (None,),
    "fuse_unk": (None, False),
    "byte_fallback": (None, False),
}
# The characters that byte-level BPE writes for bytes: GPT-2's table.
ALPHABET = frozenset(
    [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x144))]
)


@dataclass(frozen=True, slots=True)
class BPE:
    """What tokenizer.json says of ordinary text, in llama.cpp's terms."""

    pre: str
    vocab: Mapping[str, int]
    merges: tuple[str, ...]
    """Each as "left right", the first one to be applied first."""
    ignore_merges: bool
    warnings: tuple[str, ...]


def read_bpe(raw: Mapping[str, Any], path: Path) -> BPE:
    """The model in `raw`, which is what the tokenizer.json at `path` says.

    Raises TokenizerError: no byte-level BPE, one that llama.cpp would apply differently, or damage.
    """
    return _Reader(raw, path).read()


class _Reader:
    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path
        self.warnings: list[str] = []

    def read(self) -> BPE:
        self._check_around()
        model = self.raw.get("model")
        # The library tells a model without a type by its fields.
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else model
            self.fail(f"the model is {clip(kind)}; only byte-level BPE is supported")
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
            self.fail("model.vocab: expected an object of token -> id")
        if below := [i for i in vocab.values() if i < 0]:
            self.fail(f"model.vocab: {below[0]} is no id")
        self._check_settings(model, vocab)
        ignore_merges = model.get("ignore_merges") is True
        pre = self._pre_tokenizer(ignore_merges)
        merges = self._merges(model.get("merges"), vocab)
        return BPE(pre, vocab, merges, ignore_merges, tuple(self.warnings))

    def fail(self, reason: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {reason}")

    def _check_settings(self, model: Mapping[str, Any], vocab: Mapping[str, int]) -> None:
        missing = sorted(ALPHABET.difference(vocab))
        for name, allowed in {**_NEUTRAL, **_FOR_UNKNOWN}.items():
            value = model.get(name)
            if value in allowed:
                continue
            if name in _NEUTRAL:
                self.fail(f"model.{name} = {clip(value)} is not supported by llama.cpp's BPE")
            if missing:
                self.fail(
                    f"model.{name} = {clip(value)} is not supported by llama.cpp's BPE, and "
                    f"matters because no token stands for the byte {few(missing)}"
                )
            self.warnings.append(
                f"model.{name} = {clip(value)} has no effect, because every byte has a token"
            )

    def _check_around(self) -> None:
        """What is done to text before it is split, and to ids afterwards."""
        for step in steps(self.raw.get("normalizer"), "normalizers"):
            kind = step.get("type")
            if kind != "NFC":
                self.fail(f"normalizer {kind!r}: llama.cpp does not normalise; ids would differ")
            self.warnings.append(
                "the tokenizer normalises text to NFC and llama.cpp does not: text in another "
                "form (decomposed accents) gets other ids unless it is normalised first"
            )
        for name in ("truncation", "padding"):
            if self.raw.get(name) is not None:
                self.warnings.append(
                    f"tokenizer.json sets {name}, which llama.cpp and transformers leave to who "
                    "asks: not converted"
                )

    # --- splitting ---

    def _pre_tokenizer(self, ignore_merges: bool) -> str:
        expressions: list[str] = []
        found = steps(self.raw.get("pre_tokenizer"), "pretokenizers")
        for i, step in enumerate(found):
            kind = step.get("type")
            if kind == "Split":
                expressions.append(self._split(step))
            elif kind == "Digits" and step.get("individual_digits") is True:
                expressions.append(r"\p{N}")
            elif kind == "ByteLevel" and i == len(found) - 1:
                if step.get("add_prefix_space") is True:
                    self.fail("pre_tokenizer: add_prefix_space is not supported")
                if step.get("use_regex", True) is True:
                    expressions.append(_GPT2)
            else:
                self.fail(f"pre_tokenizer: step {kind!r} is not supported")
        if not found or found[-1].get("type") != "ByteLevel":
            self.fail("pre_tokenizer: does not end in ByteLevel; only byte-level BPE is supported")
        pre = PRE_TOKENIZERS.get((tuple(expressions), ignore_merges))
        if pre is None:
            self.fail(
                f"pre_tokenizer: llama.cpp has none known to split like {expressions!r} with "
                f"ignore_merges {str(ignore_merges).lower()}"
            )
        return pre

    def _split(self, step: Mapping[str, Any]) -> str:
        pattern = step.get("pattern")
        pattern = pattern if isinstance(pattern, dict) else {}
        literal, regex = pattern.get("String"), pattern.get("Regex")
        if isinstance(literal, str):
            regex = re.escape(literal)
        behavior, invert = step.get("behavior"), step.get("invert") is True
        # Isolated keeps matches and what lies between; for expressions that match everything,
        # keeping only the matches (Removed, inverted) is the same.
        if not isinstance(regex, str) or (behavior, invert) not in (
            ("Isolated", False),
            ("Removed", True),
        ):
            self.fail(f"pre_tokenizer: Split {clip(pattern)} ({behavior}) is not supported")
        return regex.replace("\r", r"\r").replace("\n", r"\n")

    # --- merging ---

    def _merges(self, raw: Any, vocab: Mapping[str, int]) -> tuple[str, ...]:
        if not isinstance(raw, list):
            self.fail("model.merges: expected a list")
        merges: list[str] = []
        unwritable: list[str] = []
        for left, right in self._pairs(raw):
            if left not in vocab or right not in vocab or left + right not in vocab:
                self.fail(
                    f"model.merges: {clip([left, right])} names or makes a token that is not in "
                    "the vocab"
                )
            if " " in left + right:
                unwritable.append(left + right)
            else:
                merges.append(f"{left} {right}")
        if unwritable:
            self.warnings.append(
                f"{len(unwritable)} merges hold a space, which no byte is written as, and were "
                f"left out: they make {few([repr(token) for token in unwritable])}"
            )
        # The library takes the last of equal pairs, llama.cpp the first.
        unique = tuple(reversed(dict.fromkeys(reversed(merges))))
        if twice := len(merges) - len(unique):
            self.warnings.append(
                f"{twice} merges are listed twice; the later place counts, as in tokenizers"
            )
        return unique

    def _pairs(self, raw: list[Any]) -> Iterator[tuple[str, str]]:
        for entry in raw:
            if isinstance(entry, str) and entry.startswith("#version"):
                continue  # the first line of a merges.txt, which the library passes over too
            pair = entry.split(" ") if isinstance(entry, str) else entry
            if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
                self.fail(f"model.merges: {clip(entry)} is not a pair of tokens")
            yield pair[0], pair[1]


def steps(node: Any, children: str) -> list[dict[str, Any]]:
    """Flatten a `Sequence` of normalizers, pre-tokenizers or post-processors."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    listed = node.get(children)
    listed = listed if isinstance(listed, list) else []
    return [step for child in listed for step in steps(child, children)]
