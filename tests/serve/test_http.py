"""Habits of HTTP clients: old ones, careful ones, and those behind a proxy."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from typing import Any

import pytest

from support.server import KEY, Server

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "megrez-moe",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 4,
    "temperature": 0,
}
DATA = json.dumps(BODY).encode()
STREAM = json.dumps(BODY | {"stream": True}).encode()
HEAD = b"Host: x\r\nAuthorization: Bearer " + KEY.encode() + b"\r\n"


def spoken(server: Server, *sent: bytes) -> bytes:
    """What comes back on a connection until the server closes it; a piece is sent a reply."""
    with server.connect() as connection:
        received = b""
        for data in sent:
            connection.sendall(data)
            if data is not sent[-1]:
                received += connection.recv(1 << 16)
        while data := connection.recv(1 << 16):
            received += data
        return received


def request(version: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {CHAT} HTTP/{version}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n" + HEAD + b"\r\n" + body


def test_http_1_0(server: Server) -> None:
    head, _, body = spoken(server, request("1.0", DATA)).partition(b"\r\n\r\n")
    assert head.split(b" ")[1] == b"200"
    assert json.loads(body)["choices"]


def test_http_1_0_knows_no_chunks(server: Server) -> None:
    head, _, body = spoken(server, request("1.0", STREAM)).partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert body.startswith(b"data: {")
    assert body.endswith(b"data: [DONE]\n\n")


def test_a_connection_is_kept(server: Server) -> None:
    with closing(http.client.HTTPConnection(*server.address, timeout=30)) as connection:
        connection.connect()
        kept = connection.sock
        for path, body in [
            (CHAT, DATA),
            (CHAT, STREAM),
            (CHAT, DATA),
        ]:
            connection.request("POST", path, body, {"Authorization": f"Bearer {KEY}"})
            response = connection.getresponse()
            response.read()
            assert connection.sock is kept, (path, body, response.status)
    assert response.status == 200


def test_a_chunked_request(server: Server) -> None:
    with closing(http.client.HTTPConnection(*server.address, timeout=30)) as connection:
        pieces = iter([DATA[:9], DATA[9:40], DATA[40:]])
        connection.request(
            "POST", CHAT, pieces, {"Authorization": f"Bearer {KEY}"}, encode_chunked=True
        )
        assert connection.getresponse().status == 200


def test_a_request_in_pieces(server: Server) -> None:
    whole = request("1.1", DATA, "Connection: close")
    with server.connect() as connection:
        for i in range(0, len(whole), 40):
            connection.sendall(whole[i : i + 40])
        assert b" 200 " in connection.recv(1 << 16)


def test_expect_100_continue(server: Server) -> None:
    head = request("1.1", DATA, "Connection: close", "Expect: 100-continue")[: -len(DATA)]
    reply = spoken(server, head, DATA)
    assert reply.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_what_is_not_wanted_is_not_waited_for(server: Server) -> None:
    """A client that asks first is told before it sends."""
    head = request("1.1", DATA, "Expect: 100-continue")[: -len(DATA)]
    with server.connect() as connection:
        connection.sendall(head.replace(KEY.encode(), b"wrong"))
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
    with server.connect() as connection:
        length = f"Content-Length: {len(DATA)}".encode()
        connection.sendall(head.replace(length, b"Content-Length: 200000000"))
        replies = connection.recv(1 << 16)
        assert replies.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": ""},
        {"Content-Type": "application/json; charset=utf-8"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"BEARER {KEY}"},
        {"Accept": "text/event-stream"},
        {"Accept-Encoding": "gzip, deflate, br, zstd"},
        {"Range": "bytes=0-3"},
        {"OpenAI-Organization": "x", "User-Agent": "", "X-Stainless-Lang": "python"},
        {"X-Forwarded-For": "10.0.0.1", "X-Forwarded-Proto": "https", "Via": "1.1 proxy"},
    ],
    ids=str,
)
def test_headers_that_change_nothing(server: Server, headers: dict[str, str]) -> None:
    reply = server.post(CHAT, BODY, headers)
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json; charset=utf-8"
    assert reply.json()["choices"]


def test_a_byte_order_mark(server: Server) -> None:
    assert server.post(CHAT, b"\xef\xbb\xbf" + DATA).status == 200


@pytest.mark.parametrize("path", ["/chat/completions", CHAT, CHAT + "?api-version=1"])
def test_with_v1_and_without(server: Server, path: str) -> None:
    assert server.post(path, BODY).status == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
def test_head(server: Server, path: str) -> None:
    reply = server.request("HEAD", path)
    assert (reply.status, reply.body) == (200, b"")
    assert int(reply.headers["Content-Length"]) == len(server.get(path).body)


def test_a_stream_of_events(server: Server) -> None:
    reply = server.post(CHAT, STREAM)
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    *events, end, rest = reply.body.split(b"\n\n")
    assert (end, rest) == (b"data: [DONE]", b"")
    assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events)


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_others_have_no_access(server: Server, method: str) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    reply = server.request(method, CHAT if method != "GET" else "/v1/models", DATA, headers)
    assert not reply.headers["Access-Control-Allow-Origin"]
    assert not reply.headers["Access-Control-Allow-Credentials"]
    assert reply.status == 403


def test_a_page_of_its_own_has_access(server: Server) -> None:
    host = server.url.removeprefix("http://")
    assert server.post(CHAT, BODY, {"Origin": server.url, "Host": host}).status == 200


def test_a_name_that_is_not_its_own(server: Server) -> None:
    """A page whose name was made to lead here (DNS rebinding) calls this server its own."""
    headers = {"Origin": "http://evil.example:80", "Host": "evil.example:80"}
    assert server.post(CHAT, BODY, headers | {"Authorization": ""}).status in (401, 403)
