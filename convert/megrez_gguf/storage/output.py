"""Files that appear whole or not at all, even when the process is killed."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from megrez_gguf.errors import OutputError

if sys.platform != "win32":  # which has no such locks: leftovers stay where they are
    import fcntl

_PREFIX, _SUFFIX = ".megrez-gguf-", ".part"
# Bytes written at once.
_BUFFER = 16 << 20


class OutputFiles:
    """One or several files, written one after the other under temporary names beside their own.

    A context manager: leaving it normally gives the files their names, the first one last, since a
    split model is loaded by it; leaving it by an exception removes them. What a killed process has
    left is removed by the next one that writes to the folder. `inputs` are files that must not be
    replaced.

    Raises OutputError: a file exists and `force` is not given, the folder is missing or cannot be
    written, the disk is full.
    """

    def __init__(
        self, paths: Sequence[Path], *, force: bool = False, inputs: Sequence[Path] = ()
    ) -> None:
        self._paths, self._force = paths, force
        for path in paths:
            _check(path, force, inputs)
        self._temporary: list[Path] = []
        self._descriptors: list[int] = []
        self._direct: list[int] = []  # the same files, or -1
        self._current = -1
        self._position = self._used = 0
        self._buffers = [mmap.mmap(-1, _BUFFER), mmap.mmap(-1, _BUFFER)]
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def reserve(self, nbytes: int) -> None:
        """Remove what killed processes left, and see that `nbytes` will fit.

        Raises OutputError.
        """
        folder = self._paths[0].parent
        _remove_leftovers(folder)
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise OutputError(
                f"{self._paths[0]}: needs {nbytes} bytes and the disk has {free} left"
            )

    def __enter__(self) -> OutputFiles:
        for path in self._paths:
            try:
                self._create(path)
            except OSError as e:
                self._remove()
                raise OutputError(f"{path}: cannot be written: {e.strerror}") from None
            self._direct.append(_open_direct(self._temporary[-1]))
        return self

    def _create(self, path: Path) -> None:
        while True:
            descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
            self._descriptors.append(descriptor)
            self._temporary.append(Path(name))
            if sys.platform == "win32":
                return
            # "In use", to `_remove_leftovers`; which removes nothing where there are no locks.
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return
            # Another process took it for a leftover before it was locked.
            os.close(self._descriptors.pop())
            self._temporary.pop()

    def start(self, index: int) -> None:
        """Go on with the file `index`."""
        self._drain()
        self._current, self._position = index, 0

    def write(self, data: Any) -> None:
        """Append bytes to the current file, behind the caller's back: errors may come later."""
        view = memoryview(data).cast("B")
        while view:
            count = min(len(view), _BUFFER - self._used)
            self._buffers[0][self._used : self._used + count] = view[:count]
            self._used += count
            view = view[count:]
            if self._used == _BUFFER:
                self._hand_over()

    def _hand_over(self) -> None:
        """Let the writing thread have what has gathered; go on in the other buffer."""
        self._wait()
        if self._used:
            job = self._current, self._buffers[0], self._used, self._position
            self._writing = self._writer.submit(self._write_out, *job)
            self._position += self._used
            self._used = 0
            self._buffers.reverse()

    def _wait(self) -> None:
        if self._writing:
            try:
                self._writing.result()
            except OSError as e:
                raise self._failed(e) from None
            finally:
                self._writing = None

    def _drain(self) -> None:
        self._hand_over()
        self._wait()

    def _write_out(self, index: int, buffer: mmap.mmap, used: int, position: int) -> None:
        done = 0
        with memoryview(buffer)[:used] as gathered:
            while done < used:
                count = self._write_direct(index, gathered[done:], position + done)
                if not count:
                    count = os.pwrite(self._descriptors[index], gathered[done:], position + done)
                done += count

    def _write_direct(self, index: int, data: memoryview, position: int) -> int:
        """Write whole pages past the system's cache; returns how many bytes, 0 if it cannot."""
        whole = len(data) // mmap.PAGESIZE * mmap.PAGESIZE
        if self._direct[index] < 0 or not whole or position % mmap.PAGESIZE:
            return 0
        with suppress(OSError):  # an ordinary write tells what is wrong
            return os.pwrite(self._direct[index], data[:whole], position)
        return 0

    def rewrite(self, index: int, head: bytes) -> None:
        """Replace the first bytes of the file `index`, which have been written."""
        self._drain()
        try:
            done = 0
            while done < len(head):
                done += os.pwrite(self._descriptors[index], head[done:], done)
        except OSError as e:
            raise self._failed(e) from None

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._drain()
                self._commit()
        except OSError as e:
            raise self._failed(e) from None
        finally:
            self._remove()

    def _commit(self) -> None:
        # mkstemp makes files for the owner only; the output gets the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        for descriptor, temporary in zip(self._descriptors, self._temporary, strict=True):
            os.fsync(descriptor)
            temporary.chmod(0o666 & ~umask)
        placed: list[Path] = []
        replacing = self._force and len(self._paths) > 1
        if replacing:  # what loads the old parts, so that they are never loaded with new ones
            self._paths[0].unlink(missing_ok=True)
        try:
            for temporary, path in reversed([*zip(self._temporary, self._paths, strict=True)]):
                _place(temporary, path, self._force)
                placed.append(path)
        except BaseException:
            for path in placed if replacing or not self._force else ():
                path.unlink(missing_ok=True)
            raise
        if hasattr(os, "O_DIRECTORY"):
            with suppress(OSError):  # a folder may be writable and not readable
                folder = os.open(self._paths[0].parent, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def _remove(self) -> None:
        self._writer.shutdown()
        for descriptor in (*self._descriptors, *(d for d in self._direct if d >= 0)):
            # What is kept has been synced; a full network disk repeats its error here.
            with suppress(OSError):
                os.close(descriptor)
        for temporary in self._temporary:
            with suppress(OSError):
                temporary.unlink()
        self._descriptors, self._direct, self._temporary = [], [], []

    def _failed(self, error: OSError) -> OutputError:
        path = self._paths[max(self._current, 0)]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{path}: the disk is full; nothing was left behind")
        return OutputError(f"{path}: cannot be written: {error.strerror or error}")


def _open_direct(path: Path) -> int:
    """The file, to be written past the system's cache; -1 where that cannot be done."""
    with suppress(OSError, AttributeError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return -1


def _check(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    # os.path, because pathlib raises for names the system cannot have.
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not os.path.lexists(path):
        return
    if not force:
        raise OutputError(f"{path}: exists", option="force")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: is not a regular file")
    if path.exists() and any(path.samefile(source) for source in inputs):
        raise OutputError(f"{path}: is part of the input; choose another output")


def _place(temporary: Path, path: Path, force: bool) -> None:
    if force:
        temporary.replace(path)
        return
    try:
        # Unlike a rename, a link never replaces a file that appeared in the meantime.
        os.link(temporary, path)
    except FileExistsError:
        raise OutputError(f"{path}: exists", option="force") from None
    except OSError:
        if path.exists():
            raise OutputError(f"{path}: exists", option="force") from None
        temporary.replace(path)


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files that no living process holds."""
    if sys.platform == "win32":
        return
    for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)
