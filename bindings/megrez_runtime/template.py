"""Conversations as tokens: the file's own chat template, and text that stays text.

Only the template may produce control tokens. Messages are rendered between markers, and what lies
between two markers is tokenized as plain text, so a user who types `<|turn_end|>` sends those
eleven characters and does not end the turn.
"""

from __future__ import annotations

import ctypes
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megrez_gguf.errors import GGUFError
from megrez_llama.patched import require_patched

if TYPE_CHECKING:
    from llama_cpp import Llama

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said, as text and as the tokens that stand for it in the context."""

    role: Role
    text: str
    tokens: tuple[int, ...]


class ChatTemplate:
    """The chat template of a loaded model, and the tokens around it.

    Raises GGUFError when the file has none, or one that cannot render a plain conversation.
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
        self._formatter = Jinja2ChatFormatter(
            template=source, eos_token=self._text(llm.token_eos()), bos_token=self._text(bos)
        )
        self._marker = f"\ue000{secrets.token_hex(8)}\ue001"
        self._seams: re.Pattern[str] | None = None
        self._turn_end = self._probe()

    def message(self, role: Role, text: str) -> Message:
        """`text` as plain text, whatever it spells. Lone surrogates become question marks."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        parts = self._seams.split(text) if self._seams else [text]
        return Message(role, text, tuple(i for p in parts for i in self._tokens(p, special=False)))

    def encode(self, messages: Sequence[Message], opened: bool = True) -> list[int]:
        """Token ids of the conversation; `opened` leaves it where the assistant speaks next.

        Raises GGUFError when the template refuses the conversation or rewrites messages.
        """
        pieces, order = self._render(messages, opened)
        ids = self._tokens(pieces[0], special=True)
        for index, piece in zip(order, pieces[1:], strict=True):
            ids += [*messages[index].tokens, *self._tokens(piece, special=True)]
        return ids if ids[:1] == self._bos else self._bos + ids

    def ends(self, token: int) -> bool:
        """Whether `token` ends an answer: the file's end tokens, and the template's turn end."""
        return token == self._turn_end or bool(self._c.llama_vocab_is_eog(self._vocab, token))

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for; none for a control token."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._c.llama_token_to_piece(self._vocab, token, buffer, size, 0, False)
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def _probe(self) -> int | None:
        """Learn from a sample conversation what ends a turn and what text to keep apart."""
        sample = [Message("user", "u", (0,)), Message("assistant", "a", (0,))]
        pieces, _ = self._render(sample, opened=False)
        closing = self._tokens(pieces[-1], special=True)
        # Control tokens are never read from plain text, user-defined ones always are: those of
        # the template are kept from forming by a seam behind their first character.
        own = {i for piece in pieces for i in self._tokens(piece, special=True)}
        texts = sorted(
            self._text(i) for i in own if self._attr(i) & self._c.LLAMA_TOKEN_ATTR_USER_DEFINED
        )
        if texts:
            seams = (f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in texts if t[1:])
            self._seams = re.compile("|".join(seams))
        special = self._c.LLAMA_TOKEN_ATTR_CONTROL | self._c.LLAMA_TOKEN_ATTR_USER_DEFINED
        return closing[0] if closing and self._attr(closing[0]) & special else None

    def _render(self, messages: Sequence[Message], opened: bool) -> tuple[list[str], list[int]]:
        """What the template writes around messages, and the order it puts them in."""
        from jinja2 import TemplateError

        mark = self._marker
        content = [f"{mark}{i}{mark}{m.text}{mark}" for i, m in enumerate(messages)]
        self._formatter.add_generation_prompt = opened
        try:
            prompt: str = self._formatter(
                messages=[
                    {"role": m.role, "content": c} for m, c in zip(messages, content, strict=True)
                ]
            ).prompt
        except (TemplateError, ValueError, TypeError) as e:
            raise self._refused(f"refuses the conversation: {e}") from None
        # outside, index, text, outside, index, text, ..., outside
        parts = prompt.split(mark)
        order = [int(i) if i.isdecimal() else -1 for i in parts[1::3]]
        whole = len(parts) % 3 == 1 and parts[2::3] == [messages[i].text for i in order]
        if not whole or order[-1:] != [len(messages) - 1]:
            raise self._refused("rewrites messages: text and control tokens cannot be told apart")
        return parts[0::3], order

    def _refused(self, reason: str) -> GGUFError:
        return GGUFError(f"{self._llm.model_path}: its chat template {reason}")

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
