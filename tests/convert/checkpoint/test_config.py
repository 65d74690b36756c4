"""Reading config.json: one rule for spellings, one for fields nobody here reads; both are drawn."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megrez_gguf.checkpoint.config import ModelConfig
from megrez_gguf.checkpoint.documents import Documents
from megrez_gguf.checkpoint.known_fields import HARMLESS, INERT
from megrez_gguf.checkpoint.settings import ALIASES
from megrez_gguf.conversion.convert import plan_convert
from megrez_gguf.errors import ConfigError
from megrez_parity.reference import rotary
from support.checkpoints import set_json
from support.configurations import TINY, Config

Place = tuple[str, ...]
YARN: Config = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LAYERS = range(TINY["num_hidden_layers"])


def read(config: Config) -> ModelConfig:
    return ModelConfig.from_dict(config)


def refusal(config: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        read(config)
    return str(caught.value)


def put(config: Config, place: Place, value: Any) -> Config:
    """`config` with `value` at `place`, a path of keys."""
    copy = json.loads(json.dumps(config))
    node = copy
    for key in place[:-1]:
        node = node.setdefault(key, {})
        if key.startswith("rope_"):
            node.setdefault("rope_type", "default")
    node[place[-1]] = value
    return dict(copy)


# --- spellings ---------------------------------------------------------------------------------

# Setting -> where it may stand, a value, another value. Each is read from any one of the places.
ROPES = ("rope_parameters", "rope_scaling")
SPELT: dict[str, tuple[list[Place], Any, Any]] = {
    "rope_theta": (
        [("rope_theta",), ("rotary_base",), *((r, "rope_theta") for r in ROPES)],
        1e4,
        2e4,
    ),
    "attention_bias": ([("attention_bias",), ("qkv_bias",), ("add_qkv_bias",)], True, False),
    "head_dim": ([("head_dim",), ("kv_channels",)], 32, 16),
    "n_routed_experts": (
        [("n_routed_experts",), ("num_local_experts",), ("num_experts",)],
        8,
        4,
    ),
    "num_experts_per_tok": ([("num_experts_per_tok",), ("moe_topk",)], 3, 2),
    "n_shared_experts": ([("n_shared_experts",), ("num_shared_experts",)], 2, 1),
    "norm_topk_prob": ([("norm_topk_prob",), ("moe_renormalize",)], False, True),
    "num_nextn_predict_layers": (
        [("num_nextn_predict_layers",), ("num_mtp_layers",)],
        2,
        0,
    ),
}


def places(setting: str) -> list[Place]:
    found = SPELT[setting][0]
    return [*found, *(("text_config", *place) for place in found)]


def bare(setting: str) -> Config:
    return {key: value for key, value in TINY.items() if key != setting}


@pytest.mark.parametrize("setting", SPELT)
def test_a_setting_is_read_wherever_it_stands(setting: str) -> None:
    value = SPELT[setting][1]
    for place in places(setting):
        assert getattr(read(put(bare(setting), place, value)), setting) == value, place


@pytest.mark.parametrize("setting", SPELT)
def test_two_spellings_agree_or_are_refused(setting: str) -> None:
    _, value, other = SPELT[setting]
    draw = random.Random(setting)
    for _ in range(20):
        first, second = draw.sample(places(setting), 2)
        config = put(bare(setting), first, value)
        assert getattr(read(put(config, second, value)), setting) == value, (first, second)
        assert getattr(read(put(config, second, None)), setting) == value, (first, second)
        message = refusal(put(config, second, other))
        for place, found in ((first, value), (second, other)):
            assert f"`{'.'.join(place)}`" in message
            assert repr(found) in message


def test_every_other_spelling_is_of_something_that_is_read() -> None:
    assert not set(ALIASES.values()) - set(TINY) - set(SPELT) - {
        "hidden_act", "n_group", "partial_rotary_factor", "routed_scaling_factor", "torch_dtype",
    }  # fmt: skip
    assert not set(ALIASES) & (set(HARMLESS) | INERT)


def drawn_rope(draw: random.Random) -> dict[str, Any] | None:
    """What may stand under `rope_scaling` or `rope_parameters`, under either name of the type."""
    kind = draw.choice(["default", "linear", "yarn", None, "absent"])
    if kind == "absent":
        return None if draw.random() < 0.5 else {}
    rope: dict[str, Any] = {} if kind is None else {draw.choice(["type", "rope_type"]): kind}
    if kind in ("linear", "yarn"):
        rope["factor"] = draw.choice([2.0, 4.0])
    if kind == "yarn" and draw.random() < 0.5:
        rope["original_max_position_embeddings"] = draw.choice([128, 256])
    if draw.random() < 0.5:
        rope["rope_theta"] = draw.choice([1e4, 5e6])
    return rope


def meaning(rope: dict[str, Any] | None) -> dict[str, Any]:
    """What one object says, on its own."""
    if not rope:
        return {}
    said = {"rope_type": rope.get("type", "default"), **rope}
    return {key: value for key, value in said.items() if key != "type"}


@pytest.mark.parametrize("seed", range(200))
def test_two_objects_of_the_rotary_embedding(seed: int) -> None:
    draw = random.Random(seed)
    objects = [drawn_rope(draw) for _ in ROPES]
    flat = draw.choice([{}, {"rope_theta": 5e6}])
    one, other = (meaning(rope) for rope in objects)
    config = bare("rope_theta") | flat | dict(zip(ROPES, objects, strict=True))
    said = [one, other, flat]
    clash = any(a[k] != b[k] for a in said for b in said for k in a.keys() & b.keys())
    together = flat | one | other
    if clash or "rope_theta" not in together:
        message = refusal(config)
        assert (clash and "they set the same" in message) or "`rope_theta`: required" in message
        return
    found = read(config)
    assert found.rope_theta == together["rope_theta"]
    kind = together.get("rope_type", "default")
    assert (found.rope_scaling.kind if found.rope_scaling else "default") == kind
    if found.rope_scaling:
        assert found.rope_scaling.factor == together["factor"]
        original = together.get("original_max_position_embeddings", 512)
        assert found.rope_scaling.original_context_length == original


def test_one_object_for_each_type_of_layer() -> None:
    yarn = YARN | {"rope_theta": 1e4}
    one = read(bare("rope_theta") | {"rope_parameters": {"full_attention": yarn}})
    assert one == read(bare("rope_theta") | {"rope_parameters": yarn})
    two: Config = {"full_attention": yarn, "sliding_attention": yarn}
    assert one == read(bare("rope_theta") | {"rope_parameters": two})
    for other in (yarn | {"rope_theta": 2e4}, {"rope_theta": 1e4}, {}, None):
        two = {"full_attention": yarn, "sliding_attention": other}
        message = refusal(bare("rope_theta") | {"rope_parameters": two})
        assert "full_attention" in message
        assert "sliding_attention" in message


# --- the rotary embedding, as transformers computes it -----------------------------------------


@pytest.mark.parametrize("seed", range(120))
def test_scaling_is_what_transformers_computes_or_is_refused(seed: int) -> None:
    draw = random.Random(seed)
    kind = draw.choice(["linear", "yarn", "yarn", "yarn"])
    rope: dict[str, Any] = {"rope_type": kind, "factor": draw.choice([1, 1.0, 2.5, 4, 40.0])}
    others: dict[str, list[Any]] = {
        "factor": [None],
        "original_max_position_embeddings": [2, 32, 128, 512],
        "attention_factor": [None, 0.8, 1.0],
        "beta_fast": [None, 16, 32.0],
        "beta_slow": [None, 1, 2.0, 40],
        "mscale": [None, 0.7, 1.0],
        "mscale_all_dim": [None, 0, 0.7, 1.0],
        "truncate": [True, False, None],
        "partial_rotary_factor": [1.0],
    }
    for key, choices in others.items():
        if draw.random() < 0.3:
            rope[key] = draw.choice(choices)
    theta = draw.choice([100.0, 5e6])
    try:
        found = read(TINY | {"rope_theta": theta, "rope_scaling": rope})
    except ConfigError:
        # Only what is harmful, or what readers take differently, may be refused.
        assert (
            {"mscale", "mscale_all_dim", "truncate", "beta_slow"} & rope.keys()
            or rope["factor"] is None
            or rope.get("original_max_position_embeddings") == 2
        )
        return
    theirs = PretrainedConfig(
        hidden_size=64,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        rope_parameters={"original_max_position_embeddings": 512} | rope | {"rope_theta": theta},
    )
    frequency, scale = ROPE_INIT_FUNCTIONS[kind](theirs, "cpu")
    cos, sin = rotary(found, 3, torch.float64)
    assert torch.hypot(cos, sin).flatten().tolist() == pytest.approx([scale] * cos.numel())
    assert torch.atan2(sin, cos)[1].tolist() == pytest.approx(frequency.tolist(), rel=1e-5)


@pytest.mark.parametrize("mscale", [0.7, 2])
def test_what_readers_take_differently_is_refused(mscale: float) -> None:
    message = refusal(TINY | {"rope_scaling": YARN | {"mscale": mscale}})
    assert "`rope_scaling.mscale`" in message
    assert "attention_factor" in message
    assert "missing beside factor = 4" in refusal(TINY | {"rope_scaling": {"factor": 4}})
    assert "null" in refusal(TINY | {"rope_scaling": YARN | {"truncate": None}})
    assert "null" in refusal(TINY | {"norm_topk_prob": None})


def test_what_was_inferred_or_has_no_effect_is_told() -> None:
    def remarks(**rope: Any) -> str:
        return " ".join(read(TINY | {"rope_scaling": rope}).remarks)

    assert "factor: 4 is taken" in remarks(**YARN | {"factor": None})
    assert "max_position_embeddings = 512 is taken" in remarks(type="yarn", factor=2)
    assert "rope_scaling.factor has no effect" in remarks(type="default", factor=2)
    assert "rope_scaling.beta_fast has no effect" in remarks(type="linear", factor=2, beta_fast=8)
    assert remarks(**YARN) == ""


# --- fields that nobody here reads -------------------------------------------------------------

HARMFUL: tuple[Any, ...] = (7, 0.5, "gelu", True, False, [7], {"a": 1}, math.nan)
ANYWHERE: tuple[Place, ...] = (
    (),
    ("rope_parameters",),
    ("rope_scaling",),
    ("text_config",),
    ("text_config", "rope_scaling"),
    ("somebodys_settings", "deep"),
)


def harmless(name: str) -> list[Any]:
    values = HARMLESS[name]
    return [None, [], {}, *values, *([v] for v in values), [None, *values]]


def upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


# Read together with the type of rope, which decides whether it has an effect.
@pytest.mark.parametrize("name", sorted(HARMLESS.keys() - {"mscale_all_dim"}))
def test_the_rule_does_not_depend_on_where_a_value_stands(name: str) -> None:
    draw = random.Random(name)
    for place in ANYWHERE:
        value = upper(draw.choice(harmless(name)))
        read(put(TINY, (*place, name), value))
        harmful = [v for v in HARMFUL if v not in HARMLESS[name] and [v] not in harmless(name)]
        value = draw.choice(harmful)
        message = refusal(put(TINY, (*place, name), value))
        assert f"`{'.'.join((*place, name))}`" in message
        assert "supported" in message


@pytest.mark.parametrize("place", ANYWHERE)
def test_unknown_is_reported_and_not_refused(place: Place) -> None:
    found = read(put(TINY, (*place, "galaxy_brain"), 7))
    assert found == read(put(TINY, (*place, "galaxy_brain"), None))
    top = ".".join((*place, "galaxy_brain")) if place[:1] != ("somebodys_settings",) else place[0]
    assert found.remarks == (f"config.json has fields nobody here knows: {top}",)


def test_inert_fields_are_not_mentioned() -> None:
    draw = random.Random(1)
    for name in sorted(INERT - {"architectures", "model_type"}):
        value = draw.choice([0, -1, "x", True, [1], {"a": 2}, None])
        assert read(put(TINY, (*draw.choice(ANYWHERE[:4]), name), value)).remarks == (), name


@pytest.mark.parametrize(
    "fields",
    [
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
        {"sliding_window": 64, "layer_types": ["full_attention"] * 5},
        {"sliding_window": 512},
        {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 99, "use_mla": False},
    ],
    ids=str,
)
def test_harmless_because_of_another_field(fields: Config) -> None:
    found = read(TINY | fields)
    assert found == read(TINY)
    assert all("changes nothing" in remark for remark in found.remarks)
    assert found.remarks
    switches = ("use_sliding_window", "use_mla", "layer_types")
    alone = {key: value for key, value in fields.items() if key not in switches}
    refusal(TINY | {"max_position_embeddings": 8192} | alone)


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"vocab_size": 320.0, "rms_norm_eps": 1e-06, "rope_theta": 5e6}, {}),
        ({"rope_theta": 5000000}, {}),
        ({"hidden_act": "SiLU"}, {}),
        ({"hidden_act": "Swish"}, {}),
        ({"hidden_activation": "silu"}, {}),
        ({"rope_scaling": {}}, {}),
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"rope_scaling": {"rope_theta": 5e6}}, {}),
        ({"n_group": None, "topk_group": None, "head_dim": None, "moe_layer_freq": None}, {}),
        ({"tie_word_embeddings": None, "attention_bias": None}, {}),
        ({"num_nextn_predict_layers": None}, {}),
        ({"quantization_config": None}, {}),
        ({"quantization_config": {}}, {}),
        ({"moe_layer_freq": [0, 0, 1, 1, 1]}, {}),
        ({"moe_layer_freq": [1, 1, 1, 1, 1]}, {}),
        ({"moe_layer_freq": [0, 0, 1, 0, 1]}, {"moe_layer_freq": 2}),
        ({"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 3}, {}),
        ({"rotary_dim": 16, "v_head_dim": 16.0, "attention_multiplier": 0.25}, {}),
        ({"shared_expert_intermediate_size": 96, "dim_model_base": 64}, {}),
        ({"pad_token_id": -1, "attention_dropout": 0.5, "torch_dtype": "float16"}, {}),
        ({"architectures": None}, {}),
        ({"architectures": []}, {}),
        ({"architectures": ["PeftModelForCausalLM"]}, {}),
    ],
    ids=str,
)
def test_other_ways_to_say_the_same(fields: Config, same: Config) -> None:
    if same:
        same |= {"experts_shared_frequency": 2}
    found = read(TINY | fields)
    assert found == read(TINY | same)
    assert found.remarks == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_layer_freq": [0, 0, 1, 1, 0]}, "`moe_layer_freq`"),
        ({"moe_layer_freq": [1, 1]}, "`moe_layer_freq`"),
        ({"mlp_layer_types": ["sparse"] * 5}, "`mlp_layer_types`"),
        ({"mlp_layer_types": 5}, "`mlp_layer_types`"),
        ({"hidden_act": "gelu"}, "`hidden_act`: 'gelu' is not supported"),
        ({"hidden_act": ["silu"]}, "`hidden_act`"),
        ({"vocab_size": 320.5}, "expected an integer, found 320.5"),
        ({"vocab_size": math.inf}, "expected an integer, found inf"),
        ({"vocab_size": 10**3000}, "expected an integer from 1 to"),
        ({"rope_theta": 10**3000}, "expected a finite positive number"),
        ({"rope_theta": 1e39}, "expected a finite positive number"),
        ({"rms_norm_eps": 1e-60}, "expected a finite positive number"),
        ({"rms_norm_eps": math.nan}, "expected a finite positive number"),
        ({"num_hidden_layers": 2**31 - 1}, "expected an integer from 1 to 512"),
        ({"rope_scaling": "yarn"}, "`rope_scaling`: expected an object or null, found 'yarn'"),
        ({"rope_scaling": [YARN]}, "`rope_scaling`: expected an object or null"),
        ({"rope_parameters": {"full_attention": None}}, "`rope_parameters.full_attention`"),
        ({"sliding_window": 64, "layer_types": []}, "`sliding_window`"),
        ({"text_config": 7}, "`text_config`: expected an object or null"),
        ({"rotary_dim": 8}, "`rotary_dim`: 8 is not supported"),
        ({"attention_multiplier": 1.0}, "`attention_multiplier`"),
        ({"architectures": None, "model_type": "llama"}, "expected MegrezMoeForCausalLM"),
        ({"architectures": ["PeftModel"], "model_type": None}, "unknown architecture"),
        ({"architectures": "MegrezMoeForCausalLM"}, "expected a list of names"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"quantized \('awq'\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"'fp8'.*dequantize\(\)"),
        ({"compression_config": {"format": "pack-quantized"}}, "'pack-quantized'"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantized"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_refused(fields: Config, message: str) -> None:
    text = refusal(TINY | fields)
    assert text.startswith("config.json: ")
    assert len(text) < 600
    with pytest.raises(ConfigError, match=message):
        read(TINY | fields)


def test_remarks_reach_the_user_and_name_the_file(checkpoint: Path) -> None:
    set_json(checkpoint / "config.json", galaxy_brain=1)
    set_json(checkpoint / "generation_config.json", temperature="hot")
    (checkpoint / "adapter_config.json").write_text("{}")
    warnings = plan_convert(checkpoint).source.warnings
    assert "config.json has fields nobody here knows: galaxy_brain" in warnings
    assert any(w.startswith("generation_config.json: temperature = 'hot'") for w in warnings)
    assert any(w.startswith("adapter_config.json") for w in warnings)
    set_json(checkpoint / "config.json", vocab_size="many")
    with pytest.raises(ConfigError, match=str(checkpoint / "config.json")):
        ModelConfig.of(Documents.read(checkpoint))
