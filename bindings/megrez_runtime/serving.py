"""What llama.cpp's server is to be started with: from a file, wishes and the memory there is.

The server cannot be asked to change once it runs, so all its memory is planned beforehand. Every
client has a context of its own, which nobody else can fill.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.model_check import open_checked
from megrez_gguf.text import format_size, parse_size
from megrez_llama import ARCH
from megrez_llama.server import MAX_SLOTS
from megrez_runtime.errors import ContextError, MemoryBudgetError
from megrez_runtime.memory import (
    SLACK,
    UBATCHES,
    Budget,
    Needs,
    batch_for,
    cache_batch,
    check_cache,
)
from megrez_runtime.model import context_size, trained_context
from megrez_runtime.session import Sampling

# The server without weights and clients: the program, its threads, and the published vocabulary.
PROGRAM = 80 << 20
# Clients at once, where nobody says how many: the most that memory allows.
_SLOTS = (4, 2, 1)
# Where memory lacks and nobody says how long, contexts are halved down to this.
_LEAST_CONTEXT = 1024
# What the server keeps for a token of the vocabulary and a client, to draw the next one.
_CANDIDATE = 24


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """Settings of a server. Contexts are in tokens, sizes in bytes."""

    path: Path
    n_slots: int
    """Clients answered at once."""
    n_ctx: int
    """Of each client."""
    n_ubatch: int
    expert_cache: int | None
    """Memory for experts; None keeps all in memory."""
    prompt_cache: int
    """Memory for prompts that no client's context holds any more."""
    nbytes: int
    """What the process will take at most, about."""
    reason: str | None
    """What bounds that; None where nothing is known to."""
    experts: tuple[int, int]
    """Held in memory, and in the file."""
    names: tuple[str, ...]
    """Of the model, the usual one first."""
    sampling: Sampling
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        held, all_experts = self.experts
        clients = f"{self.n_slots} clients at once" if self.n_slots > 1 else "1 client at once"
        memory = f"{format_size(self.nbytes)} of memory"
        return ", ".join(
            (
                f"{clients}, {self.n_ctx} tokens each",
                f"{memory} ({self.reason})" if self.reason else memory,
                "all experts in memory"
                if self.expert_cache is None
                else f"{held} of {all_experts} experts in memory, the others read when needed",
            )
        )


def plan_serving(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_slots: int | None = None,
    ram: int | str = "auto",
    expert_cache: int | str | None = None,
) -> ServingPlan:
    """How to serve the GGUF file `path`.

    `n_ctx` tokens are for each of `n_slots` clients. Left out, they are what memory allows: at most
    4 clients and 8192 tokens, or what the model was trained on. Fewer clients come before experts
    that stay in the file, and those before shorter contexts. More than the model was trained on is
    never served. `ram` and `expert_cache` are as for `load`, for the server's whole process.

    Raises GGUFError: no such file, damaged, not a Megrez2 model, or without a chat template.
    MemoryBudgetError: too little memory; names the least. ContextError: no number of tokens or of
    clients. ValueError: no size.
    """
    path = Path(path)
    file = open_checked(path)
    values = file.values
    if not values.get("tokenizer.chat_template"):
        raise GGUFError(f"{path}: no chat template in this file; it cannot chat")
    if n_slots is not None and not 0 < n_slots <= MAX_SLOTS:
        raise ContextError(f"{n_slots} clients at once: expected 1 to {MAX_SLOTS}")
    warnings = []
    trained = trained_context(values)
    if n_ctx is not None and trained is not None and n_ctx > trained:
        warnings.append(
            f"the model was trained on {trained} tokens of context, and no client gets the {n_ctx} "
            "that were asked for"
        )
        n_ctx = trained
    first = context_size(values, n_ctx)
    if first * (n_slots or 1) >= 1 << 31:
        raise ContextError(f"{n_slots} contexts of {first} tokens: expected fewer than 2^31 in all")
    contexts = [first] if n_ctx else list(_halves(first))
    needs = Needs.of(file, path)
    cache = parse_size(expert_cache) if isinstance(expert_cache, str) else expert_cache
    budget = Budget.of("auto" if cache is not None else ram)
    memory = _divide(needs, budget, cache, contexts, (n_slots,) if n_slots else _SLOTS)
    held = needs.n_experts
    if memory.expert_cache is not None:
        held = min(held, memory.expert_cache // needs.slot_bytes)
    return ServingPlan(
        path=path,
        n_slots=memory.needs.n_slots,
        n_ctx=memory.n_ctx,
        n_ubatch=memory.n_ubatch,
        expert_cache=memory.expert_cache,
        prompt_cache=memory.prompt_cache,
        nbytes=memory.nbytes,
        reason=budget.reason if budget else None,
        experts=(held, needs.n_experts),
        names=_names(values, path),
        sampling=Sampling.advised({key: str(value) for key, value in values.items()}),
        warnings=tuple(warnings),
    )


def page() -> Path | None:
    """The folder of the page that the server shows at `/`, if it is installed."""
    folder = Path(__file__).with_name("page")
    return folder if (folder / "index.html").is_file() else None


def _halves(n_ctx: int) -> Iterator[int]:
    yield n_ctx
    while n_ctx >= 2 * _LEAST_CONTEXT:
        n_ctx //= 2
        yield n_ctx


def _names(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    """What clients may call the model: they are separated by commas, so none has one."""
    found = (ARCH, values.get("general.name"), path.stem)
    names = (name.strip() for name in found if isinstance(name, str) and name.isprintable())
    return tuple(dict.fromkeys(name for name in names if name and "," not in name))


@dataclass(frozen=True, slots=True)
class _Memory:
    """How the memory of a server is divided."""

    needs: Needs
    """With as many slots as there are clients."""
    n_ctx: int
    n_ubatch: int
    expert_cache: int | None = None
    prompt_cache: int = 0

    @property
    def nbytes(self) -> int:
        experts = self.needs.expert_bytes if self.expert_cache is None else self.expert_cache
        fixed = self.needs.everything(self.n_ctx, self.n_ubatch) - self.needs.expert_bytes
        return fixed + SLACK + experts + self.prompt_cache

    def with_prompts(self, budget: int) -> _Memory:
        """With half of what is left for prompts, if one fits, and as much as the contexts take."""
        one = self.needs.kv_bytes(self.n_ctx)
        room = min((budget - self.nbytes) // 2, self.needs.n_slots * one)
        # In whole MiB, which is how the server counts it.
        return replace(self, prompt_cache=(room >> 20) << 20) if room >= one else self


def _for_clients(needs: Needs, n_slots: int) -> Needs:
    clients = n_slots * _CANDIDATE * needs.n_vocab
    return replace(needs, n_slots=n_slots, program_bytes=PROGRAM + clients)


def _divide(
    needs: Needs,
    budget: Budget | None,
    cache: int | None,
    contexts: list[int],
    slots: tuple[int, ...],
) -> _Memory:
    """The first division that fits; with `cache`, the smallest one where none does."""
    n_ubatch = UBATCHES[0]
    if cache is not None:
        n_ubatch = cache_batch(needs, cache)
        # The server computes a token of every client at once.
        slots = tuple(n for n in slots if n <= n_ubatch) or slots[-1:]
        check_cache(needs, cache, max(slots[-1], min(n_ubatch, contexts[0])))
    whole = [_Memory(_for_clients(needs, n), contexts[0], n_ubatch, cache) for n in slots]
    if budget is None:
        return whole[0]
    for memory in whole:
        if memory.nbytes <= budget.nbytes:
            return memory if cache is not None else memory.with_prompts(budget.nbytes)
    return whole[-1] if cache is not None else _with_store(needs, budget.nbytes, contexts, slots)


def _with_store(needs: Needs, ram: int, contexts: list[int], slots: tuple[int, ...]) -> _Memory:
    """With what is left given to experts; raises MemoryBudgetError, naming the least."""
    for n_ctx in contexts:
        for n_slots in slots:
            served = _for_clients(needs, n_slots)
            spare = ram - served.least(n_ctx)
            # What clients cost, experts lose: several may have a quarter.
            others = served.least(n_ctx) - _for_clients(needs, 1).least(n_ctx)
            if spare < 0 or (n_slots > slots[-1] and others > spare // 4):
                continue
            # The server computes a token of every client at once.
            n_ubatch = max(batch_for(served, ram, n_ctx), n_slots)
            room = ram - served.least(n_ctx, n_ubatch) + served.at_once(n_ubatch)
            if room < served.at_once(n_ubatch):
                continue
            cache = min(room, needs.n_experts * needs.slot_bytes)
            return _Memory(served, n_ctx, n_ubatch, cache)
    last = _for_clients(needs, slots[-1])
    batch_for(last, ram, contexts[-1])
    least = last.least(contexts[-1], slots[-1])
    raise MemoryBudgetError(
        f"{needs.path}: {format_size(ram)} are too little: {slots[-1]} clients at once need at "
        f"least {-(-least >> 20)} MiB"
    )
