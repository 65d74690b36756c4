"""Sizes as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    **{f"{prefix}{suffix}": 1000**i for i, prefix in enumerate("KMGT", 1) for suffix in ("", "B")},
    **{f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)},
}


def parse_size(text: str) -> int:
    """Bytes in `text`: "2GiB" is 2 * 1024^3, "2G" and "2GB" are 2 * 1000^3, "2000" is itself.

    Fractions and any case are allowed. Raises ValueError for anything else, 0 included.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Z]*)", text.strip().upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size <= 0:
        raise ValueError(f"{text!r}: expected a size such as 2GiB or 500M")
    return size


def format_size(size: float) -> str:
    """`size` bytes, rounded, in the binary unit that suits it: "2.0 GiB", "600 MiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 10 else f"{size:.0f} GiB"
