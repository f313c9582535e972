"""A schedule run as it stands: proof that it comes to its end, and when every op runs with given costs.

Ranks advance together, wave by wave: in each wave every rank whose next op has what it needs does that op. Numbers are
numpy columns over ranks, so a table of 400,000 ops takes a fraction of a second. The waves are one valid order of all
ops, which is what lowering asks for; the times do not depend on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import KINDS, Kind, Op, Schedule, ScheduleError, needs
from hpcpipe.schedule.timeline import Event, Timeline

Array = npt.NDArray[Any]

KIND_OF = np.full(256, -1, np.int64)  # the number of a kind by its letter
KIND_OF[list("".join(KINDS).encode())] = range(len(KINDS))


class Table:
    """A schedule as numbers. An op is ``(kind * stages + stage) * micros + micro``; ``size`` stands for no op."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.stages, self.micros = schedule, schedule.stages, schedule.micros
        self.size = len(KINDS) * self.stages * self.micros
        self.rows = [self._codes(row) for row in schedule.rows]

    def _codes(self, row: Sequence[Op]) -> Array:
        """One row; an op that is no op of this pipeline becomes -1."""
        kind = KIND_OF[np.frombuffer("".join(map(itemgetter(0), row)).encode("ascii", "replace"), np.uint8)]
        stage, micro = (np.fromiter(map(itemgetter(i), row), np.int64, len(row)) for i in (1, 2))
        known = (kind >= 0) & (stage >= 0) & (stage < self.stages) & (micro >= 0) & (micro < self.micros)
        return np.where(known, (kind * self.stages + stage) * self.micros + micro, -1)

    def op(self, code: int) -> Op:
        """The op of a number."""
        kind, rest = divmod(int(code), self.stages * self.micros)
        return Op(KINDS[kind], *divmod(rest, self.micros))

    @cached_property
    def at(self) -> Array:
        """[kinds, stages, micros]: where in its rank's row an op stands; -1 where it does not occur."""
        found = np.full(self.size, -1, np.int64)
        for row in self.rows:
            found[row] = np.arange(len(row))
        return found.reshape(len(KINDS), self.stages, self.micros)

    @cached_property
    def needed(self) -> Array:
        """[2, size + 1]: what each op needs, by the one rule; ``size`` where it needs less."""
        found = np.full((2, self.size + 1), self.size, np.int64)
        micros = np.arange(self.micros)
        for k, kind in enumerate(KINDS):
            for stage in range(self.stages):
                first = (k * self.stages + stage) * self.micros
                for i, op in enumerate(needs(Op(kind, stage, 0), self.schedule.depth)):
                    before = (KINDS.index(op.kind) * self.stages + op.stage) * self.micros
                    found[i, first : first + self.micros] = before + micros
        return found


class Walk:
    """The waves. ``order`` lists all ops as they were done, ``place`` how far each rank came; times with ``costs``."""

    def __init__(self, table: Table, costs: Costs | None = None, kinds: Sequence[Kind] = KINDS) -> None:
        self.table, ranks = table, len(table.rows)
        length = np.array([len(row) for row in table.rows])
        rows = np.full((ranks, int(length.max(initial=0)) + 1), table.size, np.int64)
        for rank, row in enumerate(table.rows):
            rows[rank, : len(row)] = row
        self.start, self.end = np.zeros(table.size + 1), np.zeros(table.size + 1)
        cost = _per_op(table, costs) if costs is not None else np.zeros(table.size + 1)
        delay = _delays(table, costs.message if costs is not None else 0.0)
        done = np.zeros(table.size + 1, bool)
        done[table.size] = True
        for k, kind in enumerate(KINDS):  # a forward pass alone: nothing else is waited for
            if kind not in kinds:
                done[k * table.stages * table.micros : (k + 1) * table.stages * table.micros] = True
        self.place, free, every = np.zeros(ranks, np.int64), np.zeros(ranks), np.arange(ranks)
        (first, second), waves = table.needed, []
        while True:
            now = rows[every, self.place]
            a, b = first[now], second[now]
            go = np.flatnonzero(done[a] & done[b] & (now < table.size))
            if not go.size:
                break
            now, a, b = now[go], a[go], b[go]
            begin = np.maximum(np.maximum(free[go], self.end[a] + delay[0, now]), self.end[b] + delay[1, now])
            self.start[now], self.end[now] = begin, begin + cost[now]
            free[go] = self.end[now]
            done[now] = True
            self.place[go] += 1
            waves.append(now)
        self.order = np.concatenate(waves) if waves else np.zeros(0, np.int64)
        self.finished = bool((self.place == length).all())

    @cached_property
    def turn(self) -> Array:
        """[kinds, stages, micros]: the place of an op in ``order``."""
        found = np.full(self.table.size, -1, np.int64)
        found[self.order] = np.arange(len(self.order))
        return found.reshape(self.table.at.shape)


def _per_op(table: Table, costs: Costs) -> Array:
    each = np.array([costs.F, costs.B, costs.W], float)
    return np.append(np.repeat(each.ravel(), table.micros), 0.0)


def _delays(table: Table, message: float) -> Array:
    """[2, size + 1]: how much later than its end each need arrives; nothing where both are on one rank."""
    place = np.append(np.tile(np.repeat(table.schedule.placement, table.micros), len(KINDS)), -1)
    apart = place[table.needed] != place[None, :]
    return np.where(apart & (table.needed < table.size), message, 0.0)


def replay(schedule: Schedule, costs: Costs) -> Timeline:
    """The schedule run with these costs. Raises ScheduleError, with the grid, when it cannot come to its end."""
    table = Table(schedule)
    kinds = tuple(kind for kind in KINDS if any(op.kind == kind for row in schedule.rows for op in row))
    walk = _walked(table, costs, kinds)
    rank_of, start, end = schedule.placement, walk.start.tolist(), walk.end.tolist()
    codes = sorted(walk.order.tolist(), key=lambda code: start[code])
    ops = [table.op(code) for code in codes]
    events = (Event(rank_of[op.stage], op, start[c], end[c]) for op, c in zip(ops, codes, strict=True))
    return Timeline(tuple(events), schedule.ranks)


def validate(schedule: Schedule, kinds: Sequence[Kind] = KINDS) -> Walk:
    """Proves the schedule; returns one order in which it runs. Raises ScheduleError unless every op of ``kinds`` runs
    exactly once, on its stage's rank, after what it needs, and what sums gradients runs in microbatch order (so that
    all schedules add the same numbers in the same order): the W of each stage, and the F of a last one, where the loss
    has the gradients of its weights at hand.
    """
    if tuple(kinds) not in schedule.proofs:
        schedule.proofs[tuple(kinds)] = _validated(schedule, kinds)
    walk: Walk = schedule.proofs[tuple(kinds)]
    return walk


def _validated(schedule: Schedule, kinds: Sequence[Kind]) -> Walk:
    name, placement = schedule.name, schedule.placement
    if schedule.chains < 1 or sorted({*placement}) != [*range(schedule.ranks)] or len(placement) % schedule.chains:
        raise ScheduleError(
            f"{name}: stages are placed on ranks {placement}, but there are {schedule.ranks} rows"
            + (f" and {schedule.chains} chains" if schedule.chains != 1 else "")
        )
    if any(len({*placement[i :: schedule.depth]}) < schedule.chains for i in range(schedule.depth)):
        raise ScheduleError(f"{name}: two copies of one stage are on one rank; every copy needs a rank of its own")
    ops = sum(map(len, schedule.rows))
    if ops < schedule.micros:
        raise ScheduleError(f"{name} names {schedule.micros} microbatches and has {ops} ops; every one needs its own")
    table = Table(schedule)
    if not _complete(table, kinds):
        _explain(schedule, kinds)
    return _walked(table, None, kinds)


def _walked(table: Table, costs: Costs | None, kinds: Sequence[Kind]) -> Walk:
    walk = Walk(table, costs, kinds)
    if not walk.finished:
        raise ScheduleError(_stuck(table.schedule, walk.place.tolist()))
    return walk


def _complete(table: Table, kinds: Sequence[Kind]) -> bool:
    """Whether every op of ``kinds``, and no other, stands once on its rank, what sums gradients in order."""
    whole = np.concatenate([*table.rows, np.zeros(0, np.int64)])
    each = table.stages * table.micros
    wanted = np.concatenate([np.arange(each) + each * k for k, kind in enumerate(KINDS) if kind in kinds])
    if len(whole) != len(wanted) or not np.array_equal(np.sort(whole), wanted):
        return False
    placement = np.array(table.schedule.placement)
    at_home = all((placement[row // table.micros % table.stages] == r).all() for r, row in enumerate(table.rows))
    sums = *table.at[KINDS.index("W")], *table.at[KINDS.index("F"), table.schedule.depth - 1 :: table.schedule.depth]
    return at_home and ("W" not in kinds or bool((np.diff(sums, axis=1) > 0).all()))


def _explain(schedule: Schedule, kinds: Sequence[Kind]) -> None:
    """Raises the ScheduleError that says what is wrong with a table that is not complete."""
    seen: set[Op] = set()
    added: dict[tuple[str, int], int] = {}
    for rank, row in enumerate(schedule.rows):
        for at, op in enumerate(row):
            if op in seen or (fault := _fault(schedule, rank, op, kinds, added)):
                fault = "a second time" if op in seen else fault
                marks = [at if r == rank else -1 for r in range(schedule.ranks)]
                raise ScheduleError(f"{schedule.name}: rank {rank} runs {op} {fault}\n{grid(schedule, marks)}")
            seen.add(op)
    every = [Op(k, s, m) for k in kinds for s in range(schedule.stages) for m in range(schedule.micros)]
    missing = [str(op) for op in every if op not in seen]
    some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    where = grid(schedule, [-1] * schedule.ranks)
    raise ScheduleError(f"{schedule.name}: {len(missing)} of {len(every)} ops missing: {some}\n{where}")


def _fault(schedule: Schedule, rank: int, op: Op, kinds: Sequence[Kind], added: dict[tuple[str, int], int]) -> str:
    """Why ``op`` cannot stand on this rank, or "". ``added[kind, stage]`` is the last microbatch that was summed."""
    kind, stage, micro = op
    if kind not in kinds or not 0 <= stage < schedule.stages or not 0 <= micro < schedule.micros:
        return f"but has {schedule.stages} stages, {schedule.micros} microbatches and the passes {', '.join(kinds)}"
    if schedule.placement[stage] != rank:
        return f"although stage {stage} is on rank {schedule.placement[stage]}"
    if "W" in kinds and (kind == "W" or (kind == "F" and (stage + 1) % schedule.depth == 0)):
        if micro < added.get((kind, stage), -1):
            which = "W of a stage" if kind == "W" else "F of a last stage"
            return f"after {kind}{stage}.{added[kind, stage]}, but the {which} run in microbatch order"
        added[kind, stage] = micro
    return ""


def _stuck(schedule: Schedule, at: Sequence[int]) -> str:
    """Who waits for what, in words, then the grid with the places where the ranks stand."""
    done = {op for row, n in zip(schedule.rows, at, strict=True) for op in row[:n]}
    lines = [f"{schedule.name}: nothing can go on after {len(done)} ops"]
    for rank, (row, n) in enumerate(zip(schedule.rows, at, strict=True)):
        if n < len(row):
            waits = [op for op in needs(row[n], schedule.depth) if op not in done]
            reasons = " and ".join(f"{op} from rank {schedule.placement[op.stage]}" for op in waits)
            lines.append(f"rank {rank} stands at {row[n]} and waits for {reasons or 'nothing'}")
    return "\n".join([*lines, grid(schedule, at)])


def grid(schedule: Schedule, at: Sequence[int], around: int = 8) -> str:
    """The rows as text, with the op at index ``at[rank]`` in brackets (none if -1), cut to its surroundings."""
    lines = []
    for rank, (row, n) in enumerate(zip(schedule.rows, at, strict=True)):
        first, last = max(min(n, len(row)) - around, 0), max(n, 0) + around
        words = [f"[{op}]" if i == n else str(op) for i, op in enumerate(row)][first:last]
        dots = ["..."] if first > 0 else [], ["..."] if last < len(row) else []
        lines.append(f"  rank {rank}: " + " ".join([*dots[0], *words, *dots[1]]))
    return "\n".join(lines)
