"""A server of the tests' own: on a free port of the loopback interface, gone when its test is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import pytest

from support.commands import RUN

KEY = "sk-123456"
# As users start it; small, so that several can run beside each other.
COMMAND = (*RUN, "serve", "--port", "0", "--threads", "1", "--parallel", "4", "--ram", "off")


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    headers: HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    """Without a path: `http://127.0.0.1:PORT`."""
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        assert parts.hostname
        assert parts.port
        return parts.hostname, parts.port

    @property
    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace")

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Reply:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Reply:
        """`body` is sent as it is if it is bytes, otherwise as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, headers)

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """One request with the key on a connection of its own; `headers` go on top."""
        own = {"Authorization": f"Bearer {KEY}"}
        if body is not None:
            own["Content-Type"] = "application/json"
        with contextlib.closing(HTTPConnection(*self.address, timeout=60)) as connection:
            connection.request(method, path, body, own | dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, response.headers, response.read())


@contextlib.contextmanager
def running(model: Path, folder: Path, *arguments: str) -> Iterator[Server]:
    """A server of `model` that is ready to answer; what it says goes to a file in `folder`.

    `arguments` come after those of `COMMAND`, so they win. A server that does not start, or does
    not outlive the block, fails the test with the end of its log.
    """
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, str(model), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MEGREZ_API_KEY": KEY},
        )
    try:
        yield Server(_address(process, log), process, log)
        if process.poll() is not None:
            _fail(f"the server has ended with {process.returncode}", log)
    finally:
        process.kill()
        process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once the model is loaded."""
    deadline = time.monotonic() + 60
    while True:
        if process.poll() is not None:
            _fail(f"the server has ended with {process.returncode}", log)
        if match := re.search(rb" at (http://\S+:\d+)", log.read_bytes()):
            server = Server(match[1].decode(), process, log)
            with contextlib.suppress(OSError):
                if server.get("/health").status == 200:
                    return server.url
        if time.monotonic() > deadline:
            _fail("the server is not ready after a minute", log)
        time.sleep(0.02)


def _fail(reason: str, log: Path) -> NoReturn:
    pytest.fail(f"{reason}; its log ends:\n{log.read_text('utf-8', 'replace')[-3000:]}")
