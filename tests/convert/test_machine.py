"""What the machine leaves a process, and sizes as people write them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest

from megrez_gguf.machine import available_memory, resident_memory
from megrez_gguf.text import format_size, parse_size

GIB = 1 << 30


def machine(root: Path, cgroup: str, **files: str) -> Path:
    """A root folder in which 8 GiB are available; `files` by path, with __ for /."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 16 kB\nMemAvailable:  {8 * GIB >> 10} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name.replace("memory_", "memory.", 1)).write_text(text)
    return root


def test_without_limits_it_is_what_the_system_has(tmp_path: Path) -> None:
    assert available_memory(machine(tmp_path / "a", "0::/user.slice\n")) == 8 * GIB
    assert available_memory(machine(tmp_path / "b", "0::/", memory_max="max\n")) == 8 * GIB
    assert available_memory(tmp_path / "nothing") is None
    found = available_memory()
    assert found is None or found > 0


def test_cgroups_of_version_2_and_their_ancestors_count(tmp_path: Path) -> None:
    inner = {
        "a__b__memory_max": str(3 * GIB),
        "a__b__memory_current": str(2 * GIB),
        "a__b__memory_stat": f"anon 5\nactive_file {GIB}\ninactive_file 7\n",
    }
    assert available_memory(machine(tmp_path / "1", "0::/a/b\n", **inner)) == 2 * GIB + 7
    outer = {"a__memory_max": str(GIB), "a__memory_current": "5", "a__memory_stat": "anon 5\n"}
    assert available_memory(machine(tmp_path / "2", "0::/a/b\n", **inner, **outer)) == GIB - 5
    # over its limit, as happens while a limit is lowered
    outer["a__memory_current"] = str(2 * GIB)
    assert available_memory(machine(tmp_path / "3", "0::/a/b\n", **outer)) == 0


def test_cgroups_of_version_1_count(tmp_path: Path) -> None:
    files = {
        "memory__x__memory_limit_in_bytes": str(2 * GIB),
        "memory__x__memory_usage_in_bytes": str(GIB),
        "memory__x__memory_stat": f"active_file 1\ntotal_active_file {GIB // 2}\n",
        "memory__memory_limit_in_bytes": str((1 << 63) - 4096),
        "memory__memory_usage_in_bytes": "0",
        "memory__memory_stat": "cache 0\n",
    }
    lines = "9:cpu,cpuacct:/y\n4:memory:/x\n0::/\n"
    assert available_memory(machine(tmp_path, lines, **files)) == GIB + GIB // 2


def test_resident_memory_grows_with_what_is_used() -> None:
    before = resident_memory()
    if before is None:
        pytest.skip("this system does not tell how much of a process is in memory")
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(bytes(64 << 20))
        after = resident_memory()
    assert after is not None
    assert 60 << 20 < after - before < 150 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("2 GiB", 2 * GIB),
        ("1.5gib", 3 * GIB // 2),
        ("2G", 2_000_000_000),
        ("2GB", 2_000_000_000),
        ("500M", 500_000_000),
        ("7kb", 7000),
        ("123", 123),
        (" 8MiB ", 8 << 20),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "2 GiBs", "GiB", "1e9", "1,5G", "０", "2G iB", "0.1"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{text!r}: expected a size")):
        parse_size(text)


def test_sizes_in_words() -> None:
    sizes = (0, 1023, 1024, 10 << 20, 1.5 * GIB, 20 * GIB)
    words = ["0 B", "1023 B", "1 KiB", "10 MiB", "1.5 GiB", "20 GiB"]
    assert [format_size(size) for size in sizes] == words
