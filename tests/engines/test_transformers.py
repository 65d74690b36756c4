"""transformers' Megrez2 against the reference, and used as people use such a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import megrez_engines  # noqa: F401
from megrez_engines import registration
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.conversion.convert import convert
from megrez_gguf.errors import CheckpointError, ConfigError, RuntimeUnavailableError
from megrez_parity.reference import CheckpointWeights, forward
from support.checkpoints import Make
from support.configurations import TINY
from support.llama import nmse
from support.megrez_kinds import KINDS
from support.paths import POCKET

TOKENS = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))


def load(folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    if dtype == torch.float64:  # torch has no grouped product of it
        options["experts_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def expected(folder: Path, tokens: Tensor = TOKENS, **weights: Tensor) -> Tensor:
    config = ModelConfig.from_folder(folder)
    return forward(config, dict(CheckpointWeights(folder, torch.float64)) | weights, tokens)


def gradient(weight: Tensor) -> Tensor:
    assert weight.grad is not None
    return weight.grad


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= set(shard.keys())
    return found


@pytest.fixture(scope="module")
def pocket() -> Any:
    return load(POCKET, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_references(make: Make, kind: str) -> None:
    folder = make(**KINDS[kind])
    model = load(folder)
    with torch.no_grad():
        got, want = model(TOKENS).logits, expected(folder)
    # Rotations are computed in float32 there.
    assert nmse(want, got) < 1e-11


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_agree(pocket: Any, attention: str, experts: str) -> None:
    with torch.no_grad():
        want = pocket(TOKENS).logits
        other = load(POCKET, torch.float32, attn_implementation=attention)
        other.set_experts_implementation(experts)
        torch.testing.assert_close(other(TOKENS).logits, want, rtol=1e-4, atol=1e-4)


def test_tokens_one_by_one_are_tokens_at_once(pocket: Any) -> None:
    with torch.no_grad():
        want = pocket(TOKENS).logits
        cache = transformers.DynamicCache(config=pocket.config)
        name = "cache" if "cache" in pocket(TOKENS[:, :1], use_cache=True) else "past_key_values"
        parts = [pocket(part, **{name: cache}).logits for part in TOKENS.split(7, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)


def test_greedy_answers_of_a_padded_batch(pocket: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(POCKET, padding_side="left")
    texts = ["Once upon a time", "The captain said that he had never seen such a sea"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert not batch.attention_mask.all()
    answers = pocket.generate(**batch, max_new_tokens=16, do_sample=False)[:, -16:]
    for text, answer in zip(texts, answers, strict=True):
        tokens = tokenizer(text, return_tensors="pt").input_ids
        start = tokens.shape[1]
        for _ in range(16):
            after = expected(POCKET, tokens)[:, -1:].argmax(-1)
            tokens = torch.cat((tokens, after), 1)
        stop = tokens[0, start:].eq(tokenizer.eos_token_id).nonzero()
        length = int(stop[0]) + 1 if len(stop) else 16
        assert torch.equal(answer[:length], tokens[0, start : start + length])


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_gradients_are_the_references(make: Make, reentrant: bool | None) -> None:
    folder = make()
    model = load(folder)
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    model(TOKENS, labels=TOKENS).loss.backward()
    parameters = dict(model.named_parameters())

    weights = dict(CheckpointWeights(folder, torch.float64))
    watched = [
        "model.embed_tokens.weight",
        "model.layers.0.post_attention_layernorm.weight",  # layer 2's router reads what it scales
        "model.layers.2.mlp.gate.weight",
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.self_attn.q_proj.weight",
    ]
    experts = [n for n in weights if n.startswith("model.layers.2.mlp.experts.")]
    for name in (*watched, *experts):
        weights[name].requires_grad_()
    logits = forward(ModelConfig.from_folder(folder), weights, TOKENS)
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    ).backward()
    for name in watched:
        assert nmse(gradient(weights[name]), parameters[name].grad) < 1e-10, name
    gate, up = (
        torch.stack([
            gradient(weights[f"model.layers.2.mlp.experts.{e}.{kind}_proj.weight"])
            for e in range(TINY["n_routed_experts"])
        ])
        for kind in ("gate", "up")
    )  # fmt: skip
    got = parameters["model.layers.2.mlp.experts.gate_up_proj"].grad
    assert nmse(torch.cat((gate, up), 1), got) < 1e-10


def test_saved_as_published(make: Make, tmp_path: Path) -> None:
    folder = make(tie_word_embeddings=False, moe_layer_freq=1)
    load(folder, torch.float32).save_pretrained(tmp_path / "saved")
    assert names(tmp_path / "saved") == names(folder)
    assert ModelConfig.from_folder(tmp_path / "saved") == ModelConfig.from_folder(folder)
    before, after = CheckpointWeights(folder), CheckpointWeights(tmp_path / "saved")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_learns_is_merged_and_converts(pocket: Any, tmp_path: Path) -> None:
    text = "It was the best of times, it was the worst of times, it was the age of wisdom"
    tokens = AutoTokenizer.from_pretrained(POCKET)(text, return_tensors="pt").input_ids
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"])
    model = peft.get_peft_model(load(POCKET, torch.float32), options)
    learner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(tokens, labels=tokens).loss
        learner.zero_grad()
        loss.backward()
        learner.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        want = merged(tokens).logits
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path / "merged")
    assert names(tmp_path / "merged") == names(POCKET)
    got = expected(tmp_path / "merged", tokens)
    torch.testing.assert_close(got.float(), want, rtol=1e-3, atol=1e-3)
    convert(tmp_path / "merged", tmp_path / "merged.gguf", outtype="f32")


def test_the_authors_snippet_needs_no_remote_code(tmp_path: Path) -> None:
    """Their config.json names remote code, and their snippet trusts it; ours comes first."""
    folder = shutil.copytree(POCKET, tmp_path / "with remote code")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_megrez_moe.MegrezMoeConfig",
        "AutoModelForCausalLM": "modeling_megrez_moe.MegrezMoeForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", trust_remote_code=True
    )
    messages = [{"role": "user", "content": "世界上最高的山峰是哪座？"}]
    inputs = tokenizer.apply_chat_template(
        messages, return_tensors="pt", add_generation_prompt=True, return_dict=True
    )
    out = model.generate(**inputs, max_new_tokens=8, do_sample=True, top_p=0.9, temperature=0.7)
    assert out.shape[1] > inputs.input_ids.shape[1]


def test_pipeline(pocket: Any) -> None:
    write = transformers.pipeline("text-generation", model=str(POCKET), dtype=torch.float32)
    (answer,) = write("Once upon a time", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("Once upon a time")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.3.mlp.gate.weight", r"model\.layers\.3\.mlp\.gate\.weight .*verify"),
        ("model.layers.2.mlp.experts.3.up_proj.weight", "experts are missing.*verify"),
        ("model.layers.2.mlp.experts.0.down_proj.weight", "experts are missing.*verify"),
    ],
)
def test_a_lacking_tensor_is_not_made_up(make: Make, name: str, words: str) -> None:
    folder = make(options={"shard_bytes": 10**9})
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_group": 3}, "n_group"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "tanh"}, "scoring_func"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_refused_as_the_converter_refuses(make: Make, fields: dict[str, Any], words: str) -> None:
    folder = make()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ConfigError, match=words):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("package", "found"),
    [
        ("transformers", "4.53.3"),
        ("transformers", "5.25.0"),
        ("vllm", "0.10.1.1"),
        ("vllm", "0.34.0rc1"),
        ("sglang", "0.5.22"),
        ("sglang", "0.5.24"),
        ("sglang", "0.6"),
    ],
)
def test_another_version_is_refused(
    monkeypatch: pytest.MonkeyPatch, package: str, found: str
) -> None:
    versions = {"transformers": "5.19.0", "vllm": "0.32.0", package: found}
    monkeypatch.setattr(registration, "version", versions.__getitem__)
    with pytest.raises(RuntimeUnavailableError, match=rf"pip install 'megrez-gguf\[{package}\]'"):
        getattr(registration, f"register_with_{package}")()
