"""What a token stands for, as llama.cpp spells it."""

from __future__ import annotations

import ctypes
from typing import Any

from megrez_llama.patched import require_patched


def piece(vocab: Any, token: int, special: bool = False) -> bytes:
    """The bytes of a token; of a control token none, or its name if `special`."""
    llama, size = require_patched(), 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        count = llama.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if count >= 0:
            return buffer.raw[:count]
        size = -count
