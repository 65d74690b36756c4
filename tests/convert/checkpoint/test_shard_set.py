"""Which files hold the weights: by the index, else by their names, else a refusal that says why."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

import megrez_gguf
from megrez_gguf.checkpoint.shard_set import Index, choose
from megrez_gguf.errors import CheckpointError
from support.checkpoints import Make, edit_json, merge, shards

INDEX = "model.safetensors.index.json"
STEMS = ["model", "pytorch_model", "consolidated", "weights", "Megrez2-3x7B-A3B", "model.fp16"]
SINGLES = ["model-00001-of-00001", "consolidated.00", *STEMS]
# What is in many folders, and is not the model.
BESIDE = [
    "config.json", "README.md", "tokenizer.json", "pytorch_model.bin", "model.bin.index.json",
    "adapter_model.safetensors", "optimizer.safetensors", "adapters.safetensors",
    "rng_state_0.safetensors", "pytorch_model.bin.index.json", "pytorch_lora_weights.safetensors",
]  # fmt: skip


def parts(stem: str, count: int, width: int = 5, variant: str = "") -> list[str]:
    return [
        f"{stem}-{number:0{width}}-of-{count:0{width}}{variant}.safetensors"
        for number in range(1, count + 1)
    ]


def drawn_set(draw: random.Random, stem: str | None = None) -> list[str]:
    stem = stem or draw.choice(STEMS)
    if draw.random() < 0.3:
        return [f"{stem}.safetensors"]
    return parts(stem, draw.randint(2, 30), draw.choice([1, 2, 5, 6]), draw.choice(["", ".fp16"]))


def mixed(draw: random.Random, *groups: list[str]) -> list[str]:
    names = [*draw.sample(BESIDE, 4), *(name for group in groups for name in group)]
    return draw.sample(names, len(names))


def test_one_complete_set() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        wanted = drawn_set(draw)
        assert list(choose("here", mixed(draw, wanted), None).files) == wanted


def test_a_part_that_is_missing_is_named() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        wanted = parts(draw.choice(STEMS), draw.randint(2, 9))
        gone = draw.choice(wanted)
        left = [*(n for n in wanted if n != gone), *draw.choice([[], [f"{gone}.incomplete"]])]
        with pytest.raises(CheckpointError, match=rf"^here: .*{re.escape(gone)}, missing") as e:
            choose("here", mixed(draw, left), None)
        assert (f"{gone}.incomplete" in left) == (f"{gone}.incomplete was left" in str(e.value))


def test_the_set_named_model_goes_before_others() -> None:
    others = [["consolidated.safetensors"], ["ema.safetensors"], parts("model.fp16", 2)]
    for seed in range(100):
        draw = random.Random(seed)
        wanted = drawn_set(draw, "model")
        beside = draw.sample(others, draw.randint(1, 3))
        if any(name.endswith(".fp16.safetensors") for name in wanted):
            continue
        assert list(choose("here", mixed(draw, wanted, *beside), None).files) == wanted


@pytest.mark.parametrize(
    "groups",
    [
        (parts("model", 2), parts("model", 3)),
        (parts("model", 2), ["model.safetensors"]),
        (["weights.safetensors"], ["ema.safetensors"]),
        (parts("model.fp16", 2), ["consolidated.safetensors"]),
        (["model0-mp2.safetensors"], ["model1-mp2.safetensors"]),
        (["shard_0.safetensors"], ["shard_1.safetensors"]),
    ],
    ids=str,
)
def test_sets_that_could_each_be_meant(groups: tuple[list[str], list[str]]) -> None:
    one, two = groups
    with pytest.raises(CheckpointError, match=r"several \.safetensors files and no") as e:
        choose("here", [*one, *two], None)
    assert one[0] in str(e.value)
    assert two[0] in str(e.value)


def test_an_index_under_another_name_is_mentioned() -> None:
    names = ["shard_0.safetensors", "shard_1.safetensors", "weights.safetensors.index.json"]
    with pytest.raises(CheckpointError, match=r"weights\.safetensors\.index\.json may be it"):
        choose("here", names, None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json"], "no .safetensors file in this folder$"),
        (["pytorch_model-00001-of-00002.bin"], "PyTorch files only"),
        (["consolidated.00.pth"], "PyTorch files only"),
        (["model-q4.gguf"], "model-q4.gguf is converted already"),
        (["model.safetensors.incomplete"], "cut short"),
        (["model-00001-of-00002.safetensors.part"], "cut short"),
    ],
)
def test_no_weights(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        choose("here", names, None)


def test_the_index_decides() -> None:
    named = parts("model", 3)
    index = Index(dict(zip("abc", named, strict=True)), None)
    others = ["consolidated.safetensors", *parts("model.fp16", 2), *BESIDE]
    assert list(choose("here", [*named, *others], index).files) == named
    assert list(choose("here", [*named[:2], *others], index).files) == named[:2]
    for stray in ("model.safetensors", "model-00009-of-00009.safetensors"):
        with pytest.raises(CheckpointError, match=f"{stray} lies in this folder"):
            choose("here", [*named, stray], index)


@pytest.mark.parametrize("record", [".aria2", ".st"])
def test_a_file_of_full_size_whose_download_goes_on(record: str) -> None:
    for seed in range(20):
        draw = random.Random(seed)
        files = drawn_set(draw)
        half = draw.choice(files)
        with pytest.raises(CheckpointError, match=f"{re.escape(half)}: not all of it is here"):
            choose("here", mixed(draw, files, [half + record]), None)


@pytest.mark.parametrize("present", [["model.safetensors"], parts("model", 4)], ids=str)
def test_an_index_of_other_files_is_left_out(present: list[str]) -> None:
    index = Index({"a": "model-00001-of-00002.safetensors"}, None)
    chosen = choose("here", present, index)
    assert (list(chosen.files), chosen.index) == (present, None)
    assert "none of which is here" in chosen.notes[0]
    with pytest.raises(CheckpointError, match=r"names model-00001-of-00002\.safetensors, missing"):
        choose("here", ["weights.safetensors"], index)


# --- in a folder -------------------------------------------------------------------------------


def rename_shards(folder: Path, stem: str) -> None:
    for path in shards(folder):
        path.rename(path.with_name(path.name.replace("model", stem, 1)))


@pytest.mark.parametrize("stem", STEMS)
def test_a_folder_without_an_index(stem: str, make: Make, tmp_path: Path) -> None:
    folder, out = make(), tmp_path / "out.gguf"
    before = megrez_gguf.convert(folder, out).path.read_bytes()
    (folder / INDEX).unlink()
    rename_shards(folder, stem)
    for name in BESIDE:
        if name.endswith((".safetensors", ".bin")):
            (folder / name).write_bytes(b"junk")
    assert megrez_gguf.convert(folder, out, force=True).path.read_bytes() == before


@pytest.mark.parametrize("name", SINGLES)
def test_one_oddly_named_shard(name: str, make: Make, tmp_path: Path) -> None:
    folder, out = make(), tmp_path / "out.gguf"
    before = megrez_gguf.convert(folder, out).path.read_bytes()
    merge(folder)
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")
    assert megrez_gguf.convert(folder, out, force=True).path.read_bytes() == before


def test_an_index_left_from_before_a_merge(make: Make, tmp_path: Path) -> None:
    folder, out = make(), tmp_path / "out.gguf"
    before = megrez_gguf.convert(folder, out).path.read_bytes()
    index = (folder / INDEX).read_bytes()
    merge(folder)
    (folder / INDEX).write_bytes(index)
    done = megrez_gguf.convert(folder, out, force=True)
    assert done.path.read_bytes() == before
    assert any("none of which is here" in warning for warning in done.warnings)


def test_a_wrong_total_size_is_told(checkpoint: Path, tmp_path: Path) -> None:
    edit_json(checkpoint / INDEX, lambda index: index["metadata"].update(total_size=1))
    done = megrez_gguf.convert(checkpoint, tmp_path / "out.gguf")
    assert any("says the weights take 1 bytes" in warning for warning in done.warnings)


def test_a_link_that_leads_nowhere(checkpoint: Path, tmp_path: Path) -> None:
    """As in a hub's cache whose blobs are gone."""
    path = shards(checkpoint)[0]
    path.unlink()
    path.symlink_to("../../blobs/0123")
    with pytest.raises(CheckpointError, match=r"a link to .*/blobs/0123, which is not there"):
        megrez_gguf.convert(checkpoint, tmp_path / "out.gguf")


def test_a_gguf_in_place_of_a_shard(checkpoint: Path, tmp_path: Path) -> None:
    gguf = megrez_gguf.convert(checkpoint, tmp_path / "out.gguf").path
    shards(checkpoint)[0].write_bytes(gguf.read_bytes())
    with pytest.raises(CheckpointError, match="a GGUF file, not safetensors"):
        megrez_gguf.convert(checkpoint, tmp_path / "other.gguf")
