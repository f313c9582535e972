"""A schedule made for given costs and memory, where no published one was made for them.

A candidate says when each op is due; running it with "the most urgent first" gives rows. Candidates start from a family
of regular ones and from named schedules, and are bred: the best are changed at random, again and again, and kept if
better. Many are run at once, as numpy columns, and always equally many, so that every rank of a job finds the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from random import Random
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import KINDS, Op, Schedule, ScheduleError
from hpcpipe.schedule.replay import Table, Walk, validate

Array = npt.NDArray[Any]

NAME = "search"
OPS = 10_000_000  # ops that one search runs over all candidates: about 5 s
LEAST, MOST = 100, 4_000  # candidates of a search
WIDTH = 4_096  # candidates times passes of all ranks that are run at once: numpy at its best
PARENTS = 4  # of the next generation
SLACK = 1 + 1e-9  # sums of bytes and of times are rounded


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

    ``placements``: where the stages may stand. ``hold[stage]``: bytes that one microbatch takes on a stage from its F to
    its W. ``limit[rank]``: bytes that a rank may hold at once, inf for no limit. Fast is what steps take that follow
    ``closely``: the longest time from a rank's first op to its last, and then the whole step's; or the other way round.
    Deterministic. Raises ScheduleError when nothing keeps the limit.
    """
    where = list(dict.fromkeys(tuple(p) for p in placements))
    for schedule in start:
        if (schedule.stages, schedule.micros, schedule.chains) != (len(costs.F), micros, 1):
            raise ScheduleError(
                f"{schedule.name} has {schedule.stages} stages, {schedule.micros} microbatches and {schedule.chains} "
                f"copies of the model; the search is for {len(costs.F)}, {micros} and 1"
            )
    found = [schedule for schedule in start if _fits(schedule, hold, limit)]
    shapes = [_Shape(p, micros, costs, hold, limit) for p in where if not _short(p, hold, limit)]
    if not found and not shapes:
        raise _nothing(where or [schedule.placement for schedule in start], hold, limit)
    if shapes:
        found += _Breeding(shapes, found, closely).schedules(hold, limit)
    return min(found, key=lambda schedule: _times(schedule, costs, closely))


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
    if not placements:
        return ScheduleError("a search needs a placement of the stages or a schedule to start from; give one")
    needs = _needs(min(placements, key=lambda p: _short(p, hold, limit)), hold)
    rank = max(range(len(needs)), key=lambda rank: needs[rank] - limit[rank])
    return ScheduleError(
        f"no schedule fits: one microbatch holds {needs[rank]:,.0f} bytes of activations on rank {rank}, which may hold "
        f"{limit[rank]:,.0f}; allow {max(needs):,.0f} on every rank, or make microbatches smaller or stages more"
    )


# --- many candidates at once


class _Shape:
    """A placement as columns. A pass is ``kind * stages + stage``; [ranks, columns]: each rank's passes, F, B, then W."""

    def __init__(
        self, placement: tuple[int, ...], micros: int, costs: Costs, hold: Sequence[float], limit: Sequence[float]
    ) -> None:
        self.placement, self.micros, self.costs = placement, micros, costs
        self.stages, self.ranks = len(placement), max(placement) + 1
        mine = [[s for s, where in enumerate(placement) if where == rank] for rank in range(self.ranks)]
        self.each = max(map(len, mine))
        never, always = 3 * self.stages, 3 * self.stages + 1
        self.passes = np.full((self.ranks, 3 * self.each), never)
        self.hold = np.zeros((self.ranks, self.each))
        for rank, stages in enumerate(mine):
            for i, stage in enumerate(stages):
                self.passes[rank, i :: self.each] = [k * self.stages + stage for k in range(3)]
                self.hold[rank, i] = hold[stage]
        self.deepest = np.array([len(stages) - 1 for stages in mine])
        self.limit = np.array(limit, float) * SLACK
        self.limited = bool(np.isfinite(self.limit).any())
        self._needs(never, always)
        self.cost = np.append(np.array([costs.F, costs.B, costs.W], float).ravel(), [0.0, 0.0])
        total = sum(self.cost.tolist())
        self.mean = total / never or 1.0
        self.work = [micros * sum(self.cost[k * self.stages + s] for s in stages for k in range(3)) for stages in mine]
        # No op that has not begun is over within the shortest op; very short ones are not waited for.
        self.window = max(min(self.cost[:never].tolist()), self.mean / 4) * (1 - 1e-9)

    def _needs(self, never: int, always: int) -> None:
        """[2, passes]: what each pass needs of the same microbatch, and how much later than its end it arrives."""
        n = self.stages
        self.need, self.delay = np.full((2, never + 2), always), np.zeros((2, never + 2))
        self.need[0, never] = never
        for s in range(n):
            self.need[0, n + s], self.need[0, 2 * n + s] = s, n + s
            for i, here, there in ((0, s, s - 1), (1, n + s, n + s + 1)):
                if 0 <= there % n and 0 <= s + (there - here) < n:
                    self.need[i, here] = there
                    self.delay[i, here] = self.costs.message * (self.placement[s] != self.placement[s + there - here])


class _Crowd:
    """Candidates of one shape run side by side: ``end`` and ``turn`` [candidates, passes, micros] of every op.

    A rank takes the most urgent op that is ready within its ``patience``. A ``strict`` candidate takes F and B in the
    order in which they are due, and W only while it waits for the next of them, be it for an input or for memory.
    """

    def __init__(self, shape: _Shape, due: Array, patience: Array, strict: Array) -> None:
        self.shape, count = shape, len(due)
        passes, micros, ranks = 3 * shape.stages, shape.micros, shape.ranks
        room = (count, passes + 2, micros + 1)
        self.end, self.due, self.turn = np.full(room, np.inf), np.full(room, np.inf), np.zeros(room, np.int32)
        self.end[:, -1, :micros] = 0.0  # what always was; a microbatch too many is never there
        self.due[:, :passes, :micros] = due
        self.count, self.each = count, shape.each
        self.rows = np.arange(count * ranks)
        self.next = np.zeros((count * ranks, 3 * shape.each), np.int64)
        first = (np.arange(count) * (passes + 2) * (micros + 1))[:, None, None]
        here = shape.passes[None] * (micros + 1)
        need = shape.need[:, shape.passes][:, None] * (micros + 1)
        self.at = (first + here).reshape(self.next.shape)
        self.at_need = [(first + each).reshape(self.next.shape) for each in need]
        self.delay = [np.tile(each, (count, 1)) for each in shape.delay[:, shape.passes]]
        self.cost = np.tile(shape.cost[shape.passes], (count, 1))
        self.hold, self.limit = np.tile(shape.hold, (count, 1)), np.tile(shape.limit, count)
        self.full, self.deepest = self.hold.sum(1), np.tile(shape.deepest, count)
        self.now = np.zeros(count * ranks)
        self.left = np.tile(micros * 3 * (shape.deepest + 1), count)
        self.patience, self.strict = np.repeat(patience, ranks), np.repeat(strict, ranks)
        self.loose = ~self.strict  # for the moment: a strict candidate that is stuck takes what there is
        self._run()
        self.end, self.turn = self.end[:, :passes, :micros], self.turn[:, :passes, :micros]

    def _run(self) -> None:
        wave = 0
        while (left := self.left > 0).any():
            wave += 1
            begin = np.where(left, self.now, np.inf).reshape(self.count, -1).min(1)
            horizon = np.repeat(begin + self.shape.window, self.shape.ranks)
            ready = self._ready()
            room = self._room() if self.shape.limited else None
            if room is not None:
                ready[:, : self.each][~room] = np.inf
            choice = self._choice(ready, room)
            asked = left & (self.now < horizon)
            self._begin(np.flatnonzero(asked & (choice >= 0)), choice, ready, wave)
            self._wait(np.flatnonzero(asked & (choice < 0)), ready, horizon)

    def _ready(self) -> Array:
        """When the next op of each pass has what it needs; inf where that is not known yet."""
        first, second = (self.end.take(at) for at in self.at_need)
        if self.shape.costs.message:
            first += self.delay[0]
            second += self.delay[1]
        return np.maximum(first, second, out=first)

    def _room(self) -> Array:
        """Whether the next F of each stage may be held, so that the oldest microbatch can still pass all stages.

        A microbatch is freed only after its F on the rank's deepest stage. What younger ones hold until then must leave
        room for all that the next one there takes: then microbatches can always end one after the other.
        """
        begun = self.next[:, : self.each]
        used = ((begun - self.next[:, 2 * self.each :]) * self.hold).sum(1)
        room = self.hold <= (self.limit - used)[:, None]
        if self.each > 1:
            ahead = begun - begun[self.rows, self.deepest][:, None]
            spare = self.limit - self.full - (np.maximum(ahead - 1, 0) * self.hold).sum(1)
            room &= (ahead < 1) | (self.hold <= spare[:, None])
        return np.asarray(room)

    def _choice(self, ready: Array, room: Array | None) -> Array:
        """The column of what each rank does next, -1 for nothing."""
        due, till = self.due.take(self.at), self.now + self.patience
        choice = np.full(len(due), -1)
        if self.loose.any():
            urgent = np.where(ready <= till[:, None], due, np.inf)
            best = urgent.argmin(1)
            choice = np.where(urgent[self.rows, best] < np.inf, best, -1)
        if self.loose.all():
            return choice
        split = 2 * self.each
        target = due[:, :split].argmin(1)
        owed = np.where(ready[:, split:] <= self.now[:, None], due[:, split:], np.inf)
        w = owed.argmin(1)
        strict = np.where(owed[self.rows, w] < np.inf, w + split, -1)
        if room is not None:
            held_up = np.flatnonzero((target < self.each) & (strict < 0))
            held_up = held_up[~room[held_up, target[held_up]]]
            other = np.where(np.isfinite(ready[held_up, :split]), due[held_up, :split], np.inf).argmin(1)
            strict[held_up] = np.where(ready[held_up, other] <= till[held_up], other, -1)
        strict = np.where(ready[self.rows, target] <= till, target, strict)
        return np.where(self.loose, choice, strict)

    def _begin(self, who: Array, choice: Array, ready: Array, wave: int) -> None:
        what = choice[who]
        at = self.at[who, what]
        end = np.maximum(self.now[who], ready[who, what]) + self.cost[who, what]
        self.end.put(at, end)
        self.turn.put(at, wave)
        self.now[who] = end
        self.left[who] -= 1
        for place in (self.next, self.at, *self.at_need):
            place[who, what] += 1

    def _wait(self, who: Array, ready: Array, horizon: Array) -> None:
        """Until something is known to be ready, or could be. Where a whole candidate waits for nothing, it is stuck."""
        self.loose = ~self.strict
        if not who.size:
            return
        now = self.now[who]
        known = np.where(ready[who] > now[:, None], ready[who], np.inf).min(1)
        lost = self.left == 0
        lost[who] = np.isinf(known)
        stuck = lost.reshape(self.count, -1).all(1)
        self.loose |= np.repeat(stuck, self.shape.ranks)
        self.now[who] = np.maximum(now, np.minimum(known, horizon[who]))


# --- candidates


class _Candidate(NamedTuple):
    """When each op is due [passes, micros], and how it is taken."""

    due: Array
    patience: float
    strict: bool


class _Member(NamedTuple):
    """A candidate that was run: what is minimised, the time alone, when its ops began, their order."""

    score: float
    time: float
    candidate: _Candidate
    begin: Array
    turn: Array


def _regular(shape: _Shape) -> list[_Candidate]:
    """One microbatch after the other, each at the pace of the slowest rank, and slowly or fast through the stages.

    Between two stages F and B take 1, 1.5, 2 or 3 times their length, in each half of the chain: long stays hold many
    microbatches and wait for nothing. (1.5, 1.5) is 1F1B, (3, 3) is ZB-H2; (1, 1) on a V is ZB-V, (2, 1) is V-Half.
    """
    paces = (1.0, 1.5, 2.0, 3.0)
    both = [(f, f, b, b) for f, b in product(paces, paces)]
    found = [(*four, 0.0) for four in both + [(x, y, x, y) for x, y in product(paces, paces) if x != y]]
    w = shape.cost[2 * shape.stages : 3 * shape.stages].max()
    strict = [_Candidate(_paced(shape, *paces), 0.5 * w, True) for paces in found]
    late = (1.0, 3.0 * shape.ranks)
    return strict + [_Candidate(_paced(shape, *four, owed), 0.0, False) for four in both for owed in late]


def _paced(shape: _Shape, f: float, then_f: float, b: float, then_b: float, owed: float) -> Array:
    """Due times of all ops; a W is due ``owed`` times the length of its B after it."""
    n, message = shape.stages, shape.costs.message
    first = np.arange(n) < n / 2
    each_f = shape.cost[:n] * np.where(first, f, then_f) + message
    each_b = shape.cost[n : 2 * n] * np.where(first, then_b, b) + message
    at_f = np.cumsum(each_f) - each_f
    at_b = at_f[-1] + each_f[-1] + (np.cumsum(each_b[::-1]) - each_b[::-1])[::-1]
    at = np.concatenate([at_f, at_b, at_b + owed * shape.cost[n : 2 * n]])
    return np.asarray(at[:, None] + max(shape.work) / shape.micros * np.arange(shape.micros))


def _as_it_runs(shape: _Shape, schedule: Schedule) -> list[_Candidate]:
    """A schedule as candidates: every op is due when it begins."""
    walk = Walk(Table(schedule), shape.costs)
    due = walk.start[:-1].reshape(3 * shape.stages, shape.micros)
    w = float(shape.cost[2 * shape.stages : 3 * shape.stages].max())
    return [_Candidate(due, patience, strict) for patience in (0.0, 0.5 * w) for strict in (True, False)]


class _Breeding:
    """The best few candidates of each placement, and how better ones are made from them."""

    def __init__(self, shapes: list[_Shape], start: Sequence[Schedule], closely: bool) -> None:
        self.shapes, self.closely = shapes, closely
        self.random = Random(0)
        self.best: list[list[_Member]] = [[] for _ in shapes]
        self.runs = min(MOST, max(LEAST, OPS // (3 * shapes[0].stages * shapes[0].micros)))
        for i, shape in enumerate(shapes):
            self._enter(i, _regular(shape))
            for schedule in start:
                if schedule.placement == shape.placement:
                    self._enter(i, _as_it_runs(shape, schedule))
        third, turn = 2 * self.runs // 3, 0
        while self.runs > 0 and not self._perfect():
            # A while for every placement, then for the best.
            turn = (turn + 1) % len(shapes) if self.runs > third else self._leader()
            self._enter(turn, [self._child(self.shapes[turn], self.best[turn]) for _ in range(self._width(turn))])

    def schedules(self, hold: Sequence[float], limit: Sequence[float]) -> list[Schedule]:
        """The best of each placement."""
        found = []
        for shape, members in zip(self.shapes, self.best, strict=True):
            schedule = _recorded(shape, members[0].turn)
            validate(schedule)
            if _fits(schedule, hold, limit):
                found.append(schedule)
        return found

    def _leader(self) -> int:
        return min(range(len(self.shapes)), key=lambda i: self.best[i][0].score)

    def _perfect(self) -> bool:
        """Whether no placement can do better than the best found: some rank works all the time."""
        time = min(members[0].time for members in self.best)
        return all(time <= max(shape.work) * SLACK for shape in self.shapes)

    def _width(self, i: int) -> int:
        """Candidates of one generation."""
        return max(4, min(64, WIDTH // self.shapes[i].passes.size))

    def _enter(self, i: int, candidates: Sequence[_Candidate]) -> None:
        """Runs candidates, some at once, and keeps the best."""
        shape, width = self.shapes[i], self._width(i)
        for first in range(0, len(candidates), width):
            part = candidates[first : first + width]
            due, patience, strict = (np.array(column) for column in zip(*part, strict=True))
            crowd = _Crowd(shape, due, patience, strict)
            score, time = _scores(shape, crowd.end, self.closely)
            self.runs -= len(part)
            for j in np.argsort(score, kind="stable")[:PARENTS].tolist():
                begin = crowd.end[j] - shape.cost[:-2, None]
                self.best[i].append(_Member(score[j], time[j], part[j], begin, crowd.turn[j].copy()))
            by_score = {round(member.score / shape.mean, 6): member for member in reversed(self.best[i])}
            self.best[i] = sorted(by_score.values(), key=lambda member: member.score)[:PARENTS]

    # --- changes

    def _child(self, shape: _Shape, parents: Sequence[_Member]) -> _Candidate:
        """A parent, the better the likelier, with one or two changes."""
        random = self.random
        parent = parents[int(random.random() ** 2 * len(parents))]
        _, patience, strict = parent.candidate
        due = (parent.begin if random.random() < 0.5 else parent.candidate.due).copy()
        for _ in range(1 + (random.random() < 0.4)):
            kind = random.random()
            by = shape.mean * random.choice((0.25, 0.5, 1.0, 2.0, 4.0, 8.0))
            if kind < 0.6:
                self._shift(shape, due, by * random.choice((-1, 1)))
            elif kind < 0.75:
                due += by * self._noise((len(due), 1))
            elif kind < 0.9:
                due += by * self._noise(due.shape)
                due.sort(axis=1)
            elif kind < 0.93:
                strict = not strict
            else:
                patience = shape.mean * random.choice((0.0, 0.25, 0.5, 0.75, 1.0))
        return _Candidate(due, patience, strict)

    def _noise(self, room: tuple[int, ...]) -> Array:
        """Numbers between -1 and 1, the same in every version of every library."""
        draw = self.random.random
        return np.array([2 * draw() - 1 for _ in range(room[0] * room[1])]).reshape(room)

    def _shift(self, shape: _Shape, due: Array, by: float) -> None:
        """Some passes of some neighbouring stages earlier or later: always, for some time, or more and more."""
        random, n, micros = self.random, shape.stages, shape.micros
        first = random.randrange(n)
        last = min(n, first + 1 + int(random.random() ** 2 * n))
        when, how = np.ones(micros), random.random()
        if how < 0.5:
            since, until = sorted((random.randrange(micros), random.randrange(micros)))
            when = ((np.arange(micros) >= since) & (np.arange(micros) <= until)).astype(float)
        elif how < 0.8:
            when = np.arange(micros) / micros if how < 0.65 else 1 - np.arange(micros) / micros
        for kind in random.choice(((0,), (1,), (2,), (2,), (0, 1), (0, 1, 2))):
            due[kind * n + first : kind * n + last] += by * when


def _scores(shape: _Shape, end: Array, closely: bool) -> tuple[Array, Array]:
    """(what is minimised, the time alone) of each candidate. Of equally fast ones, the one with fewer slow ranks."""
    begin, over = end[:, :, 0] - shape.cost[:-2], end[:, :, -1]
    span = np.stack([over[:, mine].max(1) - begin[:, mine].min(1) for mine in _mine(shape)])
    whole = over.max(1) - begin.min(1)
    time, other = (span.max(0), whole) if closely else (whole, span.max(0))
    late = np.zeros(len(end))
    for each in span:
        late += np.maximum(each - max(shape.work), 0.0)
    return time + 0.02 * late / shape.ranks + 1e-4 * other, time


def _mine(shape: _Shape) -> list[Array]:
    """The passes of each rank."""
    return [row[row < 3 * shape.stages] for row in shape.passes]


def _recorded(shape: _Shape, turn: Array) -> Schedule:
    """The rows of a candidate."""
    rows = []
    for mine in _mine(shape):
        order = np.argsort(turn[mine].ravel(), kind="stable")
        which, micro = np.divmod(order, shape.micros)
        kind, stage = np.divmod(mine[which], shape.stages)
        rows.append(
            tuple(Op(KINDS[k], s, m) for k, s, m in zip(kind.tolist(), stage.tolist(), micro.tolist(), strict=True))
        )
    return Schedule(NAME, tuple(rows), shape.placement, shape.micros)
