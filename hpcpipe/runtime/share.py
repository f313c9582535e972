"""What of the optimizer's state is a rank's own: all of it, or a share where copies of the model divide it.

Every copy of a stage holds its parameters and the whole sum of its gradients. Where they divide the moments
(optimizer.shard), copy c of R updates the c-th of R equal stretches of the stage's flat buffer, and only for that one
has it moments (Rajbhandari et al. 2020, ZeRO, stage 1). An update is elementwise, so its bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from hpcpipe.runtime.arena import Parameters

Index = tuple[int, ...]


class Span(NamedTuple):
    """Elements ``first`` to ``end`` of the flat parameters, whose moments begin at element ``moments`` of theirs."""

    first: int
    end: int
    moments: int


class Box(NamedTuple):
    """A box of a tensor, and the elements at which its values and its moments begin in their flat buffers."""

    start: Index
    extent: Index
    values: int
    moments: int


def spans(params: Parameters, numbers: Mapping[int, int]) -> dict[int, Span]:
    """The own span of each of a rank's stages; ``numbers`` says which of the shares of a stage is the rank's."""
    found = {}
    for stage, (start, _, end) in params.stage.items():
        size = (end - start) // params.shards  # whole: a stage's stretch is a multiple of 16 x copies
        first = start + size * numbers.get(stage, 0) if params.shards > 1 else start
        found[stage] = Span(first, first + size, start // params.shards)
    return found


def boxes(params: Parameters, own: Mapping[int, Span], name: str) -> Iterator[Box]:
    """What a rank owns of a tensor: none, or one and more boxes, in the order of the elements."""
    at, shape = params.param[name], params.shapes[name]
    for first, end, moments in own.values():
        low, high = max(first, at), min(end, at + math.prod(shape))
        for start, extent in stretch(shape, low - at, high - at):
            yield Box(start, extent, low, moments + low - first)
            low += math.prod(extent)


def stretch(shape: Index, first: int, end: int) -> Iterator[tuple[Index, Index]]:
    """(start, extent) of the boxes that the elements ``first`` to ``end`` of a row-major tensor are, in their order.

    Of a matrix there are three at most: the rest of a row, whole rows, the beginning of a row.
    """
    if len(shape) == 1 and first < end:
        yield (first,), (end - first,)
    if len(shape) == 1 or first >= end:
        return
    inner = math.prod(shape[1:])
    (low, head), (high, tail) = divmod(first, inner), divmod(end, inner)
    if head:
        stop = tail if low == high else inner
        yield from (((low, *start), (1, *extent)) for start, extent in stretch(shape[1:], head, stop))
        low += 1
    if low < high:
        yield (low, *[0] * (len(shape) - 1)), (high - low, *shape[1:])
    if low <= high:
        yield from (((high, *start), (1, *extent)) for start, extent in stretch(shape[1:], 0, tail))
