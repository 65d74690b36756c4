"""A score is the model's own: what the torch reference gives, whatever was asked before."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from lm_eval.api.instance import Instance

from megrez_eval.gguf_lm import GgufLM
from megrez_runtime import expert_stats
from support import eval_tasks
from support.paths import HELDOUT

# The KV cache is narrower unless it is asked not to be.
EXACT: dict[str, Any] = {"cache": "f32"}


def asked(pairs: Sequence[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)]


def test_every_choice_of_a_task_is_the_references(
    opened: Callable[..., GgufLM], reference_score: Callable[[list[int], int], tuple[float, bool]]
) -> None:
    lm = opened(**EXACT)
    docs = eval_tasks.cloze(12)
    pairs = [(doc["context"], choice) for doc in docs for choice in doc["choices"]]
    random.Random(1).shuffle(pairs)
    for pair, (score, greedy) in zip(pairs, lm.loglikelihood(asked(pairs)), strict=True):
        context, continuation = lm._encode_pair(*pair)
        want, likeliest = reference_score(context + continuation, len(context))
        assert score == pytest.approx(want, abs=2e-4)
        assert greedy == likeliest


def test_a_likeliest_continuation_is_said_to_be(opened: Callable[..., GgufLM]) -> None:
    lm = opened()
    prompt = lm.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    answer = "The capital of France is Paris."
    (_, greedy), (_, other) = lm.loglikelihood(
        asked([(prompt, answer), (prompt, answer.replace("Paris", "Rome"))])
    )
    assert greedy
    assert not other


def test_what_was_asked_before_changes_nothing(opened: Callable[..., GgufLM]) -> None:
    lm = opened(**EXACT)
    pairs = [(doc["context"], c) for doc in eval_tasks.cloze(6) for c in doc["choices"]]
    # Of one token, of several, and of many batches of outputs.
    pairs += [("A", " b"), ("A", " c d"), ("", "The"), ("x", " " + "the king of " * 60)]
    together = np.array([score for score, _ in lm.loglikelihood(asked(pairs))])
    alone = []
    for pair in pairs:
        lm._scorer.release()
        alone.append(lm.loglikelihood(asked([pair]))[0][0])
    assert np.allclose(together, alone, atol=2e-4)


@pytest.mark.parametrize("size", [3, 10, 27, 28, 29, 30])
def test_a_text_that_an_earlier_one_begins_with(opened: Callable[..., GgufLM], size: int) -> None:
    lm = opened(**EXACT)
    tokens = lm.tok_encode(
        "In the beginning God created the heaven and the earth. And the earth" * 3
    )
    asked_for = (tokens[:size], size - 2)
    alone = lm._scorer.score(*asked_for)
    lm._scorer.score(tokens[:30], 28)
    assert lm._scorer.score(*asked_for)[0] == pytest.approx(alone[0], abs=2e-4)


def test_texts_longer_than_the_context_are_scored_in_windows(
    opened: Callable[..., GgufLM], reference_score: Callable[[list[int], int], tuple[float, bool]]
) -> None:
    lm = opened(n_ctx=256, **EXACT)
    text = (HELDOUT / "en.txt").read_text("utf-8")[:2500]
    tokens = [lm.prefix_token_id, *lm.tok_encode(text, add_special_tokens=False)]
    assert len(tokens) > 2 * 256
    (score,) = lm.loglikelihood_rolling(asked([(text,)], "loglikelihood_rolling"))
    whole, rest = divmod(len(tokens) - 1, 256)
    want = sum(reference_score(tokens[256 * i : 256 * i + 257], 1)[0] for i in range(whole))
    assert rest  # the last window has a whole context, and is scored where it is new
    want += reference_score(tokens[-257:], 257 - rest)[0]
    assert score == pytest.approx(want, abs=2e-3)
    assert lm.cut == 0


def test_experts_in_the_file_change_no_score(opened: Callable[..., GgufLM]) -> None:
    pairs = [(doc["context"], c) for doc in eval_tasks.cloze(6) for c in doc["choices"]]
    # Equal batches, as the sums of a batch depend on its size.
    whole = opened("q4_0", n_ubatch=32).loglikelihood(asked(pairs))
    lm = opened("q4_0", n_ubatch=32, expert_cache=1 << 20)
    assert lm.loglikelihood(asked(pairs)) == whole
    stats = expert_stats(lm.llm)
    assert stats is not None
    assert stats.slots < stats.experts


def test_a_quantized_cache_scores_otherwise_and_not_much(opened: Callable[..., GgufLM]) -> None:
    pairs = [(doc["context"], c) for doc in eval_tasks.cloze(4) for c in doc["choices"]]
    scores = {
        cache: np.array([s for s, _ in opened(cache=cache).loglikelihood(asked(pairs))])
        for cache in ("f32", "f16", "q4_0")
    }
    near = np.abs(scores["f16"] - scores["f32"]).max()
    far = np.abs(scores["q4_0"] - scores["f32"]).max()
    assert 0 < near < far < 3


def test_a_context_that_is_too_long_is_counted(opened: Callable[..., GgufLM]) -> None:
    lm = opened(n_ctx=256)
    lm.loglikelihood(asked([("a b c " * 300, " d"), ("a", " b")]))
    assert lm.cut == 1
