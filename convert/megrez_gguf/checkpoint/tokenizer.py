"""The vocabulary: tokenizer.json and its companions as `tokenizer.*` key-values.

Ids are what the files say, and what the `tokenizers` library makes of them. Where the two differ,
or a companion says another thing, that is refused, or warned about if it changes no text's ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from megrez_gguf.checkpoint.bpe import BPE, read_bpe, steps
from megrez_gguf.checkpoint.chat_templates import read_templates
from megrez_gguf.checkpoint.documents import CONFIG, GENERATION, Documents
from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.checkpoint.tokenizer_judge import judge
from megrez_gguf.errors import TokenizerError
from megrez_gguf.format.writer import KeyValues
from megrez_gguf.text import clip, few

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
# Other forms of a tokenizer, from which transformers makes a tokenizer.json.
_FORMS = ("tokenizer.model", "*.tiktoken", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
# Of a token; int() refuses thousands.
_ID_DIGITS = 10

# Settings of tokenizer_config.json that GGUF has no key for, and what they may change.
_SETTINGS = {
    "add_prefix_space": "some of transformers' classes begin a text with a space, and its first "
    "word has other ids",
    "clean_up_tokenization_spaces": "answers keep the spaces before punctuation",
    "split_special_tokens": "special tokens that a prompt spells are found in it",
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
    llama.cpp would apply differently, ids that collide or are not those that the `tokenizers`
    library gives, more tokens than rows in the embedding, or no end-of-text token.
    """
    return _Builder(documents).build(vocab_size)


@dataclass(frozen=True, slots=True)
class _Added:
    """A token that is found in text before it is split."""

    text: str
    id: int
    special: bool
    where: tuple[str, ...]
    """The flags by which white space and neighbours matter, which llama.cpp does not heed."""


class _Builder:
    def __init__(self, documents: Documents) -> None:
        self.folder = documents.folder
        self.ids = {GENERATION: documents.generation, CONFIG: documents.config}
        self.path = self.folder / TOKENIZER
        if not self.path.exists():
            raise TokenizerError(f"{self.folder}: no {TOKENIZER}{self._other_forms()}")
        names = (TOKENIZER, TOKENIZER_CONFIG, SPECIAL_MAP)
        found = [read_object(self.folder / name, TokenizerError) or {} for name in names]
        self.json, self.config, self.map = found
        self.texts = {TOKENIZER_CONFIG: self.config, SPECIAL_MAP: self.map}
        self.warnings: list[str] = []

    def build(self, vocab_size: int) -> Vocabulary:
        bpe = read_bpe(self.json, self.path)
        self.warnings += bpe.warnings
        templates, warnings = read_templates(self.folder, self.config)
        self.warnings += warnings
        added = self._added_tokens(bpe.vocab)
        self._check_flags(added, templates)
        by_id = self._by_id(bpe.vocab, added, vocab_size)
        numbered = self._numbered(bpe.vocab, added)
        ids = {text: i for i, text in by_id.items()}
        self._check_companions(bpe, ids)
        special = self._special(ids, vocab_size, templates)
        if self._named("bos", ids, warn=False) is None:
            templates = self._without_bos(templates)
        add_bos, add_eos = self._post_processor(special)
        self._check_overlaps(added)
        judge(self.path, bpe, numbered)
        return Vocabulary(
            bpe.pre,
            *self._filled(by_id, self._types(ids, added, special), vocab_size),
            bpe.merges,
            special,
            add_bos,
            add_eos,
            templates,
            vocab_size - 1 - max(by_id, default=-1),
            tuple(dict.fromkeys(self.warnings)),
        )

    def fail(self, reason: str, name: str = TOKENIZER) -> NoReturn:
        raise TokenizerError(f"{self.folder / name}: {reason}")

    def _other_forms(self) -> str:
        found = [p.name for form in _FORMS for p in sorted(self.folder.glob(form))]
        here = f", only {few(found)}" if found else ""
        return (
            f"{here}; save the tokenizer with transformers: AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER), where FOLDER holds all of the model's tokenizer files"
        )

    # --- tokens ---

    def _added_tokens(self, vocab: Mapping[str, int]) -> dict[str, _Added]:
        """Added tokens by text, from tokenizer.json and tokenizer_config.json together."""
        entries = self.json.get("added_tokens") or []
        if not isinstance(entries, list):
            self.fail("added_tokens: expected a list of objects with an id and a content")
        tokens = [_added(e) for e in entries]
        if None in tokens:
            self.fail("added_tokens: expected a list of objects with an id and a content")
        listed = [t for t in tokens if t is not None]
        added = {t.text: t for t in listed}
        if len(added) != len(listed) or len({t.id for t in listed}) != len(listed):
            self.fail("added_tokens: two entries share an id or a text")
        texts = {t.id: t.text for t in listed}
        decoder = self.config.get("added_tokens_decoder")
        for key, entry in decoder.items() if isinstance(decoder, dict) else ():
            known = isinstance(entry, dict) and key.isdecimal() and len(key) <= _ID_DIGITS
            token = _added({**entry, "id": int(key)}) if known else None
            if token is None:
                self.fail(f"added_tokens_decoder: {key!r} is malformed", TOKENIZER_CONFIG)
            other = added.setdefault(token.text, token)
            if texts.get(token.id, token.text) != token.text or other.id != token.id:
                self.fail(
                    f"gives id {key} to {token.text!r}; {TOKENIZER} disagrees", TOKENIZER_CONFIG
                )
        for token in added.values():
            if vocab.get(token.text, token.id) != token.id:
                self.fail(
                    f"added token {token.text!r} has id {token.id}, and id {vocab[token.text]} in "
                    "the vocab"
                )
        if added.pop("", None):
            self.warnings.append("an added token is empty, and was left out, as in tokenizers")
        return added

    def _numbered(self, vocab: Mapping[str, int], added: Mapping[str, _Added]) -> dict[str, int]:
        """Every token of tokenizer.json -> the id that the `tokenizers` library gives it.

        It does not read the ids of added tokens, and counts on from the size of the vocab.
        """
        numbered: dict[str, int] = {}
        for token in added.values():
            following = max(len(vocab), max(numbered.values(), default=-1) + 1)
            numbered[token.text] = vocab.get(token.text, following)
        moved = [t for t in added.values() if numbered[t.text] != t.id]
        ids = [t.id for t in added.values() if t.text not in vocab]
        if moved:
            token, theirs = moved[0], numbered[moved[0].text]
            differs = (
                f"added token {token.text!r} has id {token.id}, and the tokenizers library, which "
                f"numbers added tokens itself, gives it {theirs}"
            )
            # No hole before the token, which the library would close: another order.
            if ids != sorted(ids) or any(numbered[t.text] > t.id for t in moved):
                self.fail(
                    f"{differs}: list the added tokens by their ids, and those with an id below "
                    f"{len(vocab)} in model.vocab"
                )
            self.warnings.append(
                f"{differs}, because there is a hole in the ids before it. The file's ids are "
                "converted. To have the library give them too, list the token in model.vocab"
            )
        listed = {e["content"] for e in self.json.get("added_tokens") or []}
        return {**vocab, **{text: i for text, i in numbered.items() if text in listed}}

    def _check_flags(self, added: Mapping[str, _Added], templates: Mapping[str, str]) -> None:
        for token in added.values():
            if not token.where:
                continue
            flagged = f"added token {token.text!r} has {' and '.join(token.where)}"
            if any(token.text in template for template in templates.values()):
                self.fail(
                    f"{flagged}; llama.cpp ignores that, and ids would differ in every "
                    "conversation, since the chat template writes the token"
                )
            self.warnings.append(
                f"{flagged}, which llama.cpp ignores: ids differ in texts that spell it"
            )

    def _by_id(
        self, vocab: Mapping[str, int], added: Mapping[str, _Added], vocab_size: int
    ) -> dict[int, str]:
        """The tokens by id. There may be holes."""
        by_id: dict[int, str] = {}
        for text, i in [*vocab.items(), *((t, token.id) for t, token in added.items())]:
            other = by_id.setdefault(i, text)
            if other != text:
                self.fail(f"id {i} belongs to both {other!r} and {text!r}")
        count = max(by_id, default=-1) + 1
        if count > vocab_size:
            self.fail(
                f"{count} tokens, by their ids; {CONFIG} has vocab_size = {vocab_size}, the rows "
                "of the embedding. Either the tokenizer is another model's, or tokens were added "
                "and resize_token_embeddings was not called, or not saved. Use the "
                "tokenizer that the weights were trained with"
            )
        if holes := sorted(set(range(count)).difference(by_id)):
            self.warnings.append(
                f"no token has id {few(list(map(str, holes)))}; unused tokens fill the holes"
            )
        for i in [i for i, text in by_id.items() if not text]:
            del by_id[i]
            self.warnings.append(f"token {i} is empty; an unused token takes its place")
        return by_id

    def _types(
        self, ids: Mapping[str, int], added: Mapping[str, _Added], special: Mapping[str, int]
    ) -> dict[int, int]:
        """Types by id. transformers finds every token in texts that a companion calls special."""
        types = dict.fromkeys(ids.values(), NORMAL)
        for token in added.values():
            types[token.id] = CONTROL if token.special else USER_DEFINED
        for name, text in self._called_special():
            if text in ids:
                types[ids[text]] = CONTROL
            else:
                self.warnings.append(f"{name}: special token {text!r} is not a token; left out")
        for key in ("bos", "eos"):
            if self._named(key, ids, warn=False) is not None:
                types[special[key]] = CONTROL
        return types

    def _called_special(self) -> list[tuple[str, str]]:
        """(file, text) of the special tokens that have no name of their own."""
        found: list[tuple[str, str]] = []
        for name, values in self.texts.items():
            for key in ("additional_special_tokens", "extra_special_tokens"):
                listed = values.get(key) or []
                listed = list(listed.values()) if isinstance(listed, dict) else listed
                if not isinstance(listed, list):
                    self.fail(f"{key}: expected a list of tokens", name)
                texts = [e.get("content") if isinstance(e, dict) else e for e in listed]
                for text in texts:
                    if not isinstance(text, str):
                        self.fail(f"{key}: {clip(text)} is not a token", name)
                    found.append((name, text))
        return found

    def _filled(
        self, by_id: Mapping[int, str], types: Mapping[int, int], vocab_size: int
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Texts and types of `vocab_size` tokens, with unused ones where there are none."""
        taken = set(by_id.values())
        tokens: list[str] = []
        for i in range(vocab_size):
            text = by_id.get(i, f"[PAD{i}]")
            while i not in by_id and text in taken:
                text = f"[{text}]"
            tokens.append(text)
        padding = vocab_size - 1 - max(by_id, default=-1)
        if padding:
            self.warnings.append(
                f"the vocabulary was padded by {padding} unused tokens to vocab_size"
            )
        return tuple(tokens), tuple(types.get(i, UNUSED) for i in range(vocab_size))

    def _check_overlaps(self, added: Mapping[str, _Added]) -> None:
        """llama.cpp finds the longest added token first, `tokenizers` the leftmost."""
        starts = {t[:n] for t in added for n in range(1, len(t))}
        for text in added:
            if any(text[n:] in starts for n in range(1, len(text))):
                self.warnings.append(
                    f"added token {text!r} ends like another begins: where both could match, "
                    "llama.cpp takes the longer one and the tokenizer the first one"
                )
                return

    def _check_companions(self, bpe: BPE, ids: Mapping[str, int]) -> None:
        """Settings that GGUF cannot hold, and older files that give way to tokenizer.json."""
        for key, meaning in _SETTINGS.items():
            if self.config.get(key) is True:
                self.warnings.append(
                    f"{TOKENIZER_CONFIG} sets {key}, which llama.cpp does not follow: {meaning}"
                )
        stale = "differs from tokenizer.json, which is followed, as transformers does"
        for name in (ADDED, "vocab.json"):
            for text, i in (read_object(self.folder / name, TokenizerError) or {}).items():
                if ids.get(text) != i:
                    self.warnings.append(f"{name} gives id {clip(i)} to {clip(text)}: it {stale}")
                    break
        merges = self.folder / "merges.txt"
        if merges.is_file():
            lines = merges.read_text(encoding="utf-8", errors="replace").split("\n")
            listed = [x for x in lines if x.strip() and not x.startswith("#version")]
            if tuple(line.rstrip("\r") for line in listed) != bpe.merges:
                self.warnings.append(f"{merges.name} {stale}")

    # --- special tokens ---

    def _special(
        self, ids: Mapping[str, int], vocab_size: int, templates: Mapping[str, str]
    ) -> dict[str, int]:
        special: dict[str, int] = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk")):
            if (i := self._named(key, ids)) is None:
                i = self._by_number(key, vocab_size)
            if i is not None:
                special[name] = i
        ends = [i for i in self._ends(vocab_size) if i != special.get("eos")]
        if "eos" not in special:
            if not ends:
                self.fail(
                    f"no end-of-text token: neither {TOKENIZER_CONFIG} nor {GENERATION} names an "
                    "eos token"
                )
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

    def _named(self, key: str, ids: Mapping[str, int], warn: bool = True) -> int | None:
        """The token that the tokenizer's own files name as `key`."""
        found: dict[str, str] = {}
        for name, values in self.texts.items():
            value = values.get(f"{key}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if text is None:
                continue
            if isinstance(text, str) and text in ids:
                found[name] = text
            elif key in ("bos", "eos"):
                self.fail(f"{key}_token {text!r} is not a token", name)
            elif warn:
                self.warnings.append(
                    f"{name}: {key}_token {text!r} is not a token; it is left out, and no text or "
                    "answer needs it"
                )
        if warn and len(set(found.values())) > 1:
            listed = " and ".join(f"{text!r} in {name}" for name, text in found.items())
            self.warnings.append(f"{key}_token is {listed}; the former is followed")
        return next((ids[text] for text in found.values()), None)

    def _by_number(self, key: str, vocab_size: int) -> int | None:
        for name, values in self.ids.items():
            value = values.get(f"{key}_token_id")
            if type(value) is int and 0 <= value < vocab_size:
                return value
            if value is not None and key != "eos":
                self.warnings.append(
                    f"{name}: {key}_token_id {clip(value)} is not a token id; left out"
                )
        return None

    def _ends(self, vocab_size: int) -> list[int]:
        for name, values in self.ids.items():
            value = values.get("eos_token_id")
            listed = value if isinstance(value, list) else [value]
            if value is not None:
                if any(type(i) is not int or not 0 <= i < vocab_size for i in listed):
                    self.fail(
                        f"eos_token_id {clip(value)}: not a token id, or a list of them; there "
                        f"are {vocab_size} tokens",
                        name,
                    )
                return list(dict.fromkeys(listed))
        return []

    def _without_bos(self, templates: Mapping[str, str]) -> dict[str, str]:
        """Templates that write nothing for the begin of text, as where no file names a token."""
        found = dict(templates)
        for name, template in templates.items():
            if re.search(r"\bbos_token\b", template):
                found[name] = "{% set bos_token = '' %}" + template
                self.warnings.append(
                    f"the chat template {name!r} writes bos_token and no file names one: it was "
                    "made to write nothing, as with transformers, where llama.cpp would write eos"
                )
        return found

    def _post_processor(self, special: Mapping[str, int]) -> tuple[bool, bool]:
        """Whether bos and eos are added around a text."""
        bos = eos = False
        for step in steps(self.json.get("post_processor"), "processors"):
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
        for key, does in (("bos", bos), ("eos", eos)):
            wanted = self.config.get(f"add_{key}_token")
            if isinstance(wanted, bool) and wanted != does:
                self.warnings.append(
                    f"{TOKENIZER_CONFIG} says add_{key}_token = {str(wanted).lower()} and "
                    f"{TOKENIZER} does {'' if does else 'not '}add it; {TOKENIZER} is followed"
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


def _added(entry: Any) -> _Added | None:
    """The added token that `entry` describes; None if it describes none."""
    if not isinstance(entry, dict):
        return None
    text, i = entry.get("content"), entry.get("id")
    if not isinstance(text, str) or type(i) is not int or i < 0:
        return None
    flags = tuple(f for f in ("lstrip", "rstrip", "single_word") if entry.get(f) is True)
    return _Added(text, i, entry.get("special") is True, flags)
