"""Where the chain of slots (embed, layers, head) is cut into stages.

A step is as fast as its slowest rank, so ranks are what a cut balances: each stage alone where every rank has one,
their sum where a rank has several. Cuts that do not fit into memory are none. Where one stage stands per rank, or all
of a rank's stages stand together, the cut is the best there is, by dynamic programming; where they are strewn
(interleaved, or down and up as in a V) it comes from a descent, and a search with a budget proves it or betters it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby, pairwise
from math import inf

from hpcpipe.config import UserError

Edges = tuple[int, ...]  # slot boundaries: 0, ..., slots
Bytes = Callable[[int, int, int], float]  # of a stage that holds slots first to last - 1: bytes_of(stage, first, last)
Value = Callable[[int, int, int], float]  # of part k, likewise

NODES = 100_000  # ends tried by the search that proves or betters a cut of strewn stages: some 0.3 s


def bounds(
    cut: str | Sequence[int],
    costs: Sequence[float],
    stages: int,
    *,
    placement: Sequence[int] | None = None,
    bytes_of: Bytes | None = None,
    limit: float = inf,
) -> Edges:
    """Slot boundaries (0, …, slots) of a cut.

    "auto" balances ``costs`` as ``balanced`` does, "even" counts slots, a list gives slots per stage.
    """
    slots = len(costs)
    if stages > slots:
        raise UserError(
            f"pipeline: {stages} stages for a model of {slots} slots (embedding, {slots - 2} layers, head); "
            f"use pipeline.stages <= {slots} or more layers"
        )
    if not isinstance(cut, str):
        return _listed(cut, slots, stages)
    if cut == "even":
        return balanced([1.0] * slots, stages)
    return balanced(costs, stages, placement=placement, bytes_of=bytes_of, limit=limit)


def _listed(cut: Sequence[int], slots: int, stages: int) -> Edges:
    if len(cut) != stages or sum(cut) != slots or min(cut) < 1:
        raise UserError(
            f"pipeline.cut = {list(cut)} must list {stages} numbers >= 1 that sum to {slots} slots "
            f"(embedding, {slots - 2} layers, head); it lists {len(cut)} that sum to {sum(cut)}"
        )
    return (0, *accumulate(cut))


def balanced(
    costs: Sequence[float],
    stages: int,
    *,
    placement: Sequence[int] | None = None,
    bytes_of: Bytes | None = None,
    limit: float = inf,
) -> Edges:
    """Contiguous parts of slots that make the slowest rank as fast as can be, and then the slowest stage.

    ``placement[stage]`` is the stage's rank (none: a rank for each). Every rank's stages together must fit into
    ``limit`` bytes, where ``bytes_of(stage, first, last)`` must not shrink when a part grows; UserError says what the
    fullest needs if they cannot. Exact where a rank has one stage, where its stages are consecutive and memory is not
    limited, and where the search ends within NODES; otherwise no single slot handed from the slowest rank to another
    stage makes it better. Among equally good cuts for one stage per rank, the one whose last stage starts first, and so
    on for the slots before it: a late stage holds fewer microbatches in flight, so it may hold more slots.
    """
    where = tuple(range(stages)) if placement is None else tuple(placement)
    chain = _Chain(costs, where, bytes_of, limit if bytes_of else inf)
    if len(set(where)) == stages:
        return _one_each(chain)
    together = len([rank for rank, _ in groupby(where)]) == len(set(where))
    return _together(chain) if together and chain.limit == inf else _strewn(chain)


class _Chain:
    """The slots to cut, and what a part of them costs and needs."""

    def __init__(self, costs: Sequence[float], placement: tuple[int, ...], bytes_of: Bytes | None, limit: float):
        self.sums = [0.0, *accumulate(costs)]
        self.slots, self.placement, self.stages = len(costs), placement, len(placement)
        self.ranks = sorted(set(placement))
        self.bytes_of: Bytes = bytes_of or (lambda stage, first, last: 0.0)
        self.limit = limit

    def cost(self, stage: int, first: int, last: int) -> float:
        """Of a part; infinite where it does not fit."""
        if self.limit < inf and self.bytes_of(stage, first, last) > self.limit:
            return inf
        return self.sums[last] - self.sums[first]

    def loads(self, edges: Edges) -> tuple[dict[int, float], dict[int, float], float]:
        """Cost and bytes of each rank, and the cost of the slowest stage."""
        cost, need = dict.fromkeys(self.ranks, 0.0), dict.fromkeys(self.ranks, 0.0)
        slowest = 0.0
        for stage, (first, last) in enumerate(pairwise(edges)):
            part = self.sums[last] - self.sums[first]
            cost[self.placement[stage]] += part
            slowest = max(slowest, part)
            if self.limit < inf:
                need[self.placement[stage]] += self.bytes_of(stage, first, last)
        return cost, need, slowest


# --- one part after the other


def _table(begin: int, end: int, least: Sequence[int], value: Value) -> list[tuple[list[float], list[int]]]:
    """Row k: the smallest possible maximum over k parts of slots begin to j - 1, and where the last of them starts.

    Part k has ``least[k]`` slots or more. Its ``value`` must not fall when it starts earlier, so that only the starts
    that can still be best are tried: about (slots / parts) of them.
    """
    row, origin = [inf] * (end + 1), [begin] * (end + 1)
    row[begin] = 0.0
    rows = [(row, origin)]
    first, after = begin, sum(least)
    for k, size in enumerate(least):
        before, row, origin = row, [inf] * (end + 1), [begin] * (end + 1)
        after -= size
        for j in range(first + size, end - after + 1):
            best = inf
            for i in range(j - size, first - 1, -1):
                part = value(k, i, j)
                if part > best or part == inf:
                    break
                here = max(before[i], part)
                if here <= best:
                    best, origin[j] = here, i
            row[j] = best
        rows.append((row, origin))
        first += size
    return rows


def _trace(rows: list[tuple[list[float], list[int]]], end: int) -> Edges:
    """The cut that a table found for slots up to ``end``."""
    edges = [end]
    for _, origin in reversed(rows[1:]):
        edges.append(origin[edges[-1]])
    return tuple(reversed(edges))


def _one_each(chain: _Chain) -> Edges:
    """The best cut where every stage has a rank of its own."""
    least = [1] * chain.stages
    rows = _table(0, chain.slots, least, chain.cost)
    if rows[-1][0][-1] < inf:
        return _trace(rows, chain.slots)
    fullest = _trace(_table(0, chain.slots, least, chain.bytes_of), chain.slots)
    raise _too_small(chain, fullest)


def _together(chain: _Chain) -> Edges:
    """The best cut where the stages of a rank are consecutive: first the slowest rank, then within it the stages."""
    counts = [len(list(group)) for _, group in groupby(chain.placement)]
    sums, slots = chain.sums, chain.slots
    slowest = _table(0, slots, counts, lambda k, i, j: sums[j] - sums[i])[-1][0][-1]
    inner: dict[tuple[int, int], list[tuple[list[float], list[int]]]] = {}

    def rows(first: int, parts: int) -> list[tuple[list[float], list[int]]]:
        if (first, parts) not in inner:
            end = max(j for j in range(first, slots + 1) if sums[j] - sums[first] <= slowest)
            inner[first, parts] = _table(first, end, [1] * parts, lambda k, i, j: sums[j] - sums[i])
        return inner[first, parts]

    def stage(k: int, i: int, j: int) -> float:
        return inf if sums[j] - sums[i] > slowest else rows(i, counts[k])[-1][0][j]

    edges: list[int] = [0]
    for k, (first, last) in enumerate(pairwise(_trace(_table(0, slots, counts, stage), slots))):
        edges += _trace(rows(first, counts[k]), last)[1:]
    return tuple(edges)


# --- ranks whose stages are strewn over the chain


def _strewn(chain: _Chain) -> Edges:
    """A descent from the cut with the fastest slowest stage, then the search."""
    sums, slots = chain.sums, chain.slots
    start = _trace(_table(0, slots, [1] * chain.stages, lambda k, i, j: sums[j] - sums[i]), slots)
    found = _descent(chain, start)
    cost, need, slowest = chain.loads(found)
    fits = max(need.values()) <= chain.limit
    better = _Search(chain, (max(cost.values()), slowest) if fits else (inf, inf)).found
    if better is None and not fits:
        raise _too_small(chain, found)
    return better or found


def _descent(chain: _Chain, edges: Edges) -> Edges:
    """Hands single slots from the worst rank to the stage where that helps most, while it does.

    A slot is handed on from stage to stage, so all the parts between the two move by one.
    """
    now = _badness(chain, *chain.loads(edges))
    while True:
        cost, need, _ = chain.loads(edges)
        worst = max(chain.ranks, key=lambda rank: need[rank] if now[0] else cost[rank])
        givers = [s for s, rank in enumerate(chain.placement) if rank == worst and edges[s + 1] - edges[s] > 1]
        moves = [move for giver in givers for by in (1, -1) for move in _moves(chain, edges, giver, by)]
        step = min(moves, default=(now, edges))[1]
        then = _badness(chain, *chain.loads(step))
        if then >= now:
            return edges
        now, edges = then, step


def _badness(
    chain: _Chain, cost: dict[int, float], need: dict[int, float], slowest: float
) -> tuple[float, float, float, float]:
    """What a descent goes down on: bytes over the limit, slowest rank, unevenness, slowest stage."""
    over = max(0.0, max(need.values()) - chain.limit)
    return over, max(cost.values()), sum(c * c for c in cost.values()), slowest


def _moves(chain: _Chain, edges: Edges, giver: int, by: int) -> Iterator[tuple[tuple[float, ...], Edges]]:
    """One slot fewer for ``giver``, one more for each stage above it (``by`` 1) or below it (-1); and how bad that is.

    From one taker to the next, one more slot changes its stage.
    """
    cost, need, _ = chain.loads(edges)
    moved = list(edges)
    parts = [chain.sums[b] - chain.sums[a] for a, b in pairwise(edges)]
    for taker in range(giver + by, chain.stages if by > 0 else -1, by):
        edge = max(taker, taker - by)  # between the taker and the one before it on the way
        before = {stage: (moved[stage], moved[stage + 1]) for stage in (taker - by, taker)}
        moved[edge] -= by
        for stage, (first, last) in before.items():
            rank = chain.placement[stage]
            part = chain.sums[moved[stage + 1]] - chain.sums[moved[stage]]
            cost[rank] += part - parts[stage]
            parts[stage] = part
            if chain.limit < inf:
                need[rank] += chain.bytes_of(stage, moved[stage], moved[stage + 1]) - chain.bytes_of(stage, first, last)
        yield _badness(chain, cost, need, max(parts)), tuple(moved)


class _Search:
    """Tries the ends of one stage after the other, and leaves out what cannot beat the best (rank, stage) so far."""

    def __init__(self, chain: _Chain, best: tuple[float, float]) -> None:
        self.chain, self.best, self.nodes = chain, best, NODES
        self.found: Edges | None = None
        self.cost, self.need = dict.fromkeys(chain.ranks, 0.0), dict.fromkeys(chain.ranks, 0.0)
        # Whether a stage's rank has a later one, and how many ranks have.
        self.again = [rank in chain.placement[stage + 1 :] for stage, rank in enumerate(chain.placement)]
        self.open = [len(set(chain.placement[stage + 1 :])) for stage in range(chain.stages)]
        total = chain.sums[-1]
        single = max(b - a for a, b in pairwise(chain.sums))
        bound = max(total / len(chain.ranks), single), max(total / chain.stages, single)
        if chain.stages <= 256 and best > bound:  # a frame per stage
            self._extend((0,), (0.0, 0.0), 0.0)

    def _extend(self, edges: Edges, worst: tuple[float, float], load: float) -> None:
        """Tries all ends of the next stage. ``load``: cost, so far, of the ranks that still have a stage to come."""
        chain, stage, first = self.chain, len(edges) - 1, edges[-1]
        if stage == chain.stages:
            self.best, self.found = worst, edges
            return
        rank = chain.placement[stage]
        cost, need = self.cost[rank], self.need[rank]
        left = chain.stages - stage - 1
        for last in range(first + 1, chain.slots - left + 1) if left else [chain.slots]:
            self.nodes -= 1
            part = chain.sums[last] - chain.sums[first]
            reached = max(worst[0], cost + part), max(worst[1], part)
            self.cost[rank] = cost + part
            self.need[rank] = need + chain.bytes_of(stage, first, last) if chain.limit < inf else 0.0
            if reached >= self.best or self.need[rank] > chain.limit or self.nodes < 0:
                break
            then = load + part if self.again[stage] else load - cost
            rest = chain.sums[-1] - chain.sums[last] + then
            if not left or (1 - 1e-12) * rest <= self.open[stage] * self.best[0]:
                self._extend((*edges, last), reached, then)
        self.cost[rank], self.need[rank] = cost, need


# --- what does not fit


def _too_small(chain: _Chain, edges: Edges) -> UserError:
    """For a cut whose fullest rank is as empty as can be."""
    need = chain.loads(edges)[1]
    rank = max(chain.ranks, key=lambda rank: need[rank])
    stages = [stage for stage, where in enumerate(chain.placement) if where == rank]
    who = f"stage {stages[0]} needs" if len(stages) == 1 else f"stages {', '.join(map(str, stages))} of a rank need"
    return UserError(
        f"pipeline: {who} {need[rank] / 2**20:,.1f} MiB in the cut that asks least of the fullest rank, and a rank has "
        f"{chain.limit / 2**20:,.1f} MiB; use more stages, a smaller train.microbatch or another pipeline.schedule"
    )
