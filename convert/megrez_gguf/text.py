"""Texts, sizes, lists and values as people read and write them, and whom they are told to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from megrez_gguf.errors import ConfigError

Say = Callable[[str], None]
"""Told what is being done, a line at a time."""

Progress = Callable[[int, int], None]
"""Called with what is done so far and what there is in all: bytes, unless said otherwise."""

_UNITS = {
    "": 1,
    **{f"{prefix}{suffix}": 1000**i for i, prefix in enumerate("KMGT", 1) for suffix in ("", "B")},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}


def silent(line: str) -> None:
    """A `Say` that tells nobody."""


def read_text(path: Path) -> bytes:
    """The bytes of a text, which are UTF-8. Raises ConfigError."""
    try:
        raw = path.read_bytes()
        raw.decode("utf-8")
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {e}") from None
    return raw


def parse_size(text: str) -> int:
    """Bytes in `text`: "2GiB" is 2 * 1024^3, "2G" and "2GB" are 2 * 1000^3, "2000" is itself.

    Fractions and any case are allowed. Raises ValueError for anything else, for 0, and for more
    than any file or memory holds.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) ?([A-Z]*)", text.strip().upper(), re.ASCII)
    size = int(Fraction(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if not 0 < size < 1 << 63:
        raise ValueError(f"{clip(text)}: expected a size such as 2GiB or 500M")
    return size


def format_size(size: float, digits: int | None = None) -> str:
    """`size` bytes in the binary unit that suits it: "2.0 GiB", "600 MiB".

    With `digits` after the point, but for bytes; rounded to what the eye takes in by default.
    """
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    if digits is None:
        digits = 1 if unit == "GiB" and size < 10 else 0
    return f"{size:.{digits if unit != 'B' else 0}f} {unit}"


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first of `names`, and how many more there are: "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def clip(value: object, limit: int = 80) -> str:
    """How Python writes `value`, cut after `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


# What drives a terminal or shows text in another order than it is in: control characters and
# bidirectional embeddings, overrides and isolates. Lone surrogates stand for bytes of a path.
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    r"""`text` with what could drive a terminal spelled out, a line end included: "\x1b", "\n".

    Bytes of a path that are no text are spelled as bytes: "\xff". Characters in `keep` stay.
    """

    def spell(match: re.Match[str]) -> str:
        character = match[0]
        if character in keep:
            return character
        if "\udc80" <= character <= "\udcff":
            return f"\\x{ord(character) - 0xDC00:02x}"
        return ascii(character)[1:-1]

    return _UNPRINTABLE.sub(spell, text)
