"""Which rows share a sequence: whole rows, first-fit decreasing, inside windows of the shuffled order.

Sorting the whole data set by length would fill the sequences a little better but give every epoch nearly the
same neighbours; inside a window of shuffled rows the order stays random and the loss is small. First-fit decreasing
needs at most 11/9 of the optimal number of bins (Johnson 1973).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

WINDOW_ROWS = 1024


def pack(order: Sequence[int] | np.ndarray, lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """Bins of row numbers, each of at most ``capacity`` tokens; every row of ``order`` is in exactly one.

    Args:
        order: row numbers, shuffled.
        lengths: tokens of every row of the data set, int (num rows,).
        capacity: longest sequence in tokens; a row longer than it gets a bin of its own.
    """
    rows = np.asarray(order, dtype=np.int64)
    bins: list[tuple[int, ...]] = []
    for start in range(0, len(rows), WINDOW_ROWS):
        bins += _pack_window(rows[start : start + WINDOW_ROWS], lengths, capacity)
    return bins


def _pack_window(rows: np.ndarray, lengths: np.ndarray, capacity: int) -> list[tuple[int, ...]]:
    """First-fit decreasing; ties, and the rows inside a bin, keep the shuffled order. Bins of long rows come first."""
    place = {int(row): at for at, row in enumerate(rows)}
    room = np.zeros(len(rows), dtype=np.int64)
    bins: list[list[int]] = []
    for row in rows[np.argsort(-lengths[rows], kind="stable")].tolist():
        length = int(lengths[row])
        fits = np.flatnonzero(room[: len(bins)] >= length)
        if len(fits):
            bins[fits[0]].append(row)
            room[fits[0]] -= length
        else:
            room[len(bins)] = max(capacity - length, 0)
            bins.append([row])
    return [tuple(sorted(b, key=place.__getitem__)) for b in bins]
