"""Key-values: hyper-parameters, yarn as llama.cpp will apply it, names, sampling."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megrez_gguf.checkpoint import location
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.conversion import metadata
from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.format.writer import header
from support.configurations import TINY
from support.random_checkpoint import SMALL, make_checkpoint

PUBLISHED: dict[str, Any] = TINY | {
    "experts_shared_frequency": 3,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 4,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 31,
    "num_key_value_heads": 4,
    "vocab_size": 128880,
}


def config(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict(PUBLISHED | fields)


def test_every_standard_key() -> None:
    values = metadata.architecture(config())
    assert values == {
        "megrez-moe.vocab_size": 128880,
        "megrez-moe.context_length": 32768,
        "megrez-moe.embedding_length": 2048,
        "megrez-moe.block_count": 31,
        "megrez-moe.leading_dense_block_count": 1,
        "megrez-moe.feed_forward_length": 10944,
        "megrez-moe.attention.head_count": 16,
        "megrez-moe.attention.head_count_kv": 4,
        "megrez-moe.attention.key_length": 128,
        "megrez-moe.attention.value_length": 128,
        "megrez-moe.attention.layer_norm_rms_epsilon": 1e-6,
        "megrez-moe.rope.dimension_count": 128,
        "megrez-moe.rope.freq_base": 5000000.0,
        "megrez-moe.expert_count": 64,
        "megrez-moe.expert_used_count": 6,
        "megrez-moe.expert_shared_count": 4,
        "megrez-moe.expert_feed_forward_length": 1408,
        "megrez-moe.expert_shared_feed_forward_length": 5632,
        "megrez-moe.expert_gating_func": 2,
        "megrez-moe.expert_weights_norm": True,
        "megrez-moe.expert_weights_scale": 1.0,
        "megrez-moe.expert_group_count": 1,
        "megrez-moe.expert_group_used_count": 1,
        "megrez-moe.experts_shared_frequency": 3,
        "megrez-moe.pre_gate": True,
    }


def test_values_that_differ() -> None:
    values = metadata.architecture(
        config(
            moe_layer_freq=2,
            experts_shared_frequency=1,
            first_k_dense_replace=2,
            pre_gate=False,
            scoring_func="softmax",
            norm_topk_prob=False,
            routed_scaling_factor=2.5,
            n_group=8,
            topk_group=4,
            head_dim=96,
        )
    )
    assert values["megrez-moe.moe_every_n_layers"] == 2
    assert values["megrez-moe.pre_gate"] is False
    assert values["megrez-moe.expert_gating_func"] == 1
    assert values["megrez-moe.expert_weights_norm"] is False
    assert values["megrez-moe.expert_weights_scale"] == 2.5
    assert values["megrez-moe.expert_group_count"] == 8
    assert values["megrez-moe.expert_group_used_count"] == 4
    assert values["megrez-moe.rope.dimension_count"] == 96


def test_linear() -> None:
    values = metadata.architecture(config(rope_scaling={"type": "linear", "factor": 4}))
    assert values["megrez-moe.rope.scaling.type"] == "linear"
    assert values["megrez-moe.rope.scaling.factor"] == 4.0
    assert "megrez-moe.rope.scaling.attn_factor" not in values


def llama_cpp_yarn(values: Mapping[str, Any], size: int, base: float) -> tuple[list[float], float]:
    """Inverse frequencies and cos/sin factor, transcribed from llama-context.cpp and ggml.c."""
    k = {key.removeprefix("megrez-moe.rope.scaling."): v for key, v in values.items()}
    factor, context = k["factor"], k["original_context_length"]

    def dimension(rotations: float) -> float:
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(0, math.floor(dimension(k["yarn_beta_fast"])))
    high = min(size - 1, math.ceil(dimension(k["yarn_beta_slow"])))
    frequencies = []
    for i in range(size // 2):
        ramp = 1 - min(1, max(0, (i - low) / max(0.001, high - low)))
        own = base ** (-2 * i / size)
        frequencies.append(own / factor * (1 - ramp) + own * ramp)
    own_scale = 1 + 0.1 * math.log(factor)
    in_context = own_scale / own_scale * k["attn_factor"]
    return frequencies, in_context * own_scale


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"attention_factor": 1.0},
        {"attention_factor": 0.5},
        {"beta_fast": 16, "beta_slow": 2},
        {"factor": 1.0},
        {"factor": 40.0, "original_max_position_embeddings": 4096},
        {"factor": None},
        {"mscale": 0.7, "attention_factor": 1.2},
        {"mscale": 1.0, "beta_fast": None, "truncate": True},
    ],
    ids=str,
)
def test_yarn_is_what_transformers_computes(extra: dict[str, Any]) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192} | extra
    values = metadata.architecture(config(rope_scaling=scaling))
    frequencies, scale = llama_cpp_yarn(values, 128, 5e6)
    theirs = PretrainedConfig(
        hidden_size=2048,
        num_attention_heads=16,
        head_dim=128,
        max_position_embeddings=32768,
        rope_parameters=scaling | {"rope_theta": 5e6},
    )
    expected, expected_scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, "cpu")
    assert scale == pytest.approx(expected_scale, rel=1e-6)
    assert frequencies == pytest.approx(expected.tolist(), rel=1e-5)


def general(folder: Path) -> Mapping[str, Any]:
    return metadata.general(config(), location.origin(folder), 7_500_000_000)


def test_name_and_size_from_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "Megrez2-3x7B-A3B-Preview"
    folder.mkdir()
    values = general(folder)
    assert values["general.name"] == "Megrez2-3x7B-A3B-Preview"
    assert values["general.basename"] == "Megrez2"
    assert values["general.size_label"] == "3x7B-A3B"
    assert values["general.finetune"] == "Preview"
    assert values["general.architecture"] == "megrez-moe"
    assert "general.license" not in values
    assert "general.source.url" not in values


def test_size_is_computed_where_the_name_has_none(tmp_path: Path) -> None:
    assert general(tmp_path)["general.size_label"] == "3x7.5B-A3.0B"


def test_source_from_the_hub_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--Infinigence--Megrez2-3x7B-A3B" / "snapshots" / "0a1b2c"
    folder.mkdir(parents=True)
    values = general(folder)
    assert values["general.name"] == "Megrez2-3x7B-A3B"
    assert values["general.source.url"] == "https://huggingface.co/Infinigence/Megrez2-3x7B-A3B"


def test_source_from_modelscope_s_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "Infinigence--Megrez2-3x7B-A3B" / "snapshots" / "master"
    folder.mkdir(parents=True)
    values = general(folder)
    assert values["general.name"] == "Megrez2-3x7B-A3B"
    assert values["megrez-gguf.source"] == "modelscope:Infinigence/Megrez2-3x7B-A3B@master"
    assert values["general.source.url"].endswith("Infinigence/Megrez2-3x7B-A3B")
    assert "huggingface" not in " ".join(map(str, [*values, *values.values()]))


def test_loaded_from_is_not_what_it_is(tmp_path: Path) -> None:
    """A fine-tune's configuration goes on naming its base model."""
    folder = make_checkpoint(
        SMALL | {"_name_or_path": "Infinigence/Megrez2-3x7B-A3B"}, tmp_path / "my-law-finetune"
    )
    plan = plan_convert(folder)
    assert plan.path == Path("my-law-finetune-BF16.gguf")
    values = plan.values
    assert values["general.name"] == "my-law-finetune"
    assert "Infinigence" not in " ".join(map(str, values.values()))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("law/checkpoint-500", "law-checkpoint-500"),
        ("law/merged/checkpoint-500", "law-checkpoint-500"),
        ("law/epoch_2/step-10", "law-epoch_2-step-10"),
        ("law/model", "law"),
        ("law/Final_Model", "law"),
        ("law/output/hf/bf16", "law"),
        ("law/0123456789abcdef0123456789abcdef01234567", "law"),
        ("home/alice/model", "model"),
        ("home/alice/checkpoint-7", "checkpoint-7"),
        ("law/checkpoint", "checkpoint"),
        ("law/./", "law"),
        ("law/../other//", "other"),
        ("\u6d4b\u8bd5 model", "\u6d4b\u8bd5 model"),
        ("a\x1b[31m\nb", "a_[31m_b"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "caf_"),
    ],
)
def test_folders_and_what_models_in_them_are_called(tmp_path: Path, path: str, name: str) -> None:
    (tmp_path / "law").mkdir()
    folder = tmp_path / path
    folder.mkdir(parents=True, exist_ok=True)
    values = general(folder)
    assert values["general.name"] == name
    header(values, [])  # writes every text as UTF-8


@pytest.mark.parametrize("seed", range(20))
def test_a_default_file_name_can_always_be_made(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    letters = 'a/\\:*?"<>|.- \x00\x1b\n\udce9\u6d4b\U0001f600'
    stem = metadata.file_stem("".join(draw.choices(letters, k=draw.choice([0, 1, 5, 300]))))
    assert stem
    assert not stem.startswith((".", "-", " "))
    (tmp_path / f"{stem}-Q4_K_M-00001-of-00002.gguf").write_bytes(b"")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "owners"),
    [
        ("base_model: Infinigence/Megrez2-3x7B-A3B", ["Infinigence"]),
        ("base_model:\n- Infinigence/Megrez2-3x7B-A3B\n- other/m", ["Infinigence", "other"]),
        ("base_model:\r\n  - 'a/b' # main\r\nx: y", ["a"]),
        ('base_model: ["a/b", c/d]', ["a", "c"]),
        ("base_model: https://huggingface.co/a/b/", ["a"]),
        ("base_model: /root/models/Megrez2", []),
        ("base_model: Megrez2", []),
        ("base_model:", []),
        ("tags:\n- a/b", []),
    ],
)
def test_base_models_from_the_model_card(tmp_path: Path, text: str, owners: list[str]) -> None:
    (tmp_path / "README.md").write_text(f"---\nlanguage: en\n{text}\n---\n", newline="")
    values = general(tmp_path)
    assert values.get("general.base_model.count", 0) == len(owners)
    for i, owner in enumerate(owners):
        assert values[f"general.base_model.{i}.organization"] == owner
        assert f"/{owner}/" in values[f"general.base_model.{i}.repo_url"]
    assert values["general.name"] == tmp_path.name
    assert "general.source.url" not in values


def test_a_repository_is_not_its_own_base_model(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0a1b2c"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("---\nbase_model: a/b\n---\n")
    assert "general.base_model.count" not in general(folder)


def test_license_from_the_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: apache-2.0\nlicense_name: 'x y'\n---\n\nlicense: mit\n"
    )
    values = general(tmp_path)
    assert values["general.license"] == "apache-2.0"
    assert values["general.license.name"] == "x y"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert "general.license" not in general(tmp_path)
    (tmp_path / "README.md").write_bytes(b"---\nauthor: \xff\nlicense: mit # \xff\n---\n")
    assert general(tmp_path)["general.license"] == "mit"
    (tmp_path / "README.md").unlink()
    os.mkfifo(tmp_path / "README.md")
    assert "general.license" not in general(tmp_path)


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {"temp": 0.7, "top_p": 0.9}),
        ({"eos_token_id": 3}, {"temp": 0.7, "top_p": 0.9}),
        ({"temperature": 1, "top_k": 20}, {"temp": 1.0, "top_k": 20}),
        ({"top_p": 0.5, "repetition_penalty": 1.1}, {"top_p": 0.5, "penalty_repeat": 1.1}),
        ({"do_sample": False, "temperature": 0.6}, {"temp": 0.0}),
        ({"temperature": "hot", "top_p": None, "min_p": 0.05}, {"min_p": 0.05}),
    ],
    ids=json.dumps,
)
def test_sampling(generation: dict[str, Any], expected: dict[str, Any]) -> None:
    found = metadata.sampling(generation)
    assert found == {f"general.sampling.{k}": v for k, v in expected.items()}
    assert all(type(found[f"general.sampling.{k}"]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("generation", "left_out"),
    [
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 20, "num_beams": 1, "typical_p": 1.0}, []),
        ({"temperature": "hot"}, ["temperature = 'hot'"]),
        ({"temperature": math.nan}, ["temperature = nan"]),
        ({"temperature": math.inf}, ["temperature = inf"]),
        ({"temperature": -1}, ["temperature = -1"]),
        ({"temperature": True}, ["temperature = True"]),
        ({"top_p": 1.5}, ["top_p = 1.5"]),
        ({"top_k": 10**30}, ["top_k = 1000"]),
        ({"top_k": 1.5}, ["top_k = 1.5"]),
        ({"top_k": [1]}, ["top_k = [1]"]),
        ({"repetition_penalty": 0}, ["repetition_penalty = 0"]),
        ({"do_sample": "no"}, ["do_sample = 'no'"]),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, ["num_beams = 4", "no_repeat_ngram_size"]),
    ],
    ids=str,
)
def test_sampling_that_is_left_out_is_told_of(
    generation: dict[str, Any], left_out: list[str]
) -> None:
    remarks = metadata.sampling_remarks(generation)
    assert len(remarks) == len(left_out)
    for fragment in left_out:
        assert any(r.startswith(f"generation_config.json: {fragment}") for r in remarks), remarks
    header(metadata.sampling(generation), [])


def test_top_k_of_all_tokens() -> None:
    assert metadata.sampling({"top_k": -1})["general.sampling.top_k"] == 0
