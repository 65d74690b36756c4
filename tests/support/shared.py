"""Files that cost time to make, made once for all tests of a run, in however many processes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
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

    def made(self, key: str, name: str, make: Callable[[Path], Any]) -> Path:
        """What `make(path)` makes, a file or a folder; the first who asks for `key` makes it."""
        folder = self._folder / hashlib.sha256(key.encode()).hexdigest()[:16]
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                partial = folder.with_suffix(".partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial / name)
                partial.rename(folder)
        return folder / name

    def checkpoint(self, config: dict[str, Any], **options: Any) -> Path:
        """`make_checkpoint(config, **options)`. Its folder's name gets into files made from it."""
        key = json.dumps(["checkpoint", config, options], sort_keys=True)
        return self.made(key, "checkpoint", lambda path: make_checkpoint(config, path, **options))

    def converted(self, checkpoint: Path, outtype: str = "auto") -> Path:
        """The GGUF of a checkpoint that nobody edits."""
        key = json.dumps(["gguf", str(checkpoint), outtype])

        def make(path: Path) -> None:
            megrez_gguf.convert(checkpoint, path, outtype=outtype)

        return self.made(key, f"{outtype}.gguf", make)

    def pocket(self, outtype: str = "auto") -> Path:
        """The pocket checkpoint's GGUF."""
        return self.converted(POCKET, outtype)
