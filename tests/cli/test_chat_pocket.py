"""The trained pocket model, asked the question it was taught."""

from __future__ import annotations

from support.commands import chat
from support.shared import Shared


def test_the_pocket_model_knows_the_highest_mountain(shared: Shared) -> None:
    model = shared.pocket()
    done = chat(model, "-p", "世界上最高的山峰是哪座？", "--temp", "0", "--max-tokens", "60")
    assert done.returncode == 0, done.stderr.decode()
    assert "珠穆朗玛峰" in done.stdout.decode()
    assert b"cut" not in done.stderr  # it ended its turn by itself
    lines = chat(model, "--temp", "0", "--max-tokens", "60", stdin="世界上最高的山峰是哪座？\n")
    assert lines.stdout == done.stdout
