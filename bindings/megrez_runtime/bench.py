"""How fast a model runs here: tokens a second, and what its expert store did."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megrez_gguf.machine import resident_memory
from megrez_gguf.text import format_size
from megrez_llama.expert_store import ExpertStats, expert_stats
from megrez_llama.logs import log
from megrez_runtime.errors import DecodeError
from megrez_runtime.model import load

if TYPE_CHECKING:
    from llama_cpp import Llama


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a number of tokens, evaluated several times."""

    tokens: int
    rates: tuple[float, ...]
    """Tokens a second, of each run."""
    experts: ExpertStats | None
    """What the store did, over all runs; None if all experts were in memory."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    def __str__(self) -> str:
        text = f"{self.rate:8.2f} tok/s ({min(self.rates):.2f} to {max(self.rates):.2f})"
        if self.experts:
            e, count = self.experts, self.tokens * len(self.rates)
            seconds = sum(self.tokens / rate for rate in self.rates)
            text += (
                f"; {e.hit_rate:.1%} hits, {format_size(e.bytes_read / count)} read a token, "
                f"{e.wait_us / 1e6 / seconds:.1%} of the time waiting, {e.wasted} wasted"
            )
        return text


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Speeds of one model; `resident` is the memory the process had in the end, in bytes."""

    model: str
    prompt: Speed | None
    decode: Speed
    threads: int
    seed: int
    slots: int | None
    resident: int | None

    def __str__(self) -> str:
        lines = [f"prompt  {self.prompt}"] if self.prompt else []
        lines.append(f"decode  {self.decode}")
        if self.resident:
            lines.append(f"memory  {format_size(self.resident)}")
        return "\n".join(lines)


def _evaluate(llm: Llama, tokens: Any) -> None:
    try:
        llm.eval(tokens.tolist())
    except RuntimeError as e:
        reason = log.take_errors() or str(e)
        raise DecodeError(f"llama.cpp failed to evaluate the model: {reason}") from e


def bench(
    path: Path,
    *,
    n_prompt: int = 512,
    n_decode: int = 64,
    n_warmup: int = 16,
    n_repeats: int = 3,
    seed: int = 0,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> BenchResult:
    """Time the model in the GGUF file `path` on random tokens, `n_repeats` times.

    Each run evaluates `n_prompt` tokens at once, then decodes `n_warmup` tokens that are not timed
    and `n_decode` that are, one by one. `options` go to `load`.

    Raises as `load` does, and DecodeError.
    """
    n_ctx = max(n_prompt, n_warmup + n_decode) + 1
    llm = load(path, n_ctx=n_ctx, say=say, **options)
    with contextlib.closing(llm):
        rng = np.random.default_rng(seed)

        def timed(batches: list[Any]) -> tuple[float, ExpertStats | None]:
            before, start = expert_stats(llm), time.perf_counter()
            for batch in batches:
                _evaluate(llm, batch)
            seconds, after = time.perf_counter() - start, expert_stats(llm)
            return seconds, after.since(before) if after and before else None

        prefills, decodes = [], []
        for _ in range(n_repeats):
            first, second = rng.integers(0, llm.n_vocab(), (2, n_ctx), dtype=np.int32)
            if n_prompt:
                llm.reset()
                prefills.append(timed([first[:n_prompt]]))
            llm.reset()
            singles = list(second[: n_warmup + n_decode, None])
            timed(singles[:n_warmup])
            decodes.append(timed(singles[n_warmup:]))
        stats = expert_stats(llm)
        return BenchResult(
            model=path.name,
            prompt=_speed(n_prompt, prefills) if n_prompt else None,
            decode=_speed(n_decode, decodes),
            threads=llm.n_threads,
            seed=seed,
            slots=stats.slots if stats else None,
            resident=resident_memory(),
        )


def _speed(tokens: int, runs: list[tuple[float, ExpertStats | None]]) -> Speed:
    total: ExpertStats | None = None
    for _, stats in runs:
        total = stats + total if stats and total else stats
    return Speed(tokens, tuple(tokens / seconds for seconds, _ in runs), total)
