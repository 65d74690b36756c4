"""llama.cpp's own server: where its program is, and how the pin spells what we ask of it.

Whatever is not said here is upstream's default. What upstream also reads, environment variables
named `LLAMA_...` and `AIP_...`, is kept from it: what it does follows from `Settings` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megrez_llama.errors import RuntimeUnavailableError
from megrez_llama.expert_store import CACHE_KEY, COUNTS_KEY
from megrez_llama.patched import install_command, package

BATCH = 512
"""Tokens of all clients in one step: a long prompt keeps others waiting for so many at most."""

MAX_SLOTS = 256
"""LLAMA_MAX_SEQ."""

# Seconds a client may take to send or to accept the next bytes.
_TIMEOUT = 60
# Prefixes of variables that llama.cpp's programs read.
_VARIABLES = ("LLAMA_", "AIP_", "MTMD_")


class Sampling(Protocol):
    """How tokens are drawn."""

    @property
    def temp(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repeat_penalty(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Settings:
    """A server to start. Sizes in bytes, contexts in tokens."""

    model: Path
    hosts: tuple[str, ...]
    """IP addresses or names, or paths of Unix sockets, which end in .sock."""
    port: int
    aliases: tuple[str, ...]
    """Names under which clients may ask for the model."""
    n_slots: int
    """Clients served at once; others wait."""
    n_ctx: int
    """Of one client."""
    n_ubatch: int
    n_threads: int
    n_gpu_layers: int
    """-1 is all."""
    expert_cache: int | None
    """Memory for the experts; None keeps all in memory."""
    prompt_cache: int
    """Memory for the states of prompts that no client holds any more; 0 is none."""
    sampling: Sampling
    """Where a request does not say."""
    max_tokens: int | None = None
    """Of an answer, where a request does not say."""
    page: Path | None = None
    """Folder of static files to serve at `/`."""
    keys: Path | None = None
    """File of the keys of which each request needs one, one a line; it is read once."""
    verbosity: int = 2
    """1 errors, 2 warnings, 3 a few lines a request, 4 more; 5 writes prompts and answers."""
    json_log: bool = False
    """A JSON object a line, on stdout."""


def program() -> Path:
    """The server's program. Raises RuntimeUnavailableError: no patched llama_cpp, or one without.

    Does not import llama_cpp.
    """
    path = package() / "lib" / ("llama-server.exe" if os.name == "nt" else "llama-server")
    if not os.access(path, os.X_OK):
        raise RuntimeUnavailableError(
            f"{path} is missing: this llama_cpp was built without the server. Build it again: "
            f"MEGREZ_NO_WHEEL_CACHE=1 {install_command()}"
        )
    return path


def arguments(settings: Settings) -> list[str]:
    """The arguments of the server's program, without its name."""
    s = settings
    given: dict[str, object] = {
        "--model": s.model,
        "--alias": ",".join(s.aliases),
        "--host": ",".join(s.hosts),
        "--port": s.port,
        "--timeout": _TIMEOUT,
        # No other page may read what the server answers. An empty list has no better spelling.
        "--cors-origins": "",
        "--parallel": s.n_slots,
        "--ctx-size": s.n_slots * s.n_ctx,
        "--batch-size": max(BATCH, s.n_ubatch, s.n_slots),
        "--ubatch-size": s.n_ubatch,
        "--threads": s.n_threads,
        "--threads-batch": s.n_threads,
        # As everywhere in this project: the same kernels give the same answers.
        "--flash-attn": "off",
        "--fit": "off",
        "--cache-ram": -(-s.prompt_cache >> 20),
        # For models with recurrent states and sliding windows only.
        "--ctx-checkpoints": 0,
        "--temp": s.sampling.temp,
        "--top-p": s.sampling.top_p,
        "--top-k": s.sampling.top_k,
        "--min-p": s.sampling.min_p,
        "--repeat-penalty": s.sampling.repeat_penalty,
        "--verbosity": s.verbosity,
        # Empty, in case a configuration file of llama.cpp names some.
        "--mcp-servers-config": "",
        "--mcp-servers-json": "",
    }
    if s.max_tokens is not None:
        given["--predict"] = s.max_tokens
    overrides = [f"{COUNTS_KEY}=bool:true"]
    if s.expert_cache is not None:
        overrides.append(f"{CACHE_KEY}=int:{s.expert_cache}")
        given["--load-mode"] = "none"
        given["--device"] = "none"
    elif s.n_gpu_layers >= 0:
        given["--gpu-layers"] = s.n_gpu_layers
    given["--override-kv"] = ",".join(overrides)
    if s.page is not None:
        given["--path"] = s.page
    if s.keys is not None:
        given["--api-key-file"] = s.keys
    switches = [
        # Each client has its own part of the context: in a shared one, a client that fills it ends
        # the answers of others.
        "--no-kv-unified",
        "--no-cors-credentials",
        "--no-agent",
        "--offline",
        "--metrics",
        "--no-slots",
    ]
    if s.page is None:
        switches.append("--no-ui")
    if not s.prompt_cache:
        switches.append("--no-cache-idle-slots")
    if s.expert_cache is not None:
        # The empty run would read experts that nobody asked for.
        switches.append("--no-warmup")
    if s.json_log:
        switches.append("--log-jsonl")
    return [*(str(part) for option in given.items() for part in option), *switches]


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """The environment `before`, without what would change settings of the server."""
    return {key: value for key, value in before.items() if not key.startswith(_VARIABLES)}
