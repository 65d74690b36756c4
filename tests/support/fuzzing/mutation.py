"""Damage that keeps a document's form: what gets past a parser and into the code behind it.

Plain changes of bytes rarely leave JSON, TOML or a GGUF header readable. These find the values of a
document, keys and nesting included, and change, move, double, drop or wrap them.
"""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

from support.gguf_edit import ARRAY, STRING, Gguf, Tensor

Mutate = Callable[[bytes, random.Random], bytes]

_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 8, 31, 32, 255, 256, 512, 513, 2**16, 2**31 - 1, 2**31, 2**32, 2**53),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**31), -(2**63), 10**30, 10**400),
    *(0.5, 1.0, -0.0, 1e-45, 1e30, 1e39, 1e308, float("inf"), float("-inf"), float("nan")),
)
_TEXTS = (
    *("", " ", "\0", "a", "\ud800", "\ufeff", "\n", "../x", "/etc/passwd", ".", "..", "\\", "{}"),
    *("null", "true", "0", "-1", "1e999", "9" * 5000, "x" * 300, "\U0010ffff", "e\u0301", "%s%n"),
    *(
        "{{",
        "{% for",
        "{{ 'x'|center(99999999) }}",
        "{{ 'x' * 99999999 }}",
        "(a+)+$",
        "a{99999999999}",
        "(" * 150,
        "[",
        "(?i)",
        "\\",
        "F32",
        "q4_0",
    ),
)
_OTHERS = (
    b"null",
    b"true",
    b"false",
    b"[]",
    b"{}",
    b"1e999",
    b"-0",
    b"NaN",
    b"1979-05-27",
    b"0x1F",
)
# The last is deeper than the interpreter recurses; such documents take long to change further.
_DEPTHS = (*(1, 2, 2, 3, 5, 20) * 8, 400, 1100)
_AROUND = (
    *((b"[", b"]"), (b'{"a":', b"}"), (b"{a = ", b"}")),
    *((b'{"type":"Sequence","%s":[' % name, b"]}") for name in (b"normalizers", b"processors")),
)

# Strings, brackets, what stands between values, and everything else.
_TOKEN = re.compile(rb'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[][{}]|[,:=\n]|[^][{},:=\s"\']+')
_CLOSING = {b"[": b"]", b"{": b"}"}


def document(data: bytes, draw: random.Random) -> bytes:
    """JSON or TOML with some of its values or keys changed."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        data = _change(data, draw)
    return data


def octets(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, inserted, removed, doubled, or swapped for a number of any width."""
    raw = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(raw) + 1)
        kind = draw.randrange(6)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            raw[at:at] = draw.randbytes(draw.choice((1, 2, 4, 8)))
        elif kind == 2:
            del raw[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 3:
            raw[at:at] = raw[at : at + draw.choice((1, 8, 64))]
        elif kind == 4:
            width = draw.choice((1, 2, 4, 8))
            number = draw.choice([n for n in _NUMBERS if isinstance(n, int)]) % 256**width
            raw[at : at + width] = number.to_bytes(width, "little")
        else:
            del raw[at:]
    return bytes(raw)


def tokens(data: bytes, draw: random.Random) -> bytes:
    """Words, numbers and signs of a text changed, moved, doubled or removed."""
    parts = re.findall(r"\w+|\s+|[^\w\s]", data.decode("utf-8", "replace"))
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(parts) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            parts.insert(at, draw.choice(_TEXTS))
        elif kind == 1:
            parts.insert(at, str(draw.choice(_NUMBERS)))
        elif kind == 2:
            del parts[at : at + draw.choice((1, 2, 5))]
        elif kind == 3 and parts:
            parts[at:at] = parts[draw.randrange(len(parts)) :][: draw.choice((1, 3, 9))]
        elif parts:
            parts[at % len(parts)] *= draw.choice((2, 50))
    return "".join(parts).encode("utf-8", "surrogatepass")


def gguf(data: bytes, draw: random.Random) -> bytes:
    """A GGUF whose keys and tensors are changed one by one, and its counts with them."""
    try:
        file = Gguf.parse(data)
        for _ in range(draw.choice((1, 1, 2, 3))):
            draw.choice((_change_value, _change_value, _change_tensor))(file, draw)
        changed = file.to_bytes()
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, struct.error):
        return octets(data, draw)
    return octets(changed, draw) if draw.random() < 0.2 else changed


def safetensors(data: bytes, draw: random.Random) -> bytes:
    """A shard whose header is changed as JSON, its length with it."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8 or draw.random() < 0.2:
        return octets(data, draw)
    text = document(data[8 : 8 + length], draw)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


# --- documents ---------------------------------------------------------------------------------


def _change(data: bytes, draw: random.Random) -> bytes:
    spans = [match.span() for match in _TOKEN.finditer(data)]
    values = [i for i, (begin, _) in enumerate(spans) if data[begin] not in b",:=]}\n"]
    if not values:
        return octets(data, draw)
    at = draw.choice(values)
    begin, end = spans[at][0], _end(data, spans, at)
    value = data[begin:end]
    kind = draw.randrange(8)
    if kind == 0:
        new = _value(draw)
    elif kind == 1:
        other = draw.choice(values)
        new = data[spans[other][0] : _end(data, spans, other)]
    elif kind <= 3:
        begin, end, element = _element(data, spans, at, end)
        new = b"" if kind == 2 else element + (b"" if element.endswith(b"\n") else b",") + element
    elif kind == 4:
        around, depth = draw.choice(_AROUND), draw.choice(_DEPTHS)
        new = around[0] * depth + value + around[1] * depth
    elif kind == 5 and value[:1] in _CLOSING:
        inner = value[1:-1].strip().rstrip(b",")
        new = value[:1] + b",".join([inner] * draw.choice((2, 3, 30))) + value[-1:]
    else:
        new = _near(value, draw)
    return data[:begin] + new + data[end:]


def _end(data: bytes, spans: list[tuple[int, int]], at: int) -> int:
    """Where the value that begins with token `at` ends: with its bracket's partner."""
    opening = data[spans[at][0] : spans[at][1]]
    if (closing := _CLOSING.get(opening)) is None:
        return spans[at][1]
    depth = 0
    for begin, end in spans[at:]:
        token = data[begin:end]
        depth += (token == opening) - (token == closing)
        if depth == 0:
            return end
    return len(data)


def _element(
    data: bytes, spans: list[tuple[int, int]], at: int, end: int
) -> tuple[int, int, bytes]:
    """The value that begins with token `at`, with its key and the comma or line end after it."""
    begin = spans[at][0]
    if at > 1 and data[spans[at - 1][0]] in b":=":
        begin = spans[at - 2][0]
    element = data[begin:end]
    if data[end : end + 1] in (b",", b"\n"):
        end += 1
        element += data[end - 1 : end].replace(b",", b"")
    return begin, end, element


def _value(draw: random.Random) -> bytes:
    kind = draw.randrange(3)
    if kind == 0:
        return json.dumps(draw.choice(_NUMBERS)).encode()
    return _text(draw.choice(_TEXTS), draw) if kind == 1 else draw.choice(_OTHERS)


def _text(text: str, draw: random.Random) -> bytes:
    return json.dumps(text, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")


def _near(value: bytes, draw: random.Random) -> bytes:
    """A value like `value`, or the same in another type."""
    if value[:1] in (b'"', b"'"):
        at = draw.randrange(len(value) - 1) + 1
        new = _text(draw.choice(_TEXTS), draw)[1:-1]
        inserted = value[:at] + new + value[at:]
        whole = (inserted, inserted, value[:1] + value[at:], value[1:-1], b"[%s]" % value)
        return draw.choice((*whole, value[:-1] + value[1:], value.swapcase()))
    try:
        number = int(value)
    except ValueError:
        return draw.choice((b'"%s"' % value, b"[%s]" % value, b"-" + value, b"0"))
    numbers = (number + 1, number - 1, -number, number * 2, number * 1000, bool(number))
    return draw.choice((b'"%s"' % value, *(json.dumps(n).encode() for n in numbers)))


# --- GGUF --------------------------------------------------------------------------------------


def _change_value(file: Gguf, draw: random.Random) -> None:
    name = draw.choice(list(file.values))
    kind, value = file.values[name]
    what = draw.randrange(6)
    if what == 0:
        del file.values[name]
    elif what == 1:
        file.values[draw.choice((*file.values, *_TEXTS))] = file.values[name]
    elif what == 2:
        file.values[name] = file.values[draw.choice(list(file.values))]
    elif what == 3:
        number = draw.choice(_NUMBERS)
        kinds = (6, 12) if isinstance(number, float) else (0, 1, 2, 3, 4, 5, 7, 10, 11)
        file.values[name] = (draw.choice(kinds), number)
    elif what == 4:
        file.values[name] = (STRING, draw.choice(_TEXTS))
    elif kind == ARRAY:
        inner, items = value
        at = draw.randrange(len(items) + 1)
        items = [*items[:at], *([_other(items[at], draw)] if items[at:] else []), *items[at + 1 :]]
        file.values[name] = (ARRAY, (inner, items[: draw.choice((at, len(items)))]))
    else:
        file.values[name] = (kind, _other(value, draw))


def _other(value: Any, draw: random.Random) -> Any:
    if isinstance(value, str):
        return draw.choice((value[1:], value * 2, value + draw.choice(_TEXTS), ""))
    return draw.choice((value + 1, value - 1, -value, value * 2, not value))


def _change_tensor(file: Gguf, draw: random.Random) -> None:
    name = draw.choice(list(file.tensors))
    tensor = file.tensors[name]
    what = draw.randrange(5)
    if what == 0:
        del file.tensors[name]
    elif what == 1:
        file.tensors[draw.choice((name + "x", *file.tensors, *_TEXTS))] = tensor
    elif what == 2:
        file.tensors[name] = Tensor(draw.randrange(42), tensor.shape, tensor.data)
    elif what == 3:
        shape = [*tensor.shape]
        shape[draw.randrange(len(shape))] = draw.choice(
            [n for n in _NUMBERS if isinstance(n, int) and 0 <= n < 2**64]
        )
        file.tensors[name] = Tensor(tensor.type, (*shape, *[1] * draw.randrange(3)), tensor.data)
    else:
        length = draw.randrange(len(tensor.data) + 33)
        file.tensors[name] = Tensor(tensor.type, tensor.shape, tensor.data.ljust(length, b"\0"))
