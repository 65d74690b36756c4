"""File systems that lack what is nice to have, and those that fail at what is not.

Each test draws which functions are refused, and how.
"""

from __future__ import annotations

import errno
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megrez_gguf.errors import OutputError
from megrez_gguf.storage import output
from megrez_gguf.storage.output import OutputFiles
from support.disturbed import Calls, Replace, fail_from, short

fcntl = pytest.importorskip("fcntl", reason="Windows has none of this")

UNSUPPORTED = [
    errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOTTY
]  # fmt: skip
# What nobody may take for "unsupported": bytes are lost.
LOST = [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EROFS, errno.ENOTCONN]

CONTENT = [bytes([n + 1]) * size for n, size in enumerate((10_000, 4096, 4))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def paths(folder: Path, count: int = 3) -> list[Path]:
    return [folder / f"{n}.gguf" for n in range(count)]


def write(folder: Path, count: int = 3, **options: Any) -> dict[str, bytes]:
    """Write some files, as a conversion does; returns what is there then."""
    with OutputFiles(paths(folder, count), **options) as files:
        files.reserve(sum(map(len, CONTENT)))
        for number, content in enumerate(CONTENT[:count]):
            files.start(number)
            files.write(bytes(4) + content[4:])
        for number, content in enumerate(CONTENT[:count]):
            files.rewrite(number, content[:4])
    return there(folder)


def there(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected(count: int = 3) -> dict[str, bytes]:
    return {f"{n}.gguf": CONTENT[n] for n in range(count)}


def refuse(code: int) -> Replace:
    return fail_from(1, code)


def no_direct(code: int) -> Replace:
    def open_plainly(number: int, real: Replace, path: Any, flags: int, *mode: int) -> Any:
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *mode)

    return open_plainly


def no_folders(code: int) -> Replace:
    def open_files(number: int, real: Replace, path: Any, flags: int, *mode: int) -> Any:
        if flags & os.O_DIRECTORY:
            raise OSError(code, os.strerror(code))
        return real(path, flags, *mode)

    return open_files


def failing(code: int) -> Callable[..., Any]:
    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# What is nice to have: how each is refused with a code.
NICETIES: dict[str, Callable[[Calls, dict[str, Replace], int], object]] = {
    "fsync": lambda calls, fakes, code: fakes.update(fsync=refuse(code)),
    "link": lambda calls, fakes, code: fakes.update(link=refuse(code)),
    "direct": lambda calls, fakes, code: fakes.update(open=no_direct(code)),
    "folders": lambda calls, fakes, code: fakes.update(open=no_folders(code)),
    "chmod": lambda calls, fakes, code: calls.also(Path, "chmod", failing(code)),
    "room": lambda calls, fakes, code: calls.also(
        output, "shutil", SimpleNamespace(disk_usage=failing(code))
    ),
    "no room": lambda calls, fakes, code: calls.also(
        output, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=0))
    ),
    "locks": lambda calls, fakes, code: calls.also(
        output, "fcntl", SimpleNamespace(**{**vars(fcntl), "flock": failing(code)})
    ),
    # Names of a file are not counted, or files not numbered.
    "counts": lambda calls, fakes, code: fakes.update(
        fstat=lambda number, real, file: _without_numbers(real(file))
    ),
    "short writes": lambda calls, fakes, code: fakes.update(pwrite=short(1000)),
}  # fmt: skip


def _without_numbers(status: os.stat_result) -> os.stat_result:
    values = list(status)
    values[1] = values[3] = 0  # st_ino, st_nlink
    return os.stat_result(values)


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> Iterator[None]:
    yield
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("nicety", NICETIES)
def test_what_is_nice_to_have_may_be_refused(
    folder: Path, calls: Calls, nicety: str, force: bool
) -> None:
    for code in [*UNSUPPORTED, errno.ENOLCK, errno.EBUSY] if nicety == "locks" else UNSUPPORTED:
        fakes: dict[str, Replace] = {}
        NICETIES[nicety](calls, fakes, code)
        calls.replace(output, fakes)
        if force:
            (folder / "1.gguf").write_bytes(b"old")
        assert write(folder, force=force) == expected(), errno.errorcode[code]
        calls.restore()
        for path in folder.iterdir():
            path.unlink()


@pytest.mark.parametrize("seed", range(30))
def test_any_of_it_may_be_refused_at_once(folder: Path, calls: Calls, seed: int) -> None:
    draw = random.Random(seed)
    fakes: dict[str, Replace] = {}
    for nicety in draw.sample([*NICETIES], draw.randint(2, len(NICETIES))):
        NICETIES[nicety](calls, fakes, draw.choice(UNSUPPORTED))
    calls.replace(output, fakes)
    count = draw.choice([1, 3])
    assert write(folder, count) == expected(count)


@pytest.mark.parametrize("code", LOST, ids=errno.errorcode.get)
@pytest.mark.parametrize("what", ["pwrite", "fsync", "close", "replace", "mkstemp"])
def test_what_loses_bytes_or_names_is_an_error(
    folder: Path, calls: Calls, what: str, code: int
) -> None:
    """Also where only closing tells, since syncing is unsupported."""
    for number in (1, 2, 3):
        fakes: dict[str, Replace] = {"link": refuse(errno.EPERM)}
        if what == "close":
            fakes |= {"fsync": refuse(errno.EINVAL), "dup": fail_from(number, code)}
        elif what == "replace":
            calls.also(Path, "replace", failing(code))
        elif what == "mkstemp":
            calls.also(tempfile, "mkstemp", failing(code))
        else:
            fakes[what] = _fail_on(what, number, code)
        calls.replace(output, fakes)
        with pytest.raises(OutputError, match=r"\d\.gguf: (cannot be written: |the disk is full)"):
            write(folder)
        assert there(folder) == {}
        calls.restore()
    assert write(folder) == expected()


def _fail_on(what: str, at: int, code: int) -> Replace:
    """Fail from the `at`-th call of this function on, whatever others are called."""
    done = 0

    def replacement(number: int, real: Replace, *args: Any) -> Any:
        nonlocal done
        done += 1
        if done >= at:
            raise OSError(code, os.strerror(code))
        return real(*args)

    return replacement


def test_a_write_that_takes_nothing_ends(folder: Path, calls: Calls) -> None:
    calls.replace(output, {"pwrite": lambda number, real, *args: 0})
    with pytest.raises(OutputError, match="nothing more is taken"):
        write(folder)
    assert there(folder) == {}


@pytest.mark.parametrize("code", [errno.EBUSY, errno.EACCES, errno.EPERM, errno.ETXTBSY])
@pytest.mark.parametrize("force", [False, True])
def test_an_open_file_that_cannot_be_renamed_is_closed_first(
    folder: Path, calls: Calls, code: int, force: bool
) -> None:
    real = Path.replace
    opened: dict[str, int] = {}

    def mkstemp(**options: Any) -> tuple[int, str]:
        descriptor, name = tempfile.mkstemp(**options)
        opened[name] = descriptor
        return descriptor, name

    def close(number: int, real: Replace, descriptor: int) -> None:
        for name in [name for name, kept in opened.items() if kept == descriptor]:
            del opened[name]
        real(descriptor)

    def replace(path: Path, to: Path) -> Path:
        if os.fspath(path) in opened:
            raise OSError(code, os.strerror(code))
        return real(path, to)

    calls.replace(output, {"link": refuse(errno.EPERM), "close": close})
    calls.also(output, "tempfile", SimpleNamespace(mkstemp=mkstemp))
    calls.also(Path, "replace", replace)
    assert write(folder, force=force) == expected()


def test_a_link_whose_answer_was_lost(folder: Path, calls: Calls) -> None:
    """Over a network it may be made, asked for again, and then be said to exist."""

    def link(number: int, real: Replace, *args: Any) -> Any:
        real(*args)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    calls.replace(output, {"link": link})
    assert write(folder) == expected()


def test_a_temporary_file_that_always_vanishes_is_no_endless_loop(
    folder: Path, calls: Calls
) -> None:
    real = tempfile.mkstemp

    def mkstemp(**options: Any) -> tuple[int, str]:
        descriptor, name = real(**options)
        Path(name).unlink()
        return descriptor, name

    calls.also(tempfile, "mkstemp", mkstemp)
    with pytest.raises(OutputError, match="removed again and again"):
        write(folder)


def test_a_disk_that_is_nearly_full_is_foreseen(folder: Path, calls: Calls) -> None:
    usage = SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=1))
    calls.also(output, "shutil", usage)
    with pytest.raises(OutputError, match="needs 14100 bytes and the disk has 1 left"):
        write(folder)
    assert there(folder) == {}


# --- what is there already -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "link", "chain", "dangling", "read-only", "hard link"])
def test_what_force_replaces(folder: Path, tmp_path: Path, kind: str) -> None:
    """Of a link, what it leads to: a link is somebody's choice of where the bytes lie."""
    path, elsewhere = folder / "0.gguf", tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "target.gguf"
    if kind not in ("file", "read-only", "dangling"):
        target.write_bytes(b"old")
    if kind in ("link", "dangling"):
        path.symlink_to(target)
    elif kind == "chain":
        (folder / "between").symlink_to("../elsewhere/target.gguf")
        path.symlink_to("between")
    elif kind == "hard link":
        path.hardlink_to(target)
    else:
        path.write_bytes(b"old")
        path.chmod(0o444 if kind == "read-only" else 0o644)
    with pytest.raises(OutputError, match="exists") as raised:
        write(folder, 1)
    assert raised.value.option == "force"
    write(folder, 1, force=True)
    assert path.read_bytes() == CONTENT[0]
    is_link = kind in ("link", "chain", "dangling")
    assert path.is_symlink() == is_link
    if is_link:
        assert target.read_bytes() == CONTENT[0]
    elif kind == "hard link":
        assert target.read_bytes() == b"old"
    assert {item.name for item in elsewhere.iterdir()} <= {"target.gguf"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("loop", "is a symbolic link, and leads back to itself"),
        ("to itself", "is a symbolic link, and leads back to itself"),
        ("to a folder", "is a folder"),
        ("to nowhere", "is a symbolic link, the folder .* does not exist"),
        ("to a pipe", "is not a regular file"),
        ("to the input", "is part of the input"),
    ],
)
def test_links_that_force_does_not_follow(folder: Path, kind: str, message: str) -> None:
    path, other = folder / "0.gguf", folder / "other"
    inputs = []
    if kind == "loop":
        other.symlink_to(path)
    elif kind == "to a folder":
        other.mkdir()
    elif kind == "to a pipe":
        os.mkfifo(other)
    elif kind == "to the input":
        other.write_bytes(b"precious")
        inputs = [other]
    elif kind == "to nowhere":
        other = folder / "none" / "other"
    path.symlink_to("0.gguf" if kind == "to itself" else other)
    with pytest.raises(OutputError, match=message):
        OutputFiles([path], force=True, inputs=inputs)
    assert path.is_symlink()


def test_files_without_numbers_are_not_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **how: _without_numbers(real(self, **how)))
    path, source = folder / "0.gguf", folder / "source"
    path.write_bytes(b"old")
    source.write_bytes(b"precious")
    OutputFiles([path], force=True, inputs=[source])
    with pytest.raises(OutputError, match="is part of the input"):
        OutputFiles([path], force=True, inputs=[path])


def test_a_mounted_file_cannot_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers are given single files so; renaming would fail, once all is written."""
    path = folder / "a b.gguf"
    path.write_bytes(b"old")
    point = os.fspath(path.resolve()).replace(" ", "\\040")
    mounts = f"36 35 98:0 / / rw\n37 36 98:0 /f {point} rw shared:1 - ext4 /dev/x rw\n".encode()
    monkeypatch.setattr(Path, "read_bytes", lambda self: mounts)
    with pytest.raises(OutputError, match="is a mount of its own"):
        OutputFiles([path], force=True)
    OutputFiles([folder / "b.gguf"], force=True)
