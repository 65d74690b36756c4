"""The JSON documents beside a checkpoint's weights, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.errors import CheckpointError, ConfigError

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Documents:
    """What the documents of `folder` say, as it stands there, not validated."""

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    """Empty without the file."""
    index: Mapping[str, Any] | None
    """None without the file, as for a checkpoint of one shard."""

    @classmethod
    def read(cls, folder: Path) -> Documents:
        """Raises ConfigError for no such folder, no config.json, or a damaged one;
        CheckpointError for a damaged index."""
        if not folder.exists():
            raise ConfigError(f"{folder}: no such folder")
        if not folder.is_dir():
            raise ConfigError(f"{folder}: not a folder; give the folder that holds {CONFIG}")
        config = read_object(folder / CONFIG, ConfigError)
        if config is None:
            raise ConfigError(f"{folder}: no {CONFIG} in this folder")
        generation = read_object(folder / GENERATION, ConfigError) or {}
        return cls(folder, config, generation, read_object(folder / INDEX, CheckpointError))
