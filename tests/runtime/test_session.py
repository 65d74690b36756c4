"""Sessions: history, sampling, streaming, a context that fills up, answers that are stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megrez_gguf.errors import GGUFError
from megrez_runtime import Sampling, Session, load
from megrez_runtime.errors import ContextError, DecodeError
from megrez_runtime.session import Answer
from megrez_runtime.template import ChatTemplate

GREEDY = Sampling(temp=0)
WORDS = "one two three four five six seven eight nine ten "


def ask(session: Session, text: str) -> str:
    return "".join(session.ask(text))


def last(session: Session) -> Answer:
    assert session.last is not None
    return session.last


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, Sampling(temp=0.7, top_p=0.9)),
        ({"general.sampling.temp": "0.250000"}, Sampling(temp=0.25)),
        ({"general.sampling.top_k": "20"}, Sampling(top_k=20)),
        (
            {"general.sampling.min_p": "0.05", "general.sampling.penalty_repeat": "1.1"},
            Sampling(min_p=0.05, repeat_penalty=1.1),
        ),
        ({"general.sampling.temp": "nan", "general.sampling.top_k": "-1"}, Sampling(0.7, 0.9)),
        ({"general.sampling.temp": "warm"}, Sampling(0.7, 0.9)),
    ],
)
def test_sampling_is_the_files_else_the_cards(metadata: dict[str, str], expected: Sampling) -> None:
    assert Sampling.advised(metadata) == expected


def test_sampling_reaches_the_model_file_and_all(llm: Any) -> None:
    asked: dict[str, Any] = {}

    def generate(prompt: list[int], **options: Any) -> Iterator[int]:
        asked.update(options)
        yield llm.token_eos()

    llm.generate = generate
    ask(Session(llm), "x")
    assert asked == {
        "temp": pytest.approx(0.7),
        "top_p": pytest.approx(0.9),
        "top_k": 0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
    }


def test_greedy_and_seeded_answers_repeat(llm: Any) -> None:
    def answers(seed: int, sampling: Sampling) -> list[str]:
        session = Session(llm, sampling=sampling, seed=seed, max_tokens=30)
        return [ask(session, "hello"), ask(session, "hello")]

    warm = Sampling(temp=1.0)
    assert answers(1, GREEDY) == answers(2, GREEDY)
    assert answers(1, warm) == answers(1, warm)
    assert answers(1, warm)[0] != answers(2, warm)[0]
    assert answers(0, warm) == answers(0, warm)  # llama_cpp takes 0 for "random"


def test_streams_an_answer_and_stops_at_the_turn_end(llm: Any) -> None:
    for seed in range(50):  # the weights are random: where an answer ends is the machine's to say
        session = Session(llm, sampling=Sampling(temp=1.5), seed=seed)
        pieces = list(session.ask("hello"))
        answer = last(session)
        if answer.ending == "turn end" and len(pieces) > 5:
            break
    assert answer.ending == "turn end"
    assert len(pieces) > 5
    assert "".join(pieces) == answer.text
    assert (
        b"".join(map(session.template.piece, answer.tokens)).decode("utf-8", "replace")
        == answer.text
    )
    assert not any(map(session.template.ends, answer.tokens))
    assert answer.rate > 0
    assert answer.prompt_rate > 0
    assert [m.role for m in session.messages] == ["user", "assistant"]


def test_later_turns_reuse_the_cache_and_change_nothing(llm: Any, model: Path) -> None:
    session = Session(llm, system="be brief", sampling=GREEDY, max_tokens=20)
    ask(session, "hello")
    first = last(session)
    assert first.reused_tokens == 0
    history = list(session._turns)
    text = ask(session, "and then?")
    second = last(session)
    # All but the last token drawn, which was never evaluated.
    assert second.reused_tokens == first.prompt_tokens + len(first.tokens) - 1
    assert second.prompt_tokens > second.reused_tokens + 1
    fresh = Session(load(model, n_ctx=512), system="be brief", sampling=GREEDY, max_tokens=20)
    fresh._turns = history
    assert ask(fresh, "and then?") == text
    assert last(fresh).reused_tokens == 0
    # Without the history it is another question.
    session.reset()
    assert [m.role for m in session.messages] == ["system"]
    assert ask(session, "and then?") != text


def speak(llm: Any, data: bytes, ends: bool = True) -> None:
    """Make the model say `data`, a byte a token."""
    piece = ChatTemplate(llm).piece
    ids = {piece(i): i for i in range(llm.n_vocab())}
    tokens = [ids[bytes([b])] for b in data]

    def generate(prompt: list[int], **options: Any) -> Iterator[int]:
        yield from tokens
        if ends:
            yield llm.token_eos()

    llm.generate = generate


def test_characters_split_over_tokens_arrive_whole(llm: Any) -> None:
    text = "珠穆朗玛峰🗻é!"
    speak(llm, text.encode())
    assert list(Session(llm).ask("x")) == list(text)
    # Half a character: damage at the end of a finished answer, nothing in one that was cut.
    speak(llm, b"ok\xe7\x8f")
    assert ask(Session(llm), "x") == "ok\N{REPLACEMENT CHARACTER}"
    assert ask(Session(llm, max_tokens=3), "x") == "ok"
    speak(llm, b"a\xff\xe7b")
    assert ask(Session(llm), "x") == "a\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}b"


def test_old_turns_are_forgotten_and_the_system_prompt_kept(llm: Any) -> None:
    session = Session(llm, system="keep me", sampling=GREEDY, max_tokens=30)
    (system,) = session.messages
    forgotten = []
    for turn in range(12):
        ask(session, f"{turn} {WORDS}")
        answer = last(session)
        forgotten.append(answer.forgotten_turns)
        assert session.messages[0] == system
        assert answer.prompt_tokens <= 512 * 3 // 4
        if answer.forgotten_turns:
            assert 512 // 4 < answer.prompt_tokens <= 512 // 2
        texts = [m.text for m in session.messages[1::2]]
        kept = range(sum(forgotten), turn + 1)
        assert texts == [f"{t} {WORDS}" for t in kept]
    # Rarely, and then several at once: whatever is kept is evaluated anew.
    assert 2 <= sum(map(bool, forgotten)) <= 4
    assert max(forgotten) > 1


def test_a_message_beyond_the_context_is_refused_and_forgotten(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY, max_tokens=5)
    ask(session, "hello")
    before = session.messages
    with pytest.raises(ContextError, match=r"takes \d{4} tokens, and the context holds 512"):
        session.ask(WORDS * 60)
    assert session.messages == before
    assert ask(session, "still there?")
    assert len(session.messages) == 4


def test_an_answer_may_fill_the_context_to_the_last_token(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY)
    ask(session, "hello")
    answer = last(session)
    assert answer.ending == "context full"
    assert answer.prompt_tokens + len(answer.tokens) == 512
    # The next question drops that turn.
    ask(session, "again")
    assert last(session).forgotten_turns == 1
    assert last(session).tokens


def test_a_prompt_one_short_of_the_context_is_answered(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY)
    rest = 511 - len(session.template.encode([session.template.message("user", "")]))
    ask(session, "\x00" * rest)
    answer = last(session)
    assert (answer.prompt_tokens, len(answer.tokens), answer.ending) == (511, 1, "context full")
    with pytest.raises(ContextError):
        session.ask("\x00" * (rest + 1))


def test_cancel_ends_an_answer_and_keeps_what_was_said(llm: Any, model: Path) -> None:
    session = Session(llm, sampling=GREEDY)
    pieces = []
    for piece in session.ask("hello"):
        pieces.append(piece)
        if len(pieces) == 5:
            session.cancel()
    answer = last(session)
    assert answer.ending == "cancelled"
    assert answer.text == "".join(pieces)
    assert session.messages[1].text == answer.text
    assert len(pieces) == 5
    # The conversation goes on as if the answer had ended there.
    session.max_tokens = 20
    text = ask(session, "go on")
    assert last(session).ending == "max tokens"
    fresh = Session(load(model, n_ctx=512), sampling=GREEDY, max_tokens=20)
    fresh._turns = session._turns[:1]
    assert ask(fresh, "go on") == text


def test_cancel_stops_the_model_not_only_the_output(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY)
    drawn: list[int] = []

    def generate(prompt: list[int], **options: Any) -> Iterator[int]:
        while len(drawn) < 100:
            drawn.append(65)
            yield 65
            while not session._cancelled:
                time.sleep(0.001)

    llm.generate = generate
    for _ in session.ask("hello"):
        session.cancel()
    assert len(drawn) == 2
    assert len(last(session).tokens) == 1


def test_cancel_drops_what_the_model_is_ahead(llm: Any) -> None:
    session = Session(llm)
    speak(llm, b"a" * 100)
    for _ in session.ask("hello"):
        assert session._worker is not None
        session._worker.join()  # all is drawn
        session.cancel()
    assert (last(session).text, last(session).ending) == ("a", "cancelled")


def test_leaving_the_loop_cancels_too(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY)
    for _ in session.ask("hello"):
        break
    assert last(session).ending == "cancelled"
    assert len(last(session).tokens) == 1
    assert not [t for t in threading.enumerate() if t is session._worker]
    assert ask(session, "again")


def test_cancel_reaches_a_prompt_being_evaluated(llm: Any, model: Path) -> None:
    session = Session(llm, sampling=GREEDY, max_tokens=10)
    evaluate = llm.eval

    def cancelled_while_evaluating(tokens: list[int]) -> None:
        session.cancel()
        evaluate(tokens)

    llm.eval = cancelled_while_evaluating
    assert ask(session, WORDS * 5) == ""
    answer = last(session)
    assert (answer.ending, answer.tokens, session.messages) == ("cancelled", (), [])
    assert llm.n_tokens == 0  # the one batch was abandoned, not finished
    llm.eval = evaluate
    text = ask(session, WORDS * 5)
    assert text == ask(Session(load(model, n_ctx=512), sampling=GREEDY, max_tokens=10), WORDS * 5)


def test_a_failure_of_llama_cpp_is_told_and_leaves_the_history(llm: Any) -> None:
    session = Session(llm, sampling=GREEDY, max_tokens=5)
    ask(session, "hello")
    before = session.messages
    evaluate = llm.eval

    def fail(tokens: list[int]) -> None:
        raise RuntimeError("llama_decode returned -3")

    llm.eval = fail
    with pytest.raises(DecodeError, match="llama_decode returned -3"):
        ask(session, "again")
    assert session.messages == before
    llm.eval = evaluate
    assert ask(session, "again")


THINKING = (
    "{% for m in messages %}<|role_start|>{{ m.role }}<|role_end|>"
    "{{ (m.content.split('</think>') | last if m.role == 'assistant' else m.content) | trim }}"
    "<|turn_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role_start|>assistant<|role_end|>{% endif %}"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_a_template_may_drop_the_reasoning_from_earlier_answers(llm: Any, model: Path) -> None:
    llm.metadata["tokenizer.chat_template"] = THINKING
    speak(llm, b"<think>\nlet me see\n</think>\n\nyes")
    session = Session(llm)
    assert ask(session, "first") == "<think>\nlet me see\n</think>\n\nyes"
    before = last(session)
    first_prompt = session.template.encode(session.messages[:1])
    ask(session, "second")
    pieces = b"".join(map(session.template.piece, prompt_of(session)))
    assert pieces == b"userfirstassistantyesusersecondassistant"
    # Up to the answer, the prompt is the one that was evaluated.
    assert prompt_of(session)[: before.prompt_tokens - 1] == first_prompt[:-1]
    assert session.messages[1].text == before.text  # the reader keeps the reasoning


def prompt_of(session: Session) -> list[int]:
    """What the latest question was asked with."""
    return session.template.encode(session.messages[:-1])


def test_old_turns_are_forgotten_where_answers_are_edited(llm: Any) -> None:
    llm.metadata["tokenizer.chat_template"] = NEEDS_SYSTEM + THINKING
    speak(llm, b"<think>" + b"long " * 20 + b"</think>" + WORDS.encode())
    session = Session(llm, system="keep me")
    for turn in range(12):
        ask(session, f"{turn} {WORDS}")
        answer = last(session)
        assert answer.prompt_tokens <= 512 * 3 // 4
        assert answer.prompt_tokens == len(prompt_of(session))
        assert session.messages[0].text == "keep me"
    assert len(session.messages) < 2 * 12


def test_a_system_prompt_that_is_missed_is_missed_at_once(llm: Any) -> None:
    llm.metadata["tokenizer.chat_template"] = NEEDS_SYSTEM + THINKING
    with pytest.raises(GGUFError, match="refuses the conversation: no system"):
        Session(llm)
    assert ask(Session(llm, system="be brief", sampling=GREEDY, max_tokens=3), "hello")
