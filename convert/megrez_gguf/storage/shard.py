"""A file that holds tensors, and whether it is still what it was."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from megrez_gguf.errors import CheckpointError

# Nanoseconds between two ticks of the clock that file systems take their times from: 10 ms at most
# on Linux, and in exFAT; twice that, to be sure.
_TICK = 20_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, and what it looked like when its header was read.

    Every file system keeps a file's size and its content. `times` and `inode` are only hints: when
    they stay, so has the file; when they do not, the content has to be read once more, since
    networks, FUSE, FAT and overlays round dates and number files anew as they please. Nor do times
    tell anything about a file written a moment before: a second change can fall into the same tick.
    """

    path: Path
    size: int
    times: tuple[int, int] = field(compare=False)
    """Of the last change to the content, and to the file at all, which nobody can set back."""
    inode: int = field(compare=False)
    just_written: bool = field(compare=False)
    """Whether a change since would not show in `times`."""

    @classmethod
    def of(cls, path: Path, status: os.stat_result) -> Shard:
        times = status.st_mtime_ns, status.st_ctime_ns
        just_written = max(times) > time.time_ns() - _TICK
        return cls(path, status.st_size, times, status.st_ino, just_written)

    def may_have_changed(self) -> bool:
        """Whether only reading the file once more can tell.

        Raises CheckpointError: it has been resized or removed.
        """
        try:
            now = Shard.of(self.path, self.path.stat())
        except OSError as e:
            raise CheckpointError(
                f"{self.path}: vanished while it was read: {e.strerror}"
            ) from None
        if now.size != self.size:
            raise self.changed()
        return self.just_written or (now.times, now.inode) != (self.times, self.inode)

    def changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: changed while it was read; wait until the download or the copy is "
            "done and start again"
        )
