"""A served model is asked as its server can, and refused what that cannot."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from megrez_eval import candidates
from megrez_eval.evaluation import evaluate
from megrez_eval.served_lm import ServedLM
from megrez_gguf.errors import ConfigError, SourceError
from support import eval_tasks
from support.server import free_port

Answer = Callable[[dict[str, Any]], Any]


def echoed(body: dict[str, Any]) -> Any:
    """As vLLM: the words of the prompt, each with a score that its letters give, and one more."""
    text, at = body["prompt"], 0
    words: list[tuple[str, int, float | None]] = []
    for part in text.replace(" ", "\0 ").split("\0"):
        words.append((part, at, None if not words else -float(len(part))))
        at += len(part)
    words.append((" more", at, -1.0))
    return {
        "text": text + " more",
        "logprobs": {
            "tokens": [w for w, _, _ in words],
            "text_offset": [o for _, o, _ in words],
            "token_logprobs": [p for _, _, p in words],
            "top_logprobs": [p and {w: p, "x": -4.0} for w, _, p in words],
        },
    }


def ignores_echo(body: dict[str, Any]) -> Any:
    """As llama-server: the answer's own log-probabilities, in its own form."""
    return {"text": " more", "logprobs": {"content": [{"token": " more", "logprob": -1.0}]}}


def refuses(body: dict[str, Any]) -> Any:
    """As `megrez-gguf serve`."""
    raise ValueError("'echo': expected false")


def forgets_logprobs(body: dict[str, Any]) -> Any:
    return {"text": body["prompt"] + " more", "logprobs": None}


def scores_only_the_answer(body: dict[str, Any]) -> Any:
    found = echoed(body)
    return found | {"logprobs": {k: v[-1:] for k, v in found["logprobs"].items()}, "text": " more"}


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], tuple[str, list[dict[str, Any]]]]]:
    """serve(answer) -> the URL of a server that answers so, and the bodies that it gets."""
    servers = []

    def start(answer: Answer) -> tuple[str, list[dict[str, Any]]]:
        bodies: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def reply(self, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.reply({"data": [{"id": "theirs"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                try:
                    self.reply({"choices": [answer(body)]})
                except ValueError as e:
                    self.send_error(400, str(e))

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/v1", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_scores_are_those_of_the_continuation(serve: Any) -> None:
    url, bodies = serve(echoed)
    pairs = [("a bb", " ccc dddd"), ("a bb", " ccc ddd")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    found = ServedLM(url).loglikelihood(requests)
    assert found == [(-9.0, False), (-8.0, True)]
    assert {body["model"] for body in bodies} == {"theirs"}


@pytest.mark.parametrize(
    "answer", [ignores_echo, refuses, forgets_logprobs, scores_only_the_answer]
)
def test_a_server_that_cannot_score_is_refused(serve: Any, tasks: Path, answer: Answer) -> None:
    url, _ = serve(answer)
    with pytest.raises(ConfigError, match="does not score"):
        evaluate(candidates.servers([url]), ["pocket_cloze"], include=tasks, limit=2)


def test_scores_through_a_chat_are_refused(serve: Any, tasks: Path) -> None:
    url, _ = serve(echoed)
    with pytest.raises(ConfigError, match="chat"):
        evaluate(candidates.servers([url]), ["pocket_cloze"], include=tasks, limit=2, chat=True)


def test_answers_in_chat(serve: Any, tasks: Path) -> None:
    docs = eval_tasks.capitals()

    def knows(body: dict[str, Any]) -> Any:
        question = body["messages"][-1]["content"]
        answer = next(doc["answer"] for doc in docs if doc["question"] == question)
        return {"message": {"content": answer + "\nAnd more."}}

    url, bodies = serve(knows)
    options: dict[str, Any] = {"include": tasks, "chat": True, "system": "Be brief."}
    result = evaluate(candidates.servers([url]), ["pocket_capitals"], limit=8, **options)
    assert result.models[0].tasks[0].score.value == 1
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert bodies[0]["max_tokens"] == 32
    assert bodies[0]["temperature"] == 0


def test_nothing_there() -> None:
    with pytest.raises(SourceError, match="models"):
        ServedLM(f"http://127.0.0.1:{free_port()}/v1")


def test_a_server_that_answers_nan_is_refused(serve: Any) -> None:
    def broken(body: dict[str, Any]) -> Any:
        found = echoed(body)
        found["logprobs"]["token_logprobs"][-2] = math.nan
        return found

    url, _ = serve(broken)
    with pytest.raises(ConfigError, match="does not score"):
        ServedLM(url).loglikelihood([Instance("loglikelihood", {}, ("a", " b"), 0)])
