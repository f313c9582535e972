"""The one event loop: it makes schedules.

A policy answers one question, "this rank is free and these passes are ready: which one?", and ``record`` writes down
what it did, which is a schedule. Each pass of each stage takes its microbatches in order, so what is ready on a rank
is a short table, (kind, stage) -> lowest microbatch, and a step costs time in proportion to its ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from hpcpipe.schedule.op import KINDS, Kind, Op, Schedule, ScheduleError, needs
from hpcpipe.schedule.timeline import Event, Timeline

Pass = tuple[Kind, int]  # a kind and a stage


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
    started: dict[Pass, int] = field(default_factory=dict)
    tally: list[dict[Kind, int]] = field(default_factory=list)  # of each rank, ops started by kind, in the order F B W

    def in_flight(self, stage: int) -> int:
        """Microbatches whose forward has started on the stage and whose B has not."""
        return self.started.get(("F", stage), 0) - self.started.get(("B", stage), 0)


Ready = Mapping[Pass, int]  # the lowest microbatch that is ready, of the passes that have one
Choose = Callable[[int, Ready, State], Op | None]


class Loop:
    """One run: an agenda of "this pass is done" as its rank and others learn it, and a question to the policy."""

    def __init__(
        self, choose: Choose, placement: Sequence[int], micros: int, costs: Costs, kinds: Sequence[Kind], depth: int
    ) -> None:
        self.choose, self.costs, self.micros = choose, costs, micros
        ranks = range(max(placement) + 1)
        self.state = State(tuple(placement), micros, rows=[[] for _ in ranks])
        self.state.tally = [dict.fromkeys(KINDS, 0) for _ in ranks]
        self.events: list[Event] = []
        self.idle = set(ranks)
        self.ready: list[dict[Pass, int]] = [{} for _ in ranks]
        self._serial = count()
        self._agenda: list[tuple[float, int, int, Pass, bool]] = []
        # The rule is the same for every microbatch, so it is turned round once per pass: how many microbatches of each
        # of its needs have come, per (pass, rank) what learns of it there, and the other ranks where anything does.
        self._come: dict[Pass, list[int]] = {}
        self._learns: dict[tuple[Pass, int], list[tuple[Pass, int]]] = {}
        self._others: dict[Pass, set[int]] = {}
        for key in [(kind, stage) for kind in kinds for stage in range(len(placement))]:
            before = [op for op in needs(Op(*key, 0), depth) if op.kind in kinds]
            there = placement[key[1]]
            self._come[key] = [0] * len(before)
            self.state.started[key] = 0
            for i, op in enumerate(before):
                self._learns.setdefault(((op.kind, op.stage), there), []).append((key, i))
                self._others.setdefault((op.kind, op.stage), set()).update({there} - {placement[op.stage]})
            if not before:
                self.ready[there][key] = 0

    def run(self) -> None:
        """Runs until nothing is left to do or nothing can go on."""
        self._ask(self.idle)
        while self._agenda:
            self._ask(self._due() & self.idle)

    def _ask(self, ranks: set[int]) -> None:
        for rank in sorted(ranks):
            op = self.choose(rank, self.ready[rank], self.state)
            if op is not None:
                self._begin(rank, op)

    def _due(self) -> set[int]:
        """Moves the clock to the next time on the agenda and returns the ranks for which something is new."""
        agenda, touched = self._agenda, set()
        self.state.time = now = agenda[0][0]
        while agenda and agenda[0][0] == now:
            _, _, rank, done, own = heappop(agenda)
            touched.add(rank)
            if own:
                self.idle.add(rank)
            for key, i in self._learns.get((done, rank), ()):
                come = self._come[key]
                come[i] += 1
                if come[i] == min(come) > self.state.started[key]:
                    self.ready[rank].setdefault(key, self.state.started[key])
        return touched

    def _begin(self, rank: int, op: Op) -> None:
        """Starts ``op`` now: its rank is free at its end, and whoever needs it learns of it then or a message later."""
        kind, stage, micro = op
        key: Pass = (kind, stage)
        now = self.state.time
        end = now + self.costs.of(kind)[stage]
        self.idle.discard(rank)
        self.state.rows[rank].append(op)
        self.state.started[key] = micro + 1
        self.state.tally[rank][kind] += 1
        if micro + 1 < min(self._come[key], default=self.micros):
            self.ready[rank][key] = micro + 1
        else:
            del self.ready[rank][key]
        self.events.append(Event(rank, op, now, end))
        heappush(self._agenda, (end, next(self._serial), rank, key, True))
        for there in self._others.get(key, ()):
            heappush(self._agenda, (end + self.costs.message, next(self._serial), there, key, False))


def run(
    choose: Choose,
    placement: Sequence[int],
    micros: int,
    costs: Costs,
    kinds: Sequence[Kind] = KINDS,
    chains: int = 1,
) -> Timeline:
    """What the policy does with these costs. Raises ScheduleError when it leaves work undone."""
    loop = Loop(choose, placement, micros, costs, kinds, len(placement) // chains)
    loop.run()
    if len(loop.events) < len(kinds) * len(placement) * micros:
        could = (f"rank {r} could do {_lowest(ready)}" for r, ready in enumerate(loop.ready) if ready)
        raise ScheduleError(f"the policy stopped after {len(loop.events)} ops with work left: {', '.join(could)}")
    return Timeline(tuple(loop.events), len(loop.state.rows))


def _lowest(ready: Ready) -> Op:
    return min(Op(*key, micro) for key, micro in ready.items())


def record(
    name: str,
    choose: Choose,
    placement: Sequence[int],
    micros: int,
    costs: Costs,
    kinds: Sequence[Kind] = KINDS,
    chains: int = 1,
) -> Schedule:
    """The schedule that the policy makes with these costs."""
    rows = run(choose, placement, micros, costs, kinds, chains).rows
    return Schedule(name, rows, tuple(placement), micros, chains)
