"""JSON files of a checkpoint: untrusted, and read by others who may take another view of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megrez_gguf.errors import MegrezError
from megrez_gguf.storage.opening import opened


def read_object(path: Path, error: type[MegrezError]) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file; raises `error` for anything else."""
    if not path.exists():
        return None
    with opened(path, error) as (file, _):
        try:
            raw = load_json(file.read())
        except (ValueError, RecursionError) as e:
            raise error(f"{path}: cannot be read as JSON: {e}") from None
        if not isinstance(raw, dict):
            raise error(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return raw


def load_json(text: bytes | str) -> Any:
    """Parse JSON, refusing duplicate keys: two readers may each believe another one of them.

    Raises ValueError or RecursionError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key[:80]!r} appears twice")
            found[key] = value
        return found

    if isinstance(text, bytes):
        text = text.decode("utf-8")
    return json.loads(text, object_pairs_hook=unique)
