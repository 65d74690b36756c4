"""The server's answers are those of this repository's own conversation, token for token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megrez_gguf.format.reader import GGUFFile
from megrez_runtime import Sampling, Session, load
from megrez_runtime.memory import Needs
from megrez_runtime.template import ChatTemplate
from support.llama import logits
from support.server import Server, serve_model

QUESTIONS = [
    "世界上最高的山峰是哪座？",
    "hi",
    "你是谁？",
    "What is the capital of Italy?",
    "一年有几个月？",
    "写一首诗 😀",
    "def add(a, b):",
    # At a loss for an answer, so that small differences show: in Q8_0 it is another.
    "Tell me more of number 3. " * 6,
]
GREEDY = {"temperature": 0, "max_tokens": 60}


@pytest.fixture(scope="module")
def path(pocket_gguf: Callable[..., Path]) -> Path:
    return pocket_gguf("f32")


@pytest.fixture(scope="module")
def llm(path: Path) -> Any:
    return load(path, n_ctx=512, n_threads=1, ram="off")


@pytest.fixture(scope="module")
def expected(llm: Any) -> dict[str, tuple[int, ...]]:
    """What a session answers to each question, as tokens."""
    answers = {}
    for question in QUESTIONS:
        session = Session(llm, sampling=Sampling(temp=0), max_tokens=60)
        "".join(session.ask(question))
        assert session.last
        answers[question] = session.last.tokens
    assert len({len(tokens) for tokens in answers.values()}) > 3
    return answers


@pytest.fixture(scope="module")
def texts(llm: Any, expected: dict[str, tuple[int, ...]]) -> dict[str, str]:
    template = ChatTemplate(llm)
    return {
        question: b"".join(map(template.piece, tokens)).decode("utf-8", "ignore")
        for question, tokens in expected.items()
    }


@pytest.fixture(scope="module")
def half(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that holds some more than half of the experts in memory."""
    needs = Needs.of(GGUFFile.open(path), path)
    cache = str(needs.expert_bytes * 3 // 5)
    with serve_model(path, tmp_path_factory.mktemp("half"), "--expert-cache", cache) as server:
        yield server


@pytest.fixture(params=["server", "half"])
def either(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def tokens_of(server: Server, prompt: list[int], **fields: Any) -> tuple[int, ...]:
    body = {"prompt": prompt, "return_tokens": True, **GREEDY, **fields}
    reply = server.post("/completion", body)
    assert reply.status == 200, reply.body
    return tuple(reply.json()["tokens"])


def chat(server: Server, *texts: str, **fields: Any) -> Any:
    """The answer to a conversation, in which the user speaks first."""
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    reply = server.post("/v1/chat/completions", {"messages": messages, **GREEDY, **fields})
    assert reply.status == 200, reply.body
    return reply.json()


def said(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def spoken(tokens: tuple[int, ...], llm: Any) -> tuple[int, ...]:
    """Without the token that ends a turn."""
    return tuple(t for t in tokens if not ChatTemplate(llm).ends(t))


def test_alone(llm: Any, either: Server, expected: Any, texts: Any) -> None:
    template = ChatTemplate(llm)
    for question in QUESTIONS:
        prompt = template.encode([template.message("user", question)])
        found = spoken(tokens_of(either, prompt), llm)
        assert found == expected[question], question
        answer = chat(either, question)
        assert said(answer).rstrip("\ufffd") == texts[question]
        assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_sixteen_at_once(llm: Any, either: Server, expected: Any) -> None:
    template = ChatTemplate(llm)

    def found(question: str) -> tuple[int, ...]:
        prompt = template.encode([template.message("user", question)])
        return spoken(tokens_of(either, prompt), llm)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(found, QUESTIONS * 4))
    assert answers == [expected[question] for question in QUESTIONS * 4]


def test_what_is_kept_of_a_conversation_changes_nothing(either: Server) -> None:
    conversation: list[str] = []
    for question in QUESTIONS[:4]:
        conversation.append(question)
        fresh = chat(either, *conversation, cache_prompt=False)
        kept = chat(either, *conversation)
        assert said(kept) == said(fresh)
        assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert kept["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        conversation.append(said(kept))


def test_seeds_are_reproducible_in_company(either: Server) -> None:
    def drawn(seed: int) -> str:
        return said(chat(either, "The", temperature=1.2, seed=seed))

    alone = [drawn(seed) for seed in range(4)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, list(range(4)) * 3)) == alone * 3


def test_the_store_was_at_work(half: Server) -> None:
    chat(half, QUESTIONS[0])
    experts = half.get("/experts").json()
    assert experts["store"]["misses"] > 0
    assert experts["store"]["hits"] > 0
    assert sum(map(sum, experts["used"])) > 0


def test_logprobs_are_the_models(llm: Any, path: Path, either: Server) -> None:
    template = ChatTemplate(llm)
    question = QUESTIONS[3]
    answer = chat(either, question, logprobs=True, top_logprobs=5)
    content = answer["choices"][0]["logprobs"]["content"]
    prompt = template.encode([template.message("user", question)])
    drawn = [entry["id"] for entry in content]
    scores = logits(path, [*prompt, *drawn]).astype(np.float64)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    for row, entry in zip(scores[len(prompt) - 1 :], content, strict=False):
        assert entry["logprob"] == pytest.approx(row[entry["id"]], abs=2e-3)
        tops = {top["id"]: top["logprob"] for top in entry["top_logprobs"]}
        assert set(tops) == set(np.argsort(row)[-5:].tolist())
        assert tops == pytest.approx({i: row[i] for i in tops}, abs=2e-2)
