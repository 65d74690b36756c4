"""What a request may get wrong: the status, a message that says what to do, and a server that
goes on."""

from __future__ import annotations

import gzip
import http.client
import json
from typing import Any

import pytest

from support.server import KEY, Answer, Server

CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
BODY: dict[str, Any] = {"model": "megrez-moe", "messages": [USER], "max_tokens": 2}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def error(reply: Answer, status: int) -> dict[str, Any]:
    """The error object of a reply with that `status`, in the shape that clients know."""
    assert reply.status == status, reply.body
    found: dict[str, Any] = reply.json()["error"]
    assert {"message", "type", "param", "code"} <= found.keys()
    assert found["message"]
    assert found["code"] is None or isinstance(found["code"], str)
    return found


@pytest.fixture(autouse=True)
def lives(server: Server) -> Any:
    yield
    assert server.post(CHAT, BODY).status == 200


def messages(*found: Any) -> dict[str, Any]:
    return {"messages": list(found)}


def parts(*found: Any) -> dict[str, Any]:
    return messages({"role": "user", "content": list(found)})


def schema(found: Any) -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": found}}
    }


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"top_p": -1}, "top_p"),
        ({"presence_penalty": 5}, "presence_penalty"),
        ({"frequency_penalty": "x"}, "frequency_penalty"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "8"}, "max_tokens"),
        ({"max_tokens": 10**12}, "1000000000000"),
        ({"max_tokens": 1 << 32 | 8}, "4294967304"),
        ({"max_completion_tokens": -5}, "max_completion_tokens"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"seed": "x"}, "seed"),
        ({"stop": 3}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": -1, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 3}, "logprobs"),
        ({"logprobs": "x"}, "logprobs"),
        ({"logit_bias": "x"}, "logit_bias"),
        ({"logit_bias": {"5": "x"}}, "logit_bias"),
        ({"logit_bias": {"99999999": 5}}, "logit_bias"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hi"}, "messages"),
        (messages(1), "messages[0]"),
        (messages({"content": "x"}), "role"),
        (messages({"role": 1, "content": "x"}), "role"),
        (messages(USER, {"role": "wizard", "content": "x"}), "messages[1].role"),
        (messages({"role": "user"}), "content"),
        (messages({"role": "user", "content": 3}), "content"),
        (parts(1), "content[0]"),
        (parts({"type": "text"}), "text"),
        (parts({"type": "text", "text": 3}), "text"),
        (parts({"type": "smell"}), "smell"),
        (parts({"type": "text", "text": "What is it?"}, IMAGE), "image_url"),
        (parts(SOUND), "input_audio"),
        ({"tools": "x"}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tools"),
        ({"tool_choice": "maybe", "tools": [ADD]}, "tool_choice"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": [ADD]},
            "tool_choice",
        ),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "xml"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        (schema("x"), "schema"),
        (schema({"type": "nonsense"}), "nonsense"),
        (schema({"$ref": "#/nowhere"}), "#/nowhere"),
        (schema({"$ref": "http://127.0.0.1:9/x.json"}), "http://127.0.0.1:9/x.json"),
        (schema({"type": "string", "pattern": "^((a$"}), "pattern"),
        (schema(True) | {"grammar": 'root ::= "a"'}, "schema"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "grammar"),
    ],
    ids=repr,
)
def test_what_a_request_may_not_say(server: Server, changes: dict[str, Any], said: str) -> None:
    found = error(server.post(CHAT, BODY | changes), 400)
    assert found["type"] == "invalid_request_error"
    assert said in found["message"]
    # What a C++ library calls its exceptions, and parts this program does not have, help nobody.
    assert "exception" not in found["message"]
    assert "mmproj" not in found["message"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [999_999]}, "tokens"),
        ({"prompt": [-1]}, "tokens"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        # llama.cpp 27174: what is asked of the prompt was answered of the text behind it.
        ({"echo": True, "logprobs": 2}, "echo"),
        ({"echo": True}, "echo"),
    ],
    ids=repr,
)
def test_what_a_completion_may_not_say(server: Server, changes: dict[str, Any], said: str) -> None:
    body = {"model": "megrez-moe", "prompt": "The sky", "max_tokens": 2}
    found = error(server.post("/v1/completions", body | changes), 400)
    assert found["type"] == "invalid_request_error"
    assert said in found["message"]


# The other ways to the model, each with its own names for much the same.
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": {"messages": [USER], "max_tokens": 2},
    "/v1/messages/count_tokens": {"messages": [USER]},
    "/apply-template": {"messages": [USER]},
}


@pytest.mark.parametrize("path", OTHERS)
def test_other_ways(server: Server, path: str) -> None:
    assert server.post(path, OTHERS[path]).status == 200


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        *(
            (path, changes, said)
            for path in OTHERS
            for changes, said in [
                ({"temperature": "hot"}, "temperature"),
                ({"top_p": 2}, "top_p"),
                ({"tools": "x"}, "tools"),
                ({"tools": [1]}, "tools"),
            ]
        ),
        *(
            (path, {"messages": found}, said)
            for path in OTHERS
            if path != "/v1/responses"
            for found, said in [
                (None, "messages"),
                ([], "messages"),
                ("hi", "messages"),
                ([1], "messages"),
                ([{"role": "user"}], "content"),
                ([{"role": "user", "content": 3}], "content"),
                ([{"role": "wizard", "content": "x"}], "role"),
                ([{"role": "user", "content": [1]}], "content"),
            ]
        ),
        *(
            ("/v1/responses", {"input": found}, said)
            for found, said in [
                (None, "input"),
                (5, "input"),
                ([], "input"),
                ([1], "input"),
                ([{"role": "user"}], "input"),
                ([{"role": "wizard", "content": "x"}], "input"),
                ([{"role": "user", "content": [1]}], "input"),
                ([{"role": "user", "content": [{"type": "input_text", "text": 3}]}], "text"),
            ]
        ),
        ("/v1/responses", {"model": 5}, "model"),
        ("/v1/responses", {"max_output_tokens": -5}, "max_output_tokens"),
        ("/v1/responses", {"max_output_tokens": "8"}, "max_output_tokens"),
        ("/v1/responses", {"text": 5}, "text"),
        ("/v1/responses", {"text": {"format": 5}}, "format"),
        ("/v1/responses", {"text": {"format": {"type": "xml"}}}, "xml"),
        ("/v1/responses", {"text": {"format": {"type": "json_schema"}}}, "schema"),
        ("/v1/responses", {"instructions": 5}, "instructions"),
        ("/v1/responses", {"reasoning": 5}, "reasoning"),
        ("/v1/responses", {"stream": "yes"}, "stream"),
        ("/v1/responses", {"tool_choice": "required"}, "tools"),
        ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/messages", {"max_tokens": "8"}, "max_tokens"),
        ("/v1/messages", {"max_tokens": -5}, "max_tokens"),
        ("/v1/messages", {"system": 5}, "system"),
        ("/v1/messages", {"stop_sequences": 5}, "stop"),
        ("/v1/messages", {"stop_sequences": [1]}, "stop"),
        ("/v1/messages", {"tool_choice": {"type": "any"}}, "tools"),
        ("/v1/messages", {"tool_choice": 5}, "tool_choice"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "image",
        ),
    ],
    ids=repr,
)
def test_what_others_may_not_say(
    server: Server, path: str, changes: dict[str, Any], said: str
) -> None:
    found = error(server.post(path, OTHERS[path] | changes), 400)
    assert found["type"] == "invalid_request_error"
    assert said in found["message"]
    assert "exception" not in found["message"]


GOOD = json.dumps(BODY).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"model":',
        GOOD + b"x",
        b"[]",
        b"5",
        b"null",
        b'"text"',
        b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}',
        rb'{"messages": [{"role": "user", "content": "\ud83d"}]}',
        json.dumps(BODY).encode("utf-16"),
        GOOD.replace(b"2", b"NaN"),
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_request(server: Server, body: bytes) -> None:
    assert error(server.post(CHAT, body), 400)["type"] == "invalid_request_error"


def test_the_context_overflows(server: Server) -> None:
    long = BODY | messages({"role": "user", "content": "hello world " * 500})
    for stream in (False, True):
        found = error(server.post(CHAT, long | {"stream": stream}), 400)
        assert found["code"] == "context_length_exceeded"
        assert "512" in found["message"], "what there is"
        assert "2050 tokens" in found["message"], "what was asked for"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {KEY}4"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": ""},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/props", "/experts", "/nowhere"])
def test_without_the_key(server: Server, path: str, headers: dict[str, str]) -> None:
    reply = server.get(path, headers)
    found = error(reply, 401)
    assert found["code"] == "invalid_api_key"
    assert "Authorization: Bearer" in found["message"]
    assert reply.headers["WWW-Authenticate"] == "Bearer"


def test_health_needs_no_key(server: Server) -> None:
    assert server.get("/health", {"Authorization": ""}).status == 200


@pytest.mark.parametrize("model", ["gpt-4o", ""])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_an_unknown_model(server: Server, path: str, model: str) -> None:
    found = error(server.post(path, BODY | {"model": model, "prompt": "x", "input": "x"}), 404)
    assert found["code"] == "model_not_found"
    assert "megrez-moe" in found["message"]


def test_clients_of_anthropic_s_api_name_models_of_their_own(server: Server) -> None:
    body = OTHERS["/v1/messages"] | {"model": "claude"}
    assert server.post("/v1/messages", body).status == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", CHAT + "/"), ("GET", CHAT), ("GET", "/v1"), ("POST", "/nowhere"), ("PUT", CHAT)],
)
def test_an_unknown_address(server: Server, method: str, path: str) -> None:
    found = error(server.request(method, path, b"{}"), 404)
    assert f"{method} {path}" in found["message"]


@pytest.mark.parametrize("path", ["/tools", "/cors-proxy?url=http://127.0.0.1:9/"])
def test_no_tools_for_agents(server: Server, path: str) -> None:
    assert server.get(path).status in (403, 404)


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/rerank", "/v1/audio/transcriptions", "/infill", "/props"]
)
def test_what_this_model_does_not_do(server: Server, path: str) -> None:
    # 501, after which clients do not try again if they are told so by the number.
    body = {"input": "x", "query": "x", "documents": ["x"], "input_prefix": "", "input_suffix": ""}
    assert server.post(path, body).status in (400, 404, 501)


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_of_100_megabytes(server: Server, chunked: bool) -> None:
    before = server.memory()
    piece = b"a " * (1 << 19)
    head = b'{"model":"megrez-moe","messages":[{"role":"user","content":"'
    length = {} if chunked else {"Content-Length": str(len(head) + 100 * len(piece))}
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    connection.putrequest("POST", CHAT)
    for name, value in {"Authorization": f"Bearer {KEY}", **length}.items():
        connection.putheader(name, value)
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    try:
        for data in (head, *[piece] * 100):
            connection.send(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        if chunked:
            connection.send(b"0\r\n\r\n")
    except OSError:
        pass  # refused while it was being sent
    response = connection.getresponse()
    found = error(Answer(response.status, response.headers, response.read()), 413)
    connection.close()
    assert "MiB" in found["message"]
    assert server.memory() - before < 64 << 20


def test_a_compressed_body(server: Server) -> None:
    headers = {"Content-Encoding": "gzip"}
    error(server.post(CHAT, gzip.compress(GOOD), headers), 415)


@pytest.mark.parametrize(
    "request_line",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_http(server: Server, request_line: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(request_line)
        status = connection.recv(4096).split(b" ")[1:2]
    assert not status or status[0].startswith(b"4") or status[0] == b"505"
