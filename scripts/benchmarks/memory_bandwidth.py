"""What the memory gives to threads that only read, and what one token needs of it."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megrez_gguf.format.model_check import layers_with
from megrez_gguf.format.reader import GGUFFile
from megrez_llama import ARCH

SUM = """
#include <stddef.h>
#include <stdint.h>
uint64_t sum(const uint64_t * p, size_t n) {
    uint64_t ret = 0;
    for (size_t i = 0; i < n; ++i) { ret += p[i]; }
    return ret;
}
"""


def _compile() -> Callable[[int, int], int]:
    """`sum(address, n)`, of 64-bit words: one addition for 8 bytes, with the widest vectors."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "sum.c"), Path(folder, "sum.so")
        source.write_text(SUM)
        subprocess.run(
            ["cc", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True
        )
        function = ctypes.CDLL(str(library)).sum
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    function.restype = ctypes.c_uint64
    return function


class Memory:
    """Reads `gib` GiB with `threads` threads, a part each."""

    def __init__(self, threads: int, gib: float = 1.0) -> None:
        self._sum = _compile()
        words = int(gib * (1 << 27)) // threads
        self._parts = [np.arange(words, dtype=np.uint64) for _ in range(threads)]

    def read(self, passes: int = 3) -> float:
        """Bytes a second, of the fastest of some passes."""
        return max(self._pass() for _ in range(passes))

    def _pass(self) -> float:
        threads = [
            threading.Thread(target=self._sum, args=(part.ctypes.data, part.size))
            for part in self._parts
        ]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(part.nbytes for part in self._parts) / (time.perf_counter() - start)


def bytes_of_token(path: Path) -> int:
    """Bytes of weights that decoding one token reads; of a pool, a share for each of its layers."""
    file = GGUFFile.open_model(path)
    number = {key.removeprefix(f"{ARCH}."): value for key, value in file.values.items()}
    layers = number["block_count"]
    pools = layers_with("ffn_gate_exps", file.tensors, layers)
    uses = Counter(
        max(pool for pool in pools if pool <= layer)
        for layer in layers_with("ffn_gate_inp", file.tensors, layers)
    )
    is_tied = all(tensor.name != "output.weight" for tensor in file.tensors)
    total = 0
    for tensor in file.tensors:
        if "_exps." in tensor.name:
            times = uses[int(tensor.name.split(".")[1])]
            total += tensor.nbytes * times * number["expert_used_count"] // number["expert_count"]
        elif tensor.name != "token_embd.weight" or is_tied:
            total += tensor.nbytes
    return total
