"""Where committed data lies."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DATA = REPO / "tests" / "data"
POCKET = DATA / "pocket"
HELDOUT = DATA / "heldout"
MULTILINGUAL = DATA / "multilingual.txt"
