"""Interval colouring: which slot of a pool holds which tensor when, on a rank's row of ops.

Time is the index of an op in the row, and a span occupies its slot during all its ops, both ends included.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush
from itertools import accumulate
from typing import NamedTuple


class Span(NamedTuple):
    """First and last op (row indices) that touch a tensor."""

    start: int
    end: int


class Place(NamedTuple):
    """The slot given to a span, and the op after which that slot was free (-1: free from the start)."""

    number: int
    since: int


def overlap(spans: Sequence[Span]) -> int:
    """The largest number of spans that share an op: as many slots are needed, and as many are enough."""
    ends: list[int] = []
    most = 0
    for start, end in sorted(spans):
        while ends and ends[0] < start:
            heappop(ends)
        heappush(ends, end)
        most = max(most, len(ends))
    return most


def colour(spans: Sequence[Span], count: int, oldest: bool) -> list[Place]:
    """Gives each span one of ``count`` slots; starts must not decrease and ``count`` must be at least the overlap.

    ``oldest`` takes the slot that has been free longest, which gives a message the most time to come or go; otherwise
    the one used last is taken, which is still in the cache.
    """
    free = deque(Place(number, -1) for number in (range(count) if oldest else reversed(range(count))))
    taken: list[tuple[int, int]] = []
    places = []
    for start, end in spans:
        while taken and taken[0][0] < start:
            since, number = heappop(taken)
            free.append(Place(number, since))
        place = free.popleft() if oldest else free.pop()
        heappush(taken, (end, place.number))
        places.append(place)
    return places


def in_order(spans: Sequence[Span]) -> list[Span]:
    """The spans as they must be reserved if they are to be reserved in this order: no later than any that follows."""
    starts = list(accumulate((span.start for span in reversed(spans)), min))
    return [Span(start, span.end) for start, span in zip(reversed(starts), spans, strict=True)]
