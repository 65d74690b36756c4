"""Long runs of zero bytes: what a file has where nothing was ever written to it.

Its size and header are right all the same: downloaders set space aside, torrents come in any order,
disks lose pages in a crash.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megrez_gguf.storage.tensor import Tensor

# What is set aside, lost and written at once.
_PAGE = 4096
# Bytes that are not zero by chance in any type.
_SURE = 32

Run = tuple[int, int]
"""Where a run begins and ends, in bytes."""


def row_bytes(tensor: Tensor) -> int:
    """Bytes of a row of a matrix; of all values, where there is one axis."""
    return max(tensor.nbytes // max(tensor.size // tensor.shape[-1], 1), 1)


def least(tensor: Tensor) -> int:
    """Zero bytes in a row that no trained matrix or norm has: a page, or a row if shorter."""
    return max(_SURE, min(_PAGE, row_bytes(tensor)))


def zero_runs(data: npt.NDArray[np.uint8], least: int) -> list[Run]:
    """The runs of zeros in `data` of at least that many bytes, or of any up to either end."""
    cell = _SURE // 2
    while cell * 4 <= least:
        cell *= 2
    # Any run of `least` bytes has a whole cell in it, and hardly a cell begins with zeros.
    count = data.size // cell
    cells = data[: count * cell].view(np.uint64).reshape(count, cell // 8)
    found = np.flatnonzero(cells[:, 0] == 0)
    found = found[~cells[found].any(axis=1)]
    runs: list[Run] = []
    for group in np.split(found, np.flatnonzero(np.diff(found) > 1) + 1) if found.size else ():
        begin, end = int(group[0]) * cell, (int(group[-1]) + 1) * cell
        begin -= _leading(data[max(begin - cell, 0) : begin][::-1])
        end += _leading(data[end : end + cell])
        if end - begin >= least or begin == 0 or end == data.size:
            runs.append((begin, end))
    if (head := _leading(data[: 2 * cell])) and (not runs or runs[0][0] > 0):
        runs.insert(0, (0, head))
    if (tail := _leading(data[::-1][: 2 * cell])) and (not runs or runs[-1][1] < data.size):
        runs.append((data.size - tail, data.size))
    return runs


def _leading(data: npt.NDArray[np.uint8]) -> int:
    """How many zeros `data` begins with."""
    others = np.flatnonzero(data)
    return int(others[0]) if others.size else data.size


def joined(runs: Sequence[Run], more: Sequence[Run], offset: int) -> list[Run]:
    """`runs`, and `more` of the piece that begins at `offset`, where one may go on."""
    result = [*runs]
    for begin, end in more:
        if result and result[-1][1] == begin + offset:
            result[-1] = result[-1][0], end + offset
        else:
            result.append((begin + offset, end + offset))
    return result


def unwritten(tensor: Tensor, runs: Sequence[Run], known_rows: int | None) -> Run | None:
    """The first of `runs` that cannot be weights; None if all can.

    Rows from `known_rows` on may be zero: all of a bias, those of an embedding that stand for no
    token. Before them one row may be, as that of a padding token, and it is zero as a whole. None
    for any other tensor, which has no such rows.
    """
    row = row_bytes(tensor)
    for begin, end in runs:
        if end - begin < least(tensor):
            continue
        if known_rows is None:
            return begin, end
        end_known = min(end, known_rows * row)
        if end_known <= begin:
            continue
        rows = end_known // row - -(-begin // row)
        cut = -begin % row >= _SURE or end_known % row >= _SURE
        if rows > 1 or cut:
            return begin, end
    return None
