"""What is in a GGUF file or a checkpoint."""

from __future__ import annotations


def inspect(path: object) -> None:
    raise NotImplementedError
