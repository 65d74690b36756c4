"""Where figures come from: hashes, versions, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from megrez_gguf.checkpoint.shards import Checkpoint
from megrez_gguf.errors import CheckpointError, OutputError
from megrez_gguf.format.reader import GGUFFile
from megrez_gguf.machine import available_cpus
from megrez_llama.patched import marker


def sha256(paths: Sequence[Path]) -> list[str]:
    """Hex digests of files, read side by side. Raises CheckpointError for one that cannot be."""

    def digest(path: Path) -> str:
        try:
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror or e}") from None

    with ThreadPoolExecutor(available_cpus()) as pool:
        return list(pool.map(digest, paths))


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """One digest for all that decides a checkpoint's logits: config.json and every shard."""
    files = [checkpoint.folder / "config.json", *(shard.path for shard in checkpoint.shards)]
    return hashlib.sha256("\n".join(sha256(files)).encode()).hexdigest()


def file_sha256(file: GGUFFile) -> str:
    """Digest of a GGUF file; of a split one, that of its parts' digests, a line each."""
    digests = sha256([shard.path for shard in file.shards])
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def provenance(weights: str, command: str) -> dict[str, str]:
    """What a report says of its making. `weights` is `checkpoint_sha256`.

    Raises RuntimeUnavailableError without the patched llama_cpp.
    """
    build = marker()
    found = {
        "weights sha256": weights,
        "command": command,
        "seed": "0, of the bootstrap; nothing else is random",
        "commit": _commit(),
        "megrez-gguf": _version("megrez-gguf"),
        "llama_cpp": str(build["version"]),
        "llama_cpp sdist sha256": str(build["pin"]["sha256"]),
        "patches sha256": str(build["series"]),
        "torch": _version("torch"),
        "numpy": _version("numpy"),
        "tokenizers": _version("tokenizers"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {_cpu()}, {available_cpus()} CPUs",
    }
    return {name: value for name, value in found.items() if value}


def _version(package: str) -> str:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return ""


def _commit() -> str:
    """Of the working copy this package runs from, if it does."""
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        here = Path(__file__).resolve().parent
        tracked = ["git", "ls-files", "--error-unmatch", __file__]
        subprocess.run(tracked, cwd=here, check=True, capture_output=True)
        done = subprocess.run(command, cwd=here, check=True, capture_output=True, text=True)
        return done.stdout.strip()
    return ""


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown CPU"


def cache_folder() -> Path:
    """Where this user's caches go. Raises OutputError for one without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise OutputError("this user has no home folder to cache in; set XDG_CACHE_HOME") from None
    return Path(base) / "megrez-gguf"
