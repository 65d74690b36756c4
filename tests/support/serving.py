"""A server process of one's own on loopback, what it holds, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megrez_gguf.format.reader import GGUFFile
from megrez_llama.expert_store import CACHE_KEY
from megrez_runtime.memory import Needs, cache_batch

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def store_options(model: Path, share: float = 0.5) -> tuple[str, ...]:
    """The options that give `model` a store for `share` of its experts."""
    needs = Needs.of(GGUFFile.open(model), model)
    size = int(needs.slot_bytes * needs.n_experts * share)
    batch = cache_batch(needs, size)
    cache = f"{CACHE_KEY}=int:{size}"
    return "--override-kv", cache, "--ubatch-size", str(batch), "--batch-size", str(batch)


def metrics(text: str) -> dict[str, float]:
    """The values on a page of metrics in Prometheus' text format."""
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def wait_until(condition: Callable[[], Any], within: float, what: str) -> float:
    """Seconds until `condition()` is true; AssertionError when that takes more than `within`."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < within, f"not within {within:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - start


@dataclass
class Answer:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's form."""
        return str(self.json["error"]["message"])


class Server:
    """A running server. Its log, standard output and error together, is the file `log`."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def request(
        self, path: str, body: Any = None, timeout: float = 60, method: str | None = None
    ) -> Answer:
        """GET, or POST of `body` as JSON (bytes as they are), on a connection of its own."""
        with self._open(path, body, timeout, method) as response:
            return Answer(response.status, dict(response.getheaders()), response.read())

    def stream(
        self, path: str, body: dict[str, Any], timeout: float = 60
    ) -> Generator[Any, None, None]:
        """The events of a streamed answer; closing the iterator closes the connection."""
        with self._open(path, body | {"stream": True}, timeout) as response:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line.removeprefix(b"data: "))
                elif line.startswith(b"error: "):
                    yield {"error": json.loads(line.removeprefix(b"error: "))}

    @contextmanager
    def _open(
        self, path: str, body: Any, timeout: float, method: str | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {} if data is None else {"Content-Type": "application/json"}
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, headers)
            yield connection.getresponse()
        finally:
            connection.close()

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A bare connection, for clients that do not keep to the protocol."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(60)
        client.connect((HOST, self.port))
        return client

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.tail()}"
        try:
            return self.request("/health", timeout=5).status == 200
        except OSError:
            return False

    def busy(self) -> int:
        """Requests that are computed right now."""
        return int(metrics(self.request("/metrics").body.decode())["llamacpp:requests_processing"])

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    # -- what the process holds: Linux only ----------------------------------------------------

    def memory(self) -> int:
        """Resident bytes."""
        return self._status("VmRSS") * 1024

    def threads(self) -> int:
        return self._status("Threads")

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1])
        raise AssertionError(f"no {name} in /proc")

    # -- its end -------------------------------------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        """The exit code; minus a signal's number when one ended it."""
        return self.process.wait(timeout)


@contextmanager
def serve(
    command: Sequence[str | Path],
    log: Path,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    preexec: Callable[[], None] | None = None,
    within: float = 60,
) -> Iterator[Server]:
    """`command`, with a host and a port added, until the block ends; ready when it begins."""
    port = port or free_port()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*map(str, command), "--host", HOST, "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(env or {}),
            preexec_fn=preexec,
        )
    server = Server(process, port, log)
    try:
        wait_until(server.is_ready, within, "the server is ready")
        yield server
    finally:
        process.kill()
        process.wait()
