"""The schedules by name: what each is good for, which shapes it can have, and one door to build any of them.

P ranks, M microbatches; F, B and W are the times of the passes of one rank's share of the layers, m is what it holds of
one microbatch from F to W. ``idle`` is what the papers count: a rank's time from its own first op to its own last one,
in which it does nothing. Where a paper has the backward in one piece, its figure is undercut here, because the gradient
leaves after B; the papers' own figures are named where they differ. The tests hold the table, for F = B = W.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import lcm
from typing import NamedTuple

from hpcpipe.schedule import orders, policies
from hpcpipe.schedule.engine import Choose, Costs, record
from hpcpipe.schedule.op import Kind, Schedule, ScheduleError
from hpcpipe.schedule.replay import validate
from hpcpipe.schedule.timeline import Timeline

Placement = tuple[int, ...]


class Shape(NamedTuple):
    """What a schedule is built for; ``stages`` are those of one copy of the model."""

    name: str
    stages: int
    ranks: int
    micros: int
    placement: Placement
    group: int


class Family(NamedTuple):
    """A named schedule: one line about it, how it is made, where its stages are."""

    about: str
    make: Callable[[Shape], Schedule]
    place: Callable[[int, int], Placement]
    per_rank: int = 0  # stages of one copy that every rank must have; 0 = any number
    usual: int = 1  # and what it has where nothing is said
    chains: int = 1  # copies of the model
    anywhere: bool = False  # takes any placement


def consecutive(stages: int, ranks: int) -> Placement:
    """Neighbours together, as evenly as they go: 0 0 1 1."""
    return tuple(s * ranks // stages for s in range(stages))


def in_turn(stages: int, ranks: int) -> Placement:
    """Round the ranks: 0 1 0 1."""
    return tuple(s % ranks for s in range(stages))


def folded(stages: int, ranks: int) -> Placement:
    """Down and up, the V: 0 1 1 0. For two copies of the model it puts the second one the other way round."""
    return (*range(ranks), *reversed(range(ranks)))


def _interleaved(shape: Shape) -> Schedule:
    rows = orders.interleaved(shape.stages, shape.ranks, shape.micros, shape.group or shape.ranks)
    return Schedule(shape.name, rows, shape.placement, shape.micros)


def _zero_bubble(shape: Shape, pace: int, room: int) -> Schedule:
    rows = orders.zero_bubble(shape.placement, shape.micros, pace)
    return _filled(shape, rows, [room * shape.placement.count(rank) for rank in range(shape.ranks)])


def _filled(shape: Shape, rows: Sequence[orders.Row], room: Sequence[int]) -> Schedule:
    return _played(shape, policies.follow(rows, room))


def _played(shape: Shape, policy: Choose) -> Schedule:
    chains = SCHEDULES[shape.name].chains
    return record(shape.name, policy, shape.placement, shape.micros, _even(shape.placement), chains=chains)


SCHEDULES: dict[str, Family] = {
    "gpipe": Family(
        "all forwards, then all backwards: idle (P-1)(F+B), published (P-1)(F+B+W); memory M m",
        lambda s: _played(s, policies.gpipe(s.placement, s.micros)),
        consecutive,
        anywhere=True,
    ),
    "1f1b": Family(
        "forward and backward in turn: idle (P-1)(F+B), published (P-1)(F+B+W); memory P m",
        lambda s: _played(s, policies.one_f_one_b(s.placement, s.micros)),
        consecutive,
        anywhere=True,
    ),
    "interleaved": Family(
        "1f1b with v stages per rank, in groups: idle (P-1)(F+B)/v; memory (P + (P-1)/v) m for groups of P",
        _interleaved,
        in_turn,
        usual=2,
    ),
    "zb_h1": Family(
        "1f1b with W in the holes: idle (P-1)(F+B-W); memory P m",
        lambda s: _zero_bubble(s, 1, s.ranks),
        consecutive,
    ),
    "zb_h2": Family(
        "zb_h1 with forwards until the first gradient is there: idle (P-1)(F+B-2W); memory (2P-1) m",
        lambda s: _zero_bubble(s, 2, 2 * s.ranks - 1),
        consecutive,
    ),
    "zb_v": Family(
        "down the ranks and up again: no idle time where F = B = W; memory P m",
        lambda s: _filled(s, orders.folded(s.ranks, s.micros, overlap=False), [2 * s.ranks] * s.ranks),
        folded,
        per_rank=2,
        usual=2,
    ),
    "v_half": Family(
        "zb_v with half the memory: idle about P/2 (F+B+W); memory (P+2)/2 m, rounded down",
        lambda s: _filled(s, orders.repeated(orders.v_half(s.ranks), s.micros), [2 * ((s.ranks + 2) // 2)] * s.ranks),
        folded,
        per_rank=2,
        usual=2,
    ),
    "v_min": Family(
        "zb_v with a third of the memory: idle about 2P/3 (F+B+W), more where not F = B = W; memory (P+4)/3 m",
        lambda s: _filled(s, orders.repeated(orders.v_min(s.ranks), s.micros), [2 * ((s.ranks + 4) // 3)] * s.ranks),
        folded,
        per_rank=2,
        usual=2,
    ),
    "dualpipe_v": Family(
        "zb_v with every F next to a B: no idle time, published (P-1)(F+2B-W)/2; memory (P + 1/2) m",
        lambda s: _filled(s, orders.folded(s.ranks, s.micros, overlap=True), [2 * s.ranks + 1] * s.ranks),
        folded,
        per_rank=2,
        usual=2,
    ),
    "dualpipe": Family(
        "two copies of the model from both ends: no idle time, published (P/2-1)(F+2B-W); memory (P+1) m",
        lambda s: _filled(s, orders.mirrored(s.ranks, s.micros), [s.ranks + 1] * s.ranks),
        folded,
        per_rank=1,
        chains=2,
    ),
}


def default_stages(name: str, ranks: int) -> int:
    """How many stages the schedule usually cuts (one copy of) the model into."""
    return _family(name).usual * ranks


def build(
    name: str, stages: int, ranks: int, micros: int, placement: Sequence[int] | None = None, *, group: int = 0
) -> Schedule:
    """The named schedule, proven.

    ``stages`` of one copy of the model, 0 for the usual number; ``micros`` microbatches for each copy. Interleaved
    takes a ``group``: how many microbatches run one after the other through one stage before the rank turns to its next
    one. ``ranks`` (which 0 stands for) is depth-first, as in Megatron, ``micros`` is breadth-first (Lamy-Poirier,
    arXiv:2211.05953), Llama 3 tunes it in between. Raises ScheduleError for an unknown name or an impossible shape.
    """
    schedule = draft(name, stages, ranks, micros, placement, group=group)
    validate(schedule)
    return schedule


def draft(
    name: str, stages: int, ranks: int, micros: int, placement: Sequence[int] | None = None, *, group: int = 0
) -> Schedule:
    """What ``build`` proves."""
    family = _family(name)
    stages = stages or family.usual * ranks
    _check(name, family, stages, ranks, micros, group)
    where = tuple(placement) if placement is not None else family.place(stages, ranks)
    _check_placement(name, family, stages, ranks, where)
    with _uncollected():
        return family.make(Shape(name, stages, ranks, micros, where, group))


@contextmanager
def _uncollected() -> Iterator[None]:
    """Hundreds of thousands of ops are made and all of them stay: looking for cycles among them takes as long again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def forward_only(placement: Sequence[int], micros: int, chains: int = 1) -> Schedule:
    """The schedule of an evaluation: every forward, nothing else."""
    where = tuple(placement)
    _check_numbers(max(where) + 1, micros)
    schedule = record("forward", policies.forward, where, micros, _even(where), ("F",), chains)
    validate(schedule, ("F",))
    return schedule


def held(schedule: Schedule, rank: int, until: Kind = "W") -> float:
    """The most microbatches that the rank holds at once from their F to their W, or to their B.

    1 is a microbatch on all of one rank's share of the layers; stages count as equally large.
    """
    now = peak = 0
    for op in schedule.rows[rank]:
        now += (op.kind == "F") - (op.kind == until)
        peak = max(peak, now)
    return peak * schedule.ranks / schedule.depth


def period(timeline: Timeline) -> float:
    """The longest time from a rank's first op to its last: what a step takes when the next ones follow closely."""
    return max(row[-1].end - row[0].start for row in timeline.by_rank if row)


def _family(name: str) -> Family:
    if name not in SCHEDULES:
        raise ScheduleError(f"no schedule is called {name!r}; there are {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def _check_numbers(ranks: int, micros: int) -> None:
    if ranks < 1 or micros < 1:
        raise ScheduleError(f"a pipeline of {ranks} ranks and {micros} microbatches is empty; use at least 1 of each")


def _check(name: str, family: Family, stages: int, ranks: int, micros: int, group: int) -> None:
    """Raises ScheduleError where the numbers do not go together."""
    _check_numbers(ranks, micros)
    if family.chains == 2 and ranks % 2:
        raise ScheduleError(
            f"{name} lets rank r and rank P-1-r serve the two copies in opposite order, which {ranks} ranks cannot; "
            f"use {ranks + 1}" + (f" or {ranks - 1}" if ranks > 1 else "")
        )
    if stages < ranks:
        some = f"{stages} stage{'s' * (stages > 1)}"
        raise ScheduleError(f"{some} cannot occupy {ranks} ranks; use {stages} rank{'s' * (stages > 1)} or more stages")
    if family.per_rank and stages != family.per_rank * ranks:
        each = "one stage" if family.per_rank == 1 else f"{family.per_rank} stages"
        raise ScheduleError(
            f"{name} has {each} on every rank: {ranks} ranks need {family.per_rank * ranks}, not {stages}"
        )
    if group and name != "interleaved":
        raise ScheduleError(f"{name} has no groups of microbatches; leave group out, or use interleaved")
    if group < 0:
        raise ScheduleError(f"a group of {group} microbatches is impossible; use 1 to {micros}, or 0 for {ranks}")


def _check_placement(name: str, family: Family, stages: int, ranks: int, where: Placement) -> None:
    """Raises ScheduleError where the schedule cannot have its stages there."""
    if len(where) != stages * family.chains or set(where) != set(range(ranks)):
        raise ScheduleError(f"placement {where} does not put {stages} stages on all of ranks 0 to {ranks - 1}")
    usual = family.place(stages, ranks)
    ordered = family.place is consecutive and where == tuple(sorted(where))
    if not (family.anywhere or ordered or where == usual):
        raise ScheduleError(f"{name} cannot have its stages on ranks {where}; its own placement is {usual}")


def _even(placement: Sequence[int]) -> Costs:
    """Whole-number costs with which every rank takes the same time."""
    stages = Counter(placement)
    share = tuple(lcm(*stages.values()) // stages[rank] for rank in placement)
    return Costs(share, share, share)
