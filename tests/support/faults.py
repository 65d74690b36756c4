"""What goes wrong around a server: clients that misbehave, signals, disks. Each is one function.

A fault is given a `Place` and returns a note for the table; where the server does not stand it, it
raises AssertionError. The server under a fault must go on with the right tokens, or end and say so:
answers are compared with those of a server that nobody disturbs.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from support.server import (
    HOST,
    Answer,
    Server,
    free_port,
    metrics,
    serve,
    store_options,
    wait_until,
)

MIB = 1 << 20
PROBE = {"prompt": "Once upon a time", "n_predict": 24, "temperature": 0, "return_tokens": True}
# Longer than any test waits, so that only a client's leaving ends it.
ENDLESS: dict[str, Any] = {"prompt": "Once", "n_predict": 30000, "ignore_eos": True}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
VARIED = 12
CONTEXT = 32768
SLOTS = 4


@dataclass
class Place:
    """A model, and a folder for what a fault leaves behind. Servers are started by `serve`."""

    model: Path
    folder: Path
    program: Path
    notice: float = 1
    """Seconds within which the work of a client that has left must stop."""

    def command(self, *options: str | Path, model: Path | None = None) -> list[str | Path]:
        longer = f"megrez-moe.context_length=int:{CONTEXT}"  # the pocket's own is soon decoded
        fixed = ["--ctx-size", str(CONTEXT * SLOTS), "--parallel", str(SLOTS), "--threads", "1"]
        fixed += ["--override-kv", longer, "--metrics", "--no-ui", "--alias", "megrez-moe"]
        fixed += ["--timeout", "60", "--cors-origins", "", "--no-kv-unified", "--fit", "off"]
        fixed += ["--cache-ram", "64", "--batch-size", "512", "--flash-attn", "off"]
        fixed += ["--offline", "--no-slots"]
        return [self.program, "--model", model or self.model, *fixed, *options]

    @contextlib.contextmanager
    def serve(
        self,
        *options: str | Path,
        model: Path | None = None,
        **how: Any,
    ) -> Iterator[Server]:
        with serve(self.command(*options, model=model), self.log, **how) as server:
            yield server

    @property
    def log(self) -> Path:
        """What all servers of this place say."""
        return self.folder / "server.log"

    @cached_property
    def expected(self) -> list[int]:
        """The tokens of PROBE from a server that nobody disturbs."""
        with self.serve() as server:
            return tokens(server)

    @cached_property
    def expected_varied(self) -> list[list[int]]:
        """The tokens of each `varied` request, likewise."""
        with self.serve() as server:
            answers = [server.post("/completion", varied(n)) for n in range(VARIED)]
        return [answer.json()["tokens"] for answer in answers]

    def check(self, server: Server, within: float = 10) -> float:
        """Seconds a real client waits for the right answer."""
        expected = self.expected
        start = time.monotonic()
        assert tokens(server, timeout=within) == expected, "wrong tokens"
        return time.monotonic() - start


def tokens(server: Server, timeout: float = 60) -> list[int]:
    answer = server.request("POST", "/completion", PROBE, timeout=timeout)
    assert answer.status == 200, f"{answer.status}: {answer.body[:500]!r}"
    return list(answer.json()["tokens"])


def varied(number: int) -> dict[str, Any]:
    """A request that wants experts of its own."""
    prompt = [5 + (number * 7919 + n * 31) % 290 for n in range(40)]
    return {"prompt": prompt, "n_predict": 24, "temperature": 0, "return_tokens": True}


def request_bytes(body: dict[str, Any], path: str = "/completion") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    return (head + f"Content-Length: {len(data)}\r\n\r\n").encode() + data


def allow_descriptors(count: int) -> None:
    """Raise this process's own limit, which its children inherit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


@contextlib.contextmanager
def connections(server: Server, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Clients that have sent `first` and now say nothing."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(server.connect()))
            if first:
                clients[-1].sendall(first)
        yield clients


# -- clients that hold on ------------------------------------------------------------------------


def _held_on(place: Place, count: int, first: bytes = b"", within: float | None = None) -> str:
    """A real client is answered while `count` others have sent `first` and no more."""
    allow_descriptors(2 * count + 200)
    with place.serve() as server:
        place.check(server)
        memory, threads = server.memory(), server.threads()
        with connections(server, count, first):
            time.sleep(0.5)
            held, workers = server.memory() - memory, server.threads() - threads
            waited = place.check(server, within=place.notice if within is None else within)
        wait_until(lambda: server.descriptors() < 50, 90, "the connections are closed")
        place.check(server)
    return f"answer in {waited:.2f} s; {held / count / 1024:.0f} KiB each, {workers} threads more"


def idle_connections(place: Place) -> str:
    """1,000 connections that send nothing."""
    return _held_on(place, 1000)


def slow_headers(place: Place) -> str:
    """1,000 clients that never finish their headers."""
    return _held_on(place, 1000, b"POST /completion HTTP/1.1\r\nHost: x\r\n")


def slow_bodies(place: Place) -> str:
    """1,000 clients that never finish their bodies."""
    return _held_on(place, 1000, request_bytes(PROBE)[:-10])


def too_many_slow(place: Place) -> str:
    """More of them than the server starts threads: others wait until it gives those up."""
    return _held_on(place, 1200, request_bytes(PROBE)[:-10], within=90)


def slow_readers(place: Place, count: int = SLOTS) -> str:
    """Clients that read a byte a second of their streams, one on every slot."""
    ask = request_bytes(ENDLESS | {"stream": True})
    with place.serve() as server, contextlib.ExitStack() as stack:
        place.check(server)
        clients = [stack.enter_context(server.connect(receive_buffer=1)) for _ in range(count)]
        for client in clients:
            client.sendall(ask)
        wait_until(lambda: server.busy() == count, 10, "all slots decode")
        memory = server.memory()
        waits = []
        for _ in range(5):
            for client in clients:
                client.recv(1)
            waits.append(1.0)
            time.sleep(1)
        grown = server.memory() - memory
        assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB more in 5 s"
        for client in clients:
            client.close()
        waited = wait_until(lambda: server.busy() == 0, place.notice, "the work stops")
        place.check(server)
    return f"{grown / MIB:.1f} MiB more in 5 s; work stopped {waited:.2f} s after they left"


# -- clients that go -----------------------------------------------------------------------------


def _vanish(place: Place, body: dict[str, Any], reset: bool) -> str:
    with place.serve() as server:
        place.check(server)
        client = server.connect()
        client.sendall(request_bytes(body))
        wait_until(lambda: server.busy() == 1, 5, "the request is computed")
        if reset:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        client.close()
        waited = wait_until(lambda: server.busy() == 0, place.notice, "its work stops")
        place.check(server)
    return f"work stopped after {waited:.2f} s"


def vanish_streaming(place: Place) -> str:
    """A client leaves in the middle of a stream."""
    return _vanish(place, ENDLESS | {"stream": True}, reset=False)


def vanish_waiting(place: Place) -> str:
    """A client leaves that waits for a whole answer."""
    return _vanish(place, ENDLESS, reset=False)


def vanish_reset(place: Place) -> str:
    """A client's connection is reset."""
    return _vanish(place, ENDLESS | {"stream": True}, reset=True)


def vanish_in_prompt(place: Place) -> str:
    """A client leaves while its prompt of 30,000 tokens is computed."""
    prompt = [5 + n % 300 for n in range(30000)]
    return _vanish(place, {"prompt": prompt, "n_predict": 1, "cache_prompt": False}, reset=False)


def vanish_in_queue(place: Place) -> str:
    """Clients leave that wait for a slot: nothing of theirs is computed."""
    with place.serve() as server, contextlib.ExitStack() as stack:
        place.check(server)
        running = [stack.enter_context(server.connect()) for _ in range(SLOTS)]
        for client in running:
            client.sendall(request_bytes(ENDLESS | {"stream": True}))
        wait_until(lambda: server.busy() == SLOTS, 10, "all slots decode")
        queued = [server.connect() for _ in range(20)]
        for client in queued:
            client.sendall(request_bytes(ENDLESS))
        time.sleep(0.5)
        for client in [*queued, *running]:
            client.close()
        waited = wait_until(lambda: server.busy() == 0, place.notice, "the work stops")
        place.check(server)
    return f"work stopped after {waited:.2f} s"


# -- requests that are none ----------------------------------------------------------------------

POST = b"POST /completion HTTP/1.1\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NO_REQUESTS = {
    "noise": os.urandom(4096),
    "zeros": bytes(4096),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "TLS": bytes.fromhex("16030100a5010000a10303") + os.urandom(160),
    "no version": b"GET /health\r\n\r\n",
    "a long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    "many headers": b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 10_000 + b"\r\n",
    "negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 9\r\n\r\n{}",
    "bad chunk": CHUNKED + b"ZZ\r\n{}\r\n0\r\n\r\n",
    "endless chunk": CHUNKED + b"ffffffff\r\n{}",
    "half a request": request_bytes(PROBE)[:-20],
}


def garbage(place: Place) -> str:
    """Noise, other protocols and broken requests."""
    with place.serve() as server:
        place.check(server)
        said = []
        for name, data in NO_REQUESTS.items():
            with server.connect() as client:
                with contextlib.suppress(OSError):
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)
                client.settimeout(10)
                try:
                    first = client.recv(4096).split(b"\r\n")[0]
                except TimeoutError:
                    raise AssertionError(f"{name}: no answer in 10 s") from None
                except OSError:
                    first = b""
                status = first.split(b" ")[1].decode() if first.startswith(b"HTTP/") else "closed"
                assert status in {"closed", "400", "413", "414", "431"}, f"{name}: {first!r}"
                said.append(f"{name} {status}")
            place.check(server)
    return ", ".join(said)


def huge_body(place: Place, size: int = 100_000_000) -> str:
    """A body of 100 MB is refused with 413 in words, and not held in memory."""
    body = request_bytes({"prompt": "a" * size})
    with place.serve() as server:
        place.check(server)
        before = server.memory()
        with server.connect() as client:
            with contextlib.suppress(OSError):  # the server need not take it all
                client.sendall(body)
            head, _, answer = client.recv(1 << 16).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 "), head
        message = str(json.loads(answer)["error"]["message"])
        place.check(server)
        grown = server.memory() - before
        assert grown < 64 * MIB, f"{grown / MIB:.0f} MiB more"
    return f"413: {message}; {grown / MIB:.0f} MiB more"


def quick_requests(place: Place, count: int = 10_000) -> str:
    """Many short requests, each on a connection of its own: nothing piles up."""
    with place.serve() as server, ThreadPoolExecutor(8) as pool:

        def ask(number: int) -> int:
            path, body = [
                ("/health", None),
                ("/tokenize", {"content": "a"}),
                ("/completion", {"prompt": "a", "n_predict": 1}),
                ("/completion", {"prompt": 7.5}),
                ("/nothing", None),
            ][number % 5]
            return server.request("POST" if body else "GET", path, body).status

        list(pool.map(ask, range(count // 5)))
        files, memory = server.descriptors(), server.memory()
        start = time.monotonic()
        statuses = list(pool.map(ask, range(count)))
        seconds = time.monotonic() - start
        place.check(server)
        assert set(statuses) <= {200, 400, 404}, sorted(set(statuses))
        assert server.descriptors() <= files + 2, f"{server.descriptors() - files} files more"
        grown = server.memory() - memory
        assert grown < 16 * MIB, f"{grown / MIB:.0f} MiB more"
    return f"{count / seconds:.0f} a second; {grown / MIB:.1f} MiB more, no file more"


# -- ends and restarts ---------------------------------------------------------------------------


def kill_and_restart(place: Place, times: int = 3) -> str:
    """kill -9 with requests running, and at once a new server on the port."""
    port, took = free_port(), []
    for _ in range(times):
        files = set(place.folder.iterdir()) | set(Path("/dev/shm").iterdir())
        with place.serve(port=port) as server, contextlib.ExitStack() as stack:
            place.check(server)
            for _ in range(SLOTS):
                client = stack.enter_context(server.connect())
                client.sendall(request_bytes(ENDLESS | {"stream": True}))
            wait_until(lambda: server.busy() == SLOTS, 10, "all slots decode")
            group = children(server.process.pid)
            assert not group, f"child processes: {group}"
            server.process.send_signal(signal.SIGKILL)
            assert server.process.wait(30) == -signal.SIGKILL
            left = (set(place.folder.iterdir()) | set(Path("/dev/shm").iterdir())) - files
            assert left <= {place.log}, left
            start = time.monotonic()
            with place.serve(port=port) as again:
                place.check(again)
                took.append(time.monotonic() - start)
    return f"answers again after {max(took):.2f} s; no child, no file left"


def children(pid: int) -> list[int]:
    return [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]


def _end(place: Place, number: signal.Signals) -> str:
    length, patience = 500, 300
    with place.serve() as server, ThreadPoolExecutor(1) as pool:
        place.check(server)
        body = ENDLESS | {"n_predict": length}
        streamed = server.stream("/completion", body, timeout=patience)
        next(streamed)
        whole = pool.submit(server.request, "POST", "/completion", body, timeout=patience)
        wait_until(lambda: server.busy() == 2, 10, "both requests are computed")
        server.process.send_signal(number)
        start = time.monotonic()
        last = list(streamed)[-1]
        assert last.get("tokens_predicted") == length, last
        try:
            status = server.post("/completion", PROBE).status
            assert status == 503, f"a new request got {status}"
            new = "503"
        except ConnectionError:
            new = "refused"
        answer = whole.result()
        assert answer.status == 200, f"{answer.status}: {answer.body[:200]!r}"
        assert answer.json()["tokens_predicted"] == length, answer.json()["tokens_predicted"]
        done = time.monotonic()
        code = server.process.wait(30)
        assert code == 0, f"exit code {code}"
    return (
        f"both requests ended whole {done - start:.1f} s later, new ones {new}, "
        f"exit code 0 {time.monotonic() - done:.2f} s after"
    )


def terminate(place: Place) -> str:
    """SIGTERM with requests running: they finish, new ones are refused, exit code 0."""
    return _end(place, signal.SIGTERM)


def interrupt(place: Place) -> str:
    """SIGINT does the same."""
    return _end(place, signal.SIGINT)


def terminate_twice(place: Place) -> str:
    """A second SIGTERM ends the server at once."""
    with place.serve() as server:
        place.check(server)
        with server.connect() as client:
            client.sendall(request_bytes(ENDLESS | {"stream": True}))
            wait_until(lambda: server.busy() == 1, 10, "the request is computed")
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
            assert server.process.poll() is None, "the first one ended it with a request running"
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            code = server.process.wait(5)
    return f"exit code {code} after {time.monotonic() - start:.2f} s"


def terminate_idle(place: Place, count: int = 50) -> str:
    """SIGTERM with idle connections and a half-sent request: none of them holds it up."""
    with place.serve() as server:
        place.check(server)
        half = request_bytes(PROBE)[:-10]
        with connections(server, count), connections(server, 5, half):
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            start = time.monotonic()
            try:
                code = server.process.wait(10)
            except subprocess.TimeoutExpired:
                raise AssertionError("still there after 10 s") from None
            assert code == 0, f"exit code {code}"
    return f"exit code 0 after {time.monotonic() - start:.2f} s"


def terminate_loading(place: Place) -> str:
    """SIGTERM before the model is loaded."""
    codes = []
    for delay in (0.01, 0.1, 0.3):
        port = free_port()
        command = [*map(str, place.command()), "--port", str(port)]
        with place.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            time.sleep(delay)
            process.send_signal(signal.SIGTERM)
            code = process.wait(20)
        finally:
            process.kill()
        assert code in (0, -signal.SIGTERM), f"exit code {code} when sent after {delay} s"
        codes.append(code)
    return f"exit codes {', '.join(map(str, codes))}"


def port_taken(place: Place) -> str:
    """Another program has the port: exit code 1, and a message that names the port."""
    with socket.socket() as other:
        other.bind((HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        done = subprocess.run(
            [*map(str, place.command()), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    text = done.stdout + done.stderr
    assert done.returncode == 1, f"exit code {done.returncode}: {text[-500:]}"
    assert str(port) in text, text[-500:]
    return f"exit code 1: {next(line for line in text.splitlines() if str(port) in line)[14:]}"


# -- disks -----------------------------------------------------------------------------------------

# Only the store reads by preadv: the file's head and what stays in memory are read by stdio.
FAILING_READS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t preadv(int fd, const struct iovec * iov, int count, off_t offset) {
    static ssize_t (*real)(int, const struct iovec *, int, off_t);
    if (access(getenv("READS_FAIL"), F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    if (!real) {
        real = (ssize_t (*)(int, const struct iovec *, int, off_t)) dlsym(RTLD_NEXT, "preadv");
    }
    return real(fd, iov, count, offset);
}
"""


def failing_reads(folder: Path) -> tuple[Path, dict[str, str]]:
    """A file whose being there makes every read of the store fail, and the environment for it."""
    source, library = folder / "failing_reads.c", folder / "failing_reads.so"
    source.write_text(FAILING_READS)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)
    flag = folder / "reads-fail"
    return flag, {"LD_PRELOAD": str(library), "READS_FAIL": str(flag)}


def disk_errors(place: Place) -> str:
    """Reads of experts fail while clients ask: a 500 in words, or the right tokens."""
    flag, env = failing_reads(place.folder)
    expected = place.expected_varied
    options = store_options(place.model)
    with place.serve(*options, env=env) as server, ThreadPoolExecutor(4) as pool:
        place.check(server)

        def ask(number: int) -> Answer:
            return server.post("/completion", varied(number % VARIED))

        statuses, message = [], ""
        for fails in (False, True, False, True, False):
            flag.touch() if fails else flag.unlink(missing_ok=True)
            answers = list(pool.map(ask, range(2 * VARIED)))
            for number, answer in enumerate(answers):
                statuses.append(answer.status)
                if answer.status == 200:
                    wanted = expected[number % VARIED]
                    assert answer.json()["tokens"] == wanted, f"wrong tokens, disk fails: {fails}"
                else:
                    assert fails, f"{answer.status} with a sound disk: {answer.body!r}"
                    assert answer.status == 500, f"{answer.status}: {answer.body!r}"
                    message = answer.error
            assert server.process.poll() is None
        failed = statuses.count(500)
        assert failed, "the disk's errors were not noticed"
        # A stream that has begun can only break off with an error event.
        events = server.stream("/completion", ENDLESS | {"temperature": 2, "top_k": 0})
        next(events)
        flag.touch()
        last = list(events)[-1]
        assert "error" in last, f"the stream ended as if it were whole: {last}"
        flag.unlink()
        place.check(server)
    assert "read" in message, f"the message does not say what failed: {message}"
    return f"{failed} of {len(statuses)} requests failed ({message}), no wrong token"


def replaced_file(place: Place) -> str:
    """The model's file is replaced by another (as an update does): the old one is still read."""
    copy = Path(shutil.copy(place.model, place.folder / "replaced.gguf"))
    with place.serve(*store_options(copy), model=copy) as server:
        place.check(server)
        other = place.folder / "other"
        other.write_bytes(b"something else")
        other.replace(copy)
        for number in range(12):
            server.post("/completion", varied(number))
        place.check(server)
    return "answers as before"


def truncated_file(place: Place) -> str:
    """The model's file is cut while it is served from: a word about it, and never a wrong token."""
    notes = []
    for name, options in (("store", store_options(place.model)), ("mapped", ())):
        copy = Path(shutil.copy(place.model, place.folder / "cut.gguf"))
        with place.serve(*options, model=copy) as server:
            place.check(server)
            os.truncate(copy, copy.stat().st_size // 2)
            said = ""
            for number, expected in enumerate(place.expected_varied):
                try:
                    answer = server.post("/completion", varied(number))
                except OSError:
                    # Of a mapped file, the kernel's doing.
                    said = f"exit code {server.process.wait(10)}"
                    break
                if answer.status == 200:
                    assert answer.json()["tokens"] == expected, "wrong tokens"
                else:
                    assert answer.status == 500, answer.body
                    said = f"500: {answer.error}"
        notes.append(f"{name}: {said or 'answers as before'}")
    assert "changed" in notes[0], notes[0]
    return "; ".join(notes)


# -- resources -------------------------------------------------------------------------------------


def no_descriptors(place: Place, limit: int = 64) -> str:
    """More connections than the server may open files: it waits, and goes on when they are gone."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    with place.serve(preexec=limited) as server:
        place.check(server)
        with connections(server, 2 * limit):
            time.sleep(2)
            spent = processor_seconds(server.process.pid)
            time.sleep(1)
            spent = processor_seconds(server.process.pid) - spent
            assert server.process.poll() is None, "it ended"
        waited = place.check(server, within=20)
        assert spent < 0.5, f"{spent:.1f} s of processor time a second while it waits"
    return f"answer {waited:.2f} s after they left"


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def full_log_disk(place: Place) -> str:
    """The disk that holds the log is full: the server goes on."""
    with place.serve("--log-file", "/dev/full") as server:
        for _ in range(3):
            place.check(server)
        assert server.post("/completion", b"{").status == 400
    return "answers as before"


# -- what is said ----------------------------------------------------------------------------------


def types(text: str) -> dict[str, str]:
    """The types on a page of metrics, each of which is described and has one value."""
    found = dict(re.findall(r"^# TYPE ([\w:]+) (counter|gauge)$", text, re.MULTILINE))
    described = re.findall(r"^# HELP ([\w:]+) \S", text, re.MULTILINE)
    assert sorted(found) == sorted(described) == sorted(metrics(text)), text
    return found


def metrics_format(place: Place) -> str:
    """/metrics is in Prometheus' format, and no counter falls."""
    with place.serve(*store_options(place.model)) as server:
        last: dict[str, float] = {}
        for number in range(5):
            answer = server.get("/metrics")
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            page = answer.body.decode()
            values, kinds = metrics(page), types(page)
            for name, before in last.items():
                assert values[name] >= before or kinds[name] != "counter", f"{name} fell"
            last = values
            server.post("/completion", varied(number))
        ours = [name for name in last if "expert" in name]
        assert ours, "nothing of the store"
        assert any(last[name] for name in ours), "the store's figures are zero"
    return f"{len(last)} figures, {len(ours)} of the experts"


MARKER = "xyzzy-plugh-4711"


def log_privacy(place: Place) -> str:
    """No text of a request is in the log, whatever becomes of the request."""
    chat = "/v1/chat/completions"

    def said(text: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | more

    bad_schema = {"type": "json_schema", "json_schema": {"schema": {"type": MARKER}}}
    requests: dict[str, tuple[str, Any]] = {
        "an answer": (chat, said(MARKER)),
        "a completion": ("/v1/completions", {"prompt": MARKER, "max_tokens": 4}),
        "overflow": ("/completion", {"prompt": MARKER * 20000, "n_predict": 4}),
        "bad JSON": (chat, f'{{"messages": "{MARKER}'.encode()),
        "bad UTF-8": (chat, f'{{"messages": "{MARKER}\xff"}}'.encode("latin-1")),
        "no messages": (chat, {"messages": MARKER}),
        "bad message": (chat, {"messages": [{"role": MARKER, "content": {"a": MARKER}}]}),
        "bad part": (chat, said(MARKER) | {"messages": [{"role": "user", "content": [MARKER]}]}),
        "bad value": (chat, said("a", temperature=MARKER)),
        "bad schema": (chat, said("a", response_format=bad_schema)),
        "bad grammar": (
            "/completion",
            {"prompt": "a", "n_predict": 4, "grammar": f"root ::= {MARKER} ["},
        ),
        "bad tools": (chat, said("a", tools=[{"type": MARKER}])),
        "bad model": (chat, said(MARKER, model=MARKER)),
        "bad template": (chat, said("a", chat_template_kwargs={"a": MARKER}, tool_choice=MARKER)),
        "bad stop": (chat, said("a", stop={"a": MARKER})),
        "bad path": (f"/{MARKER}", None),
        "bad part type": (
            chat,
            said("a") | {"messages": [{"role": "user", "content": [{"type": MARKER}]}]},
        ),
        "an image": (
            chat,
            said("a")
            | {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": MARKER}}],
                    }
                ]
            },
        ),
    }
    leaks, statuses = [], []
    with place.serve() as server:
        for name, (path, body) in requests.items():
            status = server.request("POST" if body else "GET", path, body).status
            statuses.append(f"{name} {status}")
            time.sleep(0.05)  # the log is written by a thread
            lines = server.log.read_text(errors="replace").splitlines()
            leaks += [f"{name}: {line[12:]}" for line in lines if MARKER in line]
            os.truncate(server.log, 0)
    assert not leaks, f"in the log: {'; '.join(leaks)}"
    return ", ".join(statuses)


# -- time ------------------------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}


def soak(place: Place, minutes: float, clients: int = 8) -> str:
    """Mixed traffic for so long: every answer is right or the right refusal, and memory is flat."""
    end = time.monotonic() + 60 * minutes

    def said(text: str, **more: Any) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": text}], "max_tokens": 32} | more

    def talk(server: Server, client: int) -> int:
        dice = random.Random(client)
        done = 0
        while time.monotonic() < end:
            chat = "/v1/chat/completions"
            body = said("Tell me. " * dice.randrange(1, 40), seed=done)
            match dice.randrange(8):
                case 0:
                    place.check(server, within=120)
                case 1:
                    list(server.stream(chat, body | {"max_tokens": 300}))
                case 2:
                    leaving = server.stream("/completion", ENDLESS)
                    for _ in range(dice.randrange(1, 50)):
                        next(leaving)
                    leaving.close()
                case 3:
                    with server.connect() as client_socket:
                        client_socket.sendall(request_bytes(ENDLESS))
                        time.sleep(dice.random())
                case 4:
                    body["tools"] = [TOOL]
                    assert server.post(chat, body).status == 200
                case 5:
                    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
                    body["response_format"] = form
                    assert server.post(chat, body).status == 200
                case 6:
                    long = {"prompt": [5] * (CONTEXT + 1), "n_predict": 1}
                    assert server.post("/completion", long).status == 400
                case 7:
                    prompt = {"prompt": [dice.randrange(5, 300) for _ in range(600)]}
                    assert server.post("/completion", prompt | {"n_predict": 8}).status == 200
            done += 1
        return done

    samples: list[tuple[float, int]] = []
    with place.serve(*store_options(place.model)) as server, ThreadPoolExecutor(clients) as pool:
        place.check(server)
        futures = [pool.submit(talk, server, client) for client in range(clients)]
        while not all(future.done() for future in futures):
            time.sleep(1)
            samples.append((time.monotonic(), server.memory()))
        done = sum(future.result() for future in futures)
        wait_until(lambda: server.busy() == 0, 10, "the work stops")
        place.check(server)
    # The first half is warming up: prompt caches fill, and the allocator finds its size.
    half = samples[len(samples) // 2 :]
    slope = statistics.linear_regression(*zip(*half, strict=True)).slope * 3600 / MIB
    growth = slope * minutes / 120
    sizes = [size / MIB for _, size in half]
    note = (
        f"{done} requests in {minutes:g} min; {min(sizes):.0f} to {max(sizes):.0f} MiB in the "
        f"second half, {growth:+.1f} MiB in it ({slope:+.1f} an hour)"
    )
    assert growth < 16, note
    return note


Fault = Callable[[Place], str]
FAULTS: tuple[Fault, ...] = (
    idle_connections,
    slow_headers,
    slow_bodies,
    too_many_slow,
    slow_readers,
    vanish_streaming,
    vanish_waiting,
    vanish_reset,
    vanish_in_prompt,
    vanish_in_queue,
    garbage,
    huge_body,
    quick_requests,
    kill_and_restart,
    terminate,
    interrupt,
    terminate_twice,
    terminate_idle,
    terminate_loading,
    port_taken,
    disk_errors,
    replaced_file,
    truncated_file,
    no_descriptors,
    full_log_disk,
    metrics_format,
    log_privacy,
)
