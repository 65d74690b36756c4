"""How long a stranger's regular expression may take to search the name of a tensor.

Python's `re` and C++'s `std::regex` try one way to match after another. What nests repetitions has
more ways than anyone can wait for: `(.+)+x` takes years on a name of 60 letters.
"""

from __future__ import annotations

import re
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 64  # GGML_MAX_NAME
# Three times "anything" in a row.
MAX_WAYS = (_LONGEST + 1) ** 3


def check(pattern: str) -> None:
    """Raise re.error for what is no regular expression, or has too many ways to match a name."""
    try:
        re.compile(pattern)
        parsed = _parser.parse(pattern)
    except (OverflowError, RecursionError) as e:
        raise re.error(f"{e}") from None
    if _ways(parsed) > MAX_WAYS:
        raise re.error("repetitions in it repeat, or follow one another too often")


def _ways(items: Any) -> int:
    """An upper bound for the ways to match `items` from one place of a name, up to a limit."""
    product = 1
    for operator, content in items:
        kind, ways = str(operator), 1
        if kind.endswith("_REPEAT"):
            least, most = (min(int(count), _LONGEST) for count in content[:2])
            inner = _ways(content[2])
            ways = sum(min(inner, MAX_WAYS + 1) ** n for n in range(least, most + 1))
        elif kind == "BRANCH":
            ways = sum(map(_ways, content[1]))
        elif kind == "GROUPREF_EXISTS":
            ways = sum(_ways(branch) for branch in content[1:] if branch)
        elif kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            ways = _ways(content[-1])
        elif kind == "ATOMIC_GROUP":
            ways = _ways(content)
        product = min(product * max(ways, 1), MAX_WAYS + 1)
    return product
