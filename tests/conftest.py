"""Settings and fixtures every test shares."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads of torch and ggml that wait by spinning starve each other as soon as anything else runs
# on the machine: tests then take twenty times as long. Read when the OpenMP library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:
    # As many workers as CPUs: torch and BLAS take the one that is theirs. ggml, and the
    # converter, are told how many threads to use by what is tested, and do as they are told.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

# A job that a script starts in the background ignores SIGINT, one under nohup SIGHUP, and so would
# every program the tests start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import hypothesis
import pytest

from support.checkpoints import Make
from support.configurations import TALKING, TINY
from support.shared import Shared

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Slow tests of folders whose files say nothing of it: a part of the test's id.
SLOW = (
    "test_upstream_converter.py::",
    "test_series.py::test_the_series_applies_and_exports_byte_for_byte",
    "test_series.py::test_the_amx_patch_mends_what_is_broken_without_it",
    "test_refusals.py::test_changed_keys",
    "test_refusals.py::test_damaged_headers",
    "test_refusals.py::test_llama_cpp_survives_alone",
    "test_refusals.py::test_infinite_weights_do_not_crash",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers
    return Shared(folder / "shared")


@pytest.fixture(scope="session")
def pocket_gguf(shared: Shared) -> Callable[..., Path]:
    """pocket_gguf(outtype) -> the pocket checkpoint's GGUF, for reading."""
    return shared.pocket


@pytest.fixture
def make(shared: Shared, tmp_path: Path) -> Make:
    """make(**config fields) -> a fresh checkpoint folder of `TINY` with those fields.

    `options={...}` goes to make_checkpoint; two shards unless it says otherwise.
    """

    def make(options: dict[str, Any] | None = None, **fields: Any) -> Path:
        source = shared.checkpoint(TINY | fields, **({"shard_bytes": 120_000} | (options or {})))
        folder = tmp_path / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        return folder

    return make


@pytest.fixture
def checkpoint(make: Make) -> Path:
    """A fresh copy of the default tiny checkpoint: bfloat16, several shards."""
    return make()


@pytest.fixture(scope="session")
def model(shared: Shared) -> Path:
    """The GGUF of a tiny random model to talk to: what it says is noise, always the same noise."""
    return shared.converted(shared.checkpoint(TALKING))
