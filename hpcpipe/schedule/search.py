"""A schedule made for given costs and memory, where no published one was made for them.

A candidate says when each op is due; running it with "the most urgent first" gives rows. Candidates start from a family
of regular ones and from named schedules, and are bred: the best are changed at random, again and again, and kept if
better. Many are run at once, as numpy columns, and always equally many, so that every rank of a job finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise, product
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.crowd import SLACK, Candidate, Crowd, Shape
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import Schedule, ScheduleError
from hpcpipe.schedule.replay import Table, Walk, validate

Array = npt.NDArray[Any]

NAME = "search"
OPS = 4_000_000  # ops that one search runs over all candidates: about 4 s
LEAST, MOST = 40, 4_000  # candidates of a search
WIDTH = 8_192  # candidates times passes of all ranks that are run at once: numpy at its best
PARENTS = 4  # of the next generation
APART = 4  # pools of each placement


def search(
    placements: Iterable[Sequence[int]],
    micros: int,
    costs: Costs,
    hold: Sequence[float],
    limit: Sequence[float],
    start: Sequence[Schedule] = (),
    *,
    closely: bool = True,
) -> Schedule:
    """The fastest schedule that is found among those that keep the limit; never slower than the fastest of ``start``.

    ``placements``: where the stages may stand. ``hold[stage]``: bytes that one microbatch takes there from its F to its
    W. ``limit[rank]``: bytes that a rank may hold at once, inf for no limit. Fast is what steps take that follow each
    other ``closely``: the longest time from a rank's first op to its last, and then the whole step; or the other way
    round. Those of ``start`` that do not keep the limit are still tried as ideas. Deterministic: a fixed number of
    candidates, about 4,000,000 divided by the ops of one. Raises ScheduleError when nothing keeps the limit.
    """
    where = list(dict.fromkeys(tuple(p) for p in placements))
    _check(where, micros, costs, limit, start)
    found = [schedule for schedule in start if _fits(schedule, hold, limit)]
    shapes = [Shape(p, micros, costs, hold, limit) for p in where if not _short(p, hold, limit)]
    if not found and not shapes:
        raise _nothing(where or [schedule.placement for schedule in start], hold, limit)
    if shapes:
        found += _Breeding(shapes, start, closely).schedules(hold, limit)
    return min(found, key=lambda schedule: _times(schedule, costs, closely))


def _check(
    placements: Sequence[Sequence[int]], micros: int, costs: Costs, limit: Sequence[float], start: Sequence[Schedule]
) -> None:
    """Raises ScheduleError where the question does not fit together."""
    stages, ranks = len(costs.F), len(limit)
    if not placements and not start:
        raise ScheduleError("a search needs a placement of the stages or a schedule to start from; give one")
    for placement in (*placements, *(schedule.placement for schedule in start)):
        if len(placement) != stages or set(placement) != set(range(ranks)):
            raise ScheduleError(
                f"placement {tuple(placement)} does not put {stages} stages on all of ranks 0 to {ranks - 1}"
            )
    for schedule in start:
        if (schedule.micros, schedule.chains) != (micros, 1):
            raise ScheduleError(
                f"{schedule.name} has {schedule.micros} microbatches and {schedule.chains} copies of the model; "
                f"the search is for {micros} and 1"
            )


# --- what is known of a schedule without searching


def _times(schedule: Schedule, costs: Costs, closely: bool) -> tuple[float, float]:
    """What is minimised: (from first to last op of the slowest rank, of all) or the other way round."""
    table = Table(schedule)
    walk = Walk(table, costs)
    spans = [float(walk.end[row[-1]] - walk.start[row[0]]) for row in table.rows if len(row)]
    whole = float(walk.end.max())
    return (max(spans), whole) if closely else (whole, max(spans))


def _fits(schedule: Schedule, hold: Sequence[float], limit: Sequence[float]) -> bool:
    """Whether no rank ever holds more than its limit."""
    step = {"F": 1, "B": 0, "W": -1}
    for row, most in zip(schedule.rows, limit, strict=True):
        held = np.cumsum([step[op.kind] * hold[op.stage] for op in row])
        if len(row) and held.max() > most * SLACK:
            return False
    return True


def _needs(placement: Sequence[int], hold: Sequence[float]) -> list[float]:
    """Bytes that one microbatch takes on each rank; with as much, microbatches can always run one after the other."""
    return [
        sum(h for h, where in zip(hold, placement, strict=True) if where == rank) for rank in range(max(placement) + 1)
    ]


def _short(placement: Sequence[int], hold: Sequence[float], limit: Sequence[float]) -> float:
    """Bytes that the rank with the least room lacks, 0 for none."""
    return max(max(need - most * SLACK, 0.0) for need, most in zip(_needs(placement, hold), limit, strict=True))


def _nothing(placements: Sequence[Sequence[int]], hold: Sequence[float], limit: Sequence[float]) -> ScheduleError:
    needs = _needs(min(placements, key=lambda p: _short(p, hold, limit)), hold)
    rank = max(range(len(needs)), key=lambda rank: needs[rank] - limit[rank])
    return ScheduleError(
        f"no schedule fits: one microbatch holds {needs[rank]:,.0f} bytes of activations on rank {rank}, which may "
        f"hold {limit[rank]:,.0f}; allow {max(needs):,.0f} on every rank, or make microbatches smaller or stages more"
    )


# --- candidates


class _Member(NamedTuple):
    """A candidate that was run: what is minimised, the time alone, when its ops began, their order."""

    score: float
    time: float
    candidate: Candidate
    begin: Array
    turn: Array


def _regular(shape: Shape) -> list[Candidate]:
    """One microbatch after the other, each at the pace of the slowest rank, and slowly or fast through the stages.

    From stage to stage F and B take 1, 1.5, 2 or 3 times their length, in each half of the chain: long stays hold many
    microbatches and wait for nothing. (1.5, 1.5) is 1F1B, (3, 3) is ZB-H2; (1, 1) on a V is ZB-V, (2, 1) is V-Half.
    Where ranks have several stages, microbatches also come in groups, as in interleaved schedules.
    """
    paces = (1.0, 1.5, 2.0, 3.0)
    even = [(f, f, b, b) for f, b in product(paces, paces)]
    same = [(x, y, x, y) for x, y in product(paces, paces) if x != y]
    other = [four for four in product(paces, repeat=4) if four not in even + same]
    w = shape.cost[2 * shape.stages : 3 * shape.stages].max()

    def strict(fours: Sequence[tuple[float, ...]]) -> list[Candidate]:
        return [Candidate(_paced(shape, four), 0.5 * w, True) for four in fours]

    loose = [Candidate(_paced(shape, four, owed), 0.0, False) for four in even for owed in (1.0, 3.0 * shape.ranks)]
    sizes = {2, shape.ranks} if shape.each > 1 else set[int]()
    grouped = [
        Candidate(_paced(shape, four, group=size), patience, strictly)
        for size in sorted(sizes)
        for four in even
        for patience, strictly in ((0.5 * w, True), (0.0, False))
    ]
    return strict(even) + strict(same) + loose + grouped + strict(other)


def _paced(shape: Shape, paces: tuple[float, ...], owed: float = 0.0, group: int = 1) -> Array:
    """Due times of all ops; a W is due ``owed`` times the length of its B after it.

    Microbatches of a group follow each other as if a rank had one stage.
    """
    n, message, (f, then_f, b, then_b) = shape.stages, shape.costs.message, paces
    first = np.arange(n) < n / 2
    each_f = shape.cost[:n] * np.where(first, f, then_f) + message
    each_b = shape.cost[n : 2 * n] * np.where(first, then_b, b) + message
    at_f = np.cumsum(each_f) - each_f
    at_b = at_f[-1] + each_f[-1] + (np.cumsum(each_b[::-1]) - each_b[::-1])[::-1]
    at = np.concatenate([at_f, at_b, at_b + owed * shape.cost[n : 2 * n]])
    which, within = np.divmod(np.arange(shape.micros), group)
    return np.asarray(at[:, None] + max(shape.work) / shape.micros * (which * group + within / shape.each))


def _as_it_runs(shape: Shape, schedule: Schedule) -> list[Candidate]:
    """A schedule as candidates: every op is due when it begins."""
    walk = Walk(Table(schedule), shape.costs)
    due = walk.start[:-1].reshape(3 * shape.stages, shape.micros)
    w = float(shape.cost[2 * shape.stages : 3 * shape.stages].max())
    return [Candidate(due, patience, strict) for patience in (0.0, 0.5 * w) for strict in (True, False)]


class _Pool:
    """The best candidates of a placement so far, none as good as another."""

    def __init__(self, shape: Shape, closely: bool, room: int = PARENTS, members: Sequence[_Member] = ()) -> None:
        self.shape, self.closely, self.room, self.members = shape, closely, room, list(members)
        self.width = max(4, min(128, WIDTH // shape.passes.size))  # candidates of one generation

    def enter(self, candidates: Sequence[Candidate]) -> int:
        """Runs candidates, some at once, and keeps the best; how many there were."""
        for first in range(0, len(candidates), self.width):
            part = candidates[first : first + self.width]
            cutoff = self.members[-1].score if len(self.members) == self.room else np.inf
            crowd = Crowd(self.shape, part, cutoff, self.closely)
            score, time = _scores(self.shape, crowd.end, self.closely)
            for j in np.argsort(score, kind="stable")[: self.room].tolist():
                if score[j] < np.inf:
                    begin = crowd.end[j] - self.shape.cost[:-2, None]
                    self.members.append(_Member(score[j], time[j], part[j], begin, crowd.turn[j].copy()))
            by_score = {round(member.score / self.shape.mean, 6): member for member in self.members}
            self.members = sorted(by_score.values(), key=lambda member: member.score)[: self.room]
        return len(candidates)

    def split(self, count: int) -> list[_Pool]:
        """Several, each with members of its own."""
        parts = [self.members[i::count] for i in range(min(count, len(self.members)))]
        return [_Pool(self.shape, self.closely, PARENTS, part) for part in parts]


class _Breeding:
    """How better candidates are made: in pools apart for a while, since what leads early seldom does in the end."""

    def __init__(self, shapes: list[Shape], start: Sequence[Schedule], closely: bool) -> None:
        self.shapes, self.closely = shapes, closely
        self.draw = Random(0).random
        self.pools: list[_Pool] = []
        ops = 3 * shapes[0].stages * shapes[0].micros
        runs = min(MOST, max(LEAST, OPS // ops, min(200, 10_000_000 // ops)))
        apart, first = APART if runs >= 1000 else 1, 2 * runs // 3 // len(shapes)
        left = runs
        for shape in shapes:
            known = [one for s in start if s.placement == shape.placement for one in _as_it_runs(shape, s)]
            pool = _Pool(shape, closely, PARENTS * apart)
            left -= pool.enter(known + _regular(shape)[: max(0, first - len(known))])
            self.pools += pool.split(apart)
        turn, alone = 0, left // 3
        while left > 0 and not self._perfect():
            turn += 1
            pool = self.pools[turn % len(self.pools)] if left > alone else self._leader()
            left -= pool.enter([self._child(pool.shape, pool.members) for _ in range(pool.width)])

    def schedules(self, hold: Sequence[float], limit: Sequence[float]) -> list[Schedule]:
        """The best of each pool."""
        found = []
        for pool in self.pools:
            schedule = pool.shape.schedule(NAME, pool.members[0].turn)
            validate(schedule)
            if _fits(schedule, hold, limit):
                found.append(schedule)
        return found

    def _leader(self) -> _Pool:
        return min(self.pools, key=lambda pool: pool.members[0].score)

    def _perfect(self) -> bool:
        """Whether no placement can do better than the best found: some rank works all the time that it can."""
        time = min(pool.members[0].time for pool in self.pools)
        return all(time <= _bound(shape, self.closely) * SLACK for shape in self.shapes)

    # --- changes: all of them from numbers between 0 and 1, which are the same in every version of Python

    def _pick(self, options: Sequence[Any]) -> Any:
        return options[int(self.draw() * len(options))]

    def _child(self, shape: Shape, parents: Sequence[_Member]) -> Candidate:
        """A parent, the better the likelier, with one or two changes."""
        parent = parents[int(self.draw() ** 2 * len(parents))]
        _, patience, strict = parent.candidate
        due = parent.begin.copy()
        for _ in range(1 + (self.draw() < 0.4)):
            kind = self.draw()
            by = shape.mean * self._pick((0.25, 0.5, 1.0, 2.0, 4.0, 8.0))
            if kind < 0.7:
                self._shift(shape, due, by * self._pick((-1, 1)))
            elif kind < 0.8:
                due += by * self._noise((len(due), 1))
            elif kind < 0.9:
                due += by * self._noise(due.shape)
                due.sort(axis=1)
            elif kind < 0.93:
                strict = not strict
            else:
                patience = shape.mean * self._pick((0.0, 0.25, 0.5, 0.75, 1.0))
        return Candidate(due, patience, strict)

    def _noise(self, room: tuple[int, ...]) -> Array:
        """Numbers between -1 and 1."""
        return np.array([2 * self.draw() - 1 for _ in range(room[0] * room[1])]).reshape(room)

    def _shift(self, shape: Shape, due: Array, by: float) -> None:
        """Some passes of some neighbouring stages earlier or later: always, for some time, or more and more."""
        n, each = shape.stages, np.arange(shape.micros)
        first = int(self.draw() * n)
        last = min(n, first + 1 + int(self.draw() ** 2 * n))
        when, how = np.ones(len(each)), self.draw()
        if how < 0.5:
            since, until = sorted(int(self.draw() * len(each)) for _ in range(2))
            when = ((since <= each) & (each <= until)).astype(float)
        elif how < 0.8:
            when = each / len(each) if how < 0.65 else 1 - each / len(each)
        for kind in self._pick(((0,), (1,), (2,), (2,), (0, 1), (0, 1, 2))):
            due[kind * n + first : kind * n + last] += by * when


def _bound(shape: Shape, closely: bool) -> float:
    """No schedule is faster: the work of a rank and, of a whole step, the way of the first microbatch to it."""
    n, message = shape.stages, shape.costs.message
    if closely:
        return float(max(shape.work))
    apart = [0.0, *(message * (a != b) for a, b in pairwise(shape.placement))]
    way = np.cumsum(np.array(apart) + np.append(0.0, shape.cost[: n - 1]))
    return max(float(way[mine[0]] + work) for mine, work in zip(shape.mine, shape.work, strict=True))


def _scores(shape: Shape, end: Array, closely: bool) -> tuple[Array, Array]:
    """(what is minimised, the time alone) of each candidate. Of equally fast ones, the one with fewer slow ranks."""
    begin, over = end[:, :, 0] - shape.cost[:-2], end[:, :, -1].copy()
    given_up = ~np.isfinite(over).all(1)
    begin[given_up], over[given_up] = 0.0, np.inf
    span = np.stack([over[:, mine].max(1) - begin[:, mine].min(1) for mine in shape.mine])
    whole = over.max(1) - begin.min(1)
    time, other = (span.max(0), whole) if closely else (whole, span.max(0))
    late = np.zeros(len(end))
    for each in span:
        late += np.maximum(each - max(shape.work), 0.0)
    return time + 0.02 * late / shape.ranks + 1e-4 * other, time
