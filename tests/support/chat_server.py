"""A loopback server that speaks the API of `megrez-gguf serve`, says what it is told, and errs on
command.

It also serves the page's files, so the page can be tested without a model.
"""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from support.paths import REPO

PAGE = REPO / "bindings" / "megrez_runtime" / "page"

LAYERS = list(range(1, 31))
N_EXPERT = 64


@dataclass
class ChatServer:
    """What the server says, and what it was asked. Change the fields while it runs."""

    url: str = ""
    answer: list[str] = field(default_factory=lambda: ["Hello", " there", "."])
    """The pieces of every answer."""
    finish: str = "stop"
    key: str | None = None
    """Requests without it get a 401; the page's files need none."""
    loading: bool = False
    """Every request of the API gets a 503."""
    refusal: tuple[int, dict[str, Any]] | None = None
    """Status and error of the next chat request, once."""
    hold_after: int | None = None
    """Pieces after which an answer waits until `go` is set or the client is gone."""
    go: threading.Event = field(default_factory=threading.Event)
    break_after: int | None = None
    """Pieces after which the connection breaks."""
    break_politely: bool = False
    """The answer then ends as if it were whole, as a proxy may let it."""
    rate: float = 12.5
    experts: dict[str, Any] | None = None
    """What GET /experts says; None: a 404, as a server without it."""
    props: bool = True
    """Whether GET /props is open."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    """The bodies of chat requests, in order."""
    paths: list[str] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client left before its answer was complete."""


def expert_state(**fields: Any) -> dict[str, Any]:
    """What GET /experts says of a model in its released shape that has done nothing yet."""
    state = {
        "layers": LAYERS,
        "pools": [1 + (layer - 1) // 3 * 3 for layer in LAYERS],
        "n_expert": N_EXPERT,
        "used": [[0] * N_EXPERT for _ in LAYERS],
        "store": None,
        "resident_bytes": 2 * 2**30,
    }
    return state | fields


@contextmanager
def serve_chat(**fields: Any) -> Iterator[ChatServer]:
    """A server with these fields of ChatServer, on a free port of 127.0.0.1."""
    chat = ChatServer(**fields)
    handler = type("_Bound", (_Handler,), {"chat": chat})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(PAGE))) as server:
        server.daemon_threads = True
        server.block_on_close = False
        chat.url = f"http://127.0.0.1:{server.server_address[1]}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield chat
        finally:
            chat.go.set()
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    chat: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def end_headers(self) -> None:
        # So that nothing answers any more once the server is closed.
        self.send_header("Connection", "close")
        super().end_headers()

    def do_GET(self) -> None:
        self.chat.paths.append(self.path)
        path = self.path.partition("?")[0]
        if path not in ("/v1/models", "/props", "/experts"):
            super().do_GET()
        elif self._admits():
            self._tell(path)

    def do_POST(self) -> None:
        self.chat.paths.append(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._admits():
            return
        self.chat.asked.append(body)
        if self.chat.refusal is not None:
            status, error = self.chat.refusal
            self.chat.refusal = None
            self._json({"error": error}, status)
        else:
            self._answer(body)

    def _admits(self) -> bool:
        if self.chat.loading:
            self._json({"error": {"message": "Loading model", "type": "unavailable_error"}}, 503)
        elif self.chat.key and self.headers.get("Authorization") != f"Bearer {self.chat.key}":
            self._json(
                {"error": {"message": "Invalid API Key", "type": "authentication_error"}}, 401
            )
        else:
            return True
        return False

    def _tell(self, path: str) -> None:
        if path == "/v1/models":
            self._json({"data": [{"id": "megrez-moe", "meta": {"n_ctx": 4096}}]})
        elif path == "/props" and self.chat.props:
            params = {"temperature": 0.7, "top_p": 0.9}
            self._json({"default_generation_settings": {"params": params, "n_ctx": 4096}})
        elif path == "/experts" and self.chat.experts is not None:
            self._json(self.chat.experts)
        else:
            self._json({"error": {"message": "File Not Found", "type": "not_found_error"}}, 404)

    def _answer(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        # A chunked answer that ends without its last chunk is one that broke.
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self._stream(body)
        except OSError:
            self.chat.gone.set()

    def _stream(self, body: dict[str, Any]) -> None:
        chat = self.chat
        for count, piece in enumerate(chat.answer, start=1):
            self._event({"delta": {"content": piece}, "finish_reason": None}, count)
            if count == chat.hold_after and not self._wait():
                chat.gone.set()
                return
            if count == chat.break_after:
                self.wfile.write(b"0\r\n\r\n" if chat.break_politely else b"")
                return
        self._event({"delta": {}, "finish_reason": chat.finish}, len(chat.answer))
        usage = {"completion_tokens": len(chat.answer), "prompt_tokens": 20}
        self._data(json.dumps({"choices": [], "usage": usage}))
        self._data("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _wait(self) -> bool:
        """Wait for `go`; False if the client went away first."""
        while not self.chat.go.wait(0.01):
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
                return False
        return True

    def _event(self, choice: dict[str, Any], count: int) -> None:
        timings = {
            "cache_n": 0,
            "prompt_n": 20,
            "prompt_per_second": 150.0,
            "predicted_n": count,
            "predicted_per_second": self.chat.rate,
        }
        self._data(json.dumps({"choices": [choice], "timings": timings}))

    def _data(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))

    def _json(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
