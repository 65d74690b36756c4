"""Key-values: hyper-parameters, yarn as llama.cpp will apply it, names, sampling."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megrez_gguf.checkpoint import location
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.conversion import metadata
from support.configurations import TINY

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


def general(folder: Path, raw: dict[str, Any] | None = None) -> Mapping[str, Any]:
    return metadata.general(config(), raw or {}, location.origin(folder), 7_500_000_000)


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


def test_source_from_the_config(tmp_path: Path) -> None:
    values = general(tmp_path, {"_name_or_path": "Infinigence/Megrez2-3x7B-A3B"})
    assert values["general.source.huggingface.repository"] == "Infinigence/Megrez2-3x7B-A3B"
    for path in ("/data/models/x", "../x", "x", 3, "a/b/c"):
        assert "general.source.url" not in general(tmp_path, {"_name_or_path": path})


def test_license_from_the_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nlanguage:\n- en\nlicense: apache-2.0\nlicense_name: 'x y'\n---\n\nlicense: mit\n"
    )
    values = general(tmp_path)
    assert values["general.license"] == "apache-2.0"
    assert values["general.license.name"] == "x y"
    (tmp_path / "README.md").write_text("license: mit\n")
    assert "general.license" not in general(tmp_path)
    (tmp_path / "README.md").write_bytes(b"---\n\xff\n---\n")
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
