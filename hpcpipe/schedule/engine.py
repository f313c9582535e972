"""The one event loop: it makes schedules, proves them and predicts how long they take.

A policy answers one question, "this rank is free and these ops are ready: which one?". ``record`` writes down what a
policy did, which is a schedule; ``replay`` runs a schedule, whose policy is "the next op of my row"; ``validate`` is a
replay that must come to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from hpcpipe.schedule.op import KINDS, Kind, Op, Schedule, ScheduleError, needs
from hpcpipe.schedule.timeline import Event, Timeline


@dataclass(frozen=True)
class Costs:
    """Time of each pass of each stage, and of one message between two ranks (which occupies neither)."""

    F: tuple[float, ...]
    B: tuple[float, ...]
    W: tuple[float, ...]
    message: float = 0.0

    @classmethod
    def unit(cls, stages: int) -> Costs:
        """Every pass takes 1, messages nothing."""
        return cls((1,) * stages, (1,) * stages, (1,) * stages)

    def of(self, kind: Kind) -> tuple[float, ...]:
        """The times of one kind of pass, per stage."""
        return self.F if kind == "F" else self.B if kind == "B" else self.W


@dataclass
class State:
    """What a policy may look at: the clock, what every rank has started so far, and the shape of the pipeline."""

    placement: tuple[int, ...]
    micros: int
    time: float = 0.0
    rows: list[list[Op]] = field(default_factory=list)
    started: dict[tuple[Kind, int], int] = field(default_factory=dict)

    def in_flight(self, stage: int) -> int:
        """Microbatches whose forward has started on the stage and whose B has not."""
        return self.started.get(("F", stage), 0) - self.started.get(("B", stage), 0)


Choose = Callable[[int, Set[Op], State], Op | None]


class Loop:
    """One run: an agenda of "this op is ready" and "this rank is free", and a question to the policy at each."""

    def __init__(self, choose: Choose, placement: Sequence[int], micros: int, costs: Costs, kinds: Sequence[Kind]):
        self.choose, self.costs, self.micros = choose, costs, micros
        self.state = State(tuple(placement), micros, rows=[[] for _ in range(max(placement) + 1)])
        self.events: list[Event] = []
        self.idle: set[int] = set()
        self.ready: list[set[Op]] = [set() for _ in self.state.rows]
        self._serial = count()
        self._agenda: list[tuple[float, int, int, Op | None]] = []
        self._missing: dict[Op, tuple[int, float]] = {}
        # The rule is the same for every microbatch, so it is turned round once per kind and stage.
        self._needed: dict[tuple[Kind, int], int] = {}
        self._enables: dict[tuple[Kind, int], list[tuple[Kind, int]]] = {}
        for kind in kinds:
            for stage in range(len(placement)):
                before = needs(Op(kind, stage, 0), len(placement))
                self._needed[kind, stage] = len(before)
                for op in before:
                    self._enables.setdefault((op.kind, op.stage), []).append((kind, stage))

    def run(self) -> None:
        """Runs until nothing is left to do or nothing can go on."""
        placement = self.state.placement
        for rank in range(len(self.state.rows)):
            self._at(0.0, rank, None)
        for (kind, stage), before in self._needed.items():
            for micro in range(self.micros if before == 0 else 0):
                self._at(0.0, placement[stage], Op(kind, stage, micro))
        while self._agenda:
            for rank in sorted(self._due() & self.idle):
                op = self.choose(rank, self.ready[rank], self.state)
                if op is not None:
                    self._begin(rank, op)

    def _at(self, time: float, rank: int, op: Op | None) -> None:
        heappush(self._agenda, (time, next(self._serial), rank, op))

    def _due(self) -> set[int]:
        """Moves the clock to the next time on the agenda and returns the ranks for which something is new."""
        agenda, touched = self._agenda, set()
        self.state.time = now = agenda[0][0]
        while agenda and agenda[0][0] == now:
            _, _, rank, op = heappop(agenda)
            touched.add(rank)
            if op is None:
                self.idle.add(rank)
            else:
                self.ready[rank].add(op)
        return touched

    def _begin(self, rank: int, op: Op) -> None:
        """Starts ``op`` now: its rank is free at its end, and what it enables is ready when its last need has come."""
        kind, stage, micro = op
        now, placement = self.state.time, self.state.placement
        end = now + self.costs.of(kind)[stage]
        self.idle.discard(rank)
        self.ready[rank].discard(op)
        self.state.rows[rank].append(op)
        self.state.started[kind, stage] = self.state.started.get((kind, stage), 0) + 1
        self.events.append(Event(rank, op, now, end))
        for key in self._enables.get((kind, stage), ()):
            after, there = Op(*key, micro), placement[key[1]]
            left, when = self._missing.get(after, (self._needed[key], 0.0))
            left, when = left - 1, max(when, end if there == rank else end + self.costs.message)
            self._missing[after] = (left, when)
            if left == 0:
                self._at(when, there, after)
        self._at(end, rank, None)


def run(choose: Choose, placement: Sequence[int], micros: int, costs: Costs, kinds: Sequence[Kind] = KINDS) -> Timeline:
    """What the policy does with these costs. Raises ScheduleError when it leaves work undone."""
    loop = Loop(choose, placement, micros, costs, kinds)
    loop.run()
    if len(loop.events) < len(kinds) * len(placement) * micros:
        could = (f"rank {r} could do {min(ops)}" for r, ops in enumerate(loop.ready) if ops)
        raise ScheduleError(f"the policy stopped after {len(loop.events)} ops with work left: {', '.join(could)}")
    return Timeline(tuple(loop.events), len(loop.state.rows))


def record(
    name: str, choose: Choose, placement: Sequence[int], micros: int, costs: Costs, kinds: Sequence[Kind] = KINDS
) -> Schedule:
    """The schedule that the policy makes with these costs."""
    return Schedule(name, run(choose, placement, micros, costs, kinds).rows, tuple(placement), micros)


def replay(schedule: Schedule, costs: Costs) -> Timeline:
    """The schedule run with these costs. Raises ScheduleError, with the grid, when it cannot come to its end."""
    rows = schedule.rows
    kinds = tuple(kind for kind in KINDS if any(op.kind == kind for row in rows for op in row))

    def next_of_row(rank: int, ready: Set[Op], state: State) -> Op | None:
        at = len(state.rows[rank])
        op = rows[rank][at] if at < len(rows[rank]) else None
        return op if op in ready else None

    loop = Loop(next_of_row, schedule.placement, schedule.micros, costs, kinds)
    loop.run()
    if len(loop.events) < sum(len(row) for row in rows):
        raise ScheduleError(_stuck(schedule, [len(row) for row in loop.state.rows]))
    return Timeline(tuple(loop.events), len(loop.state.rows))


def validate(schedule: Schedule, kinds: Sequence[Kind] = KINDS) -> Timeline:
    """Proves the schedule; returns its timeline with unit costs. Raises ScheduleError unless every op of ``kinds`` runs
    exactly once, on its stage's rank, after what it needs, and the W of each stage run in microbatch order (so that all
    schedules add the same numbers in the same order).
    """
    name, placement = schedule.name, schedule.placement
    if sorted(set(placement)) != list(range(schedule.ranks)):
        raise ScheduleError(f"{name}: stages are placed on ranks {placement}, but there are {schedule.ranks} rows")
    seen: set[Op] = set()
    added = [-1] * schedule.stages
    for rank, row in enumerate(schedule.rows):
        for at, op in enumerate(row):
            if op in seen or (fault := _fault(schedule, rank, op, kinds, added)):
                fault = "a second time" if op in seen else fault
                marks = [at if r == rank else -1 for r in range(schedule.ranks)]
                raise ScheduleError(f"{name}: rank {rank} runs {op} {fault}\n{grid(schedule, marks)}")
            seen.add(op)
    every = [Op(k, s, m) for k in kinds for s in range(schedule.stages) for m in range(schedule.micros)]
    missing = [str(op) for op in every if op not in seen]
    if missing:
        some = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        nowhere = [-1] * schedule.ranks
        raise ScheduleError(f"{name}: {len(missing)} of {len(every)} ops missing: {some}\n{grid(schedule, nowhere)}")
    return replay(schedule, Costs.unit(schedule.stages))


def _fault(schedule: Schedule, rank: int, op: Op, kinds: Sequence[Kind], added: list[int]) -> str:
    """Why ``op`` cannot stand on this rank, or "". ``added[stage]`` is the last microbatch of the stage's W so far."""
    kind, stage, micro = op
    if kind not in kinds or not 0 <= stage < schedule.stages or not 0 <= micro < schedule.micros:
        return f"but has {schedule.stages} stages, {schedule.micros} microbatches and the passes {', '.join(kinds)}"
    if schedule.placement[stage] != rank:
        return f"although stage {stage} is on rank {schedule.placement[stage]}"
    if kind == "W":
        if micro < added[stage]:
            return f"after W{stage}.{added[stage]}, but the W of a stage run in microbatch order"
        added[stage] = micro
    return ""


def _stuck(schedule: Schedule, at: Sequence[int]) -> str:
    """Who waits for what, in words, then the grid with the places where the ranks stand."""
    done = {op for row, n in zip(schedule.rows, at, strict=True) for op in row[:n]}
    lines = [f"{schedule.name}: nothing can go on after {len(done)} ops"]
    for rank, (row, n) in enumerate(zip(schedule.rows, at, strict=True)):
        if n < len(row):
            waits = [op for op in needs(row[n], schedule.stages) if op not in done]
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
