"""Schedules exchanged with ``torch.distributed.pipelining``: its loader and simulator take ours, our reader takes its.

No process group and no model is needed: a schedule there asks its stages for their numbers only.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import SCHEDULES, build
from hpcpipe.schedule.interchange import read, write
from hpcpipe.schedule.op import Schedule, ScheduleError
from hpcpipe.schedule.replay import replay, validate

pytestmark = pytest.mark.peers

OURS = tuple(name for name, family in SCHEDULES.items() if family.chains == 1)  # they know one copy of the model

# stages, ranks, microbatches, stages on ranks (None: as the schedule wants them)
SHAPES: tuple[tuple[int, int, int, tuple[int, ...] | None], ...] = (
    (1, 1, 3, None),
    (2, 2, 1, None),
    (2, 2, 8, None),
    (4, 4, 8, None),
    (4, 4, 3, None),
    (4, 2, 8, None),
    (8, 4, 8, None),
    (8, 4, 16, None),
    (6, 3, 7, None),
    (4, 2, 4, (0, 1, 0, 1)),
    (4, 2, 4, (0, 1, 1, 0)),
    (5, 2, 3, (0, 0, 0, 1, 1)),
)

# Their name, stages per rank; ranks and microbatches that they accept.
THEIRS = (("ScheduleGPipe", 1), ("ScheduleInterleaved1F1B", 2), ("ScheduleInterleaved1F1B", 3),
          ("ScheduleLoopedBFS", 2), ("ScheduleInterleavedZeroBubble", 1), ("ScheduleInterleavedZeroBubble", 2),
          ("ScheduleZBVZeroBubble", 2), ("ScheduleDualPipeV", 2))  # fmt: skip
SIZES = ((1, 4), (2, 4), (2, 8), (3, 6), (4, 8), (4, 12))


def theirs() -> Any:
    from torch.distributed.pipelining import schedules

    return schedules


def stub(stage: int, stages: int, ranks: int) -> Any:
    """What a schedule of theirs wants to know of a stage."""
    return SimpleNamespace(stage_index=stage, num_stages=stages, group_size=ranks, group_rank=0, submod=None)


def runtime(schedule: Schedule) -> Any:
    """Their runtime for a schedule that comes from a file."""
    return theirs()._PipelineScheduleRuntime([stub(0, schedule.stages, schedule.ranks)], schedule.micros)


def made(name: str, each: int, ranks: int, micros: int) -> Any:
    """A schedule that they made."""
    stages = [stub(i, each * ranks, ranks) for i in range(each)]
    single = name in ("ScheduleGPipe", "Schedule1F1B")
    return getattr(theirs(), name)(stages[0] if single else stages, micros)


def dumped(order: dict[int, list[Any]]) -> str:
    """Their actions as ``_dump_csv`` writes them, which the schedules of one stage per rank lack."""
    out = io.StringIO(newline="")
    csv.writer(out).writerows(order[rank] for rank in sorted(order))
    return out.getvalue()


def ours(name: str) -> list[Schedule]:
    """The named schedule on all shapes that it offers."""
    found = []
    for shape in SHAPES:
        try:
            found.append(build(name, *shape))
        except ScheduleError:
            continue
    return found


def simulated(schedule: Schedule, order: dict[int, list[Any]]) -> None:
    """Runs their simulation, which knows nothing of sharding, to its end: every action of every rank has run."""
    plain = {r: [a for a in row if "SHARD" not in str(a) and "REDUCE" not in str(a)] for r, row in order.items()}
    done = theirs()._simulate_comms_compute(plain, lambda stage: schedule.placement[stage], schedule.stages)
    assert {r: [a for a in row if a is not None] for r, row in done.items()} == plain


# --- ours, there


@pytest.mark.parametrize("name", OURS)
def test_their_loader_adds_the_messages_to_ours(name: str, tmp_path: Path) -> None:
    found = ours(name)
    for schedule in found:
        (tmp_path / "plan.csv").write_text(write(schedule))
        loaded = runtime(schedule)
        loaded._load_csv(str(tmp_path / "plan.csv"), format="compute_only")
        assert loaded.stage_index_to_group_rank == dict(enumerate(schedule.placement))
        simulated(schedule, loaded.pipeline_order_with_comms)
        loaded._dump_csv(str(tmp_path / "back.csv"), format="compute_comms")
        assert read((tmp_path / "back.csv").read_text(), schedule.name) == schedule
    assert found, f"no shape of {name} was tried"


@pytest.mark.parametrize("name", OURS)
def test_their_loader_and_simulator_take_our_messages(name: str, tmp_path: Path) -> None:
    for schedule in ours(name):
        (tmp_path / "plan.csv").write_text(write(schedule, communication=True))
        loaded = runtime(schedule)
        loaded._load_csv(str(tmp_path / "plan.csv"), format="compute_comms")
        loaded._simulate()
        simulated(schedule, loaded.pipeline_order_with_comms)


@pytest.mark.parametrize("name", OURS)
def test_the_messages_are_those_that_they_add(name: str) -> None:
    for schedule in ours(name):
        loaded = runtime(schedule)
        loaded._prepare_schedule_with_comms(orders(write(schedule)))
        added = {str(a) for row in loaded.pipeline_order_with_comms.values() for a in row}
        own = {cell for line in write(schedule, communication=True).splitlines() for cell in line.split(",")}
        assert {a for a in added if "SHARD" not in a and "REDUCE" not in a} == own


def orders(text: str) -> dict[int, list[Any]]:
    """A CSV as they hold it in memory."""
    action = theirs()._Action.from_str
    return {rank: [action(cell) for cell in line.split(",")] for rank, line in enumerate(text.splitlines())}


def test_they_refuse_a_b_that_is_not_spelled_i() -> None:
    """What the writer heeds: a weight gradient apart from its input gradient needs I, not B."""
    schedule = Schedule("apart", build("1f1b", 1, 1, 2).rows, (0,), 2)
    with pytest.raises(AssertionError, match="without first running Backward Input"):
        runtime(schedule)._prepare_schedule_with_comms(orders("0F0,0B0,0F1,0B1,0W0,0W1"))


# --- theirs, here


@pytest.mark.parametrize(("ranks", "micros"), SIZES)
@pytest.mark.parametrize(("name", "each"), THEIRS)
def test_theirs_is_read_and_can_run(name: str, each: int, ranks: int, micros: int) -> None:
    schedule = made(name, each, ranks, micros)
    plan = read(dumped(schedule.pipeline_order), name)
    assert (plan.ranks, plan.stages, plan.micros) == (ranks, each * ranks, micros)
    replay(plan, Costs.unit(plan.stages))
    lowered = getattr(schedule, "pipeline_order_with_comms", None)
    assert lowered is None or read(dumped(lowered), name) == plan
    if "V" in name:
        assert plan.placement == (*range(ranks), *reversed(range(ranks)))
    if name == "ScheduleLoopedBFS":
        # They go back through the microbatches from the last one. It runs, but it adds the same gradients in another
        # order, so not to the same bits, and the proof says so.
        sentence = rf"runs W\d+\.{micros - 2} after W\d+\.{micros - 1}, but the W of a stage run in microbatch order"
        with pytest.raises(ScheduleError, match=sentence):
            validate(plan)
    else:
        validate(plan)
        assert read(write(plan, communication=True), name) == plan


@pytest.mark.parametrize(("ranks", "micros"), SIZES)
def test_gpipe_is_the_same_there(ranks: int, micros: int) -> None:
    plan = read(dumped(made("ScheduleGPipe", 1, ranks, micros).pipeline_order), "gpipe")
    assert plan == build("gpipe", ranks, ranks, micros)


@pytest.mark.parametrize(("ranks", "micros"), SIZES)
def test_1f1b_is_the_same_there_but_for_a_slip_of_theirs(ranks: int, micros: int) -> None:
    """The table that Schedule1F1B (torch 2.13) keeps, and does not run, counts the forwards of its last rank from 1."""
    order = made("Schedule1F1B", 1, ranks, micros).pipeline_order
    with pytest.raises(ScheduleError, match=rf"missing: .*F\d\.{micros}|missing: F0\.0"):
        validate(read(dumped(order), "1f1b"))
    last, forward = order[ranks - 1], theirs().F
    order[ranks - 1] = [
        a._replace(microbatch_index=a.microbatch_index - 1) if a and a.computation_type == forward else a for a in last
    ]
    assert read(dumped(order), "1f1b") == build("1f1b", ranks, ranks, micros)
