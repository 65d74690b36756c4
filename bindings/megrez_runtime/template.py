"""Conversations as tokens: the file's own chat template, and text that stays text.

What a template does with a message is its own business: many trim it, and many drop the reasoning
from earlier answers. But only the template may produce control tokens, so a user who types
`<|turn_end|>` sends those eleven characters and does not end the turn. The conversation is rendered
as it is, except that private characters stand for those that could begin a control token, until the
prompt is cut at the control tokens that the template itself wrote.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Literal

from megrez_gguf.errors import GGUFError
from megrez_llama.patched import require_patched
from megrez_llama.pieces import piece

if TYPE_CHECKING:
    from llama_cpp import Llama

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said, as text and as tokens; an answer's are those it was drawn as."""

    role: Role
    text: str
    tokens: tuple[int, ...]


class ChatTemplate:
    """The chat template of a loaded model, and the tokens around it.

    Raises GGUFError when the file has none, or one that is no Jinja, that cannot render a plain
    conversation with a system prompt or without, or that leaves out the question.
    """

    def __init__(self, llm: Llama) -> None:
        llama_cpp = require_patched()
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        self._llm, self._c = llm, llama_cpp
        self._vocab = llama_cpp.llama_model_get_vocab(llm.model)
        source = llm.metadata.get("tokenizer.chat_template")
        if not source:
            raise GGUFError(f"{llm.model_path}: no chat template in this file; it cannot chat")
        bos = llm.token_bos()
        self._bos = [bos] if llama_cpp.llama_vocab_get_add_bos(self._vocab) and bos >= 0 else []
        try:
            self._formatter = Jinja2ChatFormatter(
                template=source, eos_token=self._text(llm.token_eos()), bos_token=self._text(bos)
            )
        except Exception as e:  # the compiler evaluates constants, which may raise anything
            line = f"line {e.lineno}: " if hasattr(e, "lineno") else ""
            raise self._refused(f"is not valid Jinja: {line}{e}") from None
        control = self._c.LLAMA_TOKEN_ATTR_CONTROL
        self._control = {self._text(i) for i in range(llm.n_vocab()) if self._attr(i) & control}
        self._control.discard("")
        self._defined: set[str] = set()
        # Some templates take a message as a list of parts, and overlook one that is a text.
        self._in_parts = False
        try:
            self._turn_end = self._probe()
        except GGUFError as e:
            self._in_parts = True
            try:
                self._turn_end = self._probe()
            except GGUFError:
                raise e from None
        # Control tokens are never read from plain text, user-defined ones always are: those that
        # the template writes are kept from forming by a seam behind their first character.
        self._seams = _any_of(self._defined, r"(?<={})(?={})")
        self._written = re.compile(f"({_any_of(self._control | self._defined).pattern})")

    def message(self, role: Role, text: str) -> Message:
        """`text` as plain text, whatever it spells. Lone surrogates become question marks."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return Message(role, text, tuple(self._plain(text)))

    def encode(self, messages: Sequence[Message], opened: bool = True) -> list[int]:
        """Token ids of the conversation; `opened` leaves it where the assistant speaks next.

        An answer keeps the tokens it was drawn as, unless the template edits it. Raises GGUFError
        when the template refuses the conversation.
        """
        veil, texts, prompt = self._veiled(messages, opened)
        ids: list[int] = []
        end = 0
        for start, stop, i in self._whole_answers(messages, texts, prompt, opened):
            ids += [*self._cut(prompt[end:start], veil), *messages[i].tokens]
            end = stop
        ids += self._cut(prompt[end:], veil)
        return ids if ids[:1] == self._bos else self._bos + ids

    def ends(self, token: int) -> bool:
        """Whether `token` ends an answer: the file's end tokens, and the template's turn end."""
        return token == self._turn_end or bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for a control token."""
        return piece(self._vocab, token)

    # --- rendering ---

    def _probe(self) -> int | None:
        """Learn from samples which tokens the template writes; returns the one that ends a turn.

        A template may demand a system prompt or refuse a second question, so it need not take all.
        """
        turns: list[tuple[list[Role], bool]] = [
            (["user", "assistant", "user"], True),
            (["user"], True),
            (["user", "assistant"], False),
        ]
        user_defined = self._c.LLAMA_TOKEN_ATTR_USER_DEFINED
        special = self._c.LLAMA_TOKEN_ATTR_CONTROL | user_defined
        refusals: list[GGUFError] = []
        ends: list[int] = []
        for roles, opened in [*turns, *((["system", *roles], o) for roles, o in turns)]:
            # Digits, because a template may change the case of letters.
            said = [str(secrets.randbits(64)) for _ in roles]
            messages = [Message(role, t, ()) for role, t in zip(roles, said, strict=True)]
            try:
                prompt = self._render(messages, said, opened)
                another = self._render(messages, [*said[:-1], said[-1][::-1] + "0"], opened)
            except GGUFError as e:
                refusals.append(e)
                continue
            if prompt == another:
                raise self._refused(f"leaves out what the {roles[-1]} said last")
            defined = (
                i for i in self._tokens(prompt, special=True) if self._attr(i) & user_defined
            )
            self._defined |= {t for t in map(self._text, defined) if len(t) > 1 and not t.isspace()}
            if "assistant" in roles:
                _, _, closing = prompt.partition(said[roles.index("assistant")])
                ends += self._tokens(closing, special=True)[:1]
        if len(refusals) == 2 * len(turns):
            raise refusals[0]
        return next((i for i in ends if self._attr(i) & special), None)

    def _render(self, messages: Sequence[Message], texts: Sequence[str], opened: bool) -> str:
        said = [
            {"role": m.role, "content": [{"type": "text", "text": t}] if self._in_parts else t}
            for m, t in zip(messages, texts, strict=True)
        ]
        self._formatter.add_generation_prompt = opened
        try:
            prompt: str = self._formatter(messages=said).prompt
        except Exception as e:  # whatever the code of a template may raise
            raise self._refused(f"refuses the conversation: {e}") from None
        return prompt

    def _veiled(self, messages: Sequence[Message], opened: bool) -> tuple[_Veil, list[str], str]:
        """Texts that spell no control token, and the prompt that the template makes of them.

        The template has to see the tags around an answer's reasoning to drop it, and they may be
        tokens. Of answers as much is covered as changes nothing in what it writes.
        """
        every = self._control | self._defined
        veil = _Veil(every, [m.text for m in messages])
        answers = {m.text: self._drawn(m) for m in messages if m.role == "assistant"}

        def rendered(cover: Callable[[str], str]) -> tuple[list[str], str]:
            texts = [
                "".join(part if drawn else cover(part) for part, drawn in answers[m.text])
                if m.role == "assistant"
                else veil.over(m.text)
                for m in messages
            ]
            return texts, self._render(messages, texts, opened)

        spelled = sorted(t for t in self._defined if any(t in answer for answer in answers))
        hidden = every.difference(spelled)
        chosen = rendered(partial(veil.over_tokens, tokens=hidden))
        meant = veil.lifted(chosen[1])
        more = rendered(veil.over)
        if veil.lifted(more[1]) == meant:
            return veil, *more
        for token in spelled:
            more = rendered(partial(veil.over_tokens, tokens=hidden | {token}))
            if veil.lifted(more[1]) == meant:
                hidden.add(token)
                chosen = more
        return veil, *chosen

    def _drawn(self, answer: Message) -> list[tuple[str, bool]]:
        """The text of `answer` in parts, and which of them it was given as a user-defined token."""
        runs = groupby(answer.tokens, lambda i: self._text(i) in self._defined)
        parts = [(b"".join(map(self.piece, run)).decode("utf-8", "replace"), d) for d, run in runs]
        whole = "".join(part for part, _ in parts) == answer.text
        return parts if whole else [(answer.text, False)]

    def _whole_answers(
        self, messages: Sequence[Message], texts: Sequence[str], prompt: str, opened: bool
    ) -> list[tuple[int, int, int]]:
        """(start, stop, index) in `prompt` of the answers which the template leaves as they are.

        They are found by marks around them, inside of their outer white space, so that it can be
        trimmed. Marks may keep a template from an edit, so without them the prompt must be the one
        that was made without marks.
        """
        mark = f"\ue000{secrets.token_hex(8)}\ue001"
        between = re.compile(rf"{mark}(\d+){mark}(.*?){mark}", re.DOTALL)
        left = [
            i
            for i, m in enumerate(messages)
            if m.role == "assistant" and m.tokens and texts[i].strip()
        ]
        while left:
            marked = list(texts)
            for i in left:
                core = texts[i].strip()
                marked[i] = texts[i].replace(core, f"{mark}{i}{mark}{core}{mark}", 1)
            # outside, index, core, outside, index, core, ..., outside
            parts = between.split(self._render(messages, marked, opened))
            indices = [int(index) for index in parts[1::3]]
            del parts[1::3]
            plain = "".join(parts)
            starts = list(accumulate(map(len, parts)))[0::2]
            found: list[tuple[int, int, int]] = []
            end = 0
            for core_start, i in zip(starts, indices, strict=False):
                start = core_start - texts[i].index(texts[i].strip())
                stop = start + len(texts[i])
                if start >= end and plain[start:stop] == texts[i] and indices.count(i) == 1:
                    found.append((start, stop, i))
                    end = stop
            if plain == prompt:
                return found
            whole = [i for i in left if any(i == index for _, _, index in found)]
            if whole == left:
                break
            left = whole
        return []

    def _refused(self, reason: str) -> GGUFError:
        return GGUFError(f"{self._llm.model_path}: its chat template {reason}")

    # --- tokens ---

    def _cut(self, prompt: str, veil: _Veil) -> list[int]:
        """Token ids of a piece of a prompt: of the control tokens in it, and of what is between."""
        ids: list[int] = []
        for n, part in enumerate(self._written.split(prompt)):
            written = n % 2 == 1
            ids += self._tokens(part, True) if written else self._plain(veil.lifted(part))
        return ids

    def _plain(self, text: str) -> list[int]:
        parts = self._seams.split(text)
        return [i for part in parts for i in self._tokens(part, special=False)]

    def _tokens(self, text: str, special: bool) -> list[int]:
        if not text:
            return []
        ids: list[int] = self._llm.tokenize(text.encode("utf-8"), add_bos=False, special=special)
        return ids

    def _text(self, token: int) -> str:
        if token < 0:
            return ""
        return str(self._c.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"))

    def _attr(self, token: int) -> int:
        return int(self._c.llama_vocab_get_attr(self._vocab, token))


class _Veil:
    """Private characters, which none of `texts` holds, for those that `tokens` begin with."""

    def __init__(self, tokens: Iterable[str], texts: Iterable[str]) -> None:
        firsts = sorted({token[0] for token in tokens})
        used = set().union(*texts)
        bases = range(0xF0000, 0x10FFFE - len(firsts), len(firsts) or 1)
        base = next(b for b in bases if used.isdisjoint(map(chr, range(b, b + len(firsts)))))
        self._on = {first: chr(base + n) for n, first in enumerate(firsts)}
        self._off = str.maketrans({private: first for first, private in self._on.items()})
        # Signs wherever they stand: a template may change letters, or leave out spaces.
        signs = (first for first in firsts if not first.isalnum() and not first.isspace())
        self._all = _any_of({*signs, *tokens}, "{}(?={})")

    def over(self, text: str) -> str:
        """`text` without a character that could begin one of the tokens."""
        return self._all.sub(lambda match: self._on[match[0]], text)

    def over_tokens(self, text: str, tokens: Iterable[str]) -> str:
        """`text` in which `tokens` are not spelled, and which is the same otherwise."""
        return _any_of(tokens, "{}(?={})").sub(lambda match: self._on[match[0]], text)

    def lifted(self, text: str) -> str:
        return text.translate(self._off)


def _any_of(tokens: Iterable[str], form: str = "{}{}") -> re.Pattern[str]:
    """Matches the longest of `tokens`, with `form` around its first character and the others."""
    longest_first = sorted(tokens, key=len, reverse=True)
    forms = (form.format(re.escape(t[0]), re.escape(t[1:])) for t in longest_first)
    return re.compile("|".join(forms) or "(?!)")
