"""JSON files of a checkpoint: untrusted, and read by others who may take another view of them."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from megrez_gguf.errors import MegrezError
from megrez_gguf.storage.opening import opened

# Far beyond what any of these files holds, and far from what breaks a recursive reader.
_MAX_DEPTH = 100
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
# What taking apart a document raises that is not of the expected form.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
# The second half of an escaped pair looks like this too; what follows tells.
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_object(path: Path, error: type[MegrezError]) -> dict[str, Any] | None:
    """The JSON object in a file, None without the file; raises `error` for anything else.

    A byte order mark before it changes nothing.
    """
    try:
        path.lstat()  # a link that leads nowhere is there
    except FileNotFoundError:
        return None
    except OSError as e:
        raise error(f"{path}: cannot be read: {e.strerror}") from None
    with opened(path, error) as (file, _):
        try:
            raw = load_json(file.read().removeprefix(codecs.BOM_UTF8))
        except (ValueError, RecursionError) as e:
            raise error(f"{path}: cannot be read as JSON: {e}") from None
        if not isinstance(raw, dict):
            raise error(f"{path}: expected a JSON object, found {type(raw).__name__}")
        return raw


def load_json(text: bytes | str) -> Any:
    """Parse JSON in UTF-8.

    Refuses duplicate keys, since two readers may each believe another one of them; halves of
    surrogate pairs, which are no text; and values nested too deep.
    Raises ValueError or RecursionError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {key[:80]!r} appears twice")
            found[key] = value
        return found

    text = _decode(text) if isinstance(text, bytes) else text
    raw = json.loads(text, object_pairs_hook=unique)
    _check_depth(raw)
    if _ESCAPED_SURROGATE.search(text):
        try:
            json.dumps(raw, ensure_ascii=False).encode()
        except UnicodeEncodeError as e:
            around = e.object[max(0, e.start - 20) : e.start + 1]
            raise ValueError(f"half of a surrogate pair, which is no text: {around!r}") from None
    return raw


def _check_depth(raw: Any) -> None:
    level = [raw]
    for _ in range(_MAX_DEPTH + 1):
        inner = (
            n.values() if isinstance(n, dict) else n for n in level if isinstance(n, dict | list)
        )
        level = [child for node in inner for child in node if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"nested more than {_MAX_DEPTH} deep")


def _decode(text: bytes) -> str:
    # UTF-16 without a mark still begins with an ASCII character, and a zero before or after it.
    if text.startswith(_WIDE) or b"\0" in text[:2]:
        raise ValueError("UTF-16 or UTF-32 text, expected UTF-8; save it as UTF-8")
    return text.decode("utf-8")
