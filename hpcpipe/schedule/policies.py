"""Named schedules, each a policy of a few lines for the engine.

A policy is told which ops are ready on a free rank and picks one, or None to wait. Both policies here take any number
of microbatches and any placement: one stage per rank, consecutive stages on one rank, or stages strewn over the ranks.
W follows its B at once, so B must run in microbatch order on every stage, and does: the lowest ready one is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from itertools import groupby
from math import lcm

from hpcpipe.schedule.engine import Choose, Costs, State, record, validate
from hpcpipe.schedule.op import Op, Schedule, ScheduleError, boundaries


def gpipe(placement: Sequence[int], micros: int) -> Choose:
    """All forwards of the rank, then all backwards (Huang et al., arXiv:1811.06965)."""
    mine = [sum(r == rank for r in placement) * micros for rank in range(max(placement) + 1)]

    def choose(rank: int, ready: Set[Op], state: State) -> Op | None:
        forwards_left = len(state.rows[rank]) < mine[rank]
        kinds = "F" if forwards_left else "WB"
        return _first(ready, kinds)

    return choose


def one_f_one_b(placement: Sequence[int], micros: int) -> Choose:
    """Backward as soon as one is ready; forward while few enough microbatches are in flight.

    The limit for a stage is 1 + the messages between it and the end. For one stage per rank that is a warm-up of P-s-1
    forwards, then one forward, one backward (PipeDream-flush; Narayanan et al., arXiv:2104.04473, section 2.2).
    """
    crossings = boundaries(placement)
    limit = [1 + sum(b >= stage for b in crossings) for stage in range(len(placement))]

    def choose(rank: int, ready: Set[Op], state: State) -> Op | None:
        # A microbatch that has entered a run of stages on this rank goes through all of it.
        if state.rows[rank] and (last := state.rows[rank][-1]).kind == "F":
            onward = Op("F", last.stage + 1, last.micro)
            if onward in ready:
                return onward
        allowed = {op for op in ready if op.kind != "F" or state.in_flight(op.stage) < limit[op.stage]}
        return _first(allowed, "WBF")

    return choose


def forward(placement: Sequence[int], micros: int) -> Choose:
    """Forward only, for evaluation: the lowest microbatch that is ready."""
    return lambda rank, ready, state: _first(ready, "F")


SCHEDULES: dict[str, Callable[[Sequence[int], int], Choose]] = {"gpipe": gpipe, "1f1b": one_f_one_b}


def build(name: str, stages: int, ranks: int, micros: int, placement: Sequence[int] | None = None) -> Schedule:
    """The named schedule, proven. Without a placement, each rank gets consecutive stages, as evenly as they go.

    Raises ScheduleError for an unknown name or a shape that no schedule can have.
    """
    if name not in SCHEDULES:
        raise ScheduleError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    where = _placement(stages, ranks, micros, placement)
    schedule = record(name, SCHEDULES[name](where, micros), where, micros, _even(where))
    validate(schedule)
    return schedule


def forward_only(placement: Sequence[int], micros: int) -> Schedule:
    """The schedule of an evaluation: every forward, nothing else."""
    where = _placement(len(placement), max(placement) + 1, micros, placement)
    schedule = record("forward", forward(where, micros), where, micros, _even(where), kinds=("F",))
    validate(schedule, kinds=("F",))
    return schedule


def _first(ready: Set[Op], kinds: str) -> Op | None:
    """The ready op of the first of ``kinds`` that has one: lowest microbatch, then deepest stage."""
    for kind in kinds:
        found = [op for op in ready if op.kind == kind]
        if found:
            return min(found, key=lambda op: (op.micro, -op.stage))
    return None


def _placement(stages: int, ranks: int, micros: int, placement: Sequence[int] | None) -> tuple[int, ...]:
    if ranks < 1 or micros < 1:
        raise ScheduleError(f"a pipeline of {ranks} ranks and {micros} microbatches is empty; use at least 1 of each")
    if stages < ranks:
        raise ScheduleError(f"{stages} stages cannot occupy {ranks} ranks; use at most {stages} ranks or more stages")
    where = tuple(placement) if placement is not None else tuple(s * ranks // stages for s in range(stages))
    if len(where) != stages or set(where) != set(range(ranks)):
        raise ScheduleError(f"placement {where} does not put {stages} stages on all of ranks 0 to {ranks - 1}")
    return where


def _even(placement: Sequence[int]) -> Costs:
    """Whole-number costs with which every run of consecutive stages on one rank takes the same time."""
    runs = [len(list(run)) for _, run in groupby(placement)]
    share = tuple(lcm(*runs) // n for n in runs for _ in range(n))
    return Costs(share, share, share)
