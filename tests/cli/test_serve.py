"""`megrez-gguf serve`: who may use it, what it says, and what it becomes."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.commands import cli
from support.server import KEY, serve_model

QUESTION = {
    "model": "megrez-moe",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "世界上最高的山峰是哪座？"}]}
    ],
}


@pytest.fixture
def became(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would have become: program, arguments, environment."""
    found: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *what: found.extend(what))
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(os, "set_inheritable", lambda number, wanted: None)
    monkeypatch.delenv("MEGREZ_API_KEY", raising=False)
    return found


def test_the_authors_request_works_as_they_wrote_it(
    pocket_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    options = ("--ram", "auto", "--max-tokens", "24")
    with serve_model(pocket_gguf(), tmp_path, *options, key=None) as server:
        assert f"megrez-moe at {server.url}: " in server.log.read_text("utf-8")
        headers = {"Authorization": f"Bearer {KEY}"}
        reply = server.post("/v1/chat/completions", QUESTION, headers)
        assert reply.status == 200, reply.body
        answer = reply.json()
        assert "珠穆朗玛峰" in answer["choices"][0]["message"]["content"]
        assert answer["usage"]["completion_tokens"] <= 24
        assert "megrez-moe" in server.get("/v1/models").json()["data"][0]["aliases"]
        # One process: what was started is what serves, and ends as it should.
        command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
        assert b"llama-server" in command.split(b"\0")[0]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0


def test_keys_open_and_are_nowhere_to_be_seen(
    pocket_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\n\nsk-first\r\n  sk-second\n")
    keys.chmod(0o600)
    options = ("--api-key-file", keys)
    with serve_model(pocket_gguf(), tmp_path, *options, key="sk-third") as server:
        found = {
            key: replace(server, key=key).get("/v1/models").status
            for key in (None, "sk-first", "sk-second", "sk-third", "# of the team")
        }
        assert [key for key, status in found.items() if status == 200] == ["sk-first", "sk-second"]
        assert set(found.values()) == {200, 401}
        for file in ("cmdline", "environ"):
            seen = Path(f"/proc/{server.process.pid}/{file}").read_bytes()
            assert b"sk-" not in seen
    with serve_model(pocket_gguf(), tmp_path, "--host", "0.0.0.0", key="a,b") as server:
        assert server.get("/v1/models").status == 200
        assert replace(server, key="a").get("/v1/models").status == 401


def test_parallel_requests_do_not_end_one_another(
    pocket_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    """More clients than places, each filling its context to the end, with few experts in memory."""
    options = ("--ctx", "256", "--parallel", "3", "--expert-cache", "4M")
    body = {"prompt": "山", "ignore_eos": True, "temperature": 0, "max_tokens": 1000}
    with serve_model(pocket_gguf(), tmp_path, *options) as server, ThreadPoolExecutor(7) as pool:
        replies = list(pool.map(lambda _: server.post("/v1/completions", body), range(7)))
    assert [reply.status for reply in replies] == [200] * 7, replies
    for answer in (reply.json() for reply in replies):
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 256


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "127.0.0.1,0.0.0.0"])
def test_other_addresses_need_a_key(model: Path, became: list[Any], host: str) -> None:
    done = cli("serve", model, "--host", host)
    assert done.exit_code == 2
    assert "MEGREZ_API_KEY" in done.stderr
    assert "--api-key-file" in done.stderr
    assert not became


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.7.6", "localhost"])
def test_this_machine_s_own_addresses_need_none(model: Path, became: list[Any], host: str) -> None:
    done = cli("serve", model, "--host", host, "--port", "0")
    assert done.exit_code == 0, done.stderr
    arguments = became[1]
    assert arguments[arguments.index("--host") + 1] == host
    assert "--api-key-file" not in arguments
    port = arguments[arguments.index("--port") + 1]
    assert f"megrez-moe at http://{host}:{port}: " in done.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no key"),
        (b"\n# only a comment\n \n", "holds no key"),
        (b"two words\n", "key 1 cannot be used"),
        (b"fine\n\xe4\xb8\xad\n", "key 2 cannot be used"),
        (b"\xff\xfe\n", "expected a text file"),
        (b"x" * 20_000, "bytes of keys"),
        (None, "No such file"),
    ],
)
def test_keys_that_cannot_be_used(
    model: Path, became: list[Any], tmp_path: Path, content: bytes | None, reason: str
) -> None:
    keys = tmp_path / "keys"
    if content is not None:
        keys.write_bytes(content)
    done = cli("serve", model, "--api-key-file", keys)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert "two words" not in done.stderr
    assert not became


def test_an_empty_variable_is_no_key(
    model: Path, became: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", " ", "#x"):
        monkeypatch.setenv("MEGREZ_API_KEY", value)
        done = cli("serve", model)
        assert done.exit_code == 2
        assert "MEGREZ_API_KEY" in done.stderr
    assert not became


def test_a_key_among_the_arguments_is_refused(model: Path, became: list[Any]) -> None:
    done = cli("serve", model, "--api-key", "sk-secret")
    assert done.exit_code == 2
    assert "MEGREZ_API_KEY" in done.stderr
    assert "sk-secret" not in done.stderr
    assert not became


def test_keys_that_others_can_read_are_warned_of(
    model: Path, became: list[Any], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-x")
    for mode, warned in ((0o644, True), (0o600, False)):
        keys.chmod(mode)
        done = cli("serve", model, "--port", "0", "--api-key-file", keys)
        assert ("chmod 600" in done.stderr) is warned


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    model: Path, became: list[Any]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = cli("serve", model, "--port", other.getsockname()[1])
    assert done.exit_code == 2
    assert "another program does. Give another --port" in done.stderr
    assert not became


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("http://127.0.0.1", "without port or http://"),
        ("127.0.0.1:8000", "without port or http://"),
        ("no.such.host.invalid", "without port or http://"),
        (",", "no host to listen on"),
        ("/no/such/folder/x.sock", "no such folder"),
    ],
)
def test_hosts_that_are_none(model: Path, became: list[Any], host: str, reason: str) -> None:
    done = cli("serve", model, "--host", host)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert not became


def test_unix_sockets(model: Path, became: list[Any], tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another program does" in cli("serve", model, "--host", path).stderr
        assert path.exists()
    assert not became
    # Nobody listens any more: left behind by a server that was killed.
    done = cli("serve", model, "--host", path)
    assert done.exit_code == 0, done.stderr
    assert f"megrez-moe at unix:{path}: " in done.stderr
    assert not path.exists()
    path.write_text("precious")
    assert "no socket" in cli("serve", model, "--host", path).stderr
    assert path.read_text() == "precious"


def test_a_build_without_the_server_is_told(
    model: Path, became: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("megrez_llama.server.package", lambda: tmp_path)
    done = cli("serve", model)
    assert done.exit_code == 2
    assert "built without the server" in done.stderr
    assert "pip install" in done.stderr


def test_too_little_memory_names_the_least(model: Path, became: list[Any]) -> None:
    done = cli("serve", model, "--ram", "50MiB")
    assert done.exit_code == 2
    assert re.search(r"at least \d+ MiB", done.stderr)
    assert not became


def test_names_of_ones_own_and_more_context_than_there_is(model: Path, became: list[Any]) -> None:
    done = cli("serve", model, "--port", "0", "--alias", "a", "--alias", "b", "--ctx", "9999")
    arguments = became[1]
    assert arguments[arguments.index("--alias") + 1] == "a,b"
    assert "warning: the model was trained on 2048 tokens" in done.stderr


def test_nothing_of_this_process_is_left_over(model: Path, tmp_path: Path) -> None:
    """Signals as they were, and standard streams that were closed stay unused."""
    within = ("bash", "-c", 'exec 0<&- 1>&-; exec "$@"', "bash")
    with serve_model(model, tmp_path, within=within) as server:
        folder = Path(f"/proc/{server.process.pid}")
        assert (folder / "fd/0").readlink() == Path(os.devnull)
        assert (folder / "fd/1").readlink() == Path(os.devnull)
        fields = server.status()
        assert not int(fields["SigBlk"], 16) & (1 << signal.SIGTERM - 1)
        assert not int(fields["SigIgn"], 16) & (1 << signal.SIGXFSZ - 1)
