"""Files that appear whole or not at all, even when the process is killed.

What a file system must do is keep bytes, and give a file its name. All else is a nicety, which
networks, FUSE, FAT and overlays refuse in their own ways: locks, links, permissions, syncing,
telling how much room there is, going past the system's cache. Without one, the file is written all
the same; and an error that tells that bytes were lost is never taken for such a refusal.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
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
# How often a temporary file may vanish as soon as it was made.
_TRIES = 100
# How file systems say that they have no such function; every other error of it is one.
_UNSUPPORTED = {
    errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY, errno.EPERM,
    errno.EACCES,
}  # fmt: skip
# How a file is kept from being renamed because it is open.
_IN_USE = {errno.EBUSY, errno.EACCES, errno.EPERM, errno.ETXTBSY}


class OutputFiles:
    """One or several files, written one after the other under temporary names beside their own.

    A context manager: leaving it normally gives the files their names, the first one last, since a
    split model is loaded by it; leaving it by an exception removes them. What a killed process has
    left is removed by the next one that writes to the folder. `inputs` are files that must not be
    replaced. Where a path is a symbolic link, what it leads to is written, and the link stays.

    Raises OutputError: a file exists and `force` is not given, the folder is missing or cannot be
    written, the disk is full.
    """

    def __init__(
        self, paths: Sequence[Path], *, force: bool = False, inputs: Sequence[Path] = ()
    ) -> None:
        self._paths = [_checked(path, force, inputs) for path in paths]
        self._force = force
        self._temporary: list[Path] = []
        self._descriptors: list[int] = []
        self._direct = [-1] * len(paths)  # the same files, where that can be
        self._current = -1
        self._position = self._used = 0
        self._buffers = [mmap.mmap(-1, _BUFFER), mmap.mmap(-1, _BUFFER)]
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def reserve(self, nbytes: int) -> None:
        """Remove what killed processes left, and see that `nbytes` will fit.

        Raises OutputError.
        """
        for folder in {path.parent for path in self._paths}:
            _remove_leftovers(folder)
        free = 0
        with suppress(OSError):
            free = shutil.disk_usage(self._paths[0].parent).free
        # Who cannot tell says 0, and a disk that is full will refuse the first bytes.
        if 0 < free < nbytes:
            raise OutputError(
                f"{self._paths[0]}: needs {nbytes} bytes and the disk has {free} left"
            )

    def __enter__(self) -> OutputFiles:
        for index, path in enumerate(self._paths):
            try:
                self._create(path)
            except OSError as e:
                self._remove()
                raise OutputError(f"{path}: cannot be written: {e.strerror}") from None
            self._direct[index] = _open_direct(self._temporary[-1])
        return self

    def _create(self, path: Path) -> None:
        for _ in range(_TRIES):
            descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
            self._descriptors.append(descriptor)
            self._temporary.append(Path(name))
            if sys.platform == "win32":
                return
            # "In use", to `_remove_leftovers`; which removes nothing where there are no locks.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                return
            # Asked by name: not every file system counts the names of a file.
            if os.path.lexists(name):
                return
            # Another process took it for a leftover before it was locked.
            os.close(self._descriptors.pop())
            self._temporary.pop()
        raise OSError(errno.EBUSY, "its temporary file is removed again and again")

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
                done += count or self._pwrite(index, gathered[done:], position + done)

    def _pwrite(self, index: int, data: memoryview | bytes, position: int) -> int:
        """Write some of `data`; returns how many bytes, 1 at least."""
        count = os.pwrite(self._descriptors[index], data, position)
        if not count:
            raise OSError(errno.EIO, "nothing more is taken")
        return count

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
                done += self._pwrite(index, head[done:], done)
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
            _sync(descriptor)
            with suppress(OSError):
                temporary.chmod(0o666 & ~umask)
        placed: list[Path] = []
        replacing = self._force and len(self._paths) > 1
        if replacing:  # what loads the old parts, so that they are never loaded with new ones
            self._paths[0].unlink(missing_ok=True)
        try:
            for index, path in reversed([*enumerate(self._paths)]):
                self._give_name(index, path)
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

    def _give_name(self, index: int, path: Path) -> None:
        try:
            _place(self._temporary[index], path, self._force)
        except OSError as e:
            if e.errno not in _IN_USE:
                raise
            # Only now: while it is open, it is locked.
            self._close(index)
            _place(self._temporary[index], path, self._force)

    def _close(self, index: int) -> None:
        for descriptors in (self._descriptors, self._direct):
            descriptor, descriptors[index] = descriptors[index], -1
            # What is kept has been synced; a full network disk repeats its error here.
            with suppress(OSError):
                if descriptor >= 0:
                    os.close(descriptor)

    def _remove(self) -> None:
        self._writer.shutdown()
        for index in range(len(self._descriptors)):
            self._close(index)
        for temporary in self._temporary:
            with suppress(OSError):
                temporary.unlink()
        self._descriptors, self._temporary = [], []

    def _failed(self, error: OSError) -> OutputError:
        path = self._paths[max(self._current, 0)]
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(f"{path}: the disk is full; nothing was left behind")
        if error.errno == errno.EFBIG:
            return OutputError(
                f"{path}: larger than a file may be on this file system or for this user; "
                "split it, or write to another disk; nothing was left behind"
            )
        return OutputError(f"{path}: cannot be written: {error.strerror or error}")


def _sync(descriptor: int) -> None:
    """See that all is on disk, as far as the file system lets itself be asked. Raises OSError."""
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in _UNSUPPORTED:
            raise
        # Closing is when such a file system tells what it could not write.
        os.close(os.dup(descriptor))


def _open_direct(path: Path) -> int:
    """The file, to be written past the system's cache; -1 where that cannot be done."""
    with suppress(OSError, AttributeError):
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
    return -1


def _checked(path: Path, force: bool, inputs: Sequence[Path]) -> Path:
    """The file to write for `path`, which is another one where `path` is a symbolic link."""
    try:
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        _check(path, target, force, inputs)
    except OSError as e:
        raise OutputError(f"{path}: cannot be written: {e.strerror or e}") from None
    return target


def _check(path: Path, target: Path, force: bool, inputs: Sequence[Path]) -> None:
    link = f"{path}: is a symbolic link, " if path.is_symlink() else ""
    # os.path, because pathlib raises for names the system cannot have.
    if not os.path.isdir(target.parent):  # noqa: PTH112
        raise OutputError(f"{link or f'{path}: '}the folder {target.parent} does not exist")
    if os.path.isdir(target):  # noqa: PTH112
        raise OutputError(f"{path}: is a folder; give the name of a file")
    if not os.path.lexists(path):
        return
    if target.is_symlink():
        raise OutputError(f"{link}and leads back to itself; remove it")
    if not force:
        raise OutputError(f"{path}: exists", option="force")
    if not target.exists():
        return
    if not target.is_file():
        raise OutputError(f"{path}: is not a regular file")
    if _is_mount(target):
        raise OutputError(
            f"{path}: is a mount of its own, and no other file can take its place; "
            "mount its folder, or choose another output"
        )
    if any(_is_same(target, source) for source in inputs):
        raise OutputError(f"{path}: is part of the input; choose another output")


def _is_mount(file: Path) -> bool:
    """Whether `file` is mounted over another, as containers do with a single file.

    `os.path.ismount` takes every file of some overlays for one.
    """
    try:
        mounts = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return False
    points = (
        re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), m.split()[4]) for m in mounts
    )
    return os.fsencode(os.path.realpath(file)) in points


def _is_same(one: Path, other: Path) -> bool:
    """Whether both are one file, also where the file system does not number its files."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    a, b = one.stat(), other.stat()
    return bool(a.st_ino) and os.path.samestat(a, b)


def _place(temporary: Path, path: Path, force: bool) -> None:
    if force:
        temporary.replace(path)
        return
    try:
        # Unlike a rename, a link never replaces a file that appeared in the meantime.
        os.link(temporary, path)
    except OSError:
        # Over a network, a link may be made and its answer lost: then it is there, and ours.
        if os.path.lexists(path) and not _is_same(temporary, path):
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
