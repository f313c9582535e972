"""Interval colouring: which slot of a pool holds which tensor when, on a rank's row of ops.

Time is the index of an op in the row, and a span [start, end] occupies its slot during all its ops, both ends included.
Spans are two columns, in the order of their starts.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def overlap(start: Array, end: Array) -> int:
    """The largest number of spans that share an op: as many slots are needed, and as many are enough."""
    over = np.searchsorted(np.sort(end), np.sort(start), side="left")
    return int((np.arange(1, len(start) + 1) - over).max(initial=0))


def colour(start: Array, end: Array, count: int) -> tuple[Array, Array]:
    """(slot, before) of each span: its number, and the span that had the slot last, -1 for none.

    Starts must not decrease, and ``count`` must be at least the overlap. A span takes the slot that has been free
    longest, which gives a message the most time to come or go.
    """
    n = len(start)
    if (end[1:] >= end[:-1]).all():  # first in, first out: slots go round
        each = np.arange(n)
        return each % count, np.where(each >= count, each - count, -1)
    slot, before = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    free = [(-1, i, -1) for i in range(count)]  # (free since, slot, last span)
    taken: list[tuple[int, int, int]] = []  # (end, slot, span)
    for i, (first, last) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        while taken and taken[0][0] < first:
            heappush(free, heappop(taken))
        _, slot[i], before[i] = heappop(free)
        heappush(taken, (last, int(slot[i]), i))
    return slot, before


def in_order(start: Array) -> Array:
    """The starts at which spans must be reserved, if in this order: no later than any that follows."""
    return np.minimum.accumulate(start[::-1])[::-1]
