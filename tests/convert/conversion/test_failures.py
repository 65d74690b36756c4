"""Disks that fill up, files that change, reads that fail, threads that raise: at every single call.

Whatever happens, the message names what is at fault, nothing is left behind, and the next run is as
if there had been none before it.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import megrez_gguf
from megrez_cli import console
from megrez_gguf.conversion import stream
from megrez_gguf.errors import CheckpointError, OutputError
from megrez_gguf.quantization import encode
from megrez_gguf.storage import open_shards, output
from megrez_gguf.storage.shard import Shard
from support.checkpoints import Entry, Make, merge, read_all, read_shard, shards
from support.disturbed import Calls, Replace, do_at, fail_at, fail_from, plain, short

# The weights are copied as they are; or encoded here; or by ggml.
LEVELS = ["bf16", "f32", "q4_0"]
# One dense layer and one that is not: everything a conversion does, in few calls.
FIELDS = {"num_hidden_layers": 2, "first_k_dense_replace": 1}
SPLIT = 20_000


class Place:
    """A checkpoint, the folder its conversions go to, and what they should hold."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder
        folder.mkdir()

    def convert(self, level: str, split: bool = False, **options: Any) -> dict[str, bytes]:
        done = megrez_gguf.convert(
            self.source, self.folder / "x.gguf", outtype=level, n_threads=2,
            split_max_size=SPLIT if split else None, **options,
        )  # fmt: skip
        assert (len(done.parts) > 2) == split
        return self.content()

    def content(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.folder.iterdir())}

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def expect(self, level: str, split: bool = False) -> dict[str, bytes]:
        """What a run that nothing disturbs gives."""
        made = self.convert(level, split)
        self.clear()
        return made


@pytest.fixture
def place(make: Make, tmp_path: Path) -> Iterator[Place]:
    before = threading.active_count()
    place = Place(make(**FIELDS), tmp_path / "out")
    time.sleep(0.05)  # what was written just now would be read twice
    yield place
    assert threading.active_count() == before


def some(count: int, most: int = 8) -> list[int]:
    """The first of `count` calls, the last one, and some between them."""
    return sorted({int(n) for n in np.linspace(1, count, most)})


# --- the disk is full --------------------------------------------------------------------------

WRITES = ("pwrite",)


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("level", LEVELS)
def test_the_disk_is_full_at_any_write(place: Place, calls: Calls, level: str, split: bool) -> None:
    expected = place.expect(level, split)
    calls.replace(output, dict.fromkeys(WRITES, plain))
    place.convert(level, split)
    place.clear()
    for number in some(calls.count):
        for code in (errno.ENOSPC, errno.EDQUOT):
            calls.replace(output, dict.fromkeys(WRITES, fail_from(number, code)))
            with pytest.raises(OutputError, match=r"x.*\.gguf: the disk is full; nothing was left"):
                place.convert(level, split)
            assert place.content() == {}, number
    calls.restore()
    assert place.convert(level, split) == expected


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_the_disk_is_full_at_any_sync(place: Place, calls: Calls, split: bool) -> None:
    """Disks that take data before they have the room, as those of a network do."""
    expected = place.expect("bf16", split)
    for number in range(1, len(expected) + 1):
        calls.replace(output, {"fsync": fail_from(number, errno.ENOSPC)})
        with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
            place.convert("bf16", split)
        assert place.content() == {}, number
    calls.restore()
    assert place.convert("bf16", split) == expected


def test_the_disk_is_full_and_says_so_again_at_close(place: Place, calls: Calls) -> None:
    def close(number: int, real: Replace, descriptor: int) -> None:
        real(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls.replace(output, {"pwrite": fail_from(3, errno.ENOSPC), "close": close})
    with pytest.raises(OutputError, match="the disk is full; nothing was left behind"):
        place.convert("f32", split=True)
    assert place.content() == {}


@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
def test_a_disk_too_small_is_foreseen(
    place: Place, calls: Calls, monkeypatch: pytest.MonkeyPatch, split: bool
) -> None:
    need = sum(map(len, place.expect("bf16", split).values()))
    free = need - 1
    usage = lambda folder: SimpleNamespace(free=free)  # noqa: E731
    monkeypatch.setattr(output, "shutil", SimpleNamespace(disk_usage=usage))
    calls.replace(output, dict.fromkeys(WRITES, plain))
    with pytest.raises(OutputError, match=rf"needs {need} bytes and the disk has {free} left"):
        place.convert("bf16", split)
    assert calls.count == 0
    assert place.content() == {}
    free = need
    assert place.convert("bf16", split)


# --- giving the files their names --------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O")], ids=["interrupt", "error"]
)
def test_a_failure_while_parts_get_their_names(
    place: Place, calls: Calls, error: BaseException
) -> None:
    expected = place.expect("bf16", split=True)
    for number in range(1, len(expected) + 1):
        calls.replace(output, {"link": fail_at(number, error)})
        if isinstance(error, OSError):  # renamed instead
            assert place.convert("bf16", split=True) == expected
            place.clear()
            continue
        with pytest.raises(KeyboardInterrupt):
            place.convert("bf16", split=True)
        assert place.content() == {}, number


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "I/O")])
def test_a_failure_while_parts_replace_others(
    place: Place, calls: Calls, error: BaseException
) -> None:
    """Old parts and new ones are never loaded together."""
    expected = place.expect("bf16", split=True)
    first = next(iter(expected))
    real = Path.replace
    for number in range(1, len(expected) + 1):
        for name in expected:
            (place.folder / name).write_bytes(b"old")
        done: list[Path] = []

        def replace(path: Path, to: Path, number: int = number, done: list[Path] = done) -> Path:
            done.append(path)
            if len(done) == number:
                raise error
            return real(path, to)

        calls.also(Path, "replace", replace)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            place.convert("bf16", split=True, force=True)
        left = place.content()
        assert first not in left
        assert set(left.values()) <= {b"old"}
        assert len(left) == len(expected) - max(number, 1)
    calls.restore()
    assert place.convert("bf16", split=True, force=True) == expected


def test_a_part_that_appears_meanwhile_is_kept(place: Place, calls: Calls) -> None:
    names = [*place.expect("bf16", split=True)]
    foreign = place.folder / names[1]
    calls.replace(output, {"link": do_at(2, lambda: foreign.write_bytes(b"precious"))})
    with pytest.raises(OutputError, match="exists") as raised:
        place.convert("bf16", split=True)
    assert console.hint(raised.value) == "; use --force to replace it"
    assert place.content() == {foreign.name: b"precious"}


def test_file_systems_without_locks_links_or_readable_folders(place: Place, calls: Calls) -> None:
    expected = place.expect("bf16")

    def folder_is_unreadable(number: int, real: Replace, path: Any, flags: int) -> Any:
        if flags & os.O_DIRECTORY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags)

    fcntl = pytest.importorskip("fcntl")
    lock = fail_from(1, errno.ENOLCK)
    fake = SimpleNamespace(**{**vars(fcntl), "flock": lambda *args: lock(1, fcntl.flock, *args)})
    calls.replace(output, {"open": folder_is_unreadable, "link": fail_from(1, errno.EPERM)})
    calls.also(output, "fcntl", fake)
    assert place.convert("bf16") == expected


# --- the checkpoint changes, or cannot be read -------------------------------------------------


@pytest.fixture(params=[True, False], ids=["cached", "cold"])
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the shards, which have just been written, are in the system's cache."""
    if not request.param:
        nothing = lambda begin, count, pages: 0  # noqa: E731
        monkeypatch.setattr(open_shards, "_mincore", nothing)
    return bool(request.param)


READS = ("preadv",)
NAMES = r"model-\d+-of-\d+\.safetensors: tensor (model\.|lm_head)\S+: "


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux only")
def test_only_what_is_not_cached_is_read_past_the_cache(
    place: Place, calls: Calls, cached: bool
) -> None:
    direct = []

    def watch(number: int, real: Replace, path: Any, flags: int) -> Any:
        direct.append(flags & os.O_DIRECT)
        return real(path, flags)

    calls.replace(open_shards, {"open": watch})
    place.convert("bf16")
    assert any(direct) != cached


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("level", LEVELS)
def test_a_read_error_names_shard_and_tensor(place: Place, calls: Calls, level: str) -> None:
    calls.replace(open_shards, dict.fromkeys(READS, plain))
    expected = place.expect(level)
    for number in some(calls.count):
        calls.replace(open_shards, dict.fromkeys(READS, fail_from(number, errno.EIO)))
        with pytest.raises(CheckpointError, match=NAMES + "cannot be read: Input/output error"):
            place.convert(level)
        assert place.content() == {}, number
    calls.restore()
    assert place.convert(level) == expected


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("level", LEVELS)
def test_a_shard_that_shrinks(place: Place, calls: Calls, level: str) -> None:
    """At any read: in the middle the tensor is named, at the end the shard."""
    calls.replace(open_shards, dict.fromkeys(READS, plain))
    place.expect(level)
    shard = shards(place.source)[-1]
    whole, status = shard.read_bytes(), shard.stat()
    ends = []
    for number in some(calls.count):
        action = do_at(number, lambda: os.truncate(shard, len(whole) // 2))
        calls.replace(open_shards, dict.fromkeys(READS, action))
        with pytest.raises(CheckpointError, match=re.escape(str(shard))) as caught:
            place.convert(level)
        ends.append(re.sub(r".*: ", "", str(caught.value)).partition(";")[0])
        assert place.content() == {}, number
        shard.write_bytes(whole)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert ends[0] == "the file ended early"
    assert ends[-1] in ("the file ended early", "changed while it was read")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("change", ["content", "set back", "header", "removed", "longer"])
def test_a_shard_that_changes(place: Place, calls: Calls, level: str, change: str) -> None:
    tensor = "model.embed_tokens.weight"
    shard = next(path for path in shards(place.source) if tensor in read_shard(path))
    begin = shard.read_bytes().index(read_shard(shard)[tensor][2])
    inode = shard.stat().st_ino

    def content() -> None:
        with shard.open("r+b") as file:
            file.seek(begin)
            file.write(b"\x80\x3f")  # 1: large, so that no rounding hides it

    def set_back() -> None:
        status = shard.stat()
        content()
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    def header() -> None:
        whole = shard.read_bytes()
        shard.write_bytes(
            whole.replace(b"k_proj", b"x_proj")
            .replace(b"v_proj", b"k_proj")
            .replace(b"x_proj", b"v_proj")
        )

    action: dict[str, Callable[[], object]] = {
        "content": content,
        "set back": set_back,
        "header": header,
        "removed": shard.unlink,
        "longer": lambda: os.truncate(shard, shard.stat().st_size + 1),
    }
    todo = [action[change]]

    def once_read(number: int, real: Replace, file: int, into: Any, position: int) -> Any:
        """What nobody reads any more is what changes."""
        count = real(file, into, position)
        if todo and position <= begin < position + count and os.fstat(file).st_ino == inode:
            todo.pop()()
        return count

    calls.replace(open_shards, dict.fromkeys(READS, once_read))
    message = rf"{re.escape(str(shard))}: (changed|vanished) while it was read"
    with pytest.raises(CheckpointError, match=message):
        place.convert(level)
    assert not todo
    assert place.content() == {}


@pytest.mark.parametrize(
    ("age", "unsure"), [(-5, True), (0, True), (9_000_000, True), (10**9, False)]
)
def test_times_of_a_moment_ago_tell_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: int, unsure: bool
) -> None:
    """A second change in the same tick of the file system's clock leaves them as they are."""
    path = tmp_path / "shard"
    path.write_bytes(bytes(8))
    status = path.stat()
    clock = SimpleNamespace(time_ns=lambda: status.st_ctime_ns + age)
    monkeypatch.setattr("megrez_gguf.storage.shard.time", clock)
    assert Shard.of(path, status).may_have_changed() == unsure


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("change", ["time", "rounded", "replaced", "linked", "written anew"])
def test_a_shard_whose_content_stays(place: Place, calls: Calls, level: str, change: str) -> None:
    """Dates and numbers are what networks and overlays change as they please."""
    shard = shards(place.source)[0]

    def replaced() -> None:
        whole, status = shard.read_bytes(), shard.stat()
        shard.unlink()
        (shard.parent / "other").write_bytes(b"")  # takes the number of the file removed
        shard.write_bytes(whole)
        os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))

    action: dict[str, Callable[[], object]] = {
        "time": lambda: os.utime(shard, (1, 1)),
        "rounded": lambda: os.utime(shard, (int(shard.stat().st_mtime) // 2 * 2,) * 2),
        "replaced": replaced,
        "linked": lambda: os.link(shard, place.source / "another name"),
        "written anew": lambda: shard.write_bytes(shard.read_bytes()),
    }
    calls.replace(open_shards, dict.fromkeys(READS, plain))
    expected = place.expect(level)
    undisturbed = calls.count
    calls.replace(open_shards, dict.fromkeys(READS, do_at(20, action[change])))
    assert place.convert(level) == expected
    assert calls.count > undisturbed  # it was read once more


@pytest.mark.parametrize("level", LEVELS)
def test_what_is_not_finite_is_found_in_any_piece(
    place: Place, monkeypatch: pytest.MonkeyPatch, level: str
) -> None:
    """In pieces far smaller than a tensor: the same file, and the same place of a NaN."""
    expected = place.expect(level)
    monkeypatch.setattr(stream, "PIECE", 256)
    monkeypatch.setattr(stream, "_COPY", 1000)
    monkeypatch.setattr(stream, "_BLOCK", 96)
    assert place.convert(level) == expected
    place.clear()
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    dtype, shape, data = read_all(place.source)[name]
    for position in (0, 479, 480, 512, 32 * 64 - 1):
        values = np.frombuffer(data, "<u2").copy()
        values[position] = 0x7FC0
        bad = (dtype, shape, values.tobytes())

        def spoil(tensors: dict[str, Entry], bad: Entry = bad) -> None:
            tensors[name] = bad

        merge(place.source, spoil)
        where = re.escape(f"tensor {name}: nan at {[*divmod(position, 64)]}; weights must be")
        with pytest.raises(CheckpointError, match=where):
            place.convert(level)
        assert place.content() == {}


# --- interrupted, or broken --------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_interrupted_anywhere(place: Place, level: str) -> None:
    steps: list[int] = []
    expected = place.convert(level, progress=lambda done, total: steps.append(done))
    place.clear()
    for step in some(len(steps)):
        count = iter(range(1, len(steps) + 1))

        def interrupt(done: int, total: int, step: int = step, count: Any = count) -> None:
            if next(count) == step:
                raise KeyboardInterrupt

        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            place.convert(level, progress=interrupt)
        assert threading.active_count() == before
        assert place.content() == {}, step
    assert place.convert(level) == expected


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("number", [1, 9, 30])
def test_a_thread_that_raises(
    place: Place, monkeypatch: pytest.MonkeyPatch, level: str, number: int
) -> None:
    real, lock, count = encode.first_non_finite, threading.Lock(), iter(range(1, 10_000))

    def broken(values: Any) -> int | None:
        with lock:
            now = next(count)
        if now == number:
            raise MemoryError("no memory for that")
        return real(values)

    monkeypatch.setattr(encode, "first_non_finite", broken)
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no memory for that"):
        place.convert(level)
    assert threading.active_count() == before
    assert place.content() == {}


def test_a_thread_that_raises_while_hashing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, *arguments: Any) -> None:
        raise MemoryError("no memory for that")

    monkeypatch.setattr(stream._Stream, "hash", broken)
    with pytest.raises(MemoryError, match="no memory for that"):
        place.convert("bf16")
    assert place.content() == {}


# --- past the system's cache, or not -----------------------------------------------------------


@pytest.fixture
def small_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "_BUFFER", 8192)


@pytest.mark.usefixtures("small_writes")
@pytest.mark.parametrize("split", [False, True], ids=["plain", "split"])
@pytest.mark.parametrize("limit", [500, 4096])
def test_writes_that_do_less_than_asked(
    place: Place, calls: Calls, split: bool, limit: int
) -> None:
    expected = place.expect("bf16", split)
    calls.replace(output, {"pwrite": short(limit)})
    assert place.convert("bf16", split) == expected
    assert calls.count > sum(map(len, expected.values())) / limit


@pytest.mark.usefixtures("small_writes")
@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="Linux only")
@pytest.mark.parametrize("first", [1, 3])
def test_file_systems_that_cannot_go_past_the_cache(
    place: Place, calls: Calls, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Refused when opened, or when first used."""
    monkeypatch.setattr(open_shards, "_mincore", lambda begin, count, pages: 0)
    expected = place.expect("bf16")
    refused: list[object] = []

    def refuse(number: int, real: Replace, *args: Any) -> Any:
        flags = args[1] if isinstance(args[0], str | os.PathLike) else fcntl.fcntl(args[0], F_GETFL)
        if flags & os.O_DIRECT and number >= first:
            refused.append(number)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(*args)

    fcntl = pytest.importorskip("fcntl")
    F_GETFL = fcntl.F_GETFL
    for names in (("open",), ("pwrite",)):
        calls.replace(output, dict.fromkeys(names, refuse))
        assert place.convert("bf16") == expected
        place.clear()
    for names in (("open",), ("preadv",)):
        calls.replace(open_shards, dict.fromkeys(names, refuse))
        assert place.convert("bf16") == expected
        place.clear()
    assert refused or first > 1


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("level", LEVELS)
def test_reads_that_do_less_than_asked(place: Place, calls: Calls, level: str) -> None:
    expected = place.expect(level)
    calls.replace(open_shards, {"preadv": short(500)})
    assert place.convert(level) == expected
    assert calls.count > 200
