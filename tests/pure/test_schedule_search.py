"""The search: proven, never worse than where it starts, within the memory, the same on every rank."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.schedule import search as searching
from hpcpipe.schedule.crowd import Candidate, Crowd, Shape
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


# --- against the optimum


# Placement, microbatches, F, B, W and bytes of each stage, limit of each rank, message; the shortest time from a rank's
# first to its last op and that of the whole step, proven by an exact solver (CP-SAT of OR-tools 9.15). A rank's first
# op may begin later there than it could, which no row of ops can say: the former time is a bound.
OPTIMA = [
    ("01", 5, "23", "23", "23", "12", "24", 0, 45, 47),
    ("012", 5, "223", "223", "223", "211", "422", 0, 50, 50),
    ("0123", 4, "2223", "2223", "2223", "1212", "2424", 1, 58, 58),
    ("0110", 4, "2223", "2223", "2223", "1121", "46", 1, 62, 62),
    ("012210", 4, "222223", "222223", "222223", "112122", "666", 1, 74, 74),
    ("0101", 4, "2223", "2223", "2223", "2212", "68", 1, 64, 65),
    ("012012", 4, "222223", "222223", "222223", "111112", "446", 1, 76, 76),
    ("0011", 4, "2223", "2223", "2223", "1211", "64", 1, 63, 65),
    ("0112", 4, "2223", "2223", "2223", "2211", "462", 1, 56, 56),
    ("01", 5, "32", "55", "12", "11", "", 1, 46, 49),
    ("012", 5, "223", "222", "213", "211", "", 0, 40, 44),
    ("0123", 4, "4324", "4445", "1144", "1111", "", 0, 58, 61),
    ("0110", 4, "2434", "4532", "2321", "2121", "", 1, 80, 83),
    ("012210", 4, "432324", "433353", "243113", "111221", "", 1, 82, 82),
    ("0101", 4, "4332", "3235", "2324", "2211", "", 1, 76, 83),
    ("012012", 4, "424234", "353542", "444122", "111212", "", 0, 83, 88),
    ("0011", 4, "4434", "4332", "1124", "1111", "", 0, 72, 80),
    ("0112", 4, "3424", "4453", "1344", "2121", "", 0, 88, 91),
    ("01", 5, "32", "23", "22", "12", "24", 0, 38, 38),
    ("012", 5, "423", "522", "223", "112", "224", 1, 72, 72),
    ("0123", 4, "4223", "4345", "4232", "1111", "2222", 1, 86, 86),
    ("0110", 4, "3324", "3523", "3123", "1111", "44", 0, 76, 76),
    ("012210", 4, "423324", "335545", "233131", "121121", "474", 1, 124, 124),
    ("0101", 4, "3443", "2232", "1331", "1111", "44", 1, 71, 71),
    ("012012", 4, "324443", "424235", "131131", "211111", "544", 0, 109, 109),
    ("0011", 4, "3433", "3232", "2312", "1121", "45", 0, 73, 73),
    ("0112", 4, "3344", "3442", "3111", "2221", "472", 1, 92, 92),
]


def times(schedule: Schedule, costs: Costs) -> tuple[float, float]:
    timeline = replay(schedule, costs)
    return period(timeline), timeline.makespan


def gaps(closely: bool, cases: Sequence[Any]) -> list[float]:
    """How much longer than the optimum the found schedule takes, in shares of it, of each case."""
    found = []
    for where, micros, f, b, w, held, most, message, closest, whole in cases:
        costs = Costs(*(tuple(map(float, times)) for times in (f, b, w)), message=message)
        placement, hold = tuple(map(int, where)), [float(h) for h in held]
        limit = [float(m) for m in most] or [inf] * (max(placement) + 1)
        schedule = search([placement], micros, costs, hold, limit, closely=closely)
        validate(schedule)
        assert all(m <= most for m, most in zip(most_held(schedule, hold), limit, strict=True))
        best = closest if closely else whole
        found.append(times(schedule, costs)[not closely] / best - 1)
    return found


@pytest.mark.parametrize(
    ("closely", "cases"),
    [
        (True, OPTIMA[::4]),
        (False, OPTIMA[2::4]),
        pytest.param(True, OPTIMA, marks=pytest.mark.long),
        pytest.param(False, OPTIMA, marks=pytest.mark.long),
    ],
)
def test_small_cases_are_close_to_the_optimum(closely: bool, cases: Sequence[Any]) -> None:
    found = gaps(closely, cases)
    print(f"optimal {sum(g < 1e-9 for g in found)} of {len(found)}, mean {np.mean(found):.2%}, most {max(found):.2%}")
    assert min(found) > -1e-9
    assert sum(gap < 1e-9 for gap in found) >= 0.75 * len(found)
    assert np.mean(found) < 0.01 and max(found) < 0.15


def test_what_is_known_to_be_without_idle_time_is_found_from_nothing() -> None:
    """Equal passes: ZB-H2's and ZB-V's memory, and no schedule to start from."""
    for placement, most in (((0, 1, 2, 3), 7.0), ((0, 1, 2, 3, 3, 2, 1, 0), 8.0)):
        found = search([placement], 12, Costs.unit(len(placement)), [1.0] * len(placement), [most] * 4)
        assert times(found, Costs.unit(len(placement)))[0] == 3 * 12 * len(placement) / 4


# --- any question


@st.composite
def questions(draw: st.DrawFn) -> tuple[tuple[int, ...], int, Costs, list[float], list[float]]:
    """(placement, micros, costs, hold, limit); every rank has room for one microbatch, and perhaps for more."""
    ranks = draw(st.integers(1, 4))
    placement = tuple(draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=5))])))
    each = st.lists(st.sampled_from((0.0, 0.3, 1.0, 1.0, 2.0)), min_size=len(placement), max_size=len(placement))
    costs = Costs(*(tuple(draw(each)) for _ in range(3)), message=draw(st.sampled_from((0.0, 0.0, 0.4))))
    hold = [float(draw(st.sampled_from((0, 1, 2, 2**30 + 1)))) for _ in placement]
    one = [sum(h for h, where in zip(hold, placement, strict=True) if where == rank) for rank in range(ranks)]
    limit = [need * draw(st.sampled_from((1.0, 1.0, 1.5, 2.0, inf))) if need else 0.0 for need in one]
    return placement, draw(st.integers(1, 6)), costs, hold, limit


@given(questions(), st.booleans())
@settings(max_examples=60)
def test_any_question_has_an_answer_that_keeps_the_limit(question, closely: bool) -> None:
    placement, micros, costs, hold, limit = question
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "MOST", 200)
        found = search([placement], micros, costs, hold, limit, closely=closely)
    validate(found)
    assert found.placement == placement and found.micros == micros
    assert all(m <= most * (1 + 1e-9) for m, most in zip(most_held(found, hold), limit, strict=True))


@given(questions(), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=100)
def test_a_candidate_runs_as_its_rows_replay(question, rng: random.Random, strict: bool) -> None:
    """Its ends are those of the replay, or later where it was strict and stuck, or an op too short to be looked for."""
    placement, micros, costs, hold, limit = question
    shape = Shape(placement, micros, costs, hold, limit)
    due = np.array([[rng.random() * 20 + 3 * m for m in range(micros)] for _ in range(3 * len(placement))])
    crowd = Crowd(shape, [Candidate(due, rng.choice((0.0, 1.0)), strict)] * 2, inf, True)
    assert np.array_equal(crowd.end[0], crowd.end[1])
    schedule = shape.schedule("mine", crowd.turn[0])
    validate(schedule)
    exact = {event.op: event.end for event in replay(schedule, costs).events}
    vague = strict or min(t for kind in "FBW" for t in costs.of(kind)) < shape.mean / 4
    for op, end in exact.items():
        mine = crowd.end[0, "FBW".index(op.kind) * len(placement) + op.stage, op.micro]
        assert mine >= end - 1e-9 and (vague or mine <= end + 1e-9)


def test_a_candidate_that_is_too_slow_is_given_up() -> None:
    shape = Shape((0, 1), 30, Costs.unit(2), [1.0, 1.0], [1.0, 1.0])
    due = np.arange(6)[:, None] + 3.0 * np.arange(30)
    slow, cut = (Crowd(shape, [Candidate(due, 0.0, False)], most, False) for most in (inf, 100.0))
    assert 100 < slow.end.max() < inf and cut.end.max() == inf


# --- what is asked wrongly


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 4, Costs.unit(2), [1, 1], [9, 9]), "a search needs a placement of the stages or a schedule to start"),
        (([(0, 1)], 4, Costs.unit(3), [1, 1, 1], [9, 9]), r"placement \(0, 1\) does not put 3 stages on all of ranks"),
        (([(0, 2)], 4, Costs.unit(2), [1, 1], [9, 9]), r"placement \(0, 2\) does not put 2 stages on all of ranks"),
        (([(0, 1)], 4, Costs.unit(2), [3000, 1], [2000, 9]),
         "one microbatch holds 3,000 bytes of activations on rank 0, which may hold 2,000; allow 3,000 on every rank"),
        (([(0, 1)], 4, Costs.unit(2), [1, 1], [9, 9], [build("1f1b", 2, 2, 3)]),
         "1f1b has 3 microbatches and 1 copies of the model; the search is for 4 and 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(arguments, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        search(*arguments)
    assert "\n" not in str(error.value)
