"""The page on the commands shows them as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "bindings" / "megrez_cli" / "README.md"


def check(page: Path) -> subprocess.CompletedProcess[str]:
    # On a narrow terminal: what is written must not depend on how wide one is.
    return subprocess.run(
        [sys.executable, ROOT / "scripts/makers/command_reference.py", "--check", "--page", page],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "40"},
    )


def test_the_page_is_up_to_date() -> None:
    done = check(PAGE)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_check_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    text = PAGE.read_text(encoding="utf-8")
    page.write_text(text.replace("Replace an existing output.", "Ask.", 1), encoding="utf-8")
    done = check(page)
    assert done.returncode == 1
    assert "run scripts/makers/command_reference.py" in done.stderr
    page.write_text("nothing between no markers", encoding="utf-8")
    assert check(page).returncode == 2
