"""Every schedule by its name: shapes, published idle times and memory, orders, and what is refused.

Idle time is the papers': between a rank's own first and last op (``period``). Costs are those of one stage.
"""

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.schedule import orders
from hpcpipe.schedule.check import check
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import SCHEDULES, build, default_stages, draft, forward_only, held, period
from hpcpipe.schedule.op import Op, Schedule, ScheduleError, needs
from hpcpipe.schedule.program import Lifetimes, lower
from hpcpipe.schedule.replay import replay, validate

GRID = [(ranks, micros) for ranks in (1, 2, 3, 4, 5, 6, 9, 10) for micros in (ranks, 2 * ranks - 1, 3 * ranks + 1)]
# F, B, W: even, and W the shortest, as where attention and norms have no weights.
COSTS = [(1, 1, 1), (3, 4, 2), (1, 5, 1), (5, 1, 1)]


def runs(name, ranks):
    """Whether the schedule has a meaning for that many ranks."""
    return ranks % 2 == 0 or SCHEDULES[name].chains == 1


def idle(schedule, costs=(1, 1, 1)):
    """The longest idle time of a rank within its own step."""
    timeline = replay(schedule, Costs(*((cost,) * schedule.stages for cost in costs)))
    return period(timeline) - timeline.busy(0)


def most(schedule, until="W"):
    return max(held(schedule, rank, until) for rank in range(schedule.ranks))


# --- any shape


def some_micros(ranks):
    return sorted({1, 3, ranks, 2 * ranks + 1, random.Random(ranks).randint(1, 64)})


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_number_of_ranks_and_microbatches(name):
    for ranks in range(1, 17):
        for micros in some_micros(ranks) if runs(name, ranks) else ():
            schedule = build(name, 0, ranks, micros)
            assert (schedule.name, schedule.ranks, schedule.micros) == (name, ranks, micros)
            assert (schedule.depth, schedule.chains) == (default_stages(name, ranks), SCHEDULES[name].chains)
            assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_number_of_ranks_and_microbatches(name):
    for ranks in range(1, 17):
        for micros in range(1, 65) if runs(name, ranks) else ():
            build(name, 0, ranks, micros)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_lowers(name):
    life = Lifetimes("W", "F", "W", "B")
    for ranks, micros in [(1, 1), (1, 4), (2, 3), (3, 2), (3, 7), (4, 1), (4, 9)]:
        if runs(name, ranks):
            schedule = build(name, 0, ranks, micros)
            check(lower(schedule, [life] * schedule.stages))
            evaluation = forward_only(schedule.placement, micros, schedule.chains)
            check(lower(evaluation, [life] * schedule.stages, forward_only=True))


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2"])
@pytest.mark.parametrize("placement", [(0, 0), (0, 0, 0, 1, 1), (0, 1, 1, 2), (0, 0, 1, 1, 2, 2)])
def test_consecutive_stages_act_as_one(name, placement):
    ranks = max(placement) + 1
    one, several = build(name, ranks, ranks, 7), build(name, len(placement), ranks, 7, placement)
    for rank in range(ranks):
        assert held(several, rank) <= held(one, rank) * placement.count(rank) * ranks / len(placement)
    for row in several.only("F").rows:
        for first, second in pairwise(row):
            assert second in (Op("F", first.stage + 1, first.micro), Op("F", row[0].stage, first.micro + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dualpipe", 0, 5, 8), "rank r and rank P-1-r serve the two copies in opposite order, .* use 6 or 4"),
        (("dualpipe", 0, 1, 8), "which 1 ranks cannot; use 2$"),
        (("dualpipe", 8, 4, 8), "dualpipe has one stage on every rank: 4 ranks need 4, not 8"),
        (("zb_v", 6, 4, 8), "zb_v has 2 stages on every rank: 4 ranks need 8, not 6"),
        (("v_half", 4, 4, 8), "v_half has 2 stages on every rank: 4 ranks need 8, not 4"),
        (("v_min", 4, 2, 8, (0, 1, 0, 1)), r"v_min cannot have its stages on ranks \(0, 1, 0, 1\); .* \(0, 1, 1, 0\)"),
        (("zb_h1", 4, 2, 8, (0, 1, 0, 1)), r"zb_h1 cannot have its stages on ranks \(0, 1, 0, 1\)"),
        (("interleaved", 4, 2, 8, (0, 0, 1, 1)), r"interleaved cannot have .* its own placement is \(0, 1, 0, 1\)"),
        (("interleaved", 3, 4, 8), "3 stages cannot occupy 4 ranks"),
    ],
)
def test_impossible_shapes_are_refused_in_words(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        build(*arguments)


def test_groups_are_for_interleaved():
    with pytest.raises(ScheduleError, match="1f1b has no groups"):
        build("1f1b", 2, 2, 4, group=2)
    with pytest.raises(ScheduleError, match="group of -1 microbatches is impossible; use 1 to 4, or 0 for 2"):
        build("interleaved", 4, 2, 4, group=-1)


def test_facts():
    folded, copies = ["zb_v", "v_half", "v_min", "dualpipe_v"], ["dualpipe"]
    assert list(SCHEDULES) == ["gpipe", "1f1b", "interleaved", "zb_h1", "zb_h2", *folded, *copies]
    assert [name for name, family in SCHEDULES.items() if family.per_rank == 2] == folded
    assert [name for name, family in SCHEDULES.items() if family.chains == 2] == copies
    assert [name for name in SCHEDULES if default_stages(name, 4) == 8] == ["interleaved", *folded]
    assert build("dualpipe", 4, 4, 2).placement == (0, 1, 2, 3, 3, 2, 1, 0)


def test_an_evaluation_runs_every_copy():
    schedule = forward_only((0, 1, 1, 0), 3, chains=2)
    assert schedule.chains == 2
    assert replay(schedule, Costs.unit(4)).makespan == 6


# --- idle time and memory


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize(("name", "ahead"), [("zb_h1", 1), ("zb_h2", 2)])
def test_zero_bubble_on_one_stage_per_rank(name, ahead, costs):
    """Qi et al. 2023, table 2: (P-1)(F+B-W) in 1F1B's memory, (P-1)(F+B-2W) in nearly twice as much."""
    f, b, w = costs
    for ranks, micros in GRID:
        schedule = build(name, 0, ranks, micros)
        assert most(schedule) == min(ahead * (ranks - 1) + 1, micros)
        if micros > ahead * (ranks - 1):
            assert idle(schedule, costs) == (ranks - 1) * (f + b - ahead * w)


@pytest.mark.parametrize(("name", "more"), [("zb_v", 0), ("dualpipe_v", 1), ("dualpipe", 1)])
def test_no_idle_time_where_all_passes_are_equal(name, more):
    """ZB-V in P m (Qi et al. 2024), DualPipe in (P+1) m (DeepSeek-V3), there with (P/2-1)(F+2B-W), here with nothing.

    DualPipeV is DualPipe cut in half: the same formulas for twice as many stages as ranks.
    """
    for ranks, micros in GRID:
        if runs(name, ranks) and micros > 2 * (ranks - 1) // SCHEDULES[name].chains:
            schedule = build(name, 0, ranks, micros)
            assert idle(schedule) == 0
            two = 2 // SCHEDULES[name].chains  # stages that share the rank's layers
            assert most(schedule) == min(two * ranks + more, 2 * micros) / two


@pytest.mark.parametrize("costs", [(3, 3, 2), (3, 4, 2), (1, 5, 1)])
def test_dualpipe_stays_below_its_published_idle_time(costs):
    f, b, w = costs
    for ranks, micros in GRID:
        assert idle(build("dualpipe_v", 0, ranks, max(micros, 2 * ranks - 1)), costs) <= (ranks - 1) * (f + 2 * b - w)
        if ranks % 2 == 0:
            assert idle(build("dualpipe", 0, ranks, micros), costs) <= (ranks // 2 - 1) * (f + 2 * b - w)


def test_half_the_memory_at_half_the_idle_time():
    """V-Half, Qi et al. 2024: (P+2)/2 m and about P/2 (F+B+W), which is 3P passes of a stage."""
    for ranks, micros in GRID:
        schedule = build("v_half", 0, ranks, micros)
        assert idle(schedule) <= 3 * (ranks - 1)
        assert most(schedule) == min((ranks + 2) // 2, micros)


def test_a_third_of_the_memory_at_two_thirds_of_the_idle_time():
    """V-Min, Qi et al. 2024: (P+4)/3 m and about 2P/3 (F+B+W), which is 4P passes of a stage."""
    for ranks, micros in GRID:
        schedule = build("v_min", 0, ranks, micros)
        assert idle(schedule) <= 4 * ranks - 3
        assert most(schedule) <= (ranks + 4) // 3


@pytest.mark.parametrize("name", ["v_half", "v_min"])
def test_v_shapes_do_not_wait_more_with_more_microbatches(name):
    for ranks in (2, 3, 4, 6, 7):
        assert len({idle(build(name, 0, ranks, micros)) for micros in (2 * ranks, 3 * ranks + 1, 5 * ranks)}) == 1


def test_memory_of_the_classics():
    for ranks, micros in GRID:
        assert most(build("gpipe", 0, ranks, micros)) == micros
        schedule = build("1f1b", 0, ranks, micros)
        assert [held(schedule, rank) for rank in range(ranks)] == [min(ranks - r, micros) for r in range(ranks)]


def test_held_counts_to_the_end_that_is_asked_for():
    rows = tuple(tuple(Op.parse(word) for word in row.split()) for row in ("F0.0 F0.1 B0.0 B0.1 F1.0 W0.0 W0.1 F1.1",))
    schedule = Schedule("mine", rows, (0, 0), 2)
    assert held(schedule, 0) == 1.5
    assert held(schedule, 0, until="B") == 1


# --- interleaved


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("rounds", [1, 2, 3, 4])
def test_interleaved_divides_the_idle_time_by_the_stages_per_rank(rounds, costs):
    """(P-1)(F+B+W)/v (Narayanan et al., section 2.2), less what the gradient leaves early; for any M >= P."""
    f, b, _ = costs
    for ranks, micros in GRID:
        schedule = build("interleaved", rounds * ranks, ranks, micros)
        assert replay(schedule, Costs(*((c,) * schedule.stages for c in costs))).idle(0) == (ranks - 1) * (f + b)


def test_interleaved_holds_what_is_published():
    """P (1 + (P-1)/(P v)) m where the microbatches come in groups of P (Korthikanti et al., arXiv:2205.05198)."""
    for ranks in range(1, 9):
        for rounds in (2, 3, 4):
            schedule = build("interleaved", rounds * ranks, ranks, 3 * ranks)
            assert most(schedule) == pytest.approx(ranks * (1 + (ranks - 1) / (ranks * rounds)))


def megatron_row(rank, ranks, rounds, micros):
    """The published order: 2 (P-r-1) + (v-1) P forwards, then forward and backward in turn; microbatches by the P."""
    order = [
        (chunk * ranks + rank, first + m)
        for first in range(0, micros, ranks)
        for chunk in range(rounds)
        for m in range(ranks)
    ]
    back = [((rounds - 1) * ranks + 2 * rank - stage, micro) for stage, micro in order]
    warm = min(2 * (ranks - rank - 1) + (rounds - 1) * ranks, len(order))
    row = [Op("F", *at) for at in order[:warm]]
    for i, at in enumerate(back):
        row += [Op("F", *order[warm + i])] if warm + i < len(order) else []
        row += [Op("B", *at), Op("W", *at)]
    return tuple(row)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
@pytest.mark.parametrize("rounds", [2, 3])
def test_depth_first_is_the_published_order(ranks, rounds):
    for micros in (ranks, 2 * ranks, 5 * ranks):
        rows = build("interleaved", rounds * ranks, ranks, micros, group=ranks).rows
        assert rows == tuple(megatron_row(rank, ranks, rounds, micros) for rank in range(ranks))


def test_interleaved_with_one_stage_per_rank_is_1f1b():
    for ranks, micros in GRID:
        assert build("interleaved", ranks, ranks, micros).rows == build("1f1b", ranks, ranks, micros).rows


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (2, "0 1 0 1 0 1 2 3 2 3 2 3 4 5 4 5 4 5 6 7 6 7 6 7"),
        (4, "0 1 2 3 0 1 2 3 0 1 2 3 4 5 6 7 4 5 6 7 4 5 6 7"),
        (8, "0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7 0 1 2 3 4 5 6 7"),
        (3, "0 1 2 3 0 1 2 3 0 1 2 3 4 5 6 7 4 5 6 7 4 5 6 7"),
    ],
)
def test_a_group_runs_back_to_back(group, expected):
    for row in build("interleaved", 6, 2, 8, group=group).rows:
        assert " ".join(str(op.micro) for op in row if op.kind == "F") == expected


def test_a_larger_group_costs_memory_and_no_time():
    found = [build("interleaved", 8, 4, 16, group=group) for group in (4, 8, 16)]
    assert [idle(schedule) for schedule in found] == [6, 6, 6]
    assert [most(schedule) for schedule in found] == [5.5, 7.5, 11.5]


@pytest.mark.parametrize("rounds", [2, 3])
def test_a_last_round_that_is_not_full_costs_its_own_length(rounds):
    """A rank with more stages than others is late only by the way of the last stage: 0 for one stage too many."""
    for ranks in range(2, 9):
        for more in range(1, ranks):
            for micros in (ranks, 2 * ranks + 1, 4 * ranks):
                schedule = build("interleaved", (rounds - 1) * ranks + more, ranks, micros)
                assert replay(schedule, Costs.unit(schedule.stages)).idle(0) == 2 * (more - 1)


@given(st.integers(1, 7), st.integers(0, 20), st.integers(1, 30), st.integers(0, 32))
@settings(max_examples=200)
def test_interleaved_takes_any_group_and_any_number_of_stages(ranks, more, micros, group):
    schedule = build("interleaved", ranks + more, ranks, micros, group=group)
    assert schedule.placement == tuple(stage % ranks for stage in range(ranks + more))


@pytest.mark.parametrize(("micros", "size"), [(1, 1), (7, 3), (7, 8), (64, 8), (11, 4), (23, 5)])
def test_groups_are_nearly_equal(micros, size):
    found = orders.groups(micros, size)
    assert [m for part in found for m in part] == list(range(micros))
    lengths = {len(part) for part in found}
    assert max(lengths) - min(lengths) <= 1
    assert min(lengths) >= min(size, micros)


# --- orders


@pytest.mark.parametrize("name", ["zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe_v", "dualpipe"])
def test_a_gradient_never_waits_for_a_w(name):
    """With equal passes, a B that is ready when a W starts would have been done instead."""
    schedule = build(name, 0, 4, 12)
    timeline = replay(schedule, Costs.unit(schedule.stages))
    end = {event.op: event.end for event in timeline.events}
    for row in timeline.by_rank:
        for this, after in pairwise(row):
            if (this.op.kind, after.op.kind) == ("W", "B"):
                assert any(end[op] > this.start for op in needs(after.op, schedule.depth))


@pytest.mark.parametrize("name", ["dualpipe", "dualpipe_v"])
def test_forward_and_backward_stand_side_by_side_to_hide_their_messages(name):
    ranks, micros = 4, 16
    for row in build(name, 0, ranks, micros).rows:
        pairs = sum(first.kind == "F" and second.kind == "B" for first, second in pairwise(row))
        assert pairs >= 2 * (micros - 2 * ranks)


def test_the_first_microbatches_of_an_order():
    f, b = ("F", 0), ("B", 0)
    assert orders.first([f, f, b, f, b, b], 2) == [f, f, b, b]


# --- speed


def test_a_large_table_takes_moments():
    """64 ranks with 8 stages each, 256 microbatches: 393,216 ops."""
    start = time.process_time()
    schedule = draft("interleaved", 512, 64, 256)
    assert time.process_time() - start < 3
    validate(schedule)


@pytest.mark.parametrize("name", SCHEDULES)
def test_64_ranks_and_256_microbatches_take_moments(name):
    start = time.process_time()
    draft(name, 0, 64, 256)
    assert time.process_time() - start < 8
