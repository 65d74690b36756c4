"""What this machine lets the process use."""

from __future__ import annotations

import os
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
