"""Lowering and its proof: slot counts, order of messages, and a dry run that finds every broken program."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.schedule import program as lowering
from hpcpipe.schedule.check import check
from hpcpipe.schedule.families import SCHEDULES, build, forward_only
from hpcpipe.schedule.op import KINDS, Op, Schedule, ScheduleError
from hpcpipe.schedule.program import POOLS, Edge, Instruction, Lifetimes, Program, Slot, lower, memory
from hpcpipe.schedule.slots import colour, in_order, overlap

NAMES = sorted(name for name, family in SCHEDULES.items() if family.anywhere)
# A stage that saves its input for W, one that needs nothing after the pass, one that keeps everything.
KEEPS_X = Lifetimes("W", "F", "W", "B")
SHORT = Lifetimes("F", "F", "B", "B")
LONG = Lifetimes("W", "W", "W", "W")


def lowered(name, ranks, micros, life=KEEPS_X, placement=None, forward=False):
    stages = len(placement or range(ranks))
    programs = lower(build(name, stages, ranks, micros, placement), [life] * stages, forward)
    check(programs)
    return programs


@st.composite
def cases(draw):
    """(schedule, lifetimes) of any shape, every rank with at least one stage, anywhere."""
    ranks = draw(st.integers(1, 5))
    placement = draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=4))]))
    schedule = build(draw(st.sampled_from(NAMES)), len(placement), ranks, draw(st.integers(1, 8)), placement)
    forwards, backwards = st.sampled_from("FBW"), st.sampled_from("BW")
    life = st.builds(Lifetimes, forwards, forwards, backwards, backwards)
    return schedule, draw(st.lists(life, min_size=schedule.stages, max_size=schedule.stages))


@pytest.mark.parametrize(
    ("life", "most_ranks", "some_micros"),
    [(KEEPS_X, 8, range(1, 17)), (SHORT, 5, (1, 2, 3, 7, 16)), (LONG, 5, (1, 2, 3, 7, 16))],
)
@pytest.mark.parametrize("name", NAMES)
def test_slot_counts_of_every_shape(name, life, most_ranks, some_micros):
    """Saved: all microbatches under GPipe, min(M, P-s) under 1F1B; messages one slot ahead."""
    for ranks in range(1, most_ranks + 1):
        for micros in some_micros:
            programs = lowered(name, ranks, micros, life)
            for rank, program in enumerate(programs):
                held = micros if name == "gpipe" else min(micros, ranks - rank)
                expected = {(rank, pool): n for pool, n in (("SAVED", held), ("KEPT", held), ("OWED", 1))}
                first, last = rank == 0, rank == ranks - 1
                if not first:
                    expected[rank, "X"] = min((1 if life.x == "F" else held) + 1, micros)
                    expected[rank, "DX"] = min(2, micros)
                if not last:
                    expected[rank, "DY"] = min(2, micros)
                expected[rank, "Y"] = micros if last else min((1 if life.y == "F" else held) + 1, micros)
                assert program.counts == expected


@given(cases())
def test_any_schedule_lowers_to_programs_that_run(case):
    schedule, lifetimes = case
    programs = lower(schedule, lifetimes)
    check(programs)
    for row, program in zip(schedule.rows, programs, strict=True):
        assert tuple(Op(*i[:3]) for i in program.instructions if i.kind in KINDS) == row


@given(cases())
def test_scratch_and_saved_slots_are_as_few_as_can_be(case):
    """The count of a pool equals the most microbatches that are alive at once, counted op by op."""
    schedule, lifetimes = case
    last = {"SAVED": "B", "KEPT": "W", "OWED": "W"}
    for row, program in zip(schedule.rows, lower(schedule, lifetimes), strict=True):
        at = {op: i for i, op in enumerate(row)}
        for (stage, pool), count in program.counts.items():
            if pool in last:
                first = "B" if pool == "OWED" else "F"
                spans = [(at[Op(first, stage, m)], at[Op(last[pool], stage, m)]) for m in range(schedule.micros)]
                assert count == max(sum(a <= i <= b for a, b in spans) for i in range(len(row)))


@given(cases())
def test_forward_only_runs_in_little_memory(case):
    schedule, lifetimes = case
    for forward in (schedule, forward_only(schedule.placement, schedule.micros)):
        programs = lower(forward, lifetimes, forward_only=True)
        check(programs)
        for program in programs:
            assert {i.kind for i in program.instructions} <= {"F", "POST", "SEND", "WAIT"}
            assert all(pool in ("X", "Y", "SAVED", "KEPT") for _, pool in program.counts)
            assert all(n == 1 for (_, pool), n in program.counts.items() if pool in ("SAVED", "KEPT"))


@given(cases())
def test_messages_of_an_edge_go_in_one_order(case):
    """First sent, first posted; a tag belongs to one direction of one boundary; both ends agree."""
    schedule, lifetimes = case
    queues = {}
    for program in lower(schedule, lifetimes):
        for i in program.instructions:
            if i.kind in ("SEND", "POST"):
                edge = program.channel[i.slot[:2]]
                ends = (program.rank, edge.peer) if i.kind == "SEND" else (edge.peer, program.rank)
                queues.setdefault((*ends, edge.tag), {}).setdefault(i.kind, []).append(i)
                assert edge.tag < 32767
    assert len({tag for _, _, tag in queues}) == len(queues)
    for queue in queues.values():
        assert [i.micro for i in queue["SEND"]] == [i.micro for i in queue["POST"]]
        sent, posted = queue["SEND"][0], queue["POST"][0]
        assert (sent.slot.pool, posted.slot.pool) in (("Y", "X"), ("DX", "DY"))
        assert posted.stage - sent.stage == (1 if sent.slot.pool == "Y" else -1)


@given(cases())
def test_waits_and_posts_stand_where_they_should(case):
    """WAIT for a receive right before its op; SEND right after it; POST after the op that frees the slot, not later."""
    schedule, lifetimes = case
    for program in lower(schedule, lifetimes):
        used = {}
        for before, i in pairwise((None, *program.instructions)):
            if i.kind == "SEND":
                assert before[:3] == ({"Y": "F", "DX": "B"}[i.slot.pool], i.stage, i.micro)
            if i.kind == "POST" and i.slot in used:
                assert used[i.slot] == len(
                    [j for j in program.instructions[: program.instructions.index(i)] if j.slots]
                )
            if i.slots:
                number = len([j for j in program.instructions[: program.instructions.index(i)] if j.slots]) + 1
                used |= {slot: number for slot in i.slots if slot is not None}


def test_reduce_follows_the_last_w_of_each_stage():
    for program in lowered("1f1b", 2, 3, placement=(0, 0, 1, 1)):
        done = [i for i in program.instructions if i.kind in ("W", "REDUCE")]
        for at, i in enumerate(done):
            if i.kind == "REDUCE":
                assert done[at - 1][:3] == ("W", i.stage, 2)
                assert not any(j.stage == i.stage for j in done[at + 1 :])
        assert sum(i.kind == "REDUCE" for i in done) == 2


def test_stages_of_one_rank_share_their_boundary():
    (program,) = lowered("1f1b", 1, 4, placement=(0, 0, 0))
    assert program.edges == ()
    assert {i.kind for i in program.instructions} == {"F", "B", "W", "REDUCE"}
    assert {key for key in program.counts if key[1] in ("X", "Y", "DX", "DY")} == {
        (1, "X"), (2, "X"), (0, "DY"), (1, "DY"), (2, "Y"),
    }  # fmt: skip
    at = {i[:3]: dict(zip(POOLS, i.slots, strict=True)) for i in program.instructions if i.slots}
    for micro in range(4):
        for stage in (0, 1):
            assert at["F", stage, micro]["Y"] == at["F", stage + 1, micro]["X"] == at["W", stage + 1, micro]["X"]
            assert at["B", stage + 1, micro]["DX"] == at["B", stage, micro]["DY"] == at["W", stage, micro]["DY"]
        assert at["F", 2, micro]["Y"] == Slot(2, "Y", micro)
        assert at["F", 0, micro]["X"] is None and at["B", 0, micro]["DX"] is None and at["B", 2, micro]["DY"] is None


def test_an_op_is_given_what_is_alive_and_nothing_else():
    at = {
        i[:3]: dict(zip(POOLS, i.slots, strict=True)) for i in lowered("1f1b", 3, 2, SHORT)[1].instructions if i.slots
    }
    alive = {key: {pool for pool, slot in slots.items() if slot} for key, slots in at.items()}
    assert alive["F", 1, 0] == {"X", "Y", "SAVED", "KEPT"}
    assert alive["B", 1, 0] == {"DY", "DX", "SAVED", "KEPT", "OWED"}
    assert alive["W", 1, 0] == {"KEPT", "OWED"}
    at = {i[:3]: dict(zip(POOLS, i.slots, strict=True)) for i in lowered("1f1b", 3, 2, LONG)[1].instructions if i.slots}
    assert {pool for pool, slot in at["W", 1, 0].items() if slot} == set(POOLS) - {"SAVED"}


def test_memory_is_the_sum_over_slots():
    program = lowered("1f1b", 3, 4)[1]
    assert memory(program, lambda stage, pool: 1) == sum(program.counts.values())
    assert memory(program, lambda stage, pool: 10 if pool == "SAVED" else 0) == 20


def without(programs, rank, at):
    """The programs with one instruction left out."""
    kept = programs[rank].instructions
    return replaced(programs, rank, kept[:at] + kept[at + 1 :])


def replaced(programs, rank, instructions):
    old = programs[rank]
    return (*programs[:rank], Program.of(rank, instructions, old.counts, old.edges), *programs[rank + 1 :])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("life", [KEEPS_X, SHORT])
def test_leaving_out_any_message_instruction_is_found(name, life):
    programs = lowered(name, 3, 4, life)
    for rank, program in enumerate(programs):
        for at, i in enumerate(program.instructions):
            if i.kind in ("POST", "SEND", "WAIT"):
                with pytest.raises(ScheduleError):
                    check(without(programs, rank, at))


@pytest.mark.parametrize("name", NAMES)
def test_any_other_slot_is_found(name):
    """Another number for any slot of any instruction: something is then overwritten, missing or under way."""
    programs = lowered(name, 3, 4)
    for rank, program in enumerate(programs):
        for at, i in enumerate(program.instructions):
            for which, slot in enumerate(i.slots or (i.slot,)):
                if slot is not None and program.counts[slot.stage, slot.pool] > 1:
                    other = slot._replace(number=(slot.number + 1) % program.counts[slot.stage, slot.pool])
                    slots = (*i.slots[:which], other, *i.slots[which + 1 :])
                    wrong = i._replace(slots=slots) if i.slots else i._replace(slot=other)
                    changed = [*program.instructions[:at], wrong, *program.instructions[at + 1 :]]
                    with pytest.raises(ScheduleError):
                        check(replaced(programs, rank, changed))


@pytest.mark.parametrize("kind", ["POST", "SEND"])
def test_two_messages_of_an_edge_in_the_wrong_order_are_found(kind):
    programs = lowered("gpipe", 2, 3)
    found = 0
    for rank, program in enumerate(programs):
        places = [at for at, i in enumerate(program.instructions) if i.kind == kind]
        for a, b in pairwise(places):
            first, second = program.instructions[a], program.instructions[b]
            if first.slot.pool == second.slot.pool:
                changed = list(program.instructions)
                changed[a], changed[b] = second, first
                with pytest.raises(ScheduleError):
                    check(replaced(programs, rank, changed))
                found += 1
    assert found >= 4


def test_a_deadlock_is_told_in_words():
    """Both ranks wait for the other's message before they send their own."""
    x, y, dy, dx = Slot(1, "X", 0), Slot(0, "Y", 0), Slot(0, "DY", 0), Slot(1, "DX", 0)
    nothing = (None,) * len(POOLS)
    first = Program.of(
        0,
        (
            Instruction("POST", 0, 0, slot=dy),
            Instruction("WAIT", 0, 0, slot=dy),
            Instruction("F", 0, 0, (None, y, None, None, None, None, None)),
            Instruction("SEND", 0, 0, slot=y),
            Instruction("B", 0, 0, (None, None, dy, None, None, None, None)),
            Instruction("W", 0, 0, nothing),
            Instruction("REDUCE", 0, -1),
            Instruction("WAIT", 0, 0, slot=y),
        ),
        {(0, "Y"): 1, (0, "DY"): 1},
        (Edge(0, "Y", 1, 0, "send"), Edge(0, "DY", 1, 1, "recv")),
    )
    second = Program.of(
        1,
        (
            Instruction("POST", 1, 0, slot=x),
            Instruction("WAIT", 1, 0, slot=x),
            Instruction("F", 1, 0, (x, None, None, None, None, None, None)),
            Instruction("B", 1, 0, (None, None, None, dx, None, None, None)),
            Instruction("SEND", 1, 0, slot=dx),
            Instruction("W", 1, 0, nothing),
            Instruction("REDUCE", 1, -1),
            Instruction("WAIT", 1, 0, slot=dx),
        ),
        {(1, "X"): 1, (1, "DX"): 1},
        (Edge(1, "X", 0, 0, "recv"), Edge(1, "DX", 0, 1, "send")),
    )
    with pytest.raises(ScheduleError) as error:
        check((first, second))
    assert str(error.value).splitlines() == [
        "deadlock: no rank can go on",
        "  rank 0 waits for B1.0 from rank 1 (rank 1 is at F1.0)",
        "  rank 1 waits for F0.0 from rank 0 (rank 0 is at F0.0)",
    ]


def test_receive_slots_grow_where_a_sender_would_wait_for_ever(monkeypatch):
    """Rank 1 runs F3.0 before F1.1, so rank 0 must be rid of all F0 while one is taken: one slot ahead is too few."""
    first = tuple(Op("F", stage, micro) for stage in (0, 2) for micro in range(6))
    second = tuple(Op("F", stage, micro) for micro in range(6) for stage in (1, 3))
    schedule = Schedule("breadth first", (first, second), (0, 1, 0, 1), 6)
    programs = lower(schedule, [SHORT] * 4, forward_only=True)
    check(programs)
    assert programs[1].counts[1, "X"] == 3
    monkeypatch.setattr(lowering._Lowering, "_rendezvous", lambda *_: 1)
    with pytest.raises(ScheduleError) as error:
        check(lower(schedule, [SHORT] * 4, forward_only=True))
    assert str(error.value).splitlines() == [
        "deadlock: no rank can go on",
        "  rank 0 waits for rank 1 to take F0.3 (rank 1 is at F3.0)",
        "  rank 1 waits for F2.0 from rank 0 (rank 0 is at F0.5)",
    ]


def test_losses_must_survive_the_step():
    programs = lowered("1f1b", 2, 3)
    program = programs[1]
    changed = [
        i._replace(slots=tuple(Slot(1, "Y", 0) if s is not None and s.pool == "Y" else s for s in i.slots))
        for i in program.instructions
    ]
    with pytest.raises(ScheduleError, match="Y of stage 1, microbatch 0"):
        check(replaced(programs, 1, changed))


def test_more_stages_than_tags_are_refused():
    stages = 16384
    schedule = Schedule("long", ((),) * stages, tuple(range(stages)), 1)
    with pytest.raises(ScheduleError, match="16384 stages need more message tags than the 16000"):
        lower(schedule, [SHORT] * stages)


def test_lowering_refuses_what_validation_refuses():
    with pytest.raises(ScheduleError, match="ops missing"):
        lower(build("1f1b", 2, 2, 2).only("F"), [SHORT] * 2)


def test_words_for_a_hang_report():
    program = lowered("1f1b", 3, 4)[1]
    words = [program.waiting(at) for at, i in enumerate(program.instructions) if i.kind == "WAIT"]
    assert words[:3] == ["F0.0 from rank 0", "F0.1 from rank 0", "B2.0 from rank 2"]
    assert words[-1] == "rank 0 to take B1.3"
    assert program.standing(0) == "F1.0"
    assert program.standing(len(program.instructions)) == "the end of the step"


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 8)).map(lambda p: (p[0], p[0] + p[1])), max_size=15)


def columns(found):
    return np.array([a for a, _ in found], np.int64), np.array([b for _, b in found], np.int64)


@given(spans, st.integers(0, 3))
@settings(max_examples=200)
def test_colouring(found, extra):
    found = sorted(found)
    most = max((sum(a <= i <= b for a, b in found) for i in range(30)), default=0)
    assert overlap(*columns(found)) == most
    slots, before = colour(*columns(found), most + extra)
    since = [found[b][1] if b >= 0 else -1 for b in before]
    for i, (start, _) in enumerate(found):
        assert 0 <= slots[i] < most + extra
        assert since[i] == max((end for (_, end), slot in zip(found[:i], slots, strict=False) if slot == slots[i]),
                               default=-1) < start  # fmt: skip
    assert since == sorted(since)


@given(spans)
def test_reservations_in_order(found):
    starts = columns(found)[0]
    reserved = in_order(starts) if found else starts
    assert list(reserved) == sorted(reserved)
    assert all(r in starts[i:] and r <= starts[i] for i, r in enumerate(reserved))
