"""Files that are whole by their size and header, and not by their content."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import megrez_gguf
from megrez_cli import console
from megrez_gguf.checkpoint.shards import read_header
from megrez_gguf.conversion import stream
from megrez_gguf.errors import CheckpointError
from megrez_gguf.examination.verification import verify
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.storage.tensor import Tensor
from support.checkpoints import Entry, Make, edit_json, merge, shards

# One dense layer and one that is not.
FIELDS = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
ZEROS = r"\.safetensors: tensor \S+: \d+ of its \d+ bytes, from byte \d+ of the file on, are zero"


def blank(path: Path, begin: int, end: int) -> None:
    """Zeros there, as space that was set aside and never written has them."""
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(bytes(end - begin))


def row(tensor: Tensor) -> int:
    return tensor.nbytes // (tensor.size // tensor.shape[-1])


def loses_a_row(tensor: Tensor, begin: int, end: int) -> bool:
    """Whether a whole row of a matrix, in which no row may be zero, lies there."""
    if len(tensor.shape) < 2 or "embed" in tensor.name or "lm_head" in tensor.name:
        return False
    size = row(tensor)
    first = max(-(-(begin - tensor.begin) // size), 0)
    return first < min((end - tensor.begin) // size, tensor.shape[0])


@pytest.mark.parametrize("level", ["bf16", "f32", "q8_0"])
@pytest.mark.parametrize("seed", range(8))
def test_a_download_that_was_cut_or_has_holes(
    make: Make, tmp_path: Path, level: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    folder = make(**FIELDS)
    path = draw.choice(shards(folder))
    size, tensors = path.stat().st_size, read_header(path)[1]
    begin = draw.randint(tensors[0].begin, size - 1)
    end = draw.choice([size, min(begin + 4096, size), min(begin // 4096 * 4096 + 8192, size)])
    lost = any(loses_a_row(t, begin, end) for t in tensors)
    blank(path, begin, end)
    if draw.random() < 0.5:  # runs that go over the ends of pieces
        monkeypatch.setattr(stream, "PIECE", 960)
        monkeypatch.setattr(stream, "_COPY", 3000)
        monkeypatch.setattr(stream, "_BLOCK", 40)
    out = tmp_path / "x.gguf"
    if lost:
        with pytest.raises(CheckpointError, match=ZEROS) as raised:
            megrez_gguf.convert(folder, out, outtype=level)
        assert console.hint(raised.value) == (
            "; if the model is meant to have zeros there, --allow-zeros"
        )
        assert not out.exists()
    done = megrez_gguf.convert(folder, out, outtype=level, allow_zeros=True)
    assert not lost or any("long runs of zeros" in warning for warning in done.warnings)
    assert verify(out, folder).failures == ()


def whole(name: str) -> Callable[[dict[str, Entry]], None]:
    def edit(tensors: dict[str, Entry]) -> None:
        dtype, shape, data = tensors[name]
        tensors[name] = (dtype, shape, bytes(len(data)))

    return edit


def rows(name: str, first: int, last: int) -> Callable[[dict[str, Entry]], None]:
    def edit(tensors: dict[str, Entry]) -> None:
        dtype, shape, data = tensors[name]
        size = len(data) // shape[0]
        middle = bytes((last - first) * size)
        tensors[name] = (dtype, shape, data[: first * size] + middle + data[last * size :])

    return edit


def padding(tensors: dict[str, Entry]) -> None:
    """Rows for 12 more tokens than there are."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dtype, (count, columns), data = tensors[name]
        tensors[name] = (dtype, (count + 12, columns), data + bytes(12 * columns * 2))


BLANK = {
    "a norm": whole("model.norm.weight"),
    "a matrix": whole("model.layers.0.self_attn.q_proj.weight"),
    "an expert": whole("model.layers.1.mlp.experts.3.up_proj.weight"),
    "a router": whole("model.layers.1.mlp.gate.weight"),
    "the embeddings": whole("model.embed_tokens.weight"),
    "rows of tokens": rows("model.embed_tokens.weight", 40, 90),
    "rows of the output": rows("lm_head.weight", 7, 9),
}
MEANT = {
    "a correction bias": whole("model.layers.1.mlp.gate.e_score_correction_bias"),
    "the row of a padding token": rows("model.embed_tokens.weight", 5, 6),
    "unused tokens": padding,
    "part of a norm": lambda tensors: tensors.update(
        {
            "model.norm.weight": (
                *tensors["model.norm.weight"][:2],
                bytes(16) + tensors["model.norm.weight"][2][16:],
            )
        }
    ),
}


@pytest.mark.parametrize("what", BLANK)
def test_what_no_trained_model_has(make: Make, tmp_path: Path, what: str) -> None:
    folder = make(**FIELDS)
    merge(folder, BLANK[what])
    with pytest.raises(CheckpointError, match=ZEROS):
        megrez_gguf.convert(folder, tmp_path / "x.gguf")


@pytest.mark.parametrize("what", MEANT)
def test_zeros_that_are_weights(make: Make, tmp_path: Path, what: str) -> None:
    folder = make(**FIELDS)
    merge(folder, MEANT[what])
    if what == "unused tokens":
        edit_json(folder / "config.json", lambda config: config.update(vocab_size=332))
    done = megrez_gguf.convert(folder, tmp_path / "x.gguf")
    assert not any("zeros" in warning for warning in done.warnings)


@pytest.mark.parametrize("level", ["auto", "f32", "q8_0"])
@pytest.mark.parametrize("seed", range(6))
def test_quantizing_what_was_damaged_since_it_was_written(
    make: Make, tmp_path: Path, level: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    if seed % 2:
        monkeypatch.setattr(stream, "PIECE", 256)
        monkeypatch.setattr(stream, "_COPY", 1000)
        monkeypatch.setattr(stream, "_BLOCK", 40)
    source = megrez_gguf.convert(make(**FIELDS), tmp_path / "x.gguf").path
    sound = megrez_gguf.quantize(source, tmp_path / "sound.gguf", outtype=level).path
    tensor = draw.choice(GGUFFile.open(source).tensors)
    data = bytearray(source.read_bytes())
    at = tensor.begin + draw.randrange(tensor.nbytes)
    if seed < 3:
        data[at] ^= 1
    else:  # a block that is there twice
        at = max(at - 64, tensor.begin)
        data[at : at + 32] = np.roll(np.frombuffer(data[at : at + 32], np.uint8), 2).tobytes()
    source.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"tensor {tensor.name}: its bytes are not those"):
        megrez_gguf.quantize(source, tmp_path / "y.gguf", outtype=level)
    assert not (tmp_path / "y.gguf").exists()
    assert sound.exists()
