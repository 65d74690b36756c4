"""Recipes: a level, and the types of the tensors that are to differ from it.

Those in the folder `recipes` go by name; anyone's own is a TOML file:

    description = "..."
    level = "q4_k_m"          # decides every tensor not named below

    [types]                   # regular expression searched for in the tensor's name = its type
    "ffn_down_exps" = "iq4_nl"
    'blk\\.0\\.' = "q8_0"

The expressions are those of llama-quantize's `--tensor-type`: the first that matches counts, and a
type whose blocks do not fit the rows falls back as it does at any level, or, in the pools' down
projections, with `pad_rows = true` above the table, gets rows with zeros after them: see
`conversion.padding`. With an importance matrix that has products, weights are rounded by feedback:
see that module.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megrez_gguf.errors import ConfigError
from megrez_gguf.quantization import levels, patterns
from megrez_gguf.text import clip

_FOLDER = Path(__file__).with_name("recipes")


@dataclass(frozen=True, slots=True)
class Recipe:
    """`types` are pairs of a pattern and a ggml type, in order."""

    name: str
    level: str
    types: tuple[tuple[str, str], ...] = ()
    description: str = ""
    pad_rows: bool = False
    built_in: bool = False

    def check_matches(self, names: Iterable[str]) -> None:
        """Raise ConfigError for a pattern that is in no tensor's name: it would do nothing.

        The recipes here name tensors that not every configuration has.
        """
        if self.built_in:
            return
        names = list(names)
        for pattern, _ in self.types:
            if not any(re.search(pattern, name) for name in names):
                raise ConfigError(
                    f"recipe {self.name}: {pattern!r} matches no tensor that can be quantized, "
                    f"such as {names[0] if names else 'any'}"
                )


def names() -> list[str]:
    """Of the recipes that need no file."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(source: str | os.PathLike[str]) -> Recipe:
    """The recipe of that name, or in that TOML file.

    Raises ConfigError: neither, not TOML, an unknown key, level or type, or a pattern that is no
    regular expression.
    """
    if source in names():
        path = _FOLDER / f"{source}.toml"
        return replace(_parse(str(source), str(path), path.read_text("utf-8")), built_in=True)
    path = Path(source)
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(
            f"recipe {path}: cannot be read: {reason}. Expected a TOML file or one of "
            f"{', '.join(names())}"
        ) from None
    return _parse(path.stem, str(path), text)


def _parse(name: str, where: str, text: str) -> Recipe:
    from megrez_gguf.quantization.encode import type_number

    def fail(reason: str) -> ConfigError:
        return ConfigError(f"{where}: {reason}")

    try:
        raw: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as e:  # also of numbers too long to convert
        raise fail(f"cannot be read as TOML: {e}") from None
    if unknown := raw.keys() - {"description", "level", "pad_rows", "types"}:
        raise fail(
            f"unknown key {min(unknown)!r}; expected description, level, pad_rows and [types]"
        )
    level, types = raw.get("level"), raw.get("types", {})
    description, pad_rows = raw.get("description", ""), raw.get("pad_rows", False)
    if not isinstance(level, str):
        raise fail(f"level: expected a name such as 'q4_k_m', found {level!r}")
    if not isinstance(types, dict) or not isinstance(description, str):
        raise fail("expected a text `description` and a table `types`")
    if not isinstance(pad_rows, bool):
        raise fail(f"pad_rows: expected true or false, found {clip(pad_rows)}")
    try:
        level = levels.canonical(level)
        if level in levels.FLOATS and types:
            raise ConfigError(f"level {level!r}: expected a quantized one, for types to differ")
        for pattern, kind in types.items():
            if not isinstance(kind, str):
                raise ConfigError(f"types: {pattern!r}: expected the name of a type")
            type_number(kind)
            patterns.check(pattern)
    except ConfigError as e:
        raise fail(str(e)) from None
    except re.error as e:
        raise fail(
            f"types: {clip(pattern)} is no regular expression, or none for names: {e}"
        ) from None
    return Recipe(name, level, tuple(types.items()), description, pad_rows)
