"""Is a file the Megrez2 model it says it is? Judged from its header, before llama.cpp sees it.

llama.cpp itself refuses keys of another type, missing tensors, wrong shapes, and numbers that hold
for no model. Here is what it would accept, or name badly: keys that contradict the tensors or one
another, and tensors that the model has no use for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.key_check import key_faults
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.format.vocabulary_check import vocabulary_faults
from megrez_gguf.storage.tensor import Tensor
from megrez_llama import ARCH
from megrez_llama import MAX_LAYERS as MAX_LAYERS

_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_norm")
_DENSE = ("ffn_gate", "ffn_up", "ffn_down")
_MOE = ("ffn_gate_inp", "exp_probs_b")
_SHARED = ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp")
_POOL = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_ONCE = ("token_embd", "output_norm", "output")


def open_checked(path: Path) -> GGUFFile:
    """The Megrez2 model in the file `path`, fit to be given to llama.cpp. Raises GGUFError."""
    file = GGUFFile.open_model(path)
    for faults in (key_faults(file.values, file.raw), vocabulary_faults(file.values)):
        for fault in faults:
            raise GGUFError(f"{path}: {fault}")
    check_model(file.values, file.tensors, path)
    return file


def check_model(values: Mapping[str, Any], tensors: Sequence[Tensor], source: object) -> None:
    """Raises GGUFError with the first fault in the header of the file `source`."""
    for fault in _faults(values, tensors):
        raise GGUFError(f"{source}: {fault}")


def check_counts(values: Mapping[str, Any], source: object) -> None:
    """Raises GGUFError for counts of experts that contradict one another.

    llama.cpp refuses them when it loads a file. This is for files that it does not load: those that
    are quantized.
    """
    experts, used, groups, groups_used = (
        _number(values, key, default)
        for key, default in (
            ("expert_count", 0),
            ("expert_used_count", 0),
            ("expert_group_count", 1),
            ("expert_group_used_count", 1),
        )
    )
    if not 0 < used <= experts:
        raise GGUFError(
            f"{source}: expert_used_count = {used}, expected 1 to expert_count = {experts}"
        )
    if groups > 1 and (groups >= experts or experts % groups or not 0 < groups_used <= groups):
        raise GGUFError(
            f"{source}: expert_group_used_count = {groups_used} of expert_group_count = {groups} "
            f"groups do not divide expert_count = {experts}"
        )


def layers_with(part: str, tensors: Iterable[Tensor], layers: int) -> list[int]:
    names = {t.name for t in tensors}
    return [i for i in range(layers) if f"blk.{i}.{part}.weight" in names]


def pool_layers(moe: Iterable[int], lead: int, period: int) -> list[int]:
    """The layers whose tensors hold the experts of the layers `moe`."""
    return sorted({lead + (i - lead) // period * period for i in moe})


def _faults(values: Mapping[str, Any], tensors: Sequence[Tensor]) -> Iterator[str]:
    """What is wrong. Each check rests on those before: only the first fault is to be trusted."""

    def number(key: str, default: int) -> int:
        return _number(values, key, default)

    blocks = number("block_count", 0)
    if not 0 < blocks <= MAX_LAYERS:
        return
    layers = blocks - number("nextn_predict_layers", 0)
    routers = layers_with("ffn_gate_inp", tensors, layers)
    pools = layers_with("ffn_gate_exps", tensors, layers)
    yield from _failing(
        (not routers, "no layer has a router (ffn_gate_inp)"),
        (not pools, "no layer has an expert pool (ffn_gate_exps)"),
    )

    lead = number("leading_dense_block_count", routers[0])
    every = max(number("moe_every_n_layers", 1), 1)
    between = pools[1] - pools[0] if len(pools) > 1 else layers
    period = number("experts_shared_frequency", between)
    fault = f"experts_shared_frequency = {period}, expected 1 to {MAX_LAYERS}"
    yield from _failing((not 0 < period <= MAX_LAYERS, fault))

    moe = [i for i in range(lead, layers) if i % every == 0]
    owners = pool_layers(moe, lead, period)
    dense = [i for i in owners if i not in moe]
    yield from _failing(
        (
            dense,
            f"moe_every_n_layers = {every} makes layers {_text(dense)} dense, which should hold "
            "the expert pools of their groups",
        ),
        (
            routers != moe,
            f"leading_dense_block_count = {lead} and moe_every_n_layers = {every} put routers "
            f"(ffn_gate_inp) in layers {_text(moe)}, but the file has them in layers "
            f"{_text(routers)}",
        ),
        (
            pools != owners,
            f"experts_shared_frequency = {period} puts expert pools (ffn_gate_exps) in layers "
            f"{_text(owners)}, but the file has them in layers {_text(pools)}",
        ),
    )

    for key in ("attention.head_count", "attention.head_count_kv", "expert_used_count"):
        value = values.get(f"{ARCH}.{key}")
        for layer, one in enumerate(value if isinstance(value, list) else ()):
            if one != number(key, 0):
                yield f"layer {layer} has {key} = {one}, and layer 0 has {number(key, 0)}"

    heads = number("attention.head_count", 0)
    heads_kv = number("attention.head_count_kv", heads)
    fault = f"attention.head_count = {heads} is not a multiple of attention.head_count_kv = "
    yield from _failing(
        (heads < 1 or heads_kv < 1 or heads % heads_kv, f"{fault}{heads_kv}"),
    )

    gating = number("expert_gating_func", 2)
    scaling = values.get(f"{ARCH}.rope.scaling.type")
    epsilon = values.get(f"{ARCH}.attention.layer_norm_rms_epsilon")
    size = number("embedding_length", 0) // heads
    k_size, v_size = (number(f"attention.{name}_length", size) for name in ("key", "value"))
    rope = number("rope.dimension_count", k_size)
    experts, used = number("expert_count", 0), number("expert_used_count", 0)
    groups, groups_used = number("expert_group_count", 0), number("expert_group_used_count", 0)
    formed = 1 < groups < experts and experts % groups == 0 and groups_used > 0
    yield from _failing(
        (
            gating not in (1, 2),
            f"expert_gating_func = {gating}, expected 1 (softmax) or 2 (sigmoid)",
        ),
        (scaling == "longrope", "rope.scaling.type = longrope, expected none, linear or yarn"),
        (
            isinstance(epsilon, float) and not epsilon >= 0,
            f"attention.layer_norm_rms_epsilon = {epsilon or 0:g}, expected 0 or more",
        ),
        (
            k_size != v_size,
            f"attention.key_length = {k_size} differs from attention.value_length = {v_size}",
        ),
        (
            not 0 < rope <= k_size or rope % 2,
            f"rope.dimension_count = {rope}, expected an even number up to "
            f"attention.key_length = {k_size}",
        ),
        (
            formed and experts // groups * groups_used < used,
            f"expert_group_used_count = {groups_used} of expert_group_count = {groups} groups "
            f"cannot supply expert_used_count = {used} of expert_count = {experts}",
        ),
    )

    shared = number("expert_shared_feed_forward_length", 1) > 0
    known = {
        f"blk.{i}.{part}"
        for parts, where in (
            (_LAYER, range(layers)),
            (_DENSE, set(range(layers)).difference(moe)),
            (_MOE, moe),
            (_SHARED, moe if shared else ()),
            (_POOL, pools),
        )
        for part in parts
        for i in where
    }
    known.update(_ONCE)
    for t in tensors:
        # Kernels take norms and biases in nothing else; of a router it would cost precision.
        is_f32 = all(n == 1 for n in t.shape[:-1]) or ".ffn_gate_inp." in t.name
        yield from _failing(
            (
                is_f32 and t.dtype != "F32",
                f"tensor '{t.name}' has wrong type; expected f32, got {t.dtype.lower()}",
            ),
            # The scales that go with some types may stand beside any weight.
            (
                t.name.rpartition(".")[0] not in known and "scale" not in t.name,
                f"tensor '{t.name}' is not expected in this model",
            ),
        )


def _number(values: Mapping[str, Any], key: str, default: int) -> int:
    """A count, of the first layer where there is one a layer; else `default`."""
    value = values.get(f"{ARCH}.{key}")
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int else default


def _failing(*checks: tuple[object, str]) -> Iterator[str]:
    return (fault for fails, fault in checks if fails)


def _text(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"
