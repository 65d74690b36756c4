"""A server process of one's own on loopback, what it holds, and plain requests to it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import Any

from megrez_gguf.format.reader import GGUFFile
from megrez_llama.expert_store import CACHE_KEY
from megrez_runtime.memory import Needs, cache_batch
from support.commands import RUN

HOST = "127.0.0.1"
KEY = "sk-123456"


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
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


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response."""

    status: int
    headers: HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The message of an error in OpenAI's form."""
        return str(self.json()["error"]["message"])


@dataclass(slots=True)
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    """Its standard output and error together."""
    key: str | None = None
    """Requests carry it."""

    @property
    def address(self) -> tuple[str, int]:
        return HOST, self.port

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("GET", path, headers=headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        return self.request("POST", path, body, headers)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 120,
    ) -> Answer:
        """On a connection of its own. A body is sent as JSON, bytes as they are."""
        with self._open(method, path, body, headers, timeout) as response:
            return Answer(response.status, response.headers, response.read())

    def stream(
        self, path: str, body: dict[str, Any], timeout: float = 120
    ) -> Generator[Any, None, None]:
        """The events of a streamed answer; closing the iterator closes the connection."""
        with self._open("POST", path, body | {"stream": True}, None, timeout) as response:
            assert response.status == 200, response.read()
            for line in response:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    yield json.loads(line.removeprefix(b"data: "))
                elif line.startswith(b"error: "):
                    yield {"error": json.loads(line.removeprefix(b"error: "))}

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        body: Any,
        headers: Mapping[str, str] | None,
        timeout: float,
    ) -> Iterator[HTTPResponse]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        own = {} if data is None else {"Content-Type": "application/json"}
        if self.key is not None:
            own["Authorization"] = f"Bearer {self.key}"
        with closing(HTTPConnection(*self.address, timeout=timeout)) as connection:
            connection.request(method, path, data, own | dict(headers or {}))
            yield connection.getresponse()

    def connect(self, receive_buffer: int = 0) -> socket.socket:
        """A bare connection, for clients that do not keep to the protocol."""
        client = socket.socket()
        if receive_buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(60)
        client.connect(self.address)
        return client

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"it ended with {self.process.returncode}"
        try:
            return self.request("GET", "/health", timeout=5).status == 200
        except OSError:
            return False

    def busy(self) -> int:
        """Requests that are computed right now."""
        return int(metrics(self.get("/metrics").body.decode())["llamacpp:requests_processing"])

    # -- what the process holds: Linux only ----------------------------------------------------

    def memory(self, kind: str = "VmRSS") -> int:
        """Resident bytes; the most there have ever been if `kind` is VmHWM."""
        return int(self.status()[kind].removesuffix("kB")) * 1024

    def threads(self) -> int:
        return int(self.status()["Threads"])

    def descriptors(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def status(self) -> dict[str, str]:
        """What the kernel says of the process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines)


@contextmanager
def serve(
    command: Sequence[str | Path],
    log: Path,
    *,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    key: str | None = None,
    preexec: Callable[[], None] | None = None,
) -> Iterator[Server]:
    """`command`, with a port added, until the block ends; ready when it begins.

    An error in the block has the end of the log as a note. That the server ends during the block
    is one, unless the block waits for it.
    """
    port = port or free_port()
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*map(str, command), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(env or {}),
            preexec_fn=preexec,
        )
    server = Server(process, port, log, key)
    try:
        wait_until(server.is_ready, 60, "the server is ready")
        yield server
        expected = process.returncode is not None
        assert expected or process.poll() is None, f"it ended with {process.returncode}"
    except Exception as error:
        error.add_note(f"The server's log ends:\n{log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        process.kill()
        process.wait()


@contextmanager
def serve_model(
    model: Path,
    folder: Path,
    *options: str | Path,
    key: str | None = KEY,
    within: Sequence[str] = (),
) -> Iterator[Server]:
    """`megrez-gguf serve`, small, so that several run beside each other; its log is in `folder`.

    `options` win over what is set here. `within` is a command that runs what follows it, in the
    same process.
    """
    small = ("--threads", "1", "--ram", "off")
    command = [*within, *RUN, "serve", model, *small, *options]
    env = {} if key is None else {"MEGREZ_API_KEY": key}
    with serve(command, folder / "server.log", env=env, key=key) as server:
        yield server
