"""Every kind of bad checkpoint: its own message, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.checkpoints import (
    Make,
    bf16,
    edit_json,
    merge,
    read_shard,
    shards,
    write_raw_shard,
    write_shard,
)
from support.commands import cli

Damage = Callable[[Path], Any]
INDEX = "model.safetensors.index.json"


def config(**fields: Any) -> Damage:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(fields))


def header(content: Any, body: bytes = b"") -> Damage:
    """A single shard with this header."""

    def damage(folder: Path) -> None:
        merge(folder)
        write_raw_shard(folder / "model.safetensors", content, body)

    return damage


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def announce(length: int) -> Damage:
    def damage(folder: Path) -> None:
        path = shards(folder)[0]
        path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    return damage


def truncate(keep: Callable[[int], int]) -> Damage:
    def damage(folder: Path) -> None:
        path = shards(folder)[1]
        os.truncate(path, keep(path.stat().st_size))

    return damage


def tensors(edit: Callable[[dict[str, Any]], Any]) -> Damage:
    return lambda folder: merge(folder, edit)


def drop(*names: str) -> Damage:
    return tensors(lambda t: [t.pop(n) for n in names])


def add(name: str, like: str) -> Damage:
    return tensors(lambda t: t.update({name: t[like]}))


def weight(name: str, position: int, bits: int) -> Damage:
    """Put a bfloat16 bit pattern at a flat position."""

    def edit(t: dict[str, Any]) -> None:
        dtype, shape, data = t[name]
        values = np.frombuffer(data, "<u2").copy()
        values[position] = bits
        t[name] = (dtype, shape, values.tobytes())

    return tensors(edit)


def index(edit: Callable[[dict[str, str]], Any]) -> Damage:
    return lambda folder: edit_json(folder / INDEX, lambda i: edit(i["weight_map"]) and None)


def duplicate_tensor(folder: Path) -> None:
    first, second = shards(folder)[:2]
    content = read_shard(second)
    name, (dtype, shape, data) = next(iter(read_shard(first).items()))
    write_shard(second, {**content, name: (dtype, shape, data[:-2] + b"\0\0")})


def damaged_shard(folder: Path) -> None:
    path = next(p for p in shards(folder) if "model.norm.weight" in read_shard(p))
    write_shard(path, {n: e for n, e in read_shard(path).items() if n != "model.norm.weight"})


def unindexed_tensor(folder: Path) -> None:
    path = shards(folder)[0]
    write_shard(path, {**read_shard(path), "stray": ("F32", (1,), bytes(4))})


def move_tensor(weight_map: dict[str, str]) -> None:
    names = sorted(set(weight_map.values()))
    tensor = next(t for t, shard in weight_map.items() if shard == names[0])
    weight_map[tensor] = names[1]


EXPERT = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
LAYER4_EXPERTS = [EXPERT.format(4, e, p) for e in range(4) for p in ("gate", "up", "down")]

CASES: dict[str, tuple[Damage, str]] = {
    # configuration
    "no config": (lambda f: (f / "config.json").unlink(), r"no config\.json in this folder"),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        r"config\.json: cannot be read as JSON",
    ),
    "config says a thing twice": (
        lambda f: (f / "config.json").write_text('{"pre_gate": true, "pre_gate": false}'),
        r"config\.json: cannot be read as JSON: key 'pre_gate' appears twice",
    ),
    "unknown architecture": (
        config(architectures=["MixtralForCausalLM"]),
        r"unknown architecture 'MixtralForCausalLM'.*knows MegrezMoeForCausalLM",
    ),
    "plain Llama": (
        config(architectures=["LlamaForCausalLM"]),
        r"plain Llama \(Megrez-3B-Instruct is one\).*convert_hf_to_gguf\.py",
    ),
    "unsupported value": (config(hidden_act="gelu"), r"`hidden_act`: \"?'gelu'.* not supported"),
    "unsupported rope": (
        config(rope_scaling={"type": "longrope", "factor": 2}),
        r"`rope_scaling\.type`: 'longrope' is not supported; known: default, linear, yarn",
    ),
    "missing field": (
        lambda f: edit_json(f / "config.json", lambda c: c.pop("pre_gate") and None),
        r"`pre_gate`: required",
    ),
    # shards
    "no shards": (
        lambda f: [p.unlink() for p in shards(f)],
        r"names model-00001-of-\d+\.safe.*missing",
    ),
    "no safetensors": (
        lambda f: [p.unlink() for p in [*shards(f), f / INDEX]],
        r"no \.safetensors file in this folder",
    ),
    "PyTorch only": (
        lambda f: ([p.rename(p.with_suffix(".bin")) for p in shards(f)], (f / INDEX).unlink()),
        r"PyTorch files only; save the model as safetensors first",
    ),
    "one shard missing": (
        lambda f: shards(f)[1].unlink(),
        r"says that they are in model-00002-of-\d+\.safetensors, missing from this folder",
    ),
    "shard of another download": (
        lambda f: (f / "model-00009-of-00009.safetensors").write_bytes(b""),
        r"model-00009-of-00009\.safetensors lies in this folder and .* does not name it",
    ),
    "empty shard": (truncate(lambda size: 0), r"empty: the download"),
    "truncated in the header": (
        truncate(lambda size: 100),
        r"announces a header .* 92 left: trunc",
    ),
    "truncated in the data": (truncate(lambda size: size - 1), r"the file holds \d+: truncated"),
    "header of 2^63 bytes": (
        announce(2**63),
        r"header of 9223372036854775808 bytes; the format allows",
    ),
    "header of 2^64-1 bytes": (
        announce(2**64 - 1),
        r"header of 18446744073709551615 bytes; the format",
    ),
    "header longer than the file": (
        announce(99_999_999),
        r"announces a header of 99999999 bytes and",
    ),
    "header is no JSON": (header(b"{not json}"), r"header: cannot be read as JSON"),
    "header is no object": (header(b"[]"), r"header: expected a JSON object, found list"),
    "header is no UTF-8": (header(b'{"\xff": 1}'), r"header: cannot be read as JSON: 'utf-8'"),
    "header nested too deep": (header(b"[" * 100_000), r"header: cannot be read as JSON"),
    "duplicate key": (
        header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":1}'),
        r"header: cannot be read as JSON: key 'a' appears twice",
    ),
    "entry is no object": (header({"a": 1}), r"tensor a: expected an object with dtype, shape an"),
    "entry lacks a field": (header({"a": {"dtype": "F32"}}), r"tensor a: expected an object with"),
    "unknown dtype": (header({"a": entry("F7")}, bytes(8)), r"tensor a: unknown dtype 'F7'"),
    "negative shape": (header({"a": entry(shape=(-2,))}, bytes(8)), r"tensor a: shape: expected"),
    "fractional shape": (
        header({"a": entry(shape=(2.0,))}, bytes(8)),
        r"tensor a: shape: expected",
    ),
    "boolean shape": (
        header({"a": entry(shape=(True, 2))}, bytes(8)),
        r"tensor a: shape: expected",
    ),
    "shape of 2^64": (header({"a": entry(shape=(2**64,))}, bytes(8)), r"tensor a: shape: expected"),
    "shape whose product overflows": (
        header({"a": entry(shape=(2**62, 2**62))}, bytes(8)),
        r"tensor a: shape: .* has more elements than any file",
    ),
    "one offset": (header({"a": entry(offsets=(8,))}, bytes(8)), r"data_offsets: expected two int"),
    "negative offset": (header({"a": entry(offsets=(-8, 0))}, bytes(8)), r"data_offsets: expected"),
    "end before begin": (
        header({"a": entry(offsets=(8, 0))}, bytes(8)),
        r"begins at 8, after its end",
    ),
    "bytes do not match shape": (
        header({"a": entry(shape=(3,))}, bytes(8)),
        r"tensor a: F32 \[3\] takes 12 bytes; data_offsets span 8",
    ),
    "overlap": (
        header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        r"tensor b overlaps tensor a by 4 bytes",
    ),
    "gap": (
        header({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        r"4 bytes between tensor a and tensor b belong to no tensor",
    ),
    "gap at the start": (
        header({"a": entry(offsets=(4, 12))}, bytes(12)),
        r"4 bytes between the header and tensor a belong to no tensor",
    ),
    "bytes after the last tensor": (
        header({"a": entry()}, bytes(9)),
        r"1 bytes after tensor a belong to no tensor",
    ),
    # index
    "index is no JSON": (
        lambda f: (f / INDEX).write_text("{"),
        r"index\.json: cannot be read as JSON",
    ),
    "index is empty": (
        lambda f: edit_json(f / INDEX, lambda i: {"weight_map": {}}),
        r"expected an object `weight_map`",
    ),
    "index reaches outside": (
        index(lambda w: w.update({"model.norm.weight": "../evil.safetensors"})),
        r"'\.\./evil\.safetensors' is not the name of a \.safetensors file in this folder",
    ),
    "index with an absolute path": (
        index(lambda w: w.update({"model.norm.weight": "/etc/passwd"})),
        r"'/etc/passwd' is not the name of a",
    ),
    "index names a tensor its shard has not": (
        damaged_shard,
        r"tensor model\.norm\.weight: .* is in model-0000\d-of-.*, which does not hold it",
    ),
    "shard holds a tensor the index lacks": (
        index(lambda w: w.pop("model.norm.weight")),
        r"holds model\.norm\.weight, which .* does not name",
    ),
    "stray tensor": (unindexed_tensor, r"tensor stray: not expected"),
    "index names the wrong shard": (index(move_tensor), r"says tensor .* is in .*; it is in"),
    "two tensors of one name": (
        duplicate_tensor,
        r"differs from .* in model-00001.*, and the same tensor is in two shards",
    ),
    # tensors
    "tensor missing": (
        drop("model.norm.weight"),
        r"tensor model\.norm\.weight: missing from the ch",
    ),
    "lm_head missing, not tied": (drop("lm_head.weight"), r"tensor lm_head\.weight: missing"),
    "tensor extra": (
        add("model.extra.weight", "model.norm.weight"),
        r"model\.extra\.weight: not expected: no Megrez2 tensor has such a name",
    ),
    "layer too many": (
        add("model.layers.5.input_layernorm.weight", "model.norm.weight"),
        r"layers\.5\.input_layernorm\.weight: not expected: num_hidden_layers is 5",
    ),
    "bias where attention_bias is off": (
        add("model.layers.0.self_attn.q_proj.bias", "model.norm.weight"),
        r"q_proj\.bias: not expected: attention_bias is false",
    ),
    "o_proj.bias in one layer only": (
        add("model.layers.1.self_attn.o_proj.bias", "model.norm.weight"),
        r"layers\.0\.self_attn\.o_proj\.bias, .* expected in all layers or in none",
    ),
    "dense MLP in an MoE layer": (
        add("model.layers.3.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        r"layers\.3\.mlp\.up_proj\.weight: not expected: layer 3 is a mixture-of-experts layer",
    ),
    "router in a dense layer": (
        add("model.layers.0.mlp.gate.weight", "model.layers.2.mlp.gate.weight"),
        r"layers\.0\.mlp\.gate\.weight: not expected: layer 0 is dense",
    ),
    "experts in a dense layer": (
        add(EXPERT.format(1, 0, "up"), EXPERT.format(2, 0, "up")),
        r"layers\.1\.mlp\.experts\.0\.up_proj\.weight: not expected: layer 1 is dense",
    ),
    "experts in a layer that shares another's": (
        add(EXPERT.format(3, 0, "up"), EXPERT.format(2, 1, "up")),
        r"3\.mlp\.experts\.0\.up_proj\.weight differs from model\.layers\.2\..*, and layers share",
    ),
    "experts absent where the group needs them": (
        drop(*LAYER4_EXPERTS),
        r"layers\.4\.mlp\.experts\.0.* and 9 more: missing from the checkpoint",
    ),
    "one expert missing": (
        drop(EXPERT.format(2, 3, "down")),
        r"experts\.3\.down_proj\.weight: missing",
    ),
    "expert too many": (
        add(EXPERT.format(2, 4, "up"), EXPERT.format(2, 0, "up")),
        r"experts\.4\.up_proj\.weight: not expected: n_routed_experts is 4",
    ),
    "expert with a leading zero": (
        add(EXPERT.format(2, "00", "up"), EXPERT.format(2, 0, "up")),
        r"experts\.00\.up_proj\.weight: not expected: no Megrez2 tensor",
    ),
    "wrong shape": (
        tensors(lambda t: t.update({"model.norm.weight": ("BF16", (2, 32), bytes(128))})),
        r"tensor model\.norm\.weight: has shape \[2, 32\]; config\.json asks for \[64\]",
    ),
    "embedding rows are not vocab_size": (
        config(vocab_size=321),
        r"embed_tokens\.weight: has shape \[320, 64\]; config\.json asks for \[321, 64\]",
    ),
    "wrong dtype": (
        tensors(lambda t: t.update({"model.norm.weight": ("I64", (64,), bytes(512))})),
        r"tensor model\.norm\.weight: stored as I64; expected one of F32, F16, BF16",
    ),
    "8-bit floats": (
        tensors(lambda t: t.update({"model.norm.weight": ("F8_E4M3", (64,), bytes(64))})),
        r"tensor model\.norm\.weight: stored as F8_E4M3",
    ),
    "tied, and lm_head differs": (
        config(tie_word_embeddings=True),
        r"tensor lm_head\.weight differs",
    ),
    # weights
    "NaN": (
        weight("model.layers.1.mlp.up_proj.weight", 2 * 64 + 3, 0x7FC0),
        r"tensor model\.layers\.1\.mlp\.up_proj\.weight: nan at \[2, 3\]; weights must be finite",
    ),
    "infinity": (
        weight(EXPERT.format(4, 2, "down"), 32 + 5, 0xFF80),
        r"experts\.2\.down_proj\.weight: -inf at \[1, 5\]; weights must be finite",
    ),
    # tokenizer
    "no tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        r"no tokenizer\.json; save the tok",
    ),
    "generation config is no JSON": (
        lambda f: (f / "generation_config.json").write_text("["),
        r"generation_config\.json: cannot be read as JSON",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, checkpoint: Path, tmp_path: Path) -> None:
    damage, message = CASES[case]
    damage(checkpoint)
    out = tmp_path / "out"
    out.mkdir()
    before = sorted(checkpoint.iterdir())
    result = cli("convert", checkpoint, "-o", out / "model.gguf")
    text = " ".join(result.stderr.split())
    assert result.exit_code == 2, text
    assert text.startswith("error: ")
    assert "internal" not in text
    assert re.search(message, text), text
    assert result.stdout == ""
    assert list(out.iterdir()) == []
    assert sorted(checkpoint.iterdir()) == before


def test_every_case_has_its_own_message() -> None:
    """Two kinds of damage may share a pattern only where they share a cause."""
    assert len({m for _, m in CASES.values()}) >= len(CASES) - 12


def test_no_such_folder(tmp_path: Path) -> None:
    result = cli("convert", tmp_path / "nowhere", "-o", tmp_path / "x.gguf")
    assert result.exit_code == 2
    assert "nowhere: no such folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_not_a_folder(checkpoint: Path) -> None:
    result = cli("convert", checkpoint / "config.json")
    assert result.exit_code == 2
    assert "not a folder" in result.stderr


def test_shard_is_no_file(checkpoint: Path) -> None:
    path = shards(checkpoint)[0]
    path.unlink()
    path.mkdir()
    result = cli("inspect", checkpoint)
    assert result.exit_code == 2
    assert path.name in result.stderr


def test_f16_overflow_is_refused_and_clamped(checkpoint: Path, tmp_path: Path) -> None:
    merge(checkpoint, lambda t: t.update({"lm_head.weight": ("BF16", (320, 64), _big())}))
    out = tmp_path / "x.gguf"
    result = cli("convert", checkpoint, "-o", out, "--outtype", "f16")
    assert result.exit_code == 2
    assert "tensor output.weight: 2 weights are beyond the range of F16" in result.stderr
    assert not out.exists()
    result = cli("convert", checkpoint, "-o", out, "--outtype", "f16", "--clamp")
    assert result.exit_code == 0, result.stderr
    assert "2 weights were beyond the range" in result.stderr
    assert "1 weights are too small for F16 and became zero" in result.stderr
    from gguf import GGUFReader

    data = next(t for t in GGUFReader(out).tensors if t.name == "output.weight").data
    assert np.isfinite(data).all()
    assert sorted(data.ravel().tolist())[-2:] == [65504.0, 65504.0] or data.min() == -65504.0


def _big() -> bytes:
    values = np.ones((320, 64), dtype=np.float32)
    values[0, 0], values[7, 9], values[1, 1] = 2.0**17, -(2.0**16), 2.0**-30
    return bf16(values)


def test_messages_name_the_file(make: Make) -> None:
    folder = make()
    merge(folder, lambda t: t.update({"model.norm.weight": ("I64", (64,), bytes(512))}))
    result = cli("inspect", folder, "--json")
    assert str(folder / "model.safetensors") in result.stderr
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stdout)
