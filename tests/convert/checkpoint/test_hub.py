"""Checkpoints from the hubs: only what is needed, at the revision asked for, with plain errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megrez_gguf.checkpoint import hub
from megrez_gguf.checkpoint.shards import announced_shards
from megrez_gguf.errors import SourceError
from megrez_gguf.format.reader import GGUFFile
from support.checkpoints import Make
from support.hub_server import COMMIT, REPOSITORY, HubServer, serve
from support.marks import loop_takes

# What no repository may make us fetch.
BAIT = ("modeling_megrez.py", "pytorch_model.bin", "other.safetensors", "model-Q4.gguf", "x.pt")


@pytest.fixture(params=loop_takes("hf".__eq__, ["hf", "modelscope"]))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def server(make: Make) -> Iterator[HubServer]:
    files = {path.name: path.read_bytes() for path in make().iterdir()}
    with serve(files | dict.fromkeys(BAIT, b"raise SystemExit")) as running:
        yield running


class Client:
    """The command line in a process of its own, whose hubs are the server."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.out = folder / "out.gguf"
        self.env = {
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(folder / "home"),
            "HF_HOME": str(folder / "hf"),
            "MODELSCOPE_CACHE": str(folder / "ms"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_ENDPOINT": server.url,
            "MODELSCOPE_ENDPOINT": server.url,
            "MODELSCOPE_DOMAIN": server.url,
            "NO_PROXY": "127.0.0.1",
        }

    def __call__(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("convert", *arguments, "-o", str(self.out), "--force", **env)

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        code = "from megrez_cli import main; main()"
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, env=self.env | env, capture_output=True, text=True, timeout=120
        )


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path)


def test_only_what_is_needed(server: HubServer, client: Client, kind: str) -> None:
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{client.out}\n"
    shards = [name for name in server.files if name.startswith("model-") and ".s" in name]
    assert len(shards) > 1
    assert set(shards) < set(server.asked)
    assert not set(server.asked) & set(BAIT)
    first = min(server.asked.index(name) for name in shards)
    assert server.asked.index("config.json") < first
    values = GGUFFile.open(client.out).values
    assert REPOSITORY in values["general.source.url"]
    source = str(values["megrez-gguf.source"])
    assert source.endswith(f"@{COMMIT}" if kind == "hf" else "@master"), source
    server.forget()
    again = client(f"{kind}:{REPOSITORY}")
    assert again.returncode == 0, again.stderr
    assert not set(server.asked) & set(shards)


def test_the_folder_of_further_templates(server: HubServer, client: Client, kind: str) -> None:
    folder = "additional_chat_templates"
    server.files |= {f"{folder}/rag.jinja": b"{{ 1 }}", f"{folder}/rag.py": b"raise SystemExit"}
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert GGUFFile.open(client.out).values["tokenizer.chat_template.rag"] == "{{ 1 }}"
    assert f"{folder}/rag.py" not in server.asked


def without_index(server: HubServer, stem: str | None = None) -> list[str]:
    """Take the index away, and call the shards `stem`; their names."""
    del server.files["model.safetensors.index.json"]
    shards = [name for name in server.files if name.startswith("model-") and ".s" in name]
    for name in shards if stem else ():
        server.files[name.replace("model", str(stem), 1)] = server.files.pop(name)
    return [name.replace("model", stem or "model", 1) for name in shards]


@pytest.mark.parametrize("stem", ["model", "weights"])
def test_shards_without_an_index(server: HubServer, client: Client, kind: str, stem: str) -> None:
    if stem != "model":
        del server.files["other.safetensors"]
    wanted = without_index(server, stem)
    beside = ("optimizer.safetensors", "adapter_model.safetensors", "onnx/model.safetensors")
    server.files |= dict.fromkeys(beside, b"x")
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 0, done.stderr
    assert set(wanted) < set(server.asked)
    assert not set(server.asked) & {*beside, *BAIT}
    nowhere = "http://127.0.0.1:9"
    off = {"HF_ENDPOINT": nowhere, "MODELSCOPE_ENDPOINT": nowhere, "MODELSCOPE_DOMAIN": nowhere}
    server.forget()
    again = client(f"{kind}:{REPOSITORY}", **off)
    assert again.returncode == 0, again.stderr
    assert server.asked == []


def test_a_missing_shard_is_named_before_weights_are_fetched(
    server: HubServer, client: Client, kind: str
) -> None:
    gone = without_index(server)[1]
    del server.files[gone]
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 2
    assert f"{gone}, missing" in " ".join(done.stderr.split())
    assert not [name for name in server.asked if name.endswith(".safetensors")]


def test_another_kind_of_model_is_refused_before_its_weights(
    server: HubServer, client: Client, kind: str
) -> None:
    server.files["config.json"] = json.dumps({"model_type": "llama", "vocab_size": 320}).encode()
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 2
    assert "config.json: " in done.stderr
    assert not [name for name in server.asked if name.endswith(".safetensors")]


def test_revision(server: HubServer, client: Client, kind: str) -> None:
    done = client(f"{kind}:{REPOSITORY}", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert server.revisions <= {"v1", COMMIT}
    done = client(f"{kind}:{REPOSITORY}@no-such")
    assert done.returncode == 2
    assert "no-such" in done.stderr


def test_inspect(server: HubServer, client: Client, kind: str) -> None:
    done = client.run("inspect", f"{kind}:{REPOSITORY}", "--revision", "v1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["kind"], report["name"]) == ("checkpoint", REPOSITORY.partition("/")[2])
    assert report["non_finite"] == 0
    assert server.revisions <= {"v1", COMMIT}
    assert not set(server.asked) & set(BAIT)
    done = client.run("inspect", f"{kind}:{REPOSITORY}", "--revision", "no-such")
    assert done.returncode == 2
    assert "no-such" in done.stderr


@pytest.mark.slow
def test_parity(server: HubServer, client: Client, kind: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    size = ("--text", str(text), "--ctx", "16", "--windows", "1", "--levels", "f32", "--json")
    done = client.run("parity", f"{kind}:{REPOSITORY}", "--revision", "v1", *size)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] == f"{kind}:{REPOSITORY}"
    assert server.revisions <= {"v1", COMMIT}
    assert not set(server.asked) & set(BAIT)
    done = client.run("parity", f"{kind}:{REPOSITORY}", "--revision", "no-such", *size)
    assert done.returncode == 2
    assert "no-such" in done.stderr


@pytest.mark.slow
def test_verify(server: HubServer, client: Client, kind: str) -> None:
    out = str(client.out)
    assert client(f"{kind}:{REPOSITORY}").returncode == 0
    server.forget()
    done = client.run("verify", out, f"{kind}:{REPOSITORY}", "--revision", "v1")
    assert done.returncode == 0, done.stderr
    assert "against the checkpoint; 0 differences" in done.stdout
    assert server.revisions <= {"v1", COMMIT}
    done = client.run("verify", out, f"{kind}:{REPOSITORY}", "--revision", "no-such")
    assert done.returncode == 2
    assert "no-such" in done.stderr
    done = client.run("verify", out, "--revision", "v1")
    assert done.returncode == 2
    assert "'v1': of which repository?" in done.stderr


def test_an_interrupted_download_goes_on(server: HubServer, client: Client, kind: str) -> None:
    shard = next(n for n in server.files if n.startswith("model-00001"))
    server.cut[shard] = len(server.files[shard]) // 2
    for _ in range(2):
        done = client(f"{kind}:{REPOSITORY}")
        if done.returncode == 0:
            break
        assert "run this again to go on with it" in done.stderr, done.stderr
    assert done.returncode == 0, done.stderr
    assert not server.cut
    shards = [name for name in server.files if name.startswith("model-0")]
    assert [server.asked.count(name) for name in shards] == [1 + (n == shard) for n in shards]
    # Hugging Face's client goes on inside a file from 10 MB on, which these are not.
    assert kind == "hf" or any(name == shard for name, _ in server.ranges)


def test_unknown_repository(client: Client, kind: str) -> None:
    done = client(f"{kind}:owner/Nothing")
    assert done.returncode == 2
    assert "does not know owner/Nothing" in done.stderr
    assert "Traceback" not in done.stderr


def test_gated(server: HubServer, client: Client, kind: str) -> None:
    server.gated = True
    done = client(f"{kind}:{REPOSITORY}")
    assert done.returncode == 2
    assert "denies access" in done.stderr


@pytest.mark.slow
def test_offline(client: Client, kind: str) -> None:
    nowhere = "http://127.0.0.1:9"
    off = {"HF_ENDPOINT": nowhere, "MODELSCOPE_ENDPOINT": nowhere, "MODELSCOPE_DOMAIN": nowhere}
    done = client(f"{kind}:{REPOSITORY}", **off)
    assert done.returncode == 2
    assert "a folder works without network" in done.stderr, done.stderr
    assert client(f"{kind}:{REPOSITORY}").returncode == 0
    done = client(f"{kind}:{REPOSITORY}", **off)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "extra"), [("huggingface_hub", "hub"), ("modelscope_hub", "modelscope")]
)
def test_without_the_client(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    prefix = {"hub": "hf", "modelscope": "modelscope"}[extra]
    with pytest.raises(SourceError, match=rf"pip install 'megrez-gguf\[{extra}\]'"):
        hub.resolve(f"{prefix}:{REPOSITORY}", announced_shards)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./nowhere", "no such folder or file"),
        ("a/b/c", "no such folder or file"),
        ("models/tiny.gguf", "no such folder or file"),
        (Path("owner/name"), "no such folder or file"),
        ("owner/name@../../x", "not the name of a branch"),
        ("owner/name@", "not the name of a branch"),
    ],
)
def test_what_is_no_id(source: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        hub.resolve(source, announced_shards)


def test_a_folder_wins_and_has_no_revision(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    checkpoint.rename(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("owner/name", announced_shards).path == Path("owner/name")
    with pytest.raises(SourceError, match="is on this machine and has no revision"):
        hub.resolve("owner/name", announced_shards, revision="v1")
