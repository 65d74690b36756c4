"""The pocket checkpoint is what its README says: laid out as published, trained, and of use."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import train_pocket
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_parity.reference import CheckpointWeights
from ngram import Trigram
from support.paths import DATA, POCKET

QUESTION = "世界上最高的山峰是哪座？"


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_folder(POCKET)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return dict(CheckpointWeights(POCKET))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(POCKET / "tokenizer.json"))


def read(name: str) -> Any:
    return json.loads((POCKET / name).read_text("utf-8"))


def test_layout_is_the_published_one() -> None:
    assert sum(p.stat().st_size for p in POCKET.iterdir()) < 12_000_000
    assert read("config.json")["model_type"] == "megrez_moe"
    index = read("model.safetensors.index.json")
    shards = {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    assert set(index["weight_map"].values()) == shards
    generation = read("generation_config.json")
    assert (generation["temperature"], generation["top_p"]) == (0.7, 0.9)


def test_widths_meet_the_fallbacks_of_the_real_model(config: ModelConfig) -> None:
    for width in (config.moe_intermediate_size, config.intermediate_size):
        assert width % 32 == 0
        assert width % 256 != 0
    assert config.hidden_size % 256 == config.shared_intermediate_size % 256 == 0
    assert config.pre_gate
    assert config.num_key_value_heads < config.num_attention_heads
    owners = [config.pool_layer(layer) for layer in config.moe_layers]
    assert owners == [1, 1, 1, 4, 4, 4]


def test_special_tokens_are_single_tokens(tokenizer: Tokenizer, config: ModelConfig) -> None:
    raw = read("config.json")
    assert tokenizer.token_to_id("<|turn_end|>") == raw["eos_token_id"]
    for token in train_pocket.SPECIAL:
        assert len(tokenizer.encode(token).ids) == 1
    assert tokenizer.get_vocab_size() <= config.vocab_size


def test_template_is_megrez_form() -> None:
    template = read("tokenizer_config.json")["chat_template"]
    assert template == train_pocket.pocket_corpus.chat_template()
    rendered = train_pocket.pocket_corpus.render([{"role": "user", "content": "Hi"}], True)
    assert rendered.startswith("<|role_start|>system<|role_end|>")
    tail = "<|role_start|>user<|role_end|>Hi<|turn_end|><|role_start|>assistant<|role_end|>"
    assert rendered.endswith("<|turn_end|>" + tail)


def test_every_correction_bias_was_trained(
    config: ModelConfig, weights: dict[str, torch.Tensor]
) -> None:
    biases = [
        weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        for layer in config.moe_layers
    ]
    assert min(bias.abs().max().item() for bias in biases) > 0.01
    assert not torch.equal(biases[0], biases[1])  # one group, two routers


@pytest.mark.slow
def test_beats_the_trigram_and_uses_every_expert(
    config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    ran = torch.zeros(len(config.moe_layers), config.n_routed_experts)
    for domain in ("en", "zh", "code", "chat"):
        text = (DATA / "heldout" / f"{domain}.txt").read_text("utf-8")
        ids = train_pocket.sample(tokenizer.encode(text).ids)
        bits, loads = train_pocket.evaluate(config, weights, ids)
        ran += loads
        if domain in ("en", "zh"):
            assert len(text.encode()) > 100_000
            bar = read("training.json")["held_out"][domain]["sample_trigram_bits_per_token"]
            assert bits < bar, domain
    assert (ran / ran.sum(-1, keepdim=True)).min() > 0.01


def test_names_the_highest_mountain(
    config: ModelConfig, weights: dict[str, torch.Tensor], tokenizer: Tokenizer
) -> None:
    assert "珠穆朗玛峰" in train_pocket.answer(config, weights, tokenizer, QUESTION)


def test_trigram_probabilities_sum_to_one() -> None:
    rng = torch.Generator().manual_seed(0)
    tokens = (torch.rand(5000, generator=rng) ** 3 * 50).long().numpy()
    trigram = Trigram(tokens, 60)
    for context in ([tokens[0], tokens[1]], [0, 59]):  # seen, and with a token never seen
        total = sum(2 ** -trigram.bits(torch.tensor([*context, c]).numpy())[0] for c in range(60))
        assert total == pytest.approx(1.0)
