"""The search: proven, never worse than where it starts, within the memory, the same on every rank."""

from __future__ import annotations

import random
from contextlib import suppress
from math import inf

import pytest

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import SCHEDULES, build, consecutive, folded, in_turn, period
from hpcpipe.schedule.op import Schedule, ScheduleError
from hpcpipe.schedule.replay import replay, validate
from hpcpipe.schedule.search import search


def named(stages: int, ranks: int, micros: int) -> list[Schedule]:
    found = []
    for name, family in SCHEDULES.items():
        with suppress(ScheduleError):
            found += [build(name, stages, ranks, micros)] if family.chains == 1 else []
    return found


def most_held(schedule: Schedule, hold: list[float]) -> list[float]:
    """Bytes that each rank holds at most, counted op by op."""
    most = []
    for row in schedule.rows:
        now = peak = 0.0
        for op in row:
            now += {"F": 1, "B": 0, "W": -1}[op.kind] * hold[op.stage]
            peak = max(peak, now)
        most.append(peak)
    return most


def costs_of(stages: int, seed: int) -> Costs:
    rng = random.Random(seed)
    F, B, W = (tuple(rng.choice((1.0, 1.5, 2.0, 3.0)) for _ in range(stages)) for _ in range(3))
    return Costs(F, B, W, rng.choice((0.0, 0.1, 0.5)))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("stages", "ranks", "micros"), [(2, 2, 5), (4, 4, 8), (4, 2, 6), (5, 3, 4), (3, 3, 1)])
def test_a_search_is_proven_and_never_worse_than_where_it_starts(
    stages: int, ranks: int, micros: int, seed: int
) -> None:
    costs, hold = costs_of(stages, seed), [1.0 + s % 2 for s in range(stages)]
    places = [consecutive(stages, ranks), in_turn(stages, ranks)] + (
        [folded(stages, ranks)] if stages == 2 * ranks else []
    )
    start = named(stages, ranks, micros)
    found = search(places, micros, costs, hold, [inf] * ranks, start)
    validate(found)
    assert period(replay(found, costs)) <= min(period(replay(s, costs)) for s in start) * (1 + 1e-9)
    assert found == search(places, micros, costs, hold, [inf] * ranks, start)
    limit = [0.6 * max(most_held(found, hold)) + max(hold) * stages / ranks] * ranks
    tight = search(places, micros, costs, hold, limit, start)
    validate(tight)
    assert all(m <= most * (1 + 1e-6) for m, most in zip(most_held(tight, hold), limit, strict=True))


def test_where_no_name_was_made_for_the_costs_the_search_is_better() -> None:
    """A heavy last stage: 1F1B and the zero-bubble orders, made for equal costs, wait more."""
    costs = Costs((1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 1.0, 2.0), 0.1)
    start = named(4, 4, 8)
    found = search([consecutive(4, 4)], 8, costs, [1.0] * 4, [4.0] * 4, start)
    fitting = [s for s in start if max(most_held(s, [1.0] * 4)) <= 4.0]
    assert fitting
    assert period(replay(found, costs)) <= min(period(replay(s, costs)) for s in fitting)


def test_memory_that_nothing_fits_into_is_refused() -> None:
    with pytest.raises(ScheduleError, match="allow") as error:
        search([consecutive(2, 2)], 4, Costs.unit(2), [3.0, 3.0], [2.0, 2.0])
    assert "\n" not in str(error.value)
