"""Reading anywhere in a checkpoint's tensors, at the speed of the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megrez_gguf.storage.tensor import Tensor, ended_early, unreadable

# Bytes read at once past the system's cache.
_DIRECT = (8 << 20) + mmap.PAGESIZE
_mincore = ctypes.CDLL(None).mincore if hasattr(os, "O_DIRECT") else None


class OpenShards:
    """Shards held open, for reading anywhere in their tensors from any thread.

    A context manager. Raises CheckpointError naming shard and tensor.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[tuple[Path, int], int] = {}
        self._mapped: dict[Path, npt.NDArray[np.uint8]] = {}
        self._local = threading.local()

    def __enter__(self) -> OpenShards:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all that was opened; may be called twice."""
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._mapped.clear()

    def _descriptor(self, tensor: Tensor, flags: int = 0) -> int:
        """The open file that holds `tensor`."""
        key = tensor.shard.path, flags
        with self._lock:
            if key not in self._open:
                everywhere = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
                self._open[key] = os.open(tensor.shard.path, everywhere | flags)
            return self._open[key]

    def read(self, tensor: Tensor, offset: int, into: memoryview) -> None:
        """Fill `into` with the bytes of `tensor` from `offset` on.

        What the system has not cached is read past its cache: it is read once, and the copies and
        the bookkeeping would take as much time as the disk does.
        """
        position = tensor.begin + offset
        try:
            descriptor = self._descriptor(tensor)
            while into:
                count = self._direct(tensor, into, position) or os.preadv(
                    descriptor, [into], position
                )
                if not count:
                    raise ended_early(tensor)
                into, position = into[count:], position + count
        except OSError as e:
            raise unreadable(tensor, e) from None

    def _cached(self, tensor: Tensor, position: int, count: int) -> bool:
        """Whether the system says that it has all of these bytes in its cache."""
        # To ask by RWF_NOWAIT would set off the very reading ahead that is to be avoided.
        path, descriptor = tensor.shard.path, self._descriptor(tensor)
        with self._lock:
            if path not in self._mapped:
                with suppress(OSError, ValueError):  # it is empty by now
                    view = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
                    self._mapped[path] = np.frombuffer(view, np.uint8)
            mapped = self._mapped.get(path)
        if mapped is None or _mincore is None:
            return False
        skipped = position % mmap.PAGESIZE
        pages = np.zeros(-(-(skipped + count) // mmap.PAGESIZE), np.uint8)
        begin = ctypes.c_void_p(mapped.ctypes.data + position - skipped)
        failed = _mincore(begin, ctypes.c_size_t(skipped + count), pages.ctypes)
        return not failed and bool(np.all(pages & 1))

    def _direct(self, tensor: Tensor, into: memoryview, position: int) -> int:
        """Read past the system's cache; returns how many bytes, 0 for none: read them plainly."""
        if _mincore is None or self._cached(tensor, position, len(into)):
            return 0
        buffer: mmap.mmap | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = mmap.mmap(-1, _DIRECT)
        skipped = position % mmap.PAGESIZE
        wanted = min(_DIRECT, -(-(skipped + len(into)) // mmap.PAGESIZE) * mmap.PAGESIZE)
        with suppress(OSError), memoryview(buffer)[:wanted] as aligned:
            descriptor = self._descriptor(tensor, os.O_DIRECT)
            found = os.preadv(descriptor, [aligned], position - skipped) - skipped
            count = max(0, min(found, len(into)))
            into[:count] = aligned[skipped : skipped + count]
            return count
        return 0
