"""The event loop and the named policies: formulas, shapes, and the rejection of what cannot run."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.schedule import policies
from hpcpipe.schedule.engine import Costs, record, run
from hpcpipe.schedule.families import SCHEDULES, build, forward_only
from hpcpipe.schedule.op import KINDS, Op, Schedule, ScheduleError, needs
from hpcpipe.schedule.replay import replay, validate

NAMES = ("gpipe", "1f1b")
SHAPES = [(ranks, micros) for ranks in range(1, 9) for micros in range(1, 17)]


def uniform(stages, f, b, w, message=0):
    return Costs((f,) * stages, (b,) * stages, (w,) * stages, message)


@st.composite
def pipelines(draw):
    """(placement, micros): every rank has at least one stage, anywhere."""
    ranks = draw(st.integers(1, 5))
    extra = draw(st.lists(st.integers(0, ranks - 1), max_size=4))
    placement = draw(st.permutations([*range(ranks), *extra]))
    return tuple(placement), draw(st.integers(1, 9))


def one_f_one_b_row(stage, stages, micros):
    """The published order: min(P-s-1, M) forwards, then forward and backward in turn, then the other backwards."""
    warm = min(stages - stage - 1, micros)
    row = [Op("F", stage, m) for m in range(warm)]
    for micro in range(micros):
        row += [Op("F", stage, micro + warm)] if micro + warm < micros else []
        row += [Op("B", stage, micro), Op("W", stage, micro)]
    return tuple(row)


@pytest.mark.parametrize("ranks", range(1, 9))
def test_1f1b_is_the_published_order(ranks):
    for micros in range(1, 17):
        rows = build("1f1b", ranks, ranks, micros).rows
        assert rows == tuple(one_f_one_b_row(s, ranks, micros) for s in range(ranks))


@pytest.mark.parametrize("ranks", range(1, 9))
def test_gpipe_is_all_forwards_then_all_backwards(ranks):
    for micros in range(1, 17):
        for stage, row in enumerate(build("gpipe", ranks, ranks, micros).rows):
            forwards = [Op("F", stage, m) for m in range(micros)]
            assert list(row) == forwards + [Op(k, stage, m) for m in range(micros) for k in ("B", "W")]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("costs", [(1, 1, 1), (2, 3, 4), (4, 3, 2), (1, 5, 1), (5, 1, 1), (1, 1, 5)])
def test_bubble_is_p_minus_1_times_f_plus_b(name, costs):
    """Published: (P-1)(F+B+W), where B+W is one op. Here the gradient leaves after B, which saves (P-1) W."""
    f, b, w = costs
    for ranks, micros in SHAPES:
        timeline = replay(build(name, ranks, ranks, micros), uniform(ranks, f, b, w))
        for rank in range(ranks):
            assert timeline.busy(rank) == micros * (f + b + w)
            assert timeline.idle(rank) == (ranks - 1) * (f + b)


@pytest.mark.parametrize("message", [1, 7])
def test_gpipe_pays_each_message_latency_once(message):
    for ranks, micros in SHAPES:
        timeline = replay(build("gpipe", ranks, ranks, micros), uniform(ranks, 1, 1, 1, message))
        assert timeline.makespan == 3 * micros + (ranks - 1) * (2 + 2 * message)


@pytest.mark.parametrize("name", NAMES)
def test_stages_of_one_rank_exchange_no_message(name):
    """Any cost of a message: stages 0 0 1 1 cross one boundary, forwards and back."""
    costs = uniform(4, 1, 1, 1)
    slow = uniform(4, 1, 1, 1, message=100)
    schedule = build(name, 4, 2, 1)
    assert replay(schedule, slow).makespan == replay(schedule, costs).makespan + 200


@pytest.mark.parametrize("name", NAMES)
@given(pipelines())
def test_any_placement_is_built_and_valid(name, pipeline):
    placement, micros = pipeline
    schedule = build(name, len(placement), max(placement) + 1, micros, placement)
    assert sum(map(len, schedule.rows)) == 3 * len(placement) * micros
    for row in schedule.rows:
        for first, second in pairwise(row):
            # W follows its B at once: a stage owes one microbatch at most.
            assert first.kind != "B" or second == Op("W", first.stage, first.micro)


@given(pipelines())
def test_forward_only_is_valid_for_any_placement(pipeline):
    placement, micros = pipeline
    schedule = forward_only(placement, micros)
    assert {op.kind for row in schedule.rows for op in row} == {"F"}
    validate(schedule, kinds=("F",))


@given(pipelines(), st.sampled_from(NAMES), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_events_respect_needs_messages_and_rows(pipeline, name, rng):
    placement, micros = pipeline
    stages = len(placement)
    f, b, w = (tuple(rng.choice((0, 1, 2, 2.5)) for _ in range(stages)) for _ in range(3))
    costs = Costs(f, b, w, rng.choice((0, 0.5)))
    schedule = build(name, stages, max(placement) + 1, micros, placement)
    timeline = replay(schedule, costs)
    assert timeline.rows == schedule.rows
    at = {event.op: event for event in timeline.events}
    for row in timeline.by_rank:
        for first, second in pairwise(row):
            assert second.start >= first.end
    for op, event in at.items():
        assert event.end - event.start == costs.of(op.kind)[op.stage]
        for need in needs(op, stages):
            lag = 0 if placement[need.stage] == placement[op.stage] else costs.message
            assert event.start >= at[need].end + lag


def test_a_delayed_message_shorter_than_the_slack_costs_nothing():
    """Two ranks, the second twice as slow: its work hides the first one's wait."""
    schedule = build("gpipe", 2, 2, 8)
    costs = Costs((1, 2), (1, 2), (1, 2))
    late = Costs((1, 2), (1, 2), (1, 2), message=0.5)
    assert replay(schedule, late).makespan - replay(schedule, costs).makespan == 1.0


def reference_accepts(schedule):
    """Whether the rows can run: a topological sort that shares no code with the engine."""
    every = {Op(k, s, m) for k in KINDS for s in range(schedule.stages) for m in range(schedule.micros)}
    flat = [op for row in schedule.rows for op in row]
    if len(flat) != len(every) or set(flat) != every:
        return False
    if any(schedule.placement[op.stage] != rank for rank, row in enumerate(schedule.rows) for op in row):
        return False
    for row in schedule.rows:
        sums = [op for op in row if op.kind == "W" or (op.kind == "F" and (op.stage + 1) % schedule.depth == 0)]
        if any(a[:2] == b[:2] and a.micro > b.micro for i, a in enumerate(sums) for b in sums[i:]):
            return False
    before = {op: set(needs(op, schedule.depth)) for op in every}
    for row in schedule.rows:
        for first, second in pairwise(row):
            before[second].add(first)
    while before:
        free = [op for op, waits in before.items() if not waits & before.keys()]
        if not free:
            return False
        for op in free:
            del before[op]
    return True


def mutate(schedule, rng):
    """One random change to the rows: drop, double, swap within a row, or move to another place or rank."""
    rows = [list(row) for row in schedule.rows]
    here, there = rng.randrange(len(rows)), rng.randrange(len(rows))
    at = rng.randrange(len(rows[here]))
    change = rng.choice(("drop", "double", "swap", "move"))
    if change == "swap":
        other = rng.randrange(len(rows[here]))
        rows[here][at], rows[here][other] = rows[here][other], rows[here][at]
    else:
        op = rows[here][at] if change == "double" else rows[here].pop(at)
        if change != "drop":
            rows[there].insert(rng.randint(0, len(rows[there])), op)
    return replace(schedule, rows=tuple(map(tuple, rows)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_mutated_schedules_are_rejected_unless_equivalent(name):
    rng, refused = random.Random(3), 0
    for _ in range(300):
        ranks = rng.randint(1, 4) if SCHEDULES[name].chains == 1 else rng.choice((2, 4))
        stages = ranks + rng.randint(0, 1) if SCHEDULES[name].per_rank == 0 else 0
        mutant = mutate(build(name, stages, ranks, rng.randint(1, 5)), rng)
        if reference_accepts(mutant):
            validate(mutant)
        else:
            refused += 1
            with pytest.raises(ScheduleError):
                validate(mutant)
    assert refused > 150


def rows_of(*texts, name="mine", placement=(0, 1), micros=1):
    rows = tuple(tuple(Op.parse(word) for word in text.split()) for text in texts)
    return Schedule(name, rows, placement, micros)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (rows_of("F0.0 B0.0", "F1.0 B1.0 W1.0"), r"1 of 6 ops missing: W0\.0"),
        (rows_of("F0.0 F0.0 B0.0 W0.0", "F1.0 B1.0 W1.0"), r"rank 0 runs F0\.0 a second time"),
        (rows_of("F0.0 B0.0 W0.0 F1.0", "B1.0 W1.0"), r"rank 0 runs F1\.0 although stage 1 is on rank 1"),
        (rows_of("F0.0 B0.0 W0.0 F2.0", "F1.0 B1.0 W1.0"), r"rank 0 runs F2\.0 but has 2 stages"),
        (rows_of("F0.0 F0.1 B0.0 W0.0", "F1.0 B1.0 W1.0"), r"rank 0 runs F0\.1 but has 2 stages, 1 microbatches"),
        (rows_of("F0.0 B0.0 W0.0", placement=(0, 1)), r"stages are placed on ranks \(0, 1\), but there are 1 rows"),
        (
            rows_of("F0.0 F0.1 B0.0 B0.1 W0.1 W0.0", placement=(0,), micros=2),
            r"rank 0 runs W0\.0 after W0\.1, but the W of a stage run in microbatch order",
        ),
        (
            rows_of("F0.1 F0.0 B0.0 W0.0 B0.1 W0.1", placement=(0,), micros=2),
            r"rank 0 runs F0\.0 after F0\.1, but the F of a last stage run in microbatch order",
        ),
    ],
)
def test_the_message_names_the_fault(schedule, message):
    with pytest.raises(ScheduleError, match=message):
        validate(schedule)


def test_a_stuck_schedule_prints_who_waits_for_what_and_the_grid():
    schedule = rows_of("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 F1.1 W1.0 B1.0 B1.1 W1.1", micros=2)
    with pytest.raises(ScheduleError) as error:
        validate(schedule)
    assert str(error.value).splitlines() == [
        "mine: nothing can go on after 4 ops",
        "rank 0 stands at B0.0 and waits for B1.0 from rank 1",
        "rank 1 stands at W1.0 and waits for B1.0 from rank 1",
        "  rank 0: F0.0 F0.1 [B0.0] W0.0 B0.1 W0.1",
        "  rank 1: F1.0 F1.1 [W1.0] B1.0 B1.1 W1.1",
    ]


def test_a_long_grid_is_cut_around_the_culprit():
    good = build("gpipe", 2, 2, 40)
    row = list(good.rows[1])
    at = row.index(Op("B", 1, 20))
    row[at], row[at + 1] = row[at + 1], row[at]
    with pytest.raises(ScheduleError) as error:
        validate(Schedule("gpipe", (good.rows[0], tuple(row)), good.placement, 40))
    grid = str(error.value).splitlines()[-1]
    assert "[W1.20] B1.20" in grid
    assert grid.count("...") == 2
    assert len(grid) < 150


def test_a_policy_that_stops_is_reported():
    with pytest.raises(ScheduleError, match=r"stopped after 0 ops with work left: rank 0 could do F0\.0"):
        run(lambda rank, ready, state: None, (0, 1), 2, Costs.unit(2))


def test_a_schedule_is_the_recording_of_its_policy():
    """Replaying what a policy did, with the costs that it saw, gives the timeline that it made."""
    placement, micros, costs = (0, 1, 0, 1), 5, Costs((1, 2, 1, 3), (2, 1, 1, 1), (1, 1, 2, 1), 1)
    policy = policies.one_f_one_b(placement, micros)
    schedule = record("mine", policy, placement, micros, costs)
    assert replay(schedule, costs).by_rank == run(policy, placement, micros, costs).by_rank


@pytest.mark.parametrize("micros", [10, 1000])
def test_a_policy_is_asked_a_few_short_questions_per_op(micros):
    """However many microbatches there are: at most one line per pass of the rank's stages, in microbatch order."""
    policy, asked = policies.gpipe((0, 1, 0, 1), micros), []

    def choose(rank, ready, state):
        asked.append(rank)
        assert all(stage % 2 == rank and micro == state.started[kind, stage] for (kind, stage), micro in ready.items())
        return policy(rank, ready, state)

    run(choose, (0, 1, 0, 1), micros, Costs.unit(4))
    assert len(asked) <= 2 * 3 * 4 * micros


def test_copies_of_the_model_do_not_wait_for_each_other():
    timeline = run(policies.forward, (0, 1, 1, 0), 3, Costs.unit(4), ("F",), chains=2)
    assert {event.op for event in timeline.events if event.start == 0} == {Op("F", 0, 0), Op("F", 2, 0)}
    assert timeline.makespan == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f2b", 2, 2, 2), "no schedule is called '1f2b'; there are gpipe, 1f1b"),
        (("1f1b", 2, 3, 2), "2 stages cannot occupy 3 ranks"),
        (("1f1b", 2, 2, 0), "2 ranks and 0 microbatches is empty"),
        (("1f1b", 2, 2, 2, (0, 0)), r"placement \(0, 0\) does not put 2 stages on all of ranks 0 to 1"),
    ],
)
def test_impossible_shapes_are_refused_in_words(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        build(*arguments)


@pytest.mark.parametrize(
    ("stages", "ranks", "placement"),
    [(4, 2, (0, 0, 1, 1)), (5, 2, (0, 0, 0, 1, 1)), (3, 3, (0, 1, 2)), (7, 3, (0, 0, 0, 1, 1, 2, 2))],
)
def test_stages_are_spread_evenly_over_ranks(stages, ranks, placement):
    assert build("1f1b", stages, ranks, 1).placement == placement
