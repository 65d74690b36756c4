"""Log-probabilities of given tokens, with the prompt cache used for what texts begin alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megrez_llama.logs import log
from megrez_llama.patched import require_patched
from megrez_runtime.errors import DecodeError

if TYPE_CHECKING:
    from llama_cpp import Llama

# Rows of logits at once: at the published vocabulary 32 MiB. The expert store has memory for so
# many only if it is told so when the model is loaded.
OUTPUTS = 64


class Scorer:
    """Scores tokens by a model that has a context of `llm.n_ctx()` tokens.

    It has the KV cache for itself: call `release` before anything else uses the model.
    """

    def __init__(self, llm: Llama) -> None:
        self._llm = llm
        self._c = require_patched()
        self._memory = self._c.llama_get_memory(llm.ctx)
        self._held: list[int] = []  # tokens in the KV cache
        self._row: NDArray[np.float64] | None = None  # log-probabilities after all of them

    def release(self) -> None:
        """Leave the model as if it had just been loaded."""
        self._held, self._row = [], None
        self._llm.reset()
        self._c.llama_memory_clear(self._memory, True)

    def score(self, tokens: Sequence[int], first: int) -> tuple[float, bool]:
        """The log-probability of `tokens[first:]` after those before; is each the likeliest?

        `first` is 1 at least, and all but the last token have to fit into the context. Raises
        DecodeError: llama.cpp fails.
        """
        total, greedy = 0.0, True
        for at, row in self._rows(list(tokens[:-1]), first - 1):
            token = tokens[at + 1]
            total += float(row[token])
            greedy = greedy and int(row.argmax()) == token
        return total, greedy

    def _rows(self, tokens: list[int], first: int) -> list[tuple[int, NDArray[np.float64]]]:
        """Log-probabilities `[V]` after each token from position `first` on."""
        same = _common(self._held, tokens)
        rows = []
        if same == len(self._held) == first + 1 and self._row is not None:
            rows.append((first, self._row))  # the choices of a question begin alike
        else:
            same = min(same, first)
        self._c.llama_memory_seq_rm(self._memory, 0, same, -1)
        del self._held[same:]
        context = first + 1
        while same < len(tokens):
            # What no row is wanted of goes in large batches.
            size = self._llm.n_batch if same < first else OUTPUTS
            end = min(same + size, len(tokens), context if same < context else len(tokens))
            found = self._decode(tokens[same:end], same, first)
            rows += found
            self._held += tokens[same:end]
            same = end
            if same == context:
                self._row = found[-1][1]
        if len(tokens) > context:
            # What comes next most likely begins as this did, and not as it went on.
            self._c.llama_memory_seq_rm(self._memory, 0, context, -1)
            del self._held[context:]
        return rows

    def _decode(
        self, part: list[int], begin: int, first: int
    ) -> list[tuple[int, NDArray[np.float64]]]:
        batch = self._c.llama_batch_init(len(part), 0, 1)
        wanted = [begin + i for i in range(len(part)) if begin + i >= first]
        try:
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, begin + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = begin + i >= first
            if self._c.llama_decode(self._llm.ctx, batch):
                reason = log.take_errors() or "it gives no reason"
                raise DecodeError(f"llama.cpp failed to evaluate the model: {reason}")
            if not wanted:
                return []
            shape = (len(wanted), self._llm.n_vocab())
            logits = np.ctypeslib.as_array(self._c.llama_get_logits(self._llm.ctx), shape)
            return [(at, _log_softmax(row)) for at, row in zip(wanted, logits, strict=True)]
        finally:
            self._c.llama_batch_free(batch)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    return wide
