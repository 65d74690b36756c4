"""The vocabulary: tokenizer.json and its companions as `tokenizer.*` key-values.

llama.cpp re-implements byte-level BPE with a fixed list of pre-tokenizers, so the one to name is
chosen by what tokenizer.json *says*, and anything llama.cpp would do differently is refused or, if
it only concerns unusual text, warned about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.errors import TokenizerError
from megrez_gguf.format.writer import KeyValues

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What the tokenizer files say, in llama.cpp's terms."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    special: Mapping[str, int]
    """`bos`, `eos`, `eot`, `eom`, `padding`, `unknown` -> token id; only those that exist."""
    add_bos: bool
    add_eos: bool
    templates: Mapping[str, str]
    """Chat templates by name; the usual one is "default"."""
    padding: int
    """How many tokens at the end only fill the vocabulary up to the embedding's rows."""
    warnings: tuple[str, ...]

    def key_values(self) -> KeyValues:
        values: dict[str, Any] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": self.pre,
            "tokenizer.ggml.tokens": list(self.tokens),
            "tokenizer.ggml.token_type": list(self.types),
            "tokenizer.ggml.merges": list(self.merges),
            **{f"tokenizer.ggml.{name}_token_id": i for name, i in self.special.items()},
            "tokenizer.ggml.add_bos_token": self.add_bos,
            "tokenizer.ggml.add_eos_token": self.add_eos,
        }
        named = [n for n in self.templates if n != "default"]
        if "default" in self.templates:
            values["tokenizer.chat_template"] = self.templates["default"]
        if named:
            values["tokenizer.chat_templates"] = named
            values |= {f"tokenizer.chat_template.{n}": self.templates[n] for n in named}
        return values


def read_vocabulary(documents: Documents, vocab_size: int) -> Vocabulary:
    """The tokenizer in the folder of `documents`, padded to `vocab_size` tokens.

    config.json and generation_config.json may name the special tokens that the tokenizer's own
    files do not.

    Raises TokenizerError: a file missing or damaged, a tokenizer that is no byte-level BPE or that
    llama.cpp would apply differently, ids that collide or leave holes, more tokens than rows in
    the embedding, or no end-of-text token.
    """
    return _Builder(documents).build(vocab_size)


class _Builder:
    def __init__(self, documents: Documents) -> None:
        self.folder = documents.folder
        self.model_config, self.generation = documents.config, documents.generation
        self.path = self.folder / "tokenizer.json"
        self.json, self.config, self.map = self._objects()
        self.warnings: list[str] = []

    def build(self, vocab_size: int) -> Vocabulary:
        self._check_normalizer()
        vocab, merges, ignore_merges = self._model()
        pre = self._pre_tokenizer(ignore_merges)
        added = self._added_tokens(vocab)
        tokens, types = self._tokens(vocab, added, vocab_size)
        ids = {t: i for i, t in enumerate(tokens)}
        templates = self._templates()
        special = self._special(ids, added, templates)
        add_bos, add_eos = self._post_processor(special)
        self._check_overlaps(added)
        padding = vocab_size - len(tokens)
        if padding:
            self.warnings.append(
                f"the vocabulary was padded by {padding} unused tokens to vocab_size"
            )
        tokens += self._padding(ids, len(tokens), vocab_size)
        types += [UNUSED] * padding
        return Vocabulary(
            pre,
            tuple(tokens),
            tuple(types),
            tuple(merges),
            special,
            add_bos,
            add_eos,
            templates,
            padding,
            tuple(self.warnings),
        )

    # --- reading ---

    def fail(self, reason: str) -> NoReturn:
        raise TokenizerError(f"{self.path}: {reason}")

    def _objects(self) -> list[dict[str, Any]]:
        """The tokenizer's own files; empty where one is missing that may be."""
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        found = [read_object(self.folder / name, TokenizerError) for name in names]
        if found[0] is None:
            raise TokenizerError(
                f"{self.folder}: no {names[0]}; save the tokenizer with transformers' fast "
                "tokenizer class first"
            )
        return [raw or {} for raw in found]

    def _model(self) -> tuple[dict[str, int], list[str], bool]:
        """Vocabulary, merges as "left right", ignore_merges."""
        model = self.json.get("model")
        if not isinstance(model, dict) or model.get("type") != "BPE":
            kind = model.get("type") if isinstance(model, dict) else model
            self.fail(f"the model is {kind!r}; only byte-level BPE is supported")
        neutral: dict[str, tuple[Any, ...]] = {
            "dropout": (None, 0, 0.0),
            "unk_token": (None,),
            "continuing_subword_prefix": (None, ""),
            "end_of_word_suffix": (None, ""),
            "fuse_unk": (None, False),
            "byte_fallback": (None, False),
        }
        for name, allowed in neutral.items():
            if model.get(name) not in allowed:
                self.fail(f"model.{name} = {model[name]!r} is not supported by llama.cpp's BPE")
        vocab = model.get("vocab")
        if not isinstance(vocab, dict) or not all(type(i) is int for i in vocab.values()):
            self.fail("model.vocab: expected an object of token -> id")
        return vocab, self._merges(model.get("merges"), vocab), model.get("ignore_merges") is True

    def _merges(self, raw: Any, vocab: Mapping[str, int]) -> list[str]:
        if not isinstance(raw, list):
            self.fail("model.merges: expected a list")
        merges: list[str] = []
        for entry in raw:
            pair = entry.split(" ") if isinstance(entry, str) else entry
            if not isinstance(pair, list) or len(pair) != 2:
                self.fail(f"model.merges: {entry!r} is not a pair of tokens")
            left, right = pair
            if left not in vocab or right not in vocab or left + right not in vocab:
                self.fail(
                    f"model.merges: {entry!r} names or makes a token that is not in the vocab"
                )
            if " " in left or " " in right:
                self.fail(f"model.merges: {entry!r} holds a space, which GGUF cannot express")
            merges.append(f"{left} {right}")
        if len(set(merges)) != len(merges):
            self.fail("model.merges: the same pair is listed twice")
        return merges

    def _check_normalizer(self) -> None:
        for step in _steps(self.json.get("normalizer"), "normalizers"):
            kind = step.get("type")
            if kind != "NFC":
                self.fail(f"normalizer {kind!r}: llama.cpp does not normalise; ids would differ")
            self.warnings.append(
                "the tokenizer normalises text to NFC and llama.cpp does not: text in another "
                "form (decomposed accents) gets other ids unless it is normalised first"
            )

    def _pre_tokenizer(self, ignore_merges: bool) -> str:
        expressions: list[str] = []
        steps = _steps(self.json.get("pre_tokenizer"), "pretokenizers")
        for i, step in enumerate(steps):
            kind = step.get("type")
            if kind == "Split":
                expressions.append(self._split(step))
            elif kind == "Digits" and step.get("individual_digits") is True:
                expressions.append(r"\p{N}")
            elif kind == "ByteLevel" and i == len(steps) - 1:
                if step.get("add_prefix_space") is True:
                    self.fail("pre_tokenizer: add_prefix_space is not supported")
                if step.get("use_regex", True) is True:
                    expressions.append(_GPT2)
            else:
                self.fail(f"pre_tokenizer: step {kind!r} is not supported")
        if not steps or steps[-1].get("type") != "ByteLevel":
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
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        behavior, invert = step.get("behavior"), step.get("invert") is True
        # Isolated keeps matches and what lies between; for expressions that match everything,
        # keeping only the matches (Removed, inverted) is the same.
        if not isinstance(regex, str) or (behavior, invert) not in (
            ("Isolated", False),
            ("Removed", True),
        ):
            self.fail(f"pre_tokenizer: Split {pattern!r} ({behavior}) is not supported")
        return regex.replace("\r", r"\r").replace("\n", r"\n")

    # --- tokens ---

    def _added_tokens(self, vocab: Mapping[str, int]) -> dict[str, dict[str, Any]]:
        """Added tokens by text, from tokenizer.json and tokenizer_config.json together."""
        entries = self.json.get("added_tokens") or []
        if not isinstance(entries, list) or not all(map(_is_added, entries)):
            self.fail("added_tokens: expected a list of objects with an id and a content")
        added = {e["content"]: e for e in entries}
        if len(added) != len(entries) or len({e["id"] for e in entries}) != len(entries):
            self.fail("added_tokens: two entries share an id or a text")
        texts = {e["id"]: e["content"] for e in entries}
        decoder = self.config.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            entry = {**entry, "id": int(key)} if isinstance(entry, dict) and key.isdecimal() else {}
            if not _is_added(entry):
                self.fail(f"tokenizer_config.json: added_tokens_decoder: {key!r} is malformed")
            text = entry["content"]
            known = added.get(text)
            if texts.get(entry["id"], text) != text or (known and known["id"] != entry["id"]):
                self.fail(
                    f"tokenizer_config.json gives id {key} to {text!r}; tokenizer.json disagrees"
                )
            added.setdefault(text, entry)
        for text, entry in added.items():
            if vocab.get(text, entry["id"]) != entry["id"]:
                self.fail(
                    f"added token {text!r} has id {entry['id']}, and id {vocab[text]} in the vocab"
                )
            for flag in ("lstrip", "rstrip", "single_word"):
                if entry.get(flag) is True:
                    self.fail(
                        f"added token {text!r} has {flag}; llama.cpp ignores that and ids would "
                        "differ"
                    )
        return added

    def _tokens(
        self, vocab: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], vocab_size: int
    ) -> tuple[list[str], list[int]]:
        by_id: dict[int, str] = {}
        for text, i in [*vocab.items(), *((t, e["id"]) for t, e in added.items())]:
            other = by_id.setdefault(i, text)
            if other != text:
                self.fail(f"id {i} belongs to both {other!r} and {text!r}")
        count = len(by_id)
        if holes := [i for i in range(count) if i not in by_id]:
            self.fail(
                f"no token has id {holes[0]}, and there are ids beyond; ids must be contiguous"
            )
        if count > vocab_size:
            self.fail(f"{count} tokens; config.json has vocab_size = {vocab_size}")
        tokens = [by_id[i] for i in range(count)]
        if "" in by_id.values():
            self.fail("a token is empty, which llama.cpp does not support")
        types = [
            (CONTROL if added[t].get("special") is True else USER_DEFINED) if t in added else NORMAL
            for t in tokens
        ]
        return tokens, types

    @staticmethod
    def _padding(ids: Mapping[str, int], start: int, end: int) -> list[str]:
        names = []
        for i in range(start, end):
            name = f"[PAD{i}]"
            while name in ids:
                name = f"[{name}]"
            names.append(name)
        return names

    def _check_overlaps(self, added: Mapping[str, Mapping[str, Any]]) -> None:
        """llama.cpp finds the longest added token first, `tokenizers` the leftmost."""
        starts = {t[:n] for t in added for n in range(1, len(t))}
        for text in added:
            if any(text[n:] in starts for n in range(1, len(text))):
                self.warnings.append(
                    f"added token {text!r} ends like another begins: where both could match, "
                    "llama.cpp takes the longer one and the tokenizer the first one"
                )
                return

    # --- special tokens ---

    def _special(
        self, ids: Mapping[str, int], added: Mapping[str, Any], templates: Mapping[str, str]
    ) -> dict[str, int]:
        special: dict[str, int] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
            if (i := self._named(key, ids)) is not None:
                special[name] = i
        ends = [i for i in self._ends(len(ids)) if i != special.get("eos")]
        if "eos" not in special:
            if not ends:
                self.fail("no end-of-text token: neither tokenizer_config.json nor "
                          "generation_config.json names an eos token")  # fmt: skip
            special["eos"] = ends.pop(0)
        # The chat template's end of turn stops an answer too, whatever the lists forgot.
        turn_end = ids.get("<|turn_end|>")
        in_template = "<|turn_end|>" in templates.get("default", "")
        if turn_end is not None and in_template and turn_end != special["eos"]:
            ends = [turn_end, *(i for i in ends if i != turn_end)]
        for name, i in zip(("eot", "eom"), ends, strict=False):
            special[name] = i
        if len(ends) > 2:
            self.warnings.append(
                f"{len(ends) + 1} tokens end a generation and GGUF has room for 3; left out: "
                f"{ends[2:]}"
            )
        # llama.cpp takes token 11 for the begin of text where none is named.
        special.setdefault("bos", special["eos"])
        return special

    def _named(self, key: str, ids: Mapping[str, int]) -> int | None:
        for named, name in ((self.config, "tokenizer_config"), (self.map, "special_tokens_map")):
            value = named.get(f"{key}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if not isinstance(text, str) or text not in ids:
                self.fail(f"{name}.json: {key}_token {text!r} is not a token")
            return ids[text]
        for source in (self.generation, self.model_config):
            value = source.get(f"{key}_token_id")
            if type(value) is int and 0 <= value < len(ids):
                return value
        return None

    def _ends(self, count: int) -> list[int]:
        for source in (self.generation, self.model_config):
            value = source.get("eos_token_id")
            listed = value if isinstance(value, list) else [value]
            if value is not None:
                if any(type(i) is not int or not 0 <= i < count for i in listed):
                    self.fail(f"eos_token_id {value!r}: not a token id, or a list of them")
                return list(dict.fromkeys(listed))
        return []

    def _post_processor(self, special: Mapping[str, int]) -> tuple[bool, bool]:
        """Whether bos and eos are added around a text."""
        bos = eos = False
        for step in _steps(self.json.get("post_processor"), "processors"):
            kind = step.get("type")
            if kind == "ByteLevel":
                continue
            if kind != "TemplateProcessing":
                self.fail(f"post_processor: {kind!r} is not supported")
            known = step.get("special_tokens")
            known = known if isinstance(known, dict) else {}
            before, after = self._template_ids(step.get("single"), known)
            if before not in ([], [special["bos"]]) or after not in ([], [special["eos"]]):
                self.fail(
                    "post_processor: adds other tokens than bos before and eos after the text"
                )
            bos, eos = bos or bool(before), eos or bool(after)
        wanted = self.config.get("add_bos_token")
        if isinstance(wanted, bool) and wanted != bos:
            self.warnings.append(
                f"tokenizer_config.json says add_bos_token = {str(wanted).lower()} and "
                f"tokenizer.json does {'' if bos else 'not '}add it; tokenizer.json is followed"
            )
        return bos, eos

    def _template_ids(self, single: Any, known: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        before: list[int] = []
        after: list[int] = []
        side = before
        try:
            for piece in single:
                if "Sequence" in piece:
                    side = after
                else:
                    side.extend(known[piece["SpecialToken"]["id"]]["ids"])
        except (TypeError, KeyError):
            self.fail("post_processor: TemplateProcessing is malformed")
        return before, after

    def _templates(self) -> dict[str, str]:
        """Chat templates: a .jinja file wins over a .json file wins over tokenizer_config.json."""
        path = self.folder / "chat_template.jinja"
        try:
            return {"default": path.read_text(encoding="utf-8")}
        except FileNotFoundError:
            pass
        except (OSError, UnicodeDecodeError) as e:
            raise TokenizerError(f"{path}: cannot be read: {e}") from None
        raw = (read_object(self.folder / "chat_template.json", TokenizerError) or {}).get(
            "chat_template"
        )
        raw = raw or self.config.get("chat_template")
        if raw is None:
            self.warnings.append("the checkpoint has no chat template")
            return {}
        if isinstance(raw, str):
            return {"default": raw}
        entries = [e if isinstance(e, dict) else {} for e in raw] if isinstance(raw, list) else [{}]
        if not all(isinstance(e.get(k), str) for e in entries for k in ("name", "template")):
            self.fail("chat_template: expected a string, or a list of {name, template}")
        return {re.sub(r"\W", "_", e["name"]): e["template"] for e in entries}


def _steps(node: Any, children: str) -> list[dict[str, Any]]:
    """Flatten a `Sequence` of normalizers, pre-tokenizers or post-processors."""
    if not isinstance(node, dict):
        return []
    if node.get("type") != "Sequence":
        return [node]
    return [s for child in node.get(children) or [] for s in _steps(child, children)]


def _is_added(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
        and type(entry.get("id")) is int
        and entry["id"] >= 0
    )
