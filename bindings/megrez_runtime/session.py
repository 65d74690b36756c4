"""A conversation with a loaded model: history, sampling, streaming, and a context that fills up."""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from megrez_llama.logs import log
from megrez_llama.patched import require_patched
from megrez_runtime.errors import ContextError, DecodeError
from megrez_runtime.template import ChatTemplate, Message

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. The defaults do nothing: draw from the model's own distribution."""

    temp: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repeat_penalty: float = 1.0

    @classmethod
    def advised(cls, metadata: Mapping[str, str]) -> Sampling:
        """What the file's `general.sampling.*` keys say; the model card's advice if there are none.

        A value that is no number, or makes no sense as one, is passed over.
        """
        found: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            name = "penalty_repeat" if field.name == "repeat_penalty" else field.name
            with contextlib.suppress(KeyError, ValueError):
                value = metadata[f"general.sampling.{name}"]
                number = int(value) if field.name == "top_k" else float(value)
                if 0 <= number < float("inf"):
                    found[field.name] = number
        return cls(**found) if found else cls(temp=0.7, top_p=0.9)

    def changed(self, **fields: float | None) -> Sampling:
        """This, with the `fields` that are not None in place of its own."""
        return dataclasses.replace(self, **{k: v for k, v in fields.items() if v is not None})  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.temp == 0:
            return "greedy"
        changed = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(f"{f.name} {getattr(self, f.name):g}" for f in changed) or "plain sampling"


Ending = Literal["turn end", "max tokens", "context full", "cancelled"]


@dataclass(slots=True)
class Answer:
    """What an answer was and what it cost. Times are in seconds."""

    prompt_tokens: int
    reused_tokens: int
    """How many of the prompt's tokens were in the KV cache already."""
    forgotten_turns: int
    """Oldest turns dropped from the history to make room."""
    text: str = ""
    tokens: tuple[int, ...] = ()
    ending: Ending = "cancelled"
    prompt_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second, the first one left out: its time is the prompt's. 0 if it was alone."""
        drawn = len(self.tokens) + (self.ending == "turn end")
        return (drawn - 1) / self.seconds if drawn > 1 and self.seconds > 0 else 0.0

    @property
    def prompt_rate(self) -> float:
        fresh = self.prompt_tokens - self.reused_tokens
        return fresh / self.prompt_seconds if self.prompt_seconds > 0 else 0.0


class Session:
    """A conversation. Not for use by several threads, `cancel` excepted.

    `sampling` defaults to `Sampling.advised`, `seed` to a random one; the same seed and the same
    messages give the same answers. Raises GGUFError as `ChatTemplate` does, and when the template
    refuses the system prompt, or demands one.
    """

    def __init__(
        self,
        llm: Llama,
        *,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_tokens: int | None = None,
    ) -> None:
        self.llm = llm
        self.template = ChatTemplate(llm)
        self.sampling = sampling or Sampling.advised(llm.metadata)
        self.seed = random.getrandbits(31) if seed is None else seed
        self.max_tokens = max_tokens
        self.context: int = llm.n_ctx()
        """Tokens that fit."""
        self.last: Answer | None = None
        """The latest answer; complete once its iterator has ended."""
        self._system = [self.template.message("system", system)] if system else []
        # What the template says of the system prompt, or of its absence, is to be heard now.
        self.template.encode([*self._system, self.template.message("user", "?")])
        self._turns: list[tuple[Message, Message]] = []
        self._worker: threading.Thread | None = None
        self._cancelled = False

    @property
    def messages(self) -> list[Message]:
        """The conversation as the model will see it."""
        return [*self._system, *(m for turn in self._turns for m in turn)]

    def reset(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self._turns.clear()

    def cancel(self) -> None:
        """End the answer being given, as soon as may be. For signal handlers and other threads."""
        self._cancelled = True

    def ask(self, text: str) -> Generator[str, None, None]:
        """Stream the answer to `text`, in pieces of whole characters.

        Closing the iterator early cancels. A cancelled answer stays in the history as far as it
        got, and the question with it if it got anywhere. When the conversation fills the context
        its oldest turns are forgotten.

        Raises, here, ContextError: the message alone is too long. While iterating, DecodeError.
        """
        if self._worker is not None:
            self._worker.join()
        question = self.template.message("user", text)
        turns, prompt = self._fit(question)
        forgotten = len(self._turns) - len(turns)
        self._turns, self._cancelled = turns, False
        cached = np.asarray(self.llm.input_ids[: self.llm.n_tokens])
        size = min(len(cached), len(prompt))
        different = np.flatnonzero(cached[:size] != np.asarray(prompt[:size]))
        # The last token is evaluated again in any case, for its logits.
        reused = min(int(different[0]) if len(different) else size, len(prompt) - 1)
        self.last = Answer(len(prompt), reused, forgotten)
        return self._answer(question, prompt, self.last)

    def _fit(self, question: Message) -> tuple[list[tuple[Message, Message]], list[int]]:
        """The turns to keep, and the prompt they make with `question`.

        A quarter of the context is left for the answer. Once turns have to go, half of the context
        is cleared, because all that is kept has to be evaluated again.
        """
        turns = list(self._turns)

        def prompt() -> list[int]:
            history = (m for turn in turns for m in turn)
            return self.template.encode([*self._system, *history, question])

        ids = prompt()
        if len(ids) > self.context - self.context // 4:
            while turns and len(ids) > self.context // 2:
                del turns[0]
                ids = prompt()
        if len(ids) >= self.context:
            raise ContextError(
                f"the message is too long: with template and system prompt it takes {len(ids)} "
                f"tokens, and the context holds {self.context}, answer included. Shorten it, or "
                "ask for a longer context",
                option="n_ctx",
            )
        return turns, ids

    def _answer(
        self, question: Message, prompt: list[int], answer: Answer
    ) -> Generator[str, None, None]:
        # The model runs in a thread of its own. Python handles signals in the main thread and only
        # between bytecodes: a main thread inside llama.cpp would not notice Ctrl-C until a long
        # prompt is through.
        drawn: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._generate, args=(prompt, answer, drawn))
        self._worker.start()
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        tokens: list[int] = []
        complete = False
        try:
            while not self._cancelled and (item := drawn.get()) is not None:
                if isinstance(item, BaseException):
                    reason = log.take_errors() or str(item)
                    raise DecodeError(f"llama.cpp failed to evaluate the model: {reason}") from item
                tokens.append(item)
                if piece := decoder.decode(self.template.piece(item)):
                    answer.text += piece
                    yield piece
            # Bytes left over are half a character: damage if the model stopped there by itself.
            if answer.ending == "turn end" and (piece := decoder.decode(b"", final=True)):
                answer.text += piece
                yield piece
            complete = not self._cancelled
        finally:
            self._cancelled = True
            self._worker.join()
            if not complete:
                answer.ending = "cancelled"
            answer.tokens = tuple(tokens)
            if tokens or answer.ending == "turn end":
                self._turns.append((question, Message("assistant", answer.text, answer.tokens)))

    def _generate(
        self,
        prompt: list[int],
        answer: Answer,
        drawn: queue.SimpleQueue[int | BaseException | None],
    ) -> None:
        """Fill `drawn` with the answer's tokens, then None or the reason why there are no more."""
        llama_cpp, llm, count = require_patched(), self.llm, 0
        cancelled = llama_cpp.ggml_abort_callback(lambda _: self._cancelled)
        never = llama_cpp.ggml_abort_callback()
        started = first = time.perf_counter()
        result: BaseException | None = None
        try:
            # Another draw each turn, and the same one for the same turn.
            llm.set_seed((self.seed + len(self._turns)) % 0xFFFFFFFF)
            llama_cpp.llama_set_abort_callback(llm.ctx, cancelled, None)
            for token in llm.generate(prompt, **dataclasses.asdict(self.sampling)):
                if not count:
                    first = time.perf_counter()
                    answer.prompt_seconds = first - started
                    # Called for every node of the graph, which costs something when there is one
                    # token to share it; and one token is soon done.
                    llama_cpp.llama_set_abort_callback(llm.ctx, never, None)
                if self._cancelled:
                    break
                if self.template.ends(token):
                    answer.ending = "turn end"
                    break
                count += 1
                drawn.put(token)
                if count == self.max_tokens:
                    answer.ending = "max tokens"
                    break
                if len(prompt) + count >= self.context:
                    answer.ending = "context full"
                    break
        except BaseException as e:
            result = None if self._cancelled else e
        finally:
            llama_cpp.llama_set_abort_callback(llm.ctx, never, None)
            answer.seconds = time.perf_counter() - first
            drawn.put(result)
