"""Load a Megrez2 GGUF, with errors that say what is wrong."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megrez_gguf.errors import GGUFError
from megrez_gguf.format.model_check import open_checked
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.machine import available_cpus, resident_memory
from megrez_gguf.text import format_size, parse_size
from megrez_llama import ARCH, expert_store
from megrez_llama.logs import log
from megrez_llama.patched import require_patched
from megrez_llama.threads import thread_count
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

if TYPE_CHECKING:
    from llama_cpp import Llama

# At the published size a token of context takes 62 KiB, so this is half a gigabyte.
DEFAULT_CONTEXT = 8192
_TEMPLATE = "tokenizer.chat_template"
# llama.cpp rounds contexts up to a multiple of this, and llama_cpp's buffers must agree with it.
_CONTEXT_STEP = 256


def load(
    path: str | os.PathLike[str],
    *,
    n_ctx: int | None = None,
    n_threads: int | None = None,
    n_gpu_layers: int = -1,
    ram: int | str = "auto",
    expert_cache: int | str | None = None,
    expert_margin: float = 0.0,
    verbose: bool = False,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Llama:
    """The model in the GGUF file `path`, ready to run.

    `n_ctx` is in tokens, and rounded up to a multiple of 256 (default: what the model was trained
    on, at most 8192). `n_threads` defaults to all CPUs this process may use, `n_gpu_layers` to all
    layers, which means none in a build for the CPU. `options` go to `llama_cpp.Llama`. llama.cpp's
    log is silent unless `verbose`.

    `ram` is the memory this process may take in all, in bytes or as in "2GiB". What does not fit
    of the experts stays in the file and is read when a router names it: slower, and the same, bit
    for bit, at the same `n_ubatch`, which is chosen to suit. "auto" does so if the machine, or the
    process's cgroup, has too little memory free; "off" never. `expert_cache` gives a size for the
    experts alone, in place of `ram`. `expert_margin` trades the model's own words for speed: while
    one token is decoded, a router prefers an expert in memory to one whose score is higher by less
    than this (after arXiv 2412.00099); nothing changes where all are in memory. Both sizes mean
    computing on the CPU, and memory for the logits of one token of a batch, which is what Llama
    asks for; `n_outputs_max`, an option, is for batches made by hand. `say` is told what was
    chosen, if experts stay in the file.

    Raises GGUFError: no such file, damaged, not a Megrez2 model, or refused by llama.cpp (with its
    reason). MemoryBudgetError: `ram` or `expert_cache` is too small; names the least. ContextError:
    no memory for the context. RuntimeUnavailableError: llama_cpp is missing or unpatched.
    MegrezError: more threads than ggml can use. TypeError: an option `llama_cpp.Llama` does not
    have. ValueError: no size, or no margin.
    """
    if not 0 <= expert_margin < math.inf:
        raise ValueError(f"expert_margin is {expert_margin}, expected 0 or more")
    path = Path(path)
    threads = thread_count(n_threads, available_cpus())
    file = open_checked(path)
    values = file.values
    n_ctx = context_size(values, n_ctx)

    llama_cpp = require_patched()
    unknown = options.keys() - inspect.signature(llama_cpp.Llama).parameters.keys()
    if unknown:
        raise TypeError(f"llama_cpp.Llama has no option {', '.join(sorted(unknown))}")
    all_logits = any(options.get(name) for name in ("logits_all", "draft_model", "embedding"))
    plan = _plan_store(file, path, n_ctx, ram, expert_cache, options.get("n_ubatch"), all_logits)
    if plan:
        overrides = {**(options.get("kv_overrides") or {}), expert_store.CACHE_KEY: plan.cache}
        if expert_margin:
            overrides[expert_store.MARGIN_KEY] = float(expert_margin)
        batches = {
            "n_ubatch": plan.n_ubatch,
            "n_batch": max(plan.n_ubatch, 512),
            "n_outputs_max": 0 if all_logits else 1,
        }
        options = batches | options | {"kv_overrides": overrides, "use_mmap": False}
        n_tokens = min(n_ctx, options["n_batch"], options["n_ubatch"])
        check_cache(plan.needs, plan.cache, n_tokens)
        n_gpu_layers = 0

    log.install(llama_cpp, verbose=verbose)
    options["n_threads_batch"] = thread_count(options.get("n_threads_batch"), threads)
    llm = _without_templates(llama_cpp)
    try:
        llm.__init__(  # in two steps, to see how far it got
            _FileName(path),
            n_ctx=n_ctx,
            n_threads=threads,
            n_gpu_layers=n_gpu_layers,
            verbose=verbose,
            **options,
        )
    except (ValueError, RuntimeError) as e:
        reason = log.take_errors() or str(e)
        if hasattr(llm, "_model") and not hasattr(llm, "_ctx"):
            raise ContextError(
                f"{path}: no context of {n_ctx} tokens can be made: {reason}. If it is memory "
                "that lacks, ask for a shorter one",
                option="n_ctx",
            ) from None
        raise GGUFError(f"{path}: llama.cpp cannot load it: {reason}") from None
    _restore_templates(llm, {k: v for k, v in values.items() if isinstance(v, str)}, options)
    if plan:
        try:
            plan.settle(llm)
        except MemoryBudgetError:
            llm.close()
            raise
        if say:
            say(plan.told(llm))
    return llm


def trained_context(values: Mapping[str, Any]) -> int | None:
    """Tokens of context the model was trained on, if its file's key-values tell."""
    trained = values.get(f"{ARCH}.context_length")
    return trained if type(trained) is int else None


def context_size(values: Mapping[str, Any], n_ctx: int | None) -> int:
    """The context llama.cpp makes where `n_ctx` is asked for, or what is usual where it is None.

    Raises ContextError: no number of tokens.
    """
    if n_ctx is None:
        n_ctx = min(trained_context(values) or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if not 0 < n_ctx < 1 << 31:
        raise ContextError(f"a context of {n_ctx} tokens: expected 1 or more, and below 2^31")
    return -(-n_ctx // _CONTEXT_STEP) * _CONTEXT_STEP


def _without_templates(llama_cpp: ModuleType) -> Llama:
    """A Llama to be initialised, which will not see the chat templates in its file.

    It would compile them all, and fail if one is no Jinja, though only chatting needs one; and it
    drops the last byte of a text that just fills its buffer.
    """

    class Untalkative(llama_cpp.Llama):  # type: ignore[name-defined, misc]
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "metadata":
                value = {k: v for k, v in value.items() if not k.startswith(_TEMPLATE)}
            super().__setattr__(name, value)

    llm: Llama = Untalkative.__new__(Untalkative)
    return llm


def _restore_templates(llm: Llama, texts: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """Give `llm` the `texts` of its file as metadata, and chat templates compiled when called."""
    from llama_cpp import Llama
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    llm.__class__ = Llama
    llm.metadata.update(texts)

    def handler(template: str) -> Callable[..., Any]:
        def handle(**request: Any) -> Any:
            ends = llm.token_eos(), llm.token_bos()
            eos, bos = (llm._model.token_get_text(i) if i >= 0 else "" for i in ends)
            formatter = Jinja2ChatFormatter(template, eos, bos, stop_token_ids=[ends[0]])
            return formatter.to_chat_handler()(**request)

        return handle

    # Under the names that Llama gives them.
    for key, template in texts.items():
        if key.startswith(f"{_TEMPLATE}."):
            llm._chat_handlers[key.removeprefix("tokenizer.")] = handler(template)
    if _TEMPLATE in texts:
        llm._chat_handlers["chat_template.default"] = handler(texts[_TEMPLATE])
        if options.get("chat_format") is None and options.get("chat_handler") is None:
            llm.chat_format = "chat_template.default"


class _FileName(str):
    """A path for llama_cpp, which encodes it as UTF-8 and so could not name every file."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(Path(self))


@dataclass(frozen=True, slots=True)
class _StorePlan:
    """A store to load: `cache` bytes at most, within `ram` bytes for the process unless None."""

    needs: Needs
    file: GGUFFile
    cache: int
    ram: int | None
    n_ubatch: int
    reason: str

    def settle(self, llm: Llama) -> None:
        """Give the store of `llm` what the process has left, now that all else is in place."""
        # Reading the other weights has put them into the page cache as well.
        for shard in self.file.shards:
            _forget_pages(shard.path)
        resident = resident_memory()
        if self.ram is None or resident is None:
            return
        fixed = (
            resident + expert_store.compute_bytes(llm) + self.needs.scratch(self.n_ubatch) + SLACK
        )
        if not expert_store.resize(llm, max(0, self.ram - fixed), self.n_ubatch):
            least = fixed + self.needs.at_once(self.n_ubatch)
            raise MemoryBudgetError(
                f"{self.needs.path}: {format_size(self.ram)} are too little: with batches of "
                f"{self.n_ubatch} tokens (n_ubatch) at least {-(-least >> 20)} MiB are needed"
            )

    def told(self, llm: Llama) -> str:
        stats = expert_store.expert_stats(llm)
        assert stats is not None
        return (
            f"{self.reason}: {format_size(stats.slots * stats.slot_bytes)} for experts, "
            f"{stats.slots} of {stats.experts}; the others are read when they are needed"
        )


def _plan_store(
    file: GGUFFile,
    path: Path,
    n_ctx: int,
    ram: int | str,
    cache: int | str | None,
    n_ubatch: int | None,
    all_logits: bool,
) -> _StorePlan | None:
    """What to load with, or None if all experts are to be in memory."""
    if cache is not None:
        cache = parse_size(cache) if isinstance(cache, str) else cache
        needs = Needs.of(file, path, all_logits=all_logits)
        chosen = n_ubatch or cache_batch(needs, cache)
        return _StorePlan(needs, file, cache, None, chosen, "expert cache")
    budget = Budget.of(ram)
    if budget is None:
        return None
    needs = Needs.of(file, path, all_logits=all_logits)
    total = budget.nbytes
    if needs.everything(n_ctx, n_ubatch or UBATCHES[0]) <= total:
        return None
    chosen = n_ubatch or batch_for(needs, total, n_ctx)
    return _StorePlan(needs, file, total, total, chosen, budget.reason)


def _forget_pages(path: Path) -> None:
    """Tell the system that nothing of the file `path` need be kept in the page cache."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
