"""Random Megrez2 checkpoints of any configuration, in the published layout.

The weights are calibrated so that mistakes show: logits have a standard deviation of about 1.5,
attention, experts and shared experts each add a comparable share to the residual stream, router
scores spread far beyond rounding noise, and correction biases are small and change who is chosen.
One block of one tensor is in memory at a time. A tensor depends only on the seed, its name and its
shape, so two configurations share the tensors they have in common.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.errors import ConfigError, OutputError

FULL: dict[str, Any] = {
    "architectures": ["MegrezMoeForCausalLM"],
    "model_type": "megrez_moe",
    "attention_bias": False,
    "experts_shared_frequency": 3,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 4,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 31,
    "num_key_value_heads": 4,
    "pre_gate": True,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "routed_scaling_factor": 1.0,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "vocab_size": 128880,
}
# One dense layer and two full groups. Expert and dense widths are multiples of 32 and not of 256,
# the shared width is one of 256: the quantization fallbacks of the full size.
POCKET: dict[str, Any] = FULL | {
    "hidden_size": 256,
    "intermediate_size": 672,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 96,
    "n_routed_experts": 16,
    "n_shared_experts": 8,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
# The least that has everything, for tests of arithmetic; too small a vocabulary for its tokenizer.
SMALL: dict[str, Any] = FULL | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "vocab_size": 300,
}
SIZES = {"pocket": POCKET, "full": FULL}

BLOCK = 1 << 22  # elements drawn at a time
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}

# The published tokenizer's: Qwen2's pre-tokenizer under Megrez's special tokens.
REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|role_start|>", "<|role_end|>", "<|turn_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|role_start|>{{ message['role'] }}<|role_end|>"
    "{{ message['content'] }}<|turn_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role_start|>assistant<|role_end|>{% endif %}"
)

Progress = Callable[[int, int], None]


def make_checkpoint(
    config: dict[str, Any],
    folder: Path,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 4 << 30,
    tokenizer_vocab: int | None = None,
    output_bias: bool = False,
    progress: Progress | None = None,
    empty: bool = False,
) -> Path:
    """Write the checkpoint described by the `config.json` content `config`; returns `folder`.

    `tokenizer_vocab` (default: all of vocab_size) may be smaller than `vocab_size`, as published
    tokenizers are; `output_bias` adds `o_proj.bias`; `progress(done, total)` counts bytes; `empty`
    leaves holes where weights would be, which take no disk.
    Raises ConfigError as `ModelConfig` does or for a vocabulary below 261; OutputError when
    `folder` exists.
    """
    if folder.exists():
        raise OutputError(f"{folder}: exists; remove it or choose another folder")
    model = ModelConfig.from_dict(config)
    code, width = DTYPES[dtype]
    shapes = tensor_shapes(model, output_bias)
    sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
    shards = split_shards(sizes, shard_bytes)
    total, done = sum(sizes.values()), 0
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write_json(partial / "config.json", config | {"torch_dtype": dtype})
        write_tokenizer(partial, tokenizer_vocab or model.vocab_size)
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            weight_map.update(dict.fromkeys(names, file))
            with (partial / file).open("wb") as f:
                f.write(header({name: shapes[name] for name in names}, code, width))
                if empty:
                    f.truncate(f.tell() + sum(sizes[name] for name in names))
                    continue
                for name in names:
                    mean, std = calibration(model, name)
                    for block in draw(f"{seed}/{name}", math.prod(shapes[name])):
                        block *= np.float32(std)
                        block += np.float32(mean)
                        done += f.write(encode(block, dtype).data)
                        if progress:
                            progress(done, total)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(partial / "model.safetensors.index.json", index)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def tensor_shapes(config: ModelConfig, output_bias: bool = False) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint of this configuration, in order, with its shape."""
    d, v = config.hidden_size, config.vocab_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}

    def mlp(prefix: str, width: int) -> None:
        shapes[prefix + "gate_proj.weight"] = (width, d)
        shapes[prefix + "up_proj.weight"] = (width, d)
        shapes[prefix + "down_proj.weight"] = (d, width)

    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        shapes[p + "input_layernorm.weight"] = (d,)
        shapes[p + "post_attention_layernorm.weight"] = (d,)
        for name, rows, columns in (("q", q, d), ("k", kv, d), ("v", kv, d), ("o", d, q)):
            shapes[f"{p}self_attn.{name}_proj.weight"] = (rows, columns)
            if output_bias if name == "o" else config.attention_bias:
                shapes[f"{p}self_attn.{name}_proj.bias"] = (rows,)
        if not config.is_moe(layer):
            mlp(p + "mlp.", config.intermediate_size)
            continue
        shapes[p + "mlp.gate.weight"] = (config.n_routed_experts, d)
        if config.has_correction_bias:
            shapes[p + "mlp.gate.e_score_correction_bias"] = (config.n_routed_experts,)
        if config.n_shared_experts:
            mlp(p + "mlp.shared_experts.", config.shared_intermediate_size)
        if config.pool_layer(layer) == layer:
            for expert in range(config.n_routed_experts):
                mlp(f"{p}mlp.experts.{expert}.", config.moe_intermediate_size)
    shapes["model.norm.weight"] = (d,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (v, d)
    return shapes


def calibration(config: ModelConfig, name: str) -> tuple[float, float]:
    """Mean and standard deviation of tensor `name`.

    A normalised state has unit variance, so weights of variance g^2 / fan_in make outputs of
    standard deviation g. A SwiGLU of unit variance in gate and up gives 0.6 after its down
    projection, which is what each branch should add.
    """
    d, k = config.hidden_size, config.num_experts_per_tok
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith(("e_score_correction_bias", "_proj.bias")):
        return 0.0, 0.05 if "gate" in name else 0.2
    if name == "model.embed_tokens.weight":
        return 0.0, 1.5 / math.sqrt(d) if config.tie_word_embeddings else 1.0
    if name == "lm_head.weight" or name.endswith("mlp.gate.weight"):
        return 0.0, 1.5 / math.sqrt(d)
    if name.endswith("o_proj.weight"):
        return 0.0, 1.5 / math.sqrt(config.num_attention_heads * config.head_dim)
    if ".experts." in name and name.endswith("down_proj.weight"):
        # K independent experts of weight w add w * sqrt(K); typical w by kind of scoring.
        typical = 1 / k if config.norm_topk_prob else 0.8
        if config.scoring_func == "softmax" and not config.norm_topk_prob:
            typical = 0.5 / k
        share = typical * math.sqrt(k) * abs(config.routed_scaling_factor)
        return 0.0, 1 / math.sqrt(config.moe_intermediate_size) / share
    if name.endswith("down_proj.weight"):
        shared = "shared_experts" in name
        width = config.shared_intermediate_size if shared else config.intermediate_size
        return 0.0, 1 / math.sqrt(width)
    sharper = 1.25 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return 0.0, sharper / math.sqrt(d)


def split_shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Tensor names in order, cut into shards of at most `limit` bytes (or one larger tensor)."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def header(shapes: dict[str, tuple[int, ...]], code: str, width: int) -> bytes:
    """The safetensors header of contiguous tensors, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * width
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def draw(key: str, count: int) -> Iterator[NDArray[np.float32]]:
    """`count` standard normal float32 numbers in blocks, determined by `key`."""
    words = [zlib.crc32(key.encode()), zlib.adler32(key.encode())]
    generator = np.random.Generator(np.random.SFC64(words))
    for start in range(0, count, BLOCK):
        yield generator.standard_normal(min(BLOCK, count - start), dtype=np.float32)


def encode(block: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """`block` as little-endian storage of `dtype`; bfloat16 rounded to nearest even, in place."""
    if dtype == "float16":
        return block.astype("<f2")
    if dtype == "float32":
        return block.astype("<f4", copy=False)
    bits = block.view(np.uint32)
    bits += 0x7FFF + (bits >> 16 & 1)
    return bits.view("<u2")[1::2].copy()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of exactly `size` tokens, the special ones last, and the chat template.

    Merges are made up: every CJK ideograph from its bytes, then combinations of Latin letters.
    """
    letters = byte_letters()
    room = size - len(letters) - len(SPECIAL)
    if room < 0:
        raise ConfigError(
            f"vocab_size: {size} is too small for 256 bytes and {len(SPECIAL)} special tokens"
        )
    tokens = dict.fromkeys(letters.values())
    merges = []
    for a, b in made_up_merges(letters):
        if room == 0:
            break
        if a + b not in tokens:
            tokens[a + b] = None
            merges.append([a, b])
            room -= 1
    vocab = {token: i for i, token in enumerate(tokens)}
    first = len(vocab)
    added = [
        {
            "id": first + i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": REGEX},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    turn_end = "<|turn_end|>"
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added
            },
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": turn_end,
            "pad_token": "<|end_of_text|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.9,
            "eos_token_id": first + SPECIAL.index(turn_end),
            "pad_token_id": first + SPECIAL.index("<|end_of_text|>"),
        },
    )


def byte_letters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def made_up_merges(letters: dict[int, str]) -> Iterator[tuple[str, str]]:
    """Merges whose parts are bytes or results of earlier merges; more than 500,000 of them."""
    space, latin = letters[0x20], "etaoinsrhldcumfpgwybvkxjqz"
    pairs = [a + b for a, b in itertools.product(latin, repeat=2)]
    yield from ((space, a) for a in latin)
    yield from itertools.product(latin, repeat=2)
    yield from itertools.product((space + a for a in latin), latin)
    for code in range(0x4E00, 0xA000):
        a, b, c = (letters[byte] for byte in chr(code).encode())
        yield a, b
        yield a + b, c
    yield from itertools.product(pairs, repeat=2)
