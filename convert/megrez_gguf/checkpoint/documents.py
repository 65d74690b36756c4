"""The JSON documents beside a checkpoint's weights, each read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megrez_gguf.checkpoint.json_file import read_object
from megrez_gguf.errors import CheckpointError, ConfigError
from megrez_gguf.text import clip, few

CONFIG = "config.json"
GENERATION = "generation_config.json"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

# What else a folder without a configuration may be: files that tell, what they tell, what to do.
_OTHERS = (
    ("*.gguf", "GGUF files, which are converted already; give the file itself to what reads one"),
    (
        "params.json",
        "Meta's or Mistral's own layout; give the checkpoint in Hugging Face's, with config.json "
        "and safetensors",
    ),
    (
        "model_index.json",
        "a pipeline of several models; give the folder of the language model in it",
    ),
    (
        "zero_to_fp32.py",
        "a DeepSpeed training state; save the model from it first (`python zero_to_fp32.py . OUT "
        "--safe_serialization`, with the model's config.json and tokenizer beside it)",
    ),
    (
        "*.distcp",
        "a distributed training state; save the model from it first (`accelerate merge-weights`)",
    ),
    ("*.safetensors", "weights only; put the model's config.json and tokenizer files beside them"),
)


@dataclass(frozen=True, slots=True)
class Documents:
    """What the documents of `folder` say, as it stands there, not validated."""

    folder: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    """Empty without the file."""
    index: Mapping[str, Any] | None
    """None without the file, as for a checkpoint of one shard."""

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT adapter lies beside the model; it is no part of it."""
        return (self.folder / ADAPTER).exists()

    @classmethod
    def read(cls, folder: Path) -> Documents:
        """Raises ConfigError for no such folder, no config.json, or a damaged one;
        CheckpointError for a damaged index."""
        if folder.is_file():
            raise ConfigError(f"{folder}: not a folder; give the folder that holds {CONFIG}")
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        config = read_object(folder / CONFIG, ConfigError)
        if config is None:
            raise ConfigError(f"{folder}: no {CONFIG} in this folder{_instead(folder)}")
        if _holds_only_an_adapter(folder):
            raise ConfigError(f"{folder}: {_adapter(folder)}")
        generation = read_object(folder / GENERATION, ConfigError) or {}
        return cls(folder, config, generation, read_object(folder / INDEX, CheckpointError))


def _instead(folder: Path) -> str:
    """What a folder without a configuration is, as far as its files tell."""
    try:
        inner = sorted(p.name for p in folder.iterdir() if (p / CONFIG).is_file())
        names = [p.name for p in folder.iterdir()]
    except OSError as e:
        return f": it cannot be listed: {e.strerror}"
    if ADAPTER in names:
        return f": {_adapter(folder)}"
    if inner:
        return f"; {few(inner)} in it {'has' if len(inner) == 1 else 'have'} one: give that folder"
    for pattern, what in _OTHERS:
        if any(folder.glob(pattern)):
            return f": {what}"
    return "" if names else ": it is empty"


def _holds_only_an_adapter(folder: Path) -> bool:
    """Some trainers save the base model's configuration beside an adapter."""
    weights = [path.name for path in folder.glob("*.safetensors")]
    is_adapter = bool(weights) and all(name.startswith("adapter_") for name in weights)
    return is_adapter and (folder / ADAPTER).exists()


def _adapter(folder: Path) -> str:
    adapter = read_object(folder / ADAPTER, ConfigError) or {}
    base = adapter.get("base_model_name_or_path")
    return (
        f"a PEFT adapter, not a model. Merge it into its base model ({clip(base or 'unknown')}) "
        "with peft: `merge_and_unload()`, then `save_pretrained(OUT)` for model and tokenizer, and "
        "give OUT"
    )
