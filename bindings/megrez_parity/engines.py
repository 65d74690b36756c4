"""Other engines as candidates: a process of theirs runs the windows that levels run.

An engine lives in a process of its own (`megrez_engines.worker`), because it may need another
Python environment, and because what it does to a process is its own affair.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from megrez_gguf.errors import ConfigError, RuntimeUnavailableError
from megrez_gguf.machine import available_cpus
from megrez_llama.engine import Outputs

# What each takes, beside `python`: the options of `megrez_engines.worker`'s runners.
OPTIONS = {
    "transformers": ("dtype", "attention", "experts"),
    "vllm": ("dtype", "tp", "pp", "max_num_batched_tokens"),
    "sglang": ("dtype", "tp", "pp", "chunked_prefill_size"),
}
# The level whose bounds a precision has, and how tensors of it are called.
KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """An engine and its options, as `NAME[:OPTION=VALUE,...]` says it."""

    text: str
    name: str
    options: dict[str, str]
    python: str = sys.executable  # of the environment that has the engine

    @classmethod
    def parse(cls, text: str) -> EngineSpec:
        """Raises ConfigError for an engine or an option that nobody here knows."""
        name, _, rest = text.partition(":")
        if name not in OPTIONS:
            raise ConfigError(f"no engine is called {name}; known: {', '.join(OPTIONS)}")
        options: dict[str, str] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            if not equals or not value or key not in (*OPTIONS[name], "python"):
                known = ", ".join(f"{key}=..." for key in (*OPTIONS[name], "python"))
                raise ConfigError(f"{text}: {part!r} is no option of {name}; known: {known}")
            options[key] = value
        if options.get("dtype", "float32") not in KINDS:
            raise ConfigError(f"{text}: dtype is one of {', '.join(KINDS)}")
        for key in options.keys() & {"tp", "pp", "max_num_batched_tokens", "chunked_prefill_size"}:
            if not options[key].isdecimal() or options[key] == "0":
                raise ConfigError(f"{text}: {key} is a number from 1 on")
        python = options.pop("python", sys.executable)
        return cls(text, name, options, python)

    @property
    def kind(self) -> str:
        """The level whose thresholds apply."""
        return KINDS[self.options.get("dtype", "float32")]


def environment(spec: EngineSpec) -> dict[str, str]:
    """Variables of an engine's process; one that is set already prevails."""
    processes = int(spec.options.get("tp", 1)) * int(spec.options.get("pp", 1))
    variables = {
        "HF_HUB_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # as VLLM_ALLOW_LONG_MAX_MODEL_LEN
        "OMP_NUM_THREADS": str(max(1, available_cpus() // processes)),
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window and the token vLLM must add to it
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it most of the memory that is free
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # processes may share CPUs
        "VLLM_NO_USAGE_STATS": "1",
    }
    if processes > 1:  # without it SGLang wants a NUMA node for each
        cpus = sorted(os.sched_getaffinity(0))
        bind = "|".join(str(cpus[i % len(cpus)]) for i in range(processes))
        variables["SGLANG_CPU_OMP_THREADS_BIND"] = bind
    return variables


class EngineProcess:
    """An engine that holds a checkpoint; what `megrez_llama.engine.Engine` does, less GGUF."""

    def __init__(self, spec: EngineSpec, checkpoint: Path, n_ctx: int, scratch: Path) -> None:
        """Raises RuntimeUnavailableError: it does not start, or cannot run this checkpoint."""
        self._spec = spec
        self._folder = Path(tempfile.mkdtemp(dir=scratch))
        self._log = (self._folder / "log").open("w+b")
        job = {
            "engine": spec.name,
            "checkpoint": os.fspath(checkpoint),
            "options": spec.options,
            "context": n_ctx,
        }
        try:
            self._process = subprocess.Popen(
                [spec.python, "-m", "megrez_engines.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment(spec) | os.environ,
                start_new_session=True,
            )
        except OSError as e:
            raise RuntimeUnavailableError(f"{spec.python}: {e.strerror}") from None
        try:
            started = self._ask(job)
        except BaseException:
            self.close()
            raise
        self.version: str = started["version"]
        self.bos: int | None = started["bos"]
        self.weights: int = started["weights"]  # bytes of them in memory, on all devices

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and what it started."""
        stdin = self._pipe(self._process.stdin)
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()

    def tokenize(self, text: str) -> NDArray[np.int32]:
        """The engine's token ids of `text`, nothing added."""
        return np.array(self._ask({"tokenize": text})["tokens"], np.int32)

    def run(self, tokens: NDArray[np.int32], *, first: int, capture: Collection[str]) -> Outputs:
        """As `Engine.run`, less the last position's logits, and less nodes it cannot tell."""
        to = str(self._folder / "window")
        asked = {"run": [*map(int, tokens)], "first": first, "capture": [*capture], "to": to}
        nodes = self._ask(asked)["nodes"]
        read = {(name, layer): np.load(f"{to}.{name}.{layer}.npy") for name, layer in nodes}
        return Outputs(np.load(to + ".npy"), read)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._pipe(self._process.stdin), self._pipe(self._process.stdout)
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in answer:
            raise RuntimeUnavailableError(f"{self._spec.text}: {answer['error']}{self._words()}")
        return answer

    def _words(self) -> str:
        """The first error that it printed; a later one tells only that there was one."""
        self._log.flush()
        self._log.seek(0)
        printed = self._log.read().decode(errors="replace")
        errors = re.findall(r"\b[A-Za-z_.]*(?:Error|Exception): .*", printed)
        last = printed.strip().splitlines()[-1:]
        return "".join(f" ({words[:400]})" for words in (errors or last)[:1])

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe
