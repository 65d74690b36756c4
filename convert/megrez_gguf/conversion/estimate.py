"""How long a planned conversion will take, from a sample of the very work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from megrez_gguf.conversion.stream import PIECE, Importance, Item, Nowhere, stream

# What is read to measure with, at most.
_SAMPLE_BYTES = 64 << 20


def seconds(items: Sequence[Item], importance: Importance) -> float:
    """Estimated seconds of reading and encoding `items` on all cores; writing is not measured.

    For each type, encodes rows of its largest tensor until a few pieces are done, and scales by
    size. The sample's disk reads are in it, as fast as the disk or the system's cache gives them.
    Raises what `stream` raises.
    """
    groups: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for item in items:
        groups[item.encoding.name, item.sources[0].dtype].append(item)
    total = 0.0
    for (target, stored), members in groups.items():
        size = sum(t.size for item in members for t in item.sources)
        largest = max(members, key=lambda item: item.nbytes)
        sample = _rows(largest, 4 * PIECE if target != stored else _SAMPLE_BYTES)
        taken = sum(t.size for t in sample.sources)
        begin = time.perf_counter()
        stream([sample], Nowhere(), importance=importance, allow_zeros=True)
        total += (time.perf_counter() - begin) * max(size / taken, 1)
    return total


def _rows(item: Item, elements: int) -> Item:
    """The first matrices of `item`, or the first rows of its first: about `elements`."""
    first = item.sources[0]
    columns = item.shape[-1]
    if first.size > elements and len(item.shape) == 2:
        rows = max(elements // columns, 1)
        part = replace(
            first, shape=(rows, columns), nbytes=first.nbytes // first.size * rows * columns
        )
        return replace(item, shape=(rows, columns), sources=(part,), sha256=None)
    count = max(elements // first.size, 1)
    return replace(item, sources=item.sources[:count])
