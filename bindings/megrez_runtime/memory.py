"""How much memory a model takes, and how to divide what there is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.machine import available_memory, resident_memory
from megrez_gguf.text import format_size, parse_size
from megrez_llama import ARCH
from megrez_runtime.errors import MemoryBudgetError

# What a process has besides buffers, at least: the interpreter, numpy, the vocabulary.
BASELINE = 100 << 20
# What grows after a model was loaded, and is in no buffer that llama.cpp reports.
SLACK = 32 << 20
# Of memory that is free now, the share to plan with: others may want some, too.
SHARE = 0.9
UBATCHES = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
# Direct reads begin and end on whole pages, for which every part of a slot has room.
_PAGE = 4096
_PARTS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory that a process may take in all."""

    nbytes: int
    reason: str
    """Why so much, for people."""

    @classmethod
    def of(cls, ram: int | str) -> Budget | None:
        """As `load` understands `ram`; None is no bound. Raises ValueError: no size."""
        if ram == "off":
            return None
        if ram == "auto":
            free = available_memory()
            if free is None:
                return None
            nbytes = (resident_memory() or 0) + int(SHARE * free)
            return cls(nbytes, f"{format_size(free)} of memory are free")
        nbytes = parse_size(ram) if isinstance(ram, str) else ram
        return cls(nbytes, f"within {format_size(nbytes)}")


@dataclass(frozen=True, slots=True)
class Needs:
    """Sizes in bytes, read off a file's header."""

    path: Path
    program_bytes: int
    """The process without the model; as it is now, if that is more than usual."""
    expert_bytes: int
    """All routed experts."""
    other_bytes: int
    """All other weights."""
    slot_bytes: int
    """Memory for one expert of any layer."""
    n_pools: int
    n_expert: int
    """In a pool."""
    n_used: int
    n_embd: int
    n_ff: int
    """Of a routed expert."""
    n_vocab: int
    n_layer: int
    n_head: int
    kv_width: int
    """Elements of keys and values a token has in a layer."""
    all_logits: bool
    """Of every token of a batch, not just of the last."""
    n_slots: int = 1
    """Sequences that the process holds, each with a context of its own."""

    @classmethod
    def of(cls, file: GGUFFile, path: Path, *, all_logits: bool = False) -> Needs:
        """Raises GGUFError: a key is missing or no number. The loader judges all the rest."""

        def number(key: str) -> int:
            value = file.values.get(f"{ARCH}.{key}")
            if type(value) is not int or value <= 0:
                raise GGUFError(f"{path}: {ARCH}.{key} is {value!r}; expected a positive integer")
            return value

        heads = number("attention.head_count")
        head_dim = file.values.get(f"{ARCH}.attention.key_length")
        if type(head_dim) is not int:
            head_dim = number("embedding_length") // heads
        n_expert = number("expert_count")
        slots: dict[str, int] = {}
        experts = others = n_vocab = 0
        for tensor in file.tensors:
            layer, _, name = tensor.name.rpartition(".ffn_")
            if name in [f"{part}_exps.weight" for part in _PARTS]:
                experts += tensor.nbytes
                pages = -(-tensor.nbytes // n_expert // _PAGE) + 2
                slots[layer] = slots.get(layer, 0) + pages * _PAGE
            else:
                others += tensor.nbytes
                if tensor.name == "token_embd.weight":
                    n_vocab = tensor.shape[0]
        return cls(
            path=path,
            program_bytes=max(BASELINE, resident_memory() or 0),
            expert_bytes=experts,
            other_bytes=others,
            slot_bytes=max(slots.values(), default=0),
            n_pools=len(slots),
            n_expert=n_expert,
            n_used=number("expert_used_count"),
            n_embd=number("embedding_length"),
            n_ff=number("expert_feed_forward_length"),
            n_vocab=n_vocab,
            n_layer=number("block_count"),
            n_head=heads,
            kv_width=2 * head_dim * number("attention.head_count_kv"),
            all_logits=all_logits,
        )

    @property
    def n_experts(self) -> int:
        """Routed experts in the file, of all pools."""
        return self.n_pools * self.n_expert

    def at_once(self, n_ubatch: int) -> int:
        """Bytes of the experts that one layer may use for a batch."""
        return min(self.n_expert, self.n_used * n_ubatch) * self.slot_bytes

    def working(self, n_ctx: int, n_ubatch: int) -> int:
        """Bytes of KV cache and compute buffers, about."""
        n_ubatch = min(n_ubatch, self.n_slots * n_ctx)
        # What llama.cpp keeps at once of a token: while experts compute, while it attends (scores
        # and mask), or with its logits. Fitted to what it reserves at the published size.
        token = max(
            2 * self.n_used * (self.n_embd + self.n_ff),
            6 * self.n_embd + (self.n_head + 1) * n_ctx,
            2 * self.n_embd + self.n_vocab if self.all_logits else 0,
        )
        outputs = (self.n_slots - 1) * 4 * self.n_vocab
        cache = self.n_slots * self.kv_bytes(n_ctx)
        return cache + n_ubatch * 4 * token + outputs + self.scratch(n_ubatch)

    def kv_bytes(self, n_ctx: int) -> int:
        """Bytes of the KV cache of one sequence, 16 bits an element."""
        return self.n_layer * n_ctx * self.kv_width * 2

    def scratch(self, n_ubatch: int) -> int:
        """Bytes the matrix products need besides, which no buffer of llama.cpp's accounts for."""
        rows = n_ubatch * self.n_used
        return rows * (2 * self.n_embd + 8 * self.n_experts)

    def everything(self, n_ctx: int, n_ubatch: int) -> int:
        """Bytes of a process that keeps all experts in memory."""
        return (
            self.program_bytes
            + self.other_bytes
            + self.expert_bytes
            + self.working(n_ctx, n_ubatch)
        )

    def least(self, n_ctx: int, n_ubatch: int = 1) -> int:
        """Bytes of a process that keeps the experts of one layer in memory."""
        fixed = self.program_bytes + SLACK + self.other_bytes + self.working(n_ctx, n_ubatch)
        return fixed + self.at_once(n_ubatch)


def cache_batch(needs: Needs, cache: int) -> int:
    """The largest n_ubatch of `UBATCHES` whose experts `cache` bytes hold; 1 if none."""
    return next((n for n in UBATCHES if needs.at_once(n) <= cache), 1)


def check_cache(needs: Needs, cache: int, n_ubatch: int) -> None:
    """Raises MemoryBudgetError: `cache` bytes cannot hold the experts of a batch at once."""
    held = cache // max(needs.slot_bytes, 1)
    least = min(needs.n_experts, max(needs.n_used, 2))
    if held < least:
        raise MemoryBudgetError(
            f"{needs.path}: an expert cache of {cache} bytes holds {held} experts, and {least} "
            f"are used at once: at least {least * needs.slot_bytes} bytes are needed"
        )
    if needs.at_once(n_ubatch) > cache:
        wanted = needs.at_once(n_ubatch) // needs.slot_bytes
        raise MemoryBudgetError(
            f"{needs.path}: a batch of {n_ubatch} tokens can use {wanted} experts at once, and the "
            f"expert cache holds {held}: make it {needs.at_once(n_ubatch)} bytes, or n_ubatch "
            f"{held // needs.n_used} at most"
        )


def batch_for(needs: Needs, ram: int, n_ctx: int) -> int:
    """The largest n_ubatch of `UBATCHES` that suits a process of `ram` bytes.

    Large batches read prompts fast, but every token of one costs memory that experts could have:
    up to a sixth of what is left for experts is given to it, if more than one layer's fit.
    Raises MemoryBudgetError, with the least that would do.
    """
    for n_ubatch in UBATCHES:
        spare = ram - needs.least(n_ctx, n_ubatch)
        batch = needs.working(n_ctx, n_ubatch) - needs.working(n_ctx, 1)
        if spare >= 0 and (n_ubatch == 1 or batch <= (spare + needs.at_once(n_ubatch)) // 6):
            return n_ubatch
    least = needs.least(n_ctx)
    contexts = "a context" if needs.n_slots == 1 else f"{needs.n_slots} contexts"
    raise MemoryBudgetError(
        f"{needs.path}: {format_size(ram)} are too little: with {contexts} of {n_ctx} tokens the "
        f"model needs at least {-(-least >> 20)} MiB ({format_size(needs.other_bytes)} of weights "
        f"that every token uses, {format_size(needs.working(n_ctx, 1))} for context and computing, "
        f"{format_size(needs.at_once(1))} for the experts of one layer, and the program)"
    )
