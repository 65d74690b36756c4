"""What this machine lets the process use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_cpus() -> int:
    """How many CPUs this process may use at once, as far as affinity and cgroup tell."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        limit = max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no cgroup v2, or no limit ("max")
        limit = count or 1
    return min(count or 1, limit)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes this process could still take without swapping or being killed; None if unknown.

    What the system says is available, or less if a cgroup of the process (version 1 or 2, or any of
    its ancestors) leaves less: its limit, minus what is used and not page cache.
    """
    try:
        meminfo = (root / "proc/meminfo").read_text("ascii")
        fields = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
        found = [int(fields["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for folder, names in _memory_cgroups(root):
        limit, used, cache = names
        try:
            most = int((folder / limit).read_text("ascii"))
            stat = (folder / "memory.stat").read_text("ascii").splitlines()
            counts = {key: int(value) for key, value in (line.split() for line in stat)}
            left = most - int((folder / used).read_text("ascii"))
        except (OSError, ValueError):  # no such controller, or no limit ("max")
            continue
        found.append(max(0, left + sum(counts.get(f"{cache}{kind}_file", 0) for kind in _LISTS)))
    return min(found)


_LISTS = ("active", "inactive")
# Files with a cgroup's limit and use, and how memory.stat prefixes the sums over its descendants.
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
_V2 = ("memory.max", "memory.current", "")


def _memory_cgroups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The memory cgroups this process is in, innermost first, with the names their files have."""
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, names = (mount / "memory", _V1) if controllers else (mount, _V2)
        folder = base / path.lstrip("/")
        while True:
            yield folder, names
            if folder == base or base not in folder.parents:
                break
            folder = folder.parent


def resident_memory() -> int | None:
    """Bytes of this process that are in memory now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
