"""Goldens: a schedule, its drawing and its programs, as a person would check them by eye.

After a wanted change, ``python tests/pure/test_schedule_golden.py`` writes them anew; read the difference.
"""

from pathlib import Path

import pytest

from hpcpipe.schedule.check import check
from hpcpipe.schedule.engine import Costs, replay
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.policies import build
from hpcpipe.schedule.program import Lifetimes, lower
from hpcpipe.schedule.timeline import draw

FOLDER = Path(__file__).parents[1] / "golden" / "schedules"
# name, stages on ranks, microbatches
CASES = {
    "gpipe_4_ranks_6_microbatches": ("gpipe", (0, 1, 2, 3), 6),
    "1f1b_4_ranks_8_microbatches": ("1f1b", (0, 1, 2, 3), 8),
    "1f1b_4_ranks_2_microbatches": ("1f1b", (0, 1, 2, 3), 2),
    "1f1b_5_stages_on_2_ranks": ("1f1b", (0, 0, 0, 1, 1), 3),
    "1f1b_4_stages_in_turn_on_2_ranks": ("1f1b", (0, 1, 0, 1), 4),
}


def words(instruction):
    """``F1.2 X1.0 Y1.1 SAVED1.0 KEPT1.0``, ``POST X1.0 for 2``, ``REDUCE 1``; a slot is pool, stage, number."""
    slots = [f"{slot.pool}{slot.stage}.{slot.number}" for slot in instruction.slots if slot is not None]
    if slots:
        return " ".join([str(Op(*instruction[:3])), *slots])
    if instruction.slot is None:
        return f"{instruction.kind} {instruction.stage}"
    slot = instruction.slot
    return f"{instruction.kind} {slot.pool}{slot.stage}.{slot.number} for {instruction.micro}"


def channel(edge):
    """``X1.0 from 0 tag 0``."""
    slot, way = edge.slot, "to" if edge.direction == "send" else "from"
    return f"{slot.pool}{slot.stage}.{slot.number} {way} {edge.peer} tag {edge.tag}"


def text(name, placement, micros):
    schedule = build(name, len(placement), max(placement) + 1, micros, placement)
    timeline = replay(schedule, Costs.unit(schedule.stages))
    programs = lower(schedule, [Lifetimes("W", "F", "W", "B")] * schedule.stages)
    check(programs)
    lines = [str(schedule), draw(timeline, 96)]
    for program in programs:
        lines += [f"rank {program.rank}: {', '.join(map(channel, program.edges)) or 'no messages'}"]
        lines += [f"  {words(instruction)}" for instruction in program.instructions]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    assert text(*CASES[case]) == (FOLDER / f"{case}.txt").read_text()


def test_every_golden_has_its_case():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


if __name__ == "__main__":
    for name, case in CASES.items():
        (FOLDER / f"{name}.txt").write_text(text(*case))
