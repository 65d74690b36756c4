"""JSON as people's editors and trainers leave it, folders that hold no model, and hubs' caches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megrez_gguf
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.json_file import load_json, read_object
from megrez_gguf.checkpoint.location import origin
from megrez_gguf.errors import ConfigError, SourceError
from support.commands import cli
from support.configurations import TINY

TEXT = json.dumps(TINY)


def write(path: Path, content: bytes | str = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- JSON --------------------------------------------------------------------------------------


def test_a_byte_order_mark_changes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    plain, marked = tmp_path / "plain.gguf", tmp_path / "marked.gguf"
    megrez_gguf.convert(checkpoint, plain)
    for path in checkpoint.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    megrez_gguf.convert(checkpoint, marked)
    assert marked.read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_are_named(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path / "config.json", TEXT.encode(encoding))
    with pytest.raises(ConfigError, match=rf"{path}: .*UTF-16 or UTF-32 text, expected UTF-8"):
        Documents.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [r'"\ud800"', r'{"\udfff": 1}', r'[{"a": ["x\udC00y"]}]', r'"\ud83d\ude00 \ud83d"'],
)
def test_halves_of_surrogate_pairs(text: str) -> None:
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        load_json(text)


@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', r'"\\ud800"', '"\U0001f600"', r'"\u00e9"'])
def test_whole_pairs(text: str) -> None:
    load_json(text).encode()


@pytest.mark.parametrize("depth", [101, 500, 5000, 200_000])
@pytest.mark.parametrize("pair", ["[]", '{"a": }'])
def test_deep_nesting(tmp_path: Path, depth: int, pair: str) -> None:
    opening, closing = pair[:-1], pair[-1]
    path = write(tmp_path / "config.json", '{"x": ' + opening * depth + "1" + closing * depth + "}")
    with pytest.raises(ConfigError, match=f"{path}: cannot be read as JSON"):
        Documents.read(tmp_path)


@pytest.mark.parametrize("value", ["1" * 4000, "1" * 100_000, "1e999", "-1e400", "NaN", "Infinity"])
def test_numbers_out_of_this_world(tmp_path: Path, value: str) -> None:
    draw = random.Random(value)
    name = draw.choice([k for k, v in TINY.items() if type(v) in (int, float)])
    text = json.dumps(TINY | {name: "@"}).replace('"@"', value)
    write(tmp_path / "config.json", text)
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_folder(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert len(str(caught.value)) < 600


def test_a_link_that_leads_nowhere_is_no_absence(tmp_path: Path) -> None:
    assert read_object(tmp_path / "config.json", ConfigError) is None
    (tmp_path / "config.json").symlink_to(tmp_path / "blob")
    with pytest.raises(ConfigError, match=r"config\.json: a link to .*blob"):
        read_object(tmp_path / "config.json", ConfigError)


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_the_file_that_is_wrong_is_named(tmp_path: Path, name: str) -> None:
    write(tmp_path / "config.json")
    path = write(tmp_path / name, "[1]")
    with pytest.raises(Exception, match=f"^{path}: expected a JSON object, found list"):
        Documents.read(tmp_path)


# --- folders that hold no model ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "it is empty"),
        ({"notes.txt": ""}, r"no config\.json in this folder$"),
        (
            {
                "adapter_config.json": '{"base_model_name_or_path": "Infinigence/Megrez2"}',
                "adapter_model.safetensors": "",
            },
            r"PEFT adapter.*'Infinigence/Megrez2'.*merge_and_unload\(\)",
        ),
        ({"adapter_config.json": "{}"}, r"PEFT adapter.*\('unknown'\)"),
        ({"a.gguf": "", "b.gguf": ""}, "GGUF files, which are converted already"),
        ({"params.json": "{}", "consolidated.00.pth": ""}, "Meta's or Mistral's own layout"),
        ({"model_index.json": "{}"}, "a pipeline"),
        ({"zero_to_fp32.py": ""}, "DeepSpeed"),
        ({"x/__0_0.distcp": "", "__0_0.distcp": ""}, "distributed training state"),
        ({"model.safetensors": ""}, "weights only"),
        ({"model/config.json": TEXT}, "; model in it has one: give that folder"),
        (
            {"checkpoint-5/config.json": TEXT, "checkpoint-9/config.json": TEXT},
            "checkpoint-5, checkpoint-9 in it have one",
        ),
    ],
    ids=str,
)
def test_a_folder_without_config(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        write(folder / name, content)
    with pytest.raises(ConfigError, match=expected) as caught:
        Documents.read(folder)
    assert str(caught.value).startswith(f"{folder}: no config.json in this folder")


def test_an_adapter_beside_the_configuration_of_its_base(tmp_path: Path) -> None:
    write(tmp_path / "config.json")
    write(tmp_path / "adapter_config.json", "{}")
    assert Documents.read(tmp_path).has_adapter
    write(tmp_path / "adapter_model.safetensors", "")
    with pytest.raises(ConfigError, match="a PEFT adapter, not a model"):
        Documents.read(tmp_path)
    write(tmp_path / "model.safetensors", "")
    assert Documents.read(tmp_path).has_adapter


# --- a hub's cache -----------------------------------------------------------------------------

Build = Callable[[Path], Path]


def snapshots(*names: str, main: str | None = None, hub: str = "models--a--b") -> Build:
    """The cache folder of a repository with these snapshots."""

    def build(root: Path) -> Path:
        repository = root / hub
        (repository / "snapshots").mkdir(parents=True)
        for name in names:
            write(repository / "snapshots" / name / "config.json")
        if main is not None:
            write(repository / "refs" / "main", main)
        return repository

    return build


@pytest.mark.parametrize("inside", ["", "snapshots"])
@pytest.mark.parametrize(
    ("build", "chosen"),
    [
        (snapshots("abc"), "abc"),
        (snapshots("abc", main="abc"), "abc"),
        (snapshots("abc", main="gone"), "abc"),
        (snapshots("abc", "def", main="def\n"), "def"),
        (snapshots("master", hub="models/a--b"), "master"),
    ],
    ids=["one", "one, main", "one of another branch", "main of two", "ModelScope's"],
)
def test_a_repository_stands_for_its_snapshot(
    tmp_path: Path, inside: str, build: Build, chosen: str
) -> None:
    found = origin(build(tmp_path) / inside)
    assert found.path.name == chosen
    assert (found.repository, found.revision) == ("a/b", chosen)
    assert found == origin(found.path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (snapshots(), "without a snapshot"),
        (snapshots("abc", "def"), r"2 snapshots; give one of them: .*/abc, .*/def"),
        (snapshots("abc", "def", main="gone"), "2 snapshots"),
        (snapshots("abc", "def", main=""), "2 snapshots"),
        (lambda root: snapshots("abc")(root).parent, r"a hub's cache; give .*/models--a--b"),
        (lambda root: snapshots("abc")(root / "hub").parent.parent, r"cache; give .*/models--a--b"),
        (lambda root: snapshots("abc", hub="models/a--b")(root).parents[1], r"cache; give .*/a--b"),
    ],
    ids=["none", "two", "two, main gone", "two, main empty", "hub", "HF_HOME", "ModelScope's"],
)
def test_a_cache_that_does_not_say_which(tmp_path: Path, build: Build, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        origin(build(tmp_path))


def test_folders_that_only_look_like_a_cache(tmp_path: Path) -> None:
    folder = write(tmp_path / "models--a--b" / "config.json").parent
    (folder / "snapshots" / "abc").mkdir(parents=True)
    for path in (folder, tmp_path / "nowhere", write(tmp_path / "c" / "x.gguf")):
        assert origin(path).path == path


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_a_file_of_the_folder(checkpoint: Path, name: str, command: str) -> None:
    write(checkpoint / name, "{}")
    result = cli(command, checkpoint / name)
    assert result.exit_code == 2
    assert f"not a folder; give the folder it lies in, {checkpoint}" in result.stderr


def test_every_command_takes_a_repository_of_the_cache(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "models--Infinigence--Megrez2" / "snapshots" / "abc"
    folder.parent.mkdir(parents=True)
    make().rename(folder)
    root, out = folder.parents[1], tmp_path / "x.gguf"
    assert cli("convert", root, "-o", out).exit_code == 0
    assert cli("verify", out, root).exit_code == 0
    assert json.loads(cli("inspect", root, "--json").stdout)["name"] == "Megrez2"
