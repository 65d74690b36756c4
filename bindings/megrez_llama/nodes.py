"""The graph's nodes by name: what llama.cpp calls the states on their way, and how to read them.

These names are a vocabulary of this project: the torch reference emits its intermediates under
them, and reports call tensors by them. Shapes: S rows (tokens), D hidden, E experts, K experts a
token uses, F an MLP's inner width, H * C heads times their size, V vocabulary.

    embd                    [S, D]    what enters the first layer
    attn_norm               [S, D]    what attention reads
    kqv_out                 [S, H*C]  what attention's output matrix reads
    ffn_inp                 [S, D]    the residual stream after attention
    ffn_norm                [S, D]    what experts read, and the next layer's router
    ffn_moe_logits          [S, E]    of the router
    ffn_moe_probs_biased    [S, E]    the scores that select, -inf where masked
    ffn_moe_topk            [S, K]    ids of the experts chosen, int32
    ffn_moe_weights         [S, K]    what they are summed with
    ffn_moe_out             [S, D]    that sum
    ffn_shexp               [S, D]    of the shared experts
    ffn_out, l_out          [S, D]    of a layer's FFN, and of the layer
    result_norm             [S, D]    what the output matrix reads; outside layers
    result_output           [S, V]    logits; outside layers
"""

from __future__ import annotations

from dataclasses import dataclass

from megrez_llama.ggml import F32, Tensor, op_name

# What this project knows under one name is the last of these nodes that a model's graph has.
STEPS = {
    "ffn_moe_probs_biased": ("ffn_moe_probs", "ffn_moe_probs_biased", "ffn_moe_probs_masked"),
    "ffn_moe_weights": ("ffn_moe_weights", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"),
}
# Nodes with a row for every expert a token uses, [S, K, ...]; all others are [S, ...].
BY_EXPERT = {"ffn_moe_swiglu", "ffn_moe_weights", "ffn_moe_weights_scaled"}

# What tells where a file's routing leaves another's.
ROUTING = ("ffn_norm", "l_out", "ffn_moe_topk")

# What a trace looks at, in the order it is computed.
TRACED = (
    "embd",
    "kqv_out",
    "ffn_inp",
    "ffn_norm",
    "ffn_moe_logits",
    "ffn_moe_probs_biased",
    "ffn_moe_out",
    "ffn_shexp",
    "ffn_out",
    "l_out",
    "result_norm",
    "result_output",
)

# What enters matrix products, and which matrices, by GGUF names without "blk.N." and ".weight";
# those of ffn_norm and result_norm depend on the layer and the model.
ENTERS: dict[str, tuple[str, ...]] = {
    "attn_norm": ("attn_q", "attn_k", "attn_v"),
    "kqv_out": ("attn_output",),
    "ffn_norm": (),
    "ffn_swiglu": ("ffn_down",),
    "ffn_moe_swiglu": ("ffn_down_exps",),
    "ffn_shexp_swiglu": ("ffn_down_shexp",),
    "result_norm": (),
}
# Those that the patched llama.cpp rescales where F16 might not hold them.
RESCALED = ("ffn_swiglu", "ffn_moe_swiglu", "ffn_shexp_swiglu")

# The node behind which only the output matrix and the logits come.
LAST_BEFORE_OUTPUT = "result_norm"


def name_of(node: Tensor) -> tuple[str, int]:
    """Name and layer of a node, -1 for those outside layers."""
    name = node.name.decode("utf-8", "replace")
    step, _, layer = name.rpartition("-")
    if step and layer.lstrip("-").isdecimal():
        return step, int(layer)
    return name, -1


@dataclass(frozen=True, slots=True)
class Product:
    """A product with one of the model's matrices.

    `inputs` enter it, the first `columns` of each row: zeros may come after them. `ids` are the
    experts that each row goes to, None outside pools.
    """

    weight: Tensor
    inputs: Tensor
    columns: int
    ids: Tensor | None

    @property
    def name(self) -> str:
        """The matrix's, e.g. "blk.1.ffn_up_exps.weight"."""
        return self.weight.name.decode("utf-8", "replace")


def product(node: Tensor) -> Product | None:
    """What `node` multiplies, if that is float32 and a matrix of a layer or of the output."""
    kind = op_name(node.op)
    if kind not in ("MUL_MAT", "MUL_MAT_ID"):
        return None
    weight, inputs = node.source(0), node.source(1)
    rows = inputs.source(0) if op_name(inputs.op) == "PAD" else inputs
    found = Product(weight, inputs, rows.ne[0], node.source(2) if kind == "MUL_MAT_ID" else None)
    is_ours = found.name.startswith("blk.") or found.name == "output.weight"
    return found if is_ours and found.inputs.type == F32 else None


def before_rescaling(node: Tensor) -> Tensor | None:
    """What `node` rescales to keep it in F16's range, if that is what it does."""
    if op_name(node.op) == "RMS_NORM" and b"swiglu" in node.source(0).name:
        return node.source(0)
    return None
