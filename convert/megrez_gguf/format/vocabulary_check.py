"""Is the vocabulary in a file's header one that llama.cpp can be given?

llama.cpp looks tokens up by their text, merges by their parts, and takes ids on trust. What does
not fit together ends a process or, worse, loses text without a word: a piece that is no token is
spelt byte by byte, and bytes that are no tokens either are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_PREFIX = "tokenizer.ggml."
# llama.cpp's token types are 0 to 6, the last is a raw byte, spelt like <0x0A>.
_LAST_TYPE = 6
_BYTE_TYPE = 6
_BYTE = re.compile("<0x[0-9A-F]{2}>")
DECIDING = (
    *("bos", "eos", "eot", "eom", "prefix", "suffix", "middle"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
"""Special tokens that decide what is generated; llama.cpp does without the others."""


def vocabulary_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the vocabulary in the key-values of a file, the worst first.

    Each fault rests on those before: only the first is to be trusted.
    """
    model = values.get(f"{_PREFIX}model")
    if model != "gpt2":
        yield f"{_PREFIX}model is {_shown(model)}, expected 'gpt2': byte-level BPE"
    tokens = values.get(f"{_PREFIX}tokens")
    if not _all(tokens, str) or not tokens:
        yield f"{_PREFIX}tokens is no list of strings"
        return
    yield from _token_faults(tokens)
    yield from _type_faults(tokens, values)
    yield from _merge_faults(tokens, values.get(f"{_PREFIX}merges"))
    yield from _special_faults(len(tokens), values)


def _token_faults(tokens: list[str]) -> Iterator[str]:
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens):
        # The name that llama.cpp gives to an empty one.
        token = token or f"[EMPTY_{number}]"
        if ids.setdefault(token, number) != number:
            yield f"tokens {ids[token]} and {number} are the same: {_shown(token)}"
        if "\0" in token:
            yield f"token {number} has a NUL character: {_shown(token)}"


def _type_faults(tokens: list[str], values: Mapping[str, Any]) -> Iterator[str]:
    for key, kinds in (("token_type", (int,)), ("scores", (int, float))):
        given = values.get(_PREFIX + key)
        if given is not None and not (_all(given, *kinds) and len(given) == len(tokens)):
            found = f"{len(given)} values" if isinstance(given, list) else _shown(given)
            yield f"{_PREFIX}{key} is {found}, expected a number for each of {len(tokens)} tokens"
    for number, kind in enumerate(values.get(f"{_PREFIX}token_type") or ()):
        if not 0 <= kind <= _LAST_TYPE:
            yield f"token {number} has type {kind}, expected 0 to {_LAST_TYPE}"
        if kind == _BYTE_TYPE and not _BYTE.fullmatch(tokens[number]):
            yield f"token {number} is to be a byte, spelt like <0x0A>: {_shown(tokens[number])}"


def _merge_faults(tokens: list[str], merges: object) -> Iterator[str]:
    if not isinstance(merges, list) or not _all(merges, str):
        yield f"{_PREFIX}merges is no list of strings"
        return
    known = set(tokens)
    for number, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (left and space and right) or " " in right:
            yield f"merge {number} is {_shown(merge)}, expected two pieces with a space between"
        for piece in (left, right, left + right):
            if piece not in known:
                yield f"merge {number}, {_shown(merge)}: {_shown(piece)} is no token"


def _special_faults(count: int, values: Mapping[str, Any]) -> Iterator[str]:
    for name in DECIDING:
        key = f"{_PREFIX}{name}_token_id"
        number = values.get(key)
        if number is not None and (type(number) is not int or not 0 <= number < count):
            yield f"{key} is {_shown(number)}, expected one of {count} tokens"
    for name, default in (("bos", True), ("eos", False)):
        adds = values.get(f"{_PREFIX}add_{name}_token", default)
        if adds and values.get(f"{_PREFIX}{name}_token_id") is None:
            yield (
                f"{_PREFIX}add_{name}_token = {str(bool(adds)).lower()} adds a token, and "
                f"{_PREFIX}{name}_token_id names none"
            )
    if values.get(f"{_PREFIX}eos_token_id") is None:
        yield f"{_PREFIX}eos_token_id is missing: nothing would end an answer"
    suppressed = values.get(f"{_PREFIX}suppress_tokens", [])
    if not _all(suppressed, int) or not all(0 <= number < count for number in suppressed):
        yield f"{_PREFIX}suppress_tokens names others than the {count} tokens"


def _all(given: object, *kinds: type) -> bool:
    """A list of values of these types, and of no type derived from them: True is no number."""
    return isinstance(given, list) and all(type(one) in kinds for one in given)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
