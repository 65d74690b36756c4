"""Files that cost time to make, made once for all tests of a run, in however many processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megrez_gguf
from support.paths import POCKET
from support.random_checkpoint import make_checkpoint


class Shared:
    """A folder of a run's own. What lies in it is for reading: a test that edits takes a copy."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder

    def made(self, key: str, make: Callable[[Path], Any], suffix: str = "") -> Path:
        """What `make(path)` makes, a file or a folder; the first who asks for `key` makes it."""
        path = self._folder / (hashlib.sha256(key.encode()).hexdigest()[:16] + suffix)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                partial = path.with_name("partial-" + path.name)
                make(partial)
                partial.rename(path)
        return path

    def checkpoint(self, config: dict[str, Any], **options: Any) -> Path:
        """`make_checkpoint(config, **options)`."""
        key = json.dumps(["checkpoint", config, options], sort_keys=True)
        return self.made(key, lambda path: make_checkpoint(config, path, **options))

    def converted(self, checkpoint: Path, outtype: str = "auto", **options: Any) -> Path:
        """The GGUF of a checkpoint that nobody edits."""
        key = json.dumps(["gguf", str(checkpoint), outtype, options], sort_keys=True)

        def make(path: Path) -> None:
            megrez_gguf.convert(checkpoint, path, outtype=outtype, **options)

        return self.made(key, make, ".gguf")

    def pocket(self, outtype: str = "auto") -> Path:
        """The pocket checkpoint's GGUF."""
        return self.converted(POCKET, outtype)
