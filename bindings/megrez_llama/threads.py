"""How many threads may compute."""

from __future__ import annotations

from megrez_llama.errors import MegrezError

# GGML_MAX_N_THREADS. With many more the OpenMP library ends the process.
MAX_THREADS = 512


def thread_count(wanted: int | None, available: int) -> int:
    """`wanted`, or `available` where that is None or 0. Raises MegrezError beyond 1 to 512."""
    count = wanted or min(available, MAX_THREADS)
    if not 0 < count <= MAX_THREADS:
        raise MegrezError(
            f"{count} threads: expected 1 to {MAX_THREADS}, the most that ggml can use",
            option="n_threads",
        )
    return count
