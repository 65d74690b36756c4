"""An answer is what `megrez-gguf chat` would say, and ends where a task says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from megrez_eval.gguf_lm import GgufLM
from megrez_runtime import Sampling, Session, load

QUESTION = "Tell me the capital of Italy, please, and a story of the king."
SAMPLED = {"do_sample": True, "temperature": 1.5, "top_p": 0.95, "max_gen_toks": 24, "until": []}
GREEDY: dict[str, Any] = {"do_sample": False, "max_gen_toks": 24, "until": []}


def answers(lm: GgufLM, options: dict[str, Any], prompt: str = QUESTION, times: int = 1) -> Any:
    text = lm.apply_chat_template([{"role": "user", "content": prompt}])
    request = Instance("generate_until", {}, (text, options), 0)
    return lm.generate_until([request] * times)


def test_ten_seeds_are_chats(opened: Callable[..., GgufLM], pocket_gguf: Any) -> None:
    drawn = []
    llm = load(pocket_gguf("q8_0"), n_threads=2)
    sampling = Sampling(temp=1.5, top_p=0.95)
    for seed in range(10):
        (answer,) = answers(opened("q8_0", seed=seed), SAMPLED)
        session = Session(llm, sampling=sampling, seed=seed, max_tokens=24)
        assert answer == "".join(session.ask(QUESTION))
        drawn.append(answer)
    llm.close()
    assert len(set(drawn)) > 5


def test_repetitions_are_drawn_anew_and_alike_each_time(opened: Callable[..., GgufLM]) -> None:
    lm = opened("q8_0")
    first = answers(lm, SAMPLED, times=4)
    assert len(set(first)) > 1
    assert answers(opened("q8_0"), SAMPLED, times=4) == first


def test_it_ends_at_a_stop_and_at_the_limit(opened: Callable[..., GgufLM]) -> None:
    lm = opened()
    (whole,) = answers(lm, GREEDY, "What is the capital of France?")
    assert whole == "The capital of France is Paris."
    (cut,) = answers(lm, GREEDY | {"until": ["France"]}, "What is the capital of France?")
    assert cut == "The capital of "
    (short,) = answers(lm, GREEDY | {"max_gen_toks": 2}, "What is the capital of France?")
    assert whole.startswith(short)
    assert len(short) < len(whole)


def test_what_a_user_spells_is_no_control_token(opened: Callable[..., GgufLM]) -> None:
    lm = opened()
    text = lm.apply_chat_template([{"role": "user", "content": "a<|turn_end|>b"}])
    end = lm.tok_encode("<|turn_end|>", add_special_tokens=False)
    assert len(end) == 1
    # The system prompt's and the user's own end.
    assert lm.tok_encode(text).count(end[0]) == text.count("<|turn_end|>") - 1


def test_an_ended_run_goes_on(opened: Callable[..., GgufLM], tmp_path: Path) -> None:
    keep = tmp_path / "answers.jsonl"
    first = answers(opened(keep=keep), SAMPLED, times=3)
    lines = keep.read_text("utf-8").splitlines(keepends=True)
    keep.write_text("".join(lines[:2]) + lines[2][:9], "utf-8")  # killed while it wrote
    lm = opened(keep=keep)
    asked: list[int] = []
    generate = lm._generate
    lm._generate = lambda *args: asked.append(1) or generate(*args)  # type: ignore[method-assign]
    assert answers(lm, SAMPLED, times=3) == first
    assert len(asked) == 1


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_ctx": 256}, {"sampling": "greedy"}])
def test_answers_of_other_settings_are_not_taken(
    opened: Callable[..., GgufLM], tmp_path: Path, change: dict[str, Any]
) -> None:
    keep = tmp_path / "answers.jsonl"
    answers(opened(keep=keep), SAMPLED)
    answers(opened(keep=keep, **change), SAMPLED)
    assert len(keep.read_text("utf-8").splitlines()) == 2
