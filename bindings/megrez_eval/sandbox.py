"""Runs a program that a model wrote, in a process of its own with limits.

The limits are against accidents: a loop without end, a list without end, a file in the way. They
are no wall: the program runs as you, and can read what you can. Hence `--allow-code-execution`.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = 10
MEMORY = 4 << 30  # bytes of address space
FILES = 16 << 20  # bytes of a file it writes


def passes(program: str) -> bool:
    """Whether `program`, Python, ends by itself and without an error."""
    with tempfile.TemporaryDirectory(prefix="megrez-eval-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            # By the last line: what ends early, as by exit(0), has not passed.
            mark = Path(folder) / "passed"
            end = f"\nopen({str(mark)!r}, 'x').close()\n"
            process.communicate((program + end).encode("utf-8", "replace"), SECONDS)
            return process.returncode == 0 and mark.exists()
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()


def _limit() -> None:
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, SECONDS),
        (resource.RLIMIT_FSIZE, FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
