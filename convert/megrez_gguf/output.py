"""Files that appear whole or not at all, even when the process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megrez_gguf.errors import OutputError

if sys.platform != "win32":  # which has no such locks: leftovers stay where they are
    import fcntl

_PREFIX, _SUFFIX = ".megrez-gguf-", ".part"
# Writing to the disk is asked for in pieces of this size, long before the system would begin.
_FLUSH = 64 << 20


class OutputFiles:
    """One or several files, written one after the other under temporary names beside their own.

    A context manager: leaving it normally gives the files their names, the first one last, since a
    split model is loaded by it; leaving it by an exception removes them. What a killed process has
    left is removed by the next one that writes to the folder. `inputs` are files that must not be
    replaced.

    Raises OutputError: a file exists and `force` is not given, the folder is missing or cannot be
    written, the disk is full.
    """

    def __init__(self, paths: Sequence[Path], force: bool, inputs: Sequence[Path] = ()) -> None:
        self._paths, self._force = paths, force
        for path in paths:
            _check(path, force, inputs)
        self._temporary: list[Path] = []
        self._descriptors: list[int] = []
        self._current = -1
        self._position = self._flushed = 0

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
        if self._current >= 0:
            self._flush(self._position)
        self._current, self._position, self._flushed = index, 0, 0

    def write(self, data: Any) -> None:
        """Append bytes to the current file."""
        view = memoryview(data).cast("B")
        try:
            while view:
                count = os.write(self._descriptors[self._current], view)
                view = view[count:]
                self._advance(count)
        except OSError as e:
            raise self._failed(e) from None

    def copy(self, source: int, offset: int, count: int) -> int:
        """Append up to `count` bytes of another open file, inside the kernel where it can.

        Returns how many were copied, 0 at the end of `source`. OSError where `source` fails.
        """
        target = self._descriptors[self._current]
        if hasattr(os, "copy_file_range"):
            # Its errors do not tell which of the files is at fault, and some file systems answer 0
            # for what they cannot do: reading and writing tell.
            with suppress(OSError):
                if copied := os.copy_file_range(source, target, count, offset):
                    self._advance(copied)
                    return copied
        data = os.pread(source, min(count, 4 << 20), offset)
        self.write(data)
        return len(data)

    def rewrite(self, index: int, head: bytes) -> None:
        """Replace the first bytes of the file `index`."""
        try:
            os.pwrite(self._descriptors[index], head, 0)
        except OSError as e:
            raise self._failed(e) from None

    def _advance(self, count: int) -> None:
        self._position += count
        if self._position - self._flushed >= _FLUSH:
            self._flush(self._position)

    def _flush(self, end: int) -> None:
        """Let the disk begin with what has been written, so that little is left for the end."""
        if hasattr(os, "posix_fadvise"):
            # Starts writing dirty pages and does not wait for them.
            descriptor, begin = self._descriptors[self._current], self._flushed
            with suppress(OSError):
                os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self._flushed = end

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
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
        try:
            for temporary, path in reversed([*zip(self._temporary, self._paths, strict=True)]):
                _place(temporary, path, self._force)
                placed.append(path)
        except BaseException:
            for path in placed if not self._force else ():
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
        for descriptor in self._descriptors:
            # What is kept has been synced; a full network disk repeats its error here.
            with suppress(OSError):
                os.close(descriptor)
        for temporary in self._temporary:
            with suppress(OSError):
                temporary.unlink()
        self._descriptors, self._temporary = [], []

    def _failed(self, error: OSError) -> OutputError:
        path = self._paths[max(self._current, 0)]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{path}: the disk is full; nothing was left behind")
        return OutputError(f"{path}: cannot be written: {error.strerror or error}")


def _check(path: Path, force: bool, inputs: Sequence[Path]) -> None:
    # os.path, because pathlib raises for names the system cannot have.
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise OutputError(f"{path}: the folder {path.parent} does not exist")
    if os.path.isdir(path):  # noqa: PTH112
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not os.path.lexists(path):
        return
    if not force:
        raise OutputError(f"{path}: exists; use --force to replace it")
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
        raise OutputError(f"{path}: exists; use --force to replace it") from None
    except OSError:
        if path.exists():
            raise OutputError(f"{path}: exists; use --force to replace it") from None
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
