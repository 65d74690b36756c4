"""Quantization levels by name: llama.cpp's file types, in lower case.

Which type each tensor gets at a level is llama.cpp's decision (`quantizer.choose_types`).
"""

from __future__ import annotations

import difflib
import re

from megrez_gguf.errors import ConfigError

# Every matrix in one float type; needs no llama.cpp.
FLOATS = ("f32", "bf16", "f16")
# An importance matrix changes nothing in these, ...
PLAIN = (*FLOATS, "q8_0", "mxfp4_moe")
# ... may be used for these, ...
EITHER = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s", "q2_k"),
    *("tq2_0", "tq1_0"),
)
# ... and llama.cpp makes these with one only.
WEIGHTED = ("iq3_xs", "iq3_xxs", "q2_k_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
# All that can be made. nvfp4 has no quantizer, q1_0 does not fit the widths of Megrez2, and the
# gguf package does not know q2_0 yet.
LEVELS = (*PLAIN, *EITHER, *WEIGHTED)
# llama-quantize's own short names.
ALIASES = {"q5_k": "q5_k_m", "q4_k": "q4_k_m", "q3_k": "q3_k_m"}


# How other programs spell a part of a level's name.
_ELSEWHERE = {
    "mostly": "",
    "bfloat": "bf",
    "float": "f",
    "fp": "f",
    "int": "q",
    "medium": "m",
    "small": "s",
    "large": "l",
}


def spelled(name: str) -> str:
    """`name` as levels are spelled here, known or not: "q4_k_m" for " Q4_K"."""
    level = name.strip().lower()
    return ALIASES.get(level, level)


def canonical(name: str) -> str:
    """The level `name` means, e.g. "q4_k_m" for "Q4_K". Raises ConfigError for an unknown one."""
    level = spelled(name)
    if level not in LEVELS:
        raise ConfigError(f"level {name!r}: {suggestion(name)}expected one of {', '.join(LEVELS)}")
    return level


def suggestion(name: str) -> str:
    """A question that names what `name` may have meant; "" where nothing is like it."""
    name = name.lower()
    for theirs, ours in _ELSEWHERE.items():
        name = name.replace(theirs, ours)
    name = re.sub("[^a-z0-9]", "", name)
    plain = {re.sub("[^a-z0-9]", "", level): level for level in LEVELS}
    close = [name] if name in plain else difflib.get_close_matches(name, plain, n=2, cutoff=0.75)
    return f"did you mean {' or '.join(plain[match] for match in close)}? " if close else ""


def check_weighted(level: str, weighted: bool) -> None:
    """Raise ConfigError where a level cannot do with, or without, an importance matrix."""
    if level in WEIGHTED and not weighted:
        raise ConfigError(f"level {level!r} needs an importance matrix", option="imatrix")
    if level in PLAIN and weighted:
        raise ConfigError(f"level {level!r}: an importance matrix changes nothing in it")


def file_type(level: str) -> int:
    """llama.cpp's number for files of a level, the value of `general.file_type`."""
    from gguf import LlamaFileType

    name = "ALL_F32" if level == "f32" else f"MOSTLY_{level.upper()}"
    return int(LlamaFileType[name])


def level_of(number: object) -> str:
    """The level that a `general.file_type` means, or "" when it means none of `LEVELS`."""
    return next((level for level in LEVELS if file_type(level) == number), "")
