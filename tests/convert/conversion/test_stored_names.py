"""One parameter under another name, or stored more than once: the same model, or a refusal."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import megrez_gguf
from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.conversion import layout
from megrez_gguf.errors import CheckpointError
from megrez_gguf.format.reader import GGUFFile
from megrez_parity.reference import CheckpointWeights
from support.checkpoints import (
    Entry,
    Make,
    as_f32,
    edit_json,
    merge,
    read_shard,
    set_json,
    shards,
    write_shard,
)

Stored = dict[str, Entry]
Edit = Callable[[Stored, random.Random], None]
INDEX = "model.safetensors.index.json"
EXPERT = ".mlp.experts."
# Groups of layers 1 and 2, 3 and 4, 5; layer 0 is dense.
GROUPS: dict[str, Any] = {
    "first_k_dense_replace": 1,
    "experts_shared_frequency": 2,
    "num_hidden_layers": 6,
    "num_nextn_predict_layers": 1,
}
POOLS = {1: [1, 2], 3: [3, 4], 5: [5]}


def converted(folder: Path, **options: Any) -> dict[str, bytes]:
    """The tensors of the GGUF, by name."""
    out = folder.parent / "out.gguf"
    megrez_gguf.convert(folder, out, force=True, **options)
    found = {}
    for tensor in GGUFFile.open(out).tensors:
        with tensor.shard.path.open("rb") as file:
            file.seek(tensor.begin)
            found[tensor.name] = file.read(tensor.nbytes)
    return found


def change(folder: Path, edit: Edit, draw: random.Random) -> None:
    """Rewrite the checkpoint, as one shard, after `edit`."""
    merge(folder, lambda tensors: edit(tensors, draw))


def rename(tensors: Stored, other: Callable[[str], str]) -> None:
    renamed = {other(name): entry for name, entry in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


def expert_names(tensors: Stored, layer: int) -> list[str]:
    return [n for n in tensors if n.startswith(f"model.layers.{layer}{EXPERT}")]


def in_layer(name: str, layer: int) -> str:
    return f"model.layers.{layer}{EXPERT}{name.partition(EXPERT)[2]}"


def widened(entry: Entry) -> Entry:
    """The same values as float32."""
    return "F32", entry[1], as_f32(entry).astype("<f4").tobytes()


# --- what provably changes nothing -------------------------------------------------------------


def pools_in_every_layer(tensors: Stored, draw: random.Random) -> None:
    for pool, layers in POOLS.items():
        for name in expert_names(tensors, pool):
            tensors |= {in_layer(name, layer): tensors[name] for layer in layers}


def some_experts_copied(tensors: Stored, draw: random.Random) -> None:
    for pool, layers in POOLS.items():
        for name in draw.sample(expert_names(tensors, pool), 3):
            tensors[in_layer(name, layers[-1])] = tensors[name]


def pools_in_the_last_layer(tensors: Stored, draw: random.Random) -> None:
    rename(
        tensors,
        lambda n: next(
            (in_layer(n, ls[-1]) for p, ls in POOLS.items() if n.startswith(in_layer("", p))), n
        ),
    )


def copies_in_another_type(tensors: Stored, draw: random.Random) -> None:
    for name in draw.sample(expert_names(tensors, 1), 4):
        tensors[in_layer(name, 2)] = widened(tensors[name])


def under_one_name(tensors: Stored, draw: random.Random) -> None:
    outside = draw.choice(["_orig_mod", "module", "student", "module._orig_mod", "language_model"])
    rename(tensors, lambda n: f"{outside}.{n}")


def lightning(tensors: Stored, draw: random.Random) -> None:
    rename(tensors, lambda n: f"model.{n}")


def wrapped_inside(tensors: Stored, draw: random.Random) -> None:
    wrapper = draw.choice(["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
    layer = f"model.layers.{draw.randrange(6)}."
    rename(tensors, lambda n: n.replace(layer, f"{layer}{wrapper}."))


def text_half(tensors: Stored, draw: random.Random) -> None:
    rename(tensors, lambda n: n.replace("model.", "model.language_model.", 1))


def body_unprefixed(tensors: Stored, draw: random.Random) -> None:
    rename(tensors, lambda n: n.removeprefix("model."))


def aliases_beside(tensors: Stored, draw: random.Random) -> None:
    for name in draw.sample(sorted(tensors), 9):
        tensors[f"_orig_mod.{name}"] = tensors[name]


def other_bias_names(tensors: Stored, draw: random.Random) -> None:
    other = draw.choice(["mlp", "mlp.router", "mlp.experts", "mlp.moe_statics"])
    rename(tensors, lambda n: n.replace("mlp.gate.e_score_corr", f"{other}.e_score_corr"))


def singular_shared_expert(tensors: Stored, draw: random.Random) -> None:
    rename(tensors, lambda n: n.replace("mlp.shared_experts.", "mlp.shared_expert."))


def buffers(tensors: Stored, draw: random.Random) -> None:
    names = [
        "model.rotary_emb.inv_freq",
        "model.layers.3.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.cos_cached",
        "model.layers.0.self_attn.rotary_emb.sin_cached",
        "model.rotary_emb.original_inv_freq",
        "model.layers.2.self_attn.masked_bias",
        "model.position_ids",
        "model.layers.2.self_attn.rotary_emb.cos_sin_cache",
    ]
    for name in draw.sample(names, 4):
        tensors[name] = draw.choice([("F32", (8,), bytes(32)), ("I64", (1, 8), bytes(64))])


def mtp_layer(tensors: Stored, draw: random.Random) -> None:
    tensors["model.layers.6.eh_proj.weight"] = tensors["model.norm.weight"]


HARMLESS: dict[str, Edit] = {
    edit.__name__: edit
    for edit in (
        pools_in_every_layer, some_experts_copied, pools_in_the_last_layer, copies_in_another_type,
        under_one_name, lightning, wrapped_inside, text_half, body_unprefixed, aliases_beside,
        other_bias_names, singular_shared_expert, buffers, mtp_layer,
    )
}  # fmt: skip


@pytest.mark.parametrize("edit", HARMLESS)
def test_the_same_model(edit: str, make: Make) -> None:
    folder = make(**GROUPS)
    before = converted(merge(folder))
    reference = dict(CheckpointWeights(folder))
    for seed in range(2):
        draw = random.Random(f"{edit} {seed}")
        change(make(**GROUPS), HARMLESS[edit], draw)
        assert converted(folder) == before
        assert_same(dict(CheckpointWeights(folder)), reference)
        assert said(folder)
        assert megrez_gguf.verify(folder.parent / "out.gguf", folder).failures == ()


def test_several_at_once(make: Make) -> None:
    folder = make(**GROUPS)
    before = converted(merge(folder))
    for seed in range(8):
        draw = random.Random(seed)
        edits = draw.sample(sorted(HARMLESS), 4)
        # What adds by published name comes before what renames.
        edits.sort(key=lambda e: e in ("under_one_name", "lightning", "body_unprefixed"))
        merge(make(**GROUPS))
        for edit in edits:
            try:
                change(folder, HARMLESS[edit], draw)
            except (KeyError, ValueError):
                continue  # what it needs was renamed
        assert converted(folder) == before, edits


def said(folder: Path) -> list[str]:
    """What convert and inspect tell of what is stored otherwise; they tell the same."""
    remarks = layout.plan(Checkpoint.open(folder)).remarks
    report = megrez_gguf.inspect(folder)
    assert set(remarks) <= set(report.warnings)
    return remarks


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- copies ------------------------------------------------------------------------------------


TIED: dict[str, Callable[[Stored], Any]] = {
    "head alone": lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    "both": lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
    "head in float32": lambda t: t.update(
        {"lm_head.weight": widened(t["model.embed_tokens.weight"])}
    ),
    "embeddings in float32": lambda t: t.update(
        {
            "lm_head.weight": t["model.embed_tokens.weight"],
            "model.embed_tokens.weight": widened(t["model.embed_tokens.weight"]),
        }
    ),
}


@pytest.mark.parametrize("edit", TIED)
def test_tied_pair(edit: str, make: Make) -> None:
    folder = make(tie_word_embeddings=True)
    before = converted(merge(folder), outtype="bf16")
    merge(folder, TIED[edit])
    assert converted(folder, outtype="bf16") == before
    assert "lm_head.weight" not in CheckpointWeights(folder)


@pytest.mark.parametrize("seed", range(6))
def test_a_tensor_in_two_shards(seed: int, make: Make) -> None:
    folder, draw = make(), random.Random(seed)
    before = converted(folder)
    one, two = draw.sample(shards(folder), 2)
    name, entry = draw.choice(list(read_shard(one).items()))
    write_shard(two, {**read_shard(two), name: entry})
    assert converted(folder) == before
    dtype, shape, data = entry
    write_shard(two, {**read_shard(two), name: (dtype, shape, flipped(data, draw))})
    assert_refused(folder, rf"{name} differs from {name} in .*two shards")


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One bit of one weight changed, none of its exponent."""
    changed = bytearray(data)
    changed[draw.randrange(len(data) // 2) * 2] ^= 1
    return bytes(changed)


def assert_refused(folder: Path, message: str) -> None:
    """By convert, verify, and inspect where it reads the weights."""
    out = folder.parent / "out.gguf"
    with pytest.raises(CheckpointError, match=message):
        megrez_gguf.convert(folder, out, force=True)
    with pytest.raises(CheckpointError, match=message):
        megrez_gguf.verify(out, folder)
    with pytest.raises(CheckpointError, match=message):
        megrez_gguf.inspect(folder)


@pytest.mark.parametrize(
    "edit", ["pools_in_every_layer", "some_experts_copied", "aliases_beside", "tied"]
)
def test_one_bit_differs(edit: str, make: Make) -> None:
    for seed in range(2):
        draw = random.Random(seed)
        folder = make(tie_word_embeddings=edit == "tied", **GROUPS)
        converted(folder)
        names: set[str] = set()

        def damage(tensors: Stored, draw: random.Random = draw, names: set[str] = names) -> None:
            before = set(tensors)
            if edit == "tied":
                TIED["both"](tensors)
            else:
                HARMLESS[edit](tensors, draw)
            name = draw.choice(sorted(set(tensors) - before))
            dtype, shape, data = tensors[name]
            tensors[name] = dtype, shape, flipped(data, draw)
            names.add(name)

        merge(folder, damage)
        assert_refused(folder, rf"tensor {names.pop()} differs from .*one of them is wrong")


def test_copies_are_read_a_piece_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tie_word_embeddings=True)
    monkeypatch.setattr("megrez_gguf.conversion.copies.CHUNK", 1 << 10)

    def differ_at_the_end(tensors: Stored) -> None:
        dtype, shape, data = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = dtype, shape, data[:-2] + bytes([data[-2] ^ 1, data[-1]])

    merge(folder, differ_at_the_end)
    with pytest.raises(CheckpointError, match="differs"):
        megrez_gguf.convert(folder, folder.parent / "out.gguf")


@pytest.mark.parametrize("stored", [2, 3, 4])
@pytest.mark.parametrize("layers", [4, 5, 8])
def test_pools_that_tell_of_another_period(layers: int, stored: int, make: Make) -> None:
    """Not taken for pools under another layer of their group: some would be another group's."""
    shape = {"first_k_dense_replace": 1, "num_hidden_layers": layers}
    folder = make(experts_shared_frequency=stored, **shape)
    meant = groups(folder)
    for period in range(1, 10):
        set_json(folder / "config.json", experts_shared_frequency=period)
        if groups(folder) == meant:
            megrez_gguf.convert(folder, folder.parent / "out.gguf", force=True)
            continue
        with pytest.raises(CheckpointError, match=r"experts_shared_frequency|missing"):
            megrez_gguf.convert(folder, folder.parent / "out.gguf")


def groups(folder: Path) -> list[int]:
    config = ModelConfig.from_folder(folder)
    return [config.pool_layer(layer) for layer in config.moe_layers]


# --- the index ---------------------------------------------------------------------------------


def list_in_index(name: str, place: str, index: Any) -> None:
    index["weight_map"][name] = place


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "model.rotary_emb.inv_freq", "model.layers.6.eh_proj.weight", "ghost"],
)
def test_the_index_may_name_what_is_not_needed(name: str, make: Make) -> None:
    for place in ("model-00001-of-00005.safetensors", "model-00009-of-00009.safetensors"):
        folder = make(tie_word_embeddings=True, **GROUPS)
        before = converted(folder)
        edit_json(folder / INDEX, partial(list_in_index, name, place))
        assert converted(folder) == before
        assert any(name in remark for remark in said(folder))


def test_shards_may_hold_what_the_index_does_not_name(make: Make) -> None:
    folder = make()
    before = converted(folder)
    path = shards(folder)[0]
    buffer: Entry = ("F32", (8,), bytes(32))
    write_shard(path, {**read_shard(path), "model.rotary_emb.inv_freq": buffer})
    assert converted(folder) == before


# --- what is refused, and why ------------------------------------------------------------------


def quantized(*suffixes: str, dtype: str = "I32") -> Edit:
    def edit(tensors: Stored, draw: random.Random) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            entry = (dtype, (2,), bytes(2 * {"I32": 4, "F32": 4, "U8": 1}[dtype]))
            tensors |= {name.removesuffix("weight") + suffix: entry for suffix in suffixes}
            if "qweight" in suffixes:
                del tensors[name]

    return edit


def lora(tensors: Stored, draw: random.Random) -> None:
    for name in [n for n in tensors if "q_proj.weight" in n]:
        for part in ("A", "B"):
            tensors[name.replace("weight", f"lora_{part}.default.weight")] = tensors[name]
    rename(
        tensors,
        lambda n: "base_model.model." + n.replace("q_proj.weight", "q_proj.base_layer.weight"),
    )


def adapter_alone(tensors: Stored, draw: random.Random) -> None:
    entry = tensors["model.norm.weight"]
    tensors.clear()
    for part in ("A", "B"):
        tensors[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"] = entry


def fused_experts(tensors: Stored, draw: random.Random) -> None:
    for name in expert_names(tensors, 1):
        del tensors[name]
    name = draw.choice(["gate_up_proj", "down_proj", "w13_weight", "gate_up_proj.weight"])
    tensors[f"model.layers.1.mlp.experts.{name}"] = ("BF16", (4, 64, 64), bytes(32768))


def renamed(old: str, new: str) -> Edit:
    return lambda tensors, draw: rename(tensors, lambda n: n.replace(old, new))


def extra(name: str) -> Edit:
    return lambda tensors, draw: tensors.update({name: tensors["model.norm.weight"]})


def recast(dtype: str, width: int) -> Edit:
    def edit(tensors: Stored, draw: random.Random) -> None:
        for name, (_, shape, data) in tensors.items():
            tensors[name] = dtype, shape, bytes(len(data) // 2 * width)

    return edit


FOREIGN: dict[str, tuple[Edit, str]] = {
    "LoRA": (lora, r"PEFT.*merge_and_unload"),
    "adapter alone": (adapter_alone, r"adapter alone.*merge_and_unload"),
    "PEFT's name only": (
        lambda t, d: rename(t, lambda n: f"base_model.model.{n}"),
        r"PEFT",
    ),
    "fused experts": (fused_experts, r"all experts of a layer in one tensor.*split them"),
    "Mixtral": (
        lambda t, d: rename(t, lambda n: n.replace(".gate_proj", ".w1").replace("up_proj", "w3")),
        r"Mixtral; rename w1",
    ),
    "fused attention": (renamed("q_proj", "qkv_proj"), r"several matrices in one"),
    "GPTQ": (quantized("qweight", "qzeros", "scales", "g_idx"), r"GPTQ or AWQ.*unquantized"),
    "AWQ": (quantized("qweight", "qzeros", "scales"), r"GPTQ or AWQ.*unquantized"),
    "bitsandbytes": (
        quantized("weight.absmax", "weight.quant_state.bitsandbytes__nf4", dtype="U8"),
        r"bitsandbytes.*unquantized",
    ),
    "int8": (quantized("SCB", dtype="F32"), r"bitsandbytes.*unquantized"),
    "FP8": (quantized("weight_scale_inv", dtype="F32"), r"FP8.*unquantized"),
    "compressed-tensors": (quantized("weight_packed", "weight_shape"), r"scales.*unquantized"),
    "float8": (recast("F8_E4M3", 1), r"stored as F8_E4M3.*FP8.*unquantized"),
    "int8 alone": (recast("I8", 1), r"stored as I8.*bitsandbytes.*unquantized"),
    "float64": (recast("F64", 8), r"stored as F64.*bfloat16"),
    "gate.bias": (
        renamed("gate.e_score_correction_bias", "gate.bias"),
        r"the name does not tell.*rename it to mlp\.gate\.e_score_correction_bias",
    ),
    "query norm": (extra("model.layers.0.self_attn.q_norm.weight"), r"norm of queries"),
    "gated shared": (extra("model.layers.1.mlp.shared_expert_gate.weight"), r"gate on shared"),
    "value head": (extra("v_head.summary.weight"), r"reward model"),
    "vision": (extra("vision_tower.encoder.weight"), r"multi-modal"),
    "optimizer": (extra("optimizer.state.exp_avg"), r"optimizer"),
    "no head": (
        lambda t, d: t.pop("lm_head.weight") and None,
        r"tie_word_embeddings.*AutoModelForCausalLM",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign(case: str, make: Make) -> None:
    edit, message = FOREIGN[case]
    folder = make(**GROUPS)
    change(folder, edit, random.Random(case))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        megrez_gguf.convert(folder, folder.parent / "out.gguf")
