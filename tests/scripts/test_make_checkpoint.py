"""Random checkpoints: calibrated, reproducible, whole, in the published layout."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import ConfigError, OutputError
from megrez_parity.reference import CheckpointWeights, forward
from support import random_checkpoint as maker
from support.paths import REPO
from support.random_checkpoint import FULL, POCKET, make_checkpoint, tensor_shapes

SMALL = POCKET | {"num_hidden_layers": 4, "vocab_size": 512}


def load(folder: Path) -> dict[str, Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors.update(load_file(path))
    return tensors


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scoring_func": "softmax", "topk_method": "greedy"},
        {"scoring_func": "softmax", "norm_topk_prob": False},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.5, "num_experts_per_tok": 2},
        {"attention_bias": True, "first_k_dense_replace": 0, "num_hidden_layers": 16},
    ],
    ids=str,
)
def test_calibration(changes: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig.from_dict(POCKET | changes)
    make_checkpoint(POCKET | changes, tmp_path / "c")
    weights = CheckpointWeights(tmp_path / "c", torch.float64)
    tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
    margins, chosen = [], {}
    stream = weights["model.embed_tokens.weight"][tokens]

    def watch(name: str, layer: int, x: Tensor) -> None:
        nonlocal stream
        if name == "l_out":
            assert 1 < rms(x) < 6
            stream = x
        if name == "ffn_inp":
            assert 0.2 < rms(x - stream) < 1.5, (name, layer)
        if name in ("ffn_moe_out", "ffn_shexp") or (name == "ffn_out" and not config.is_moe(layer)):
            assert 0.2 < rms(x) < 1.5, (name, layer)
        if name == "ffn_moe_logits":
            scores = x.sigmoid() if config.scoring_func == "sigmoid" else x.softmax(-1)
            if config.has_correction_bias:
                scores += weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
            best = scores.topk(config.num_experts_per_tok + 1).values
            margins.append((best[..., -2] - best[..., -1]).flatten())
        if name == "ffn_moe_topk":
            chosen[layer] = x.unique().numel()

    logits = forward(config, weights, tokens, watch)
    assert 1.3 < float(logits.std()) < 1.7
    # bfloat16 rounds scores by about 0.002 and float32 by 1e-7.
    margin = torch.cat(margins)
    assert float(margin.median()) > 0.005
    assert float(margin.quantile(0.001)) > 1e-6
    assert set(chosen.values()) == {16}


def test_published_size() -> None:
    shapes = tensor_shapes(ModelConfig.from_dict(FULL))
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e9, 1) == 7.5
    pools = {re.sub(r"\d+(?=\.\w+_proj)", "E", n) for n in shapes if ".experts." in n}
    others = [n for n in shapes if ".experts." not in n]
    assert len(pools) + len(others) == 372


def test_same_seed_same_bytes_however_sharded(tmp_path: Path) -> None:
    made: dict[str, dict[str, Any]]
    made = {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"shard_bytes": 1}}
    for name, options in made.items():
        make_checkpoint(SMALL, tmp_path / name, **options)
    a, b, c, d = (load(tmp_path / name) for name in "abcd")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
    assert a.keys() == c.keys() == d.keys()
    assert all(torch.equal(a[name], d[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)
    assert b.keys() == tensor_shapes(ModelConfig.from_dict(SMALL)).keys()


def test_shards_and_index(tmp_path: Path) -> None:
    make_checkpoint(SMALL, tmp_path / "c", shard_bytes=1 << 20)
    index = json.loads((tmp_path / "c/model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("c/*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for path in shards:
        held = load_file(path)
        assert {n for n, file in index["weight_map"].items() if file == path.name} == held.keys()
        assert path.stat().st_size < (1 << 20) + 20_000
    tensors = load(tmp_path / "c").values()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)


def test_a_tensor_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(SMALL, tmp_path / "whole")
    monkeypatch.setattr(maker, "BLOCK", 1000)
    make_checkpoint(SMALL, tmp_path / "blocks")
    whole, blocks = load(tmp_path / "whole"), load(tmp_path / "blocks")
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_types_round_to_nearest(dtype: str, tmp_path: Path) -> None:
    make_checkpoint(SMALL, tmp_path / "exact", dtype="float32")
    make_checkpoint(SMALL, tmp_path / "c", dtype=dtype)
    exact, tensors = load(tmp_path / "exact"), load(tmp_path / "c")
    assert all(torch.equal(tensors[n], exact[n].to(getattr(torch, dtype))) for n in exact)
    assert json.loads((tmp_path / "c/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("size", [261, 300, 5000, 60_000])
def test_tokenizer(size: int, tmp_path: Path) -> None:
    maker.write_tokenizer(tmp_path, size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    text = "<|role_start|>user<|role_end|>世界上最高的山峰是哪座？ It's 42!\n\n\t ok<|turn_end|>"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert (ids[0], ids[-1]) == (size - 3, size - 1)
    if size == 60_000:
        assert "æĺ¯" in tokenizer.get_vocab()  # 是, whole
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == size - 1


def test_chat_template(tmp_path: Path) -> None:
    make_checkpoint(SMALL, tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "c")
    turn = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|role_start|>user<|role_end|>hi<|turn_end|><|role_start|>assistant<|role_end|>"
    )


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size: 260 is too small"):
        make_checkpoint(SMALL | {"vocab_size": 260}, tmp_path / "c")
    with pytest.raises(ConfigError, match="topk_group"):
        make_checkpoint(SMALL | {"topk_group": 3}, tmp_path / "c")
    assert not list(tmp_path.iterdir())
    make_checkpoint(SMALL, tmp_path / "c")
    with pytest.raises(OutputError, match="exists"):
        make_checkpoint(SMALL, tmp_path / "c")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / "scripts/make_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_command(tmp_path: Path) -> None:
    done = run(tmp_path / "c", "--size", "pocket", "--set", "vocab_size=600", "--seed", 3)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'c'}\n", "")
    assert ModelConfig.from_folder(tmp_path / "c").vocab_size == 600
    again = run(tmp_path / "d", "--config", tmp_path / "c/config.json", "--set", "n_group=3")
    assert again.returncode == 2
    assert "n_group" in again.stderr
    assert not (tmp_path / "d").exists()
