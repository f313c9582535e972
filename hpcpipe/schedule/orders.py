"""The published orders, rank by rank, that a policy with an eye only for what is ready would not find.

An order is one row per rank of passes, (kind, stage), without the W, which ``policies.follow`` puts into the holes. A
pass takes its microbatches one after the other, so a row need not name them, and the first ``micros`` of each pass of
an order for more microbatches are an order too: what a microbatch needs, of itself and of earlier ones, stays before
it. Interleaved rows are the exception: they are complete, W right after B.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hpcpipe.schedule.engine import Pass
from hpcpipe.schedule.op import Op

Row = list[Pass]
PERIOD = 6  # slots between two microbatches in a building block: F, B and W of two stages


def first(row: Sequence[Pass], micros: int) -> Row:
    """The first ``micros`` of each pass."""
    seen: dict[Pass, int] = {}
    kept = []
    for key in row:
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= micros:
            kept.append(key)
    return kept


def zero_bubble(placement: Sequence[int], micros: int, pace: int) -> list[Row]:
    """Forwards until the first gradient can be there, then B and F in turn (Qi et al., arXiv:2401.10241).

    A rank starts with ``pace`` forwards more than the next: 1 is the order of 1F1B (ZB-H1), with 2 no rank has to wait
    for its first gradient (ZB-H2). Consecutive stages of one rank are passed through as if they were one.
    """
    last, rows = max(placement), []
    for rank in range(last + 1):
        stages = [stage for stage, where in enumerate(placement) if where == rank]
        f: Row = [("F", stage) for stage in stages]
        b: Row = [("B", stage) for stage in reversed(stages)]
        warm = min(1 + pace * (last - rank), micros)
        rows.append(f * warm + (b + f) * (micros - warm) + b * warm)
    return rows


def two_streams(near: int, far: int, ahead: int, pairs: int, micros: int, overlap: bool) -> Row:
    """The row of a rank that serves two streams in turn: one that enters at its end of the pipeline, through stage
    ``near``, and one that comes back or enters at the other end, through ``far``.

    The streams meet after ``ahead`` more of ``pairs`` ranks. With ``overlap`` each F comes just before a B of the other
    stream, which may hide its messages (DualPipe, arXiv:2412.19437); otherwise B comes first, which saves the memory
    of one microbatch (ZB-V, arXiv:2405.15362).
    """
    f0, b0, f1, b1 = _passes(near, far)
    total = max(micros, 2 * pairs)
    row = [f0] * (2 * ahead)
    row += [f0, f1] * (pairs - ahead)
    row += [b1, f1] * ahead
    row += ([f0, b1, f1, b0] if overlap else [b1, f0, b0, f1]) * (total - pairs - ahead)
    row += ([b1, f1, b0] if overlap else [b1, b0, f1]) * ahead
    row += [b1, b0] * (pairs - ahead)
    row += [b0] * ahead
    return first(row, micros)


def _passes(near: int, far: int) -> Row:
    return [("F", near), ("B", near), ("F", far), ("B", far)]


def folded(ranks: int, micros: int, overlap: bool) -> list[Row]:
    """Two streams where each microbatch goes down the ranks and back up: stage r and stage 2 ranks - 1 - r."""
    return [two_streams(r, 2 * ranks - 1 - r, ranks - 1 - r, ranks, micros, overlap) for r in range(ranks)]


def mirrored(ranks: int, micros: int) -> list[Row]:
    """Two streams where each end has a copy of the model and its own microbatches: DualPipe (arXiv:2412.19437)."""
    half, rows = ranks // 2, []
    for rank in range(ranks):
        here, there = rank, 2 * ranks - 1 - rank
        ends = (here, there) if rank < half else (there, here)
        rows.append(two_streams(*ends, half - 1 - min(rank, ranks - 1 - rank), half, micros, overlap=True))
    return rows


def v_half(ranks: int) -> list[tuple[int, int, int, int]]:
    """Building block with half of 1F1B's memory: per rank, when F goes down and up and B down and up."""
    p, late = ranks, 3 * (ranks % 2 == 0)
    return [(2 * r, 3 * p - r - 2, 3 * p + late + 2 * r - 1, 6 * p + late - r - 2) for r in range(p)]


def v_min(ranks: int) -> list[tuple[int, int, int, int]]:
    """Building block with a third of 1F1B's memory: nothing waits, neither on its way down nor up."""
    p, late = ranks, 2 * (ranks % 3 == 0)
    return [(r, 2 * p - r - 1, 2 * p + late + r, 4 * p + late - r - 1) for r in range(p)]


def repeated(block: Sequence[tuple[int, int, int, int]], micros: int) -> list[Row]:
    """The order of a building block repeated every PERIOD slots (Qi et al., arXiv:2405.15362).

    Only the order is kept: when the ops run as early as it allows, the holes at both ends are squeezed out.
    """
    ranks, rows = len(block), []
    for rank, times in enumerate(block):
        f0, b0, f1, b1 = _passes(rank, 2 * ranks - 1 - rank)
        slots = sorted((time + PERIOD * m, i) for m in range(micros) for i, time in enumerate(times))
        rows.append([(f0, f1, b1, b0)[i] for _, i in slots])
    return rows


def groups(micros: int, size: int) -> list[range]:
    """The microbatches in groups of ``size`` or, where that leaves a rest, a little more; all are nearly equal."""
    n = max(micros // size, 1)
    return [range(i * micros // n, (i + 1) * micros // n) for i in range(n)]


def interleaved(stages: int, ranks: int, micros: int, size: int) -> tuple[tuple[Op, ...], ...]:
    """Whole rows: stage s on rank s % ranks, each group of microbatches through one stage of the rank after the other.

    A rank begins with the forwards that fit in until its first gradient: the first group up to its last stage, then 2
    for each rank below, there and back (Narayanan et al., arXiv:2104.04473; 1 where a rank has one stage, as in 1F1B;
    never more than 2 groups, because the first gradient would wait for ever). If the last round of stages is not full,
    its ops are those of a full one left out.
    """
    rounds = -(-stages // ranks)
    parts = groups(micros, size)
    sizes = [len(part) for part in parts]
    down = [(j * ranks, m) for part in parts for j in range(rounds) for m in part]
    up = [(j * ranks, m) for part in parts for j in reversed(range(rounds)) for m in part]
    op, rows = partial(tuple.__new__, Op), []
    for rank in range(ranks):
        below = ranks - 1 - rank
        ahead = below if rounds == 1 else 2 * min(below, *sizes)
        warm = min((rounds - 1) * max(sizes) + ahead, len(down))
        rest = len(down) - warm
        f = [op(("F", first + rank, m)) for first, m in down]
        b = [op((kind, first + rank, m)) for first, m in up for kind in ("B", "W")]
        steady = zip(f[warm:], b[: 2 * rest : 2], b[1 : 2 * rest : 2], strict=True)
        row = [*f[:warm], *(each for three in steady for each in three), *b[2 * rest :]]
        rows.append(tuple(row) if stages % ranks == 0 else tuple(each for each in row if each.stage < stages))
    return tuple(rows)
