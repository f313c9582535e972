"""Goldens: a schedule, its drawing and its programs, as a person would check them by eye.

After a wanted change, ``python tests/pure/test_schedule_golden.py`` writes them anew; read the difference.
"""

from pathlib import Path

import pytest

from hpcpipe.schedule.check import check
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import build
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.program import Lifetimes, lower
from hpcpipe.schedule.replay import replay
from hpcpipe.schedule.timeline import draw

FOLDER = Path(__file__).parents[1] / "golden" / "schedules"
# name, ranks, microbatches, and what is not as usual
CASES = {
    "gpipe_4_ranks_6_microbatches": ("gpipe", 4, 6, {}),
    "1f1b_4_ranks_8_microbatches": ("1f1b", 4, 8, {}),
    "1f1b_4_ranks_2_microbatches": ("1f1b", 4, 2, {}),
    "1f1b_5_stages_on_2_ranks": ("1f1b", 2, 3, {"placement": (0, 0, 0, 1, 1)}),
    "1f1b_4_stages_in_turn_on_2_ranks": ("1f1b", 2, 4, {"placement": (0, 1, 0, 1)}),
    "interleaved_4_ranks_8_microbatches": ("interleaved", 4, 8, {}),
    "interleaved_4_ranks_8_microbatches_in_one_group": ("interleaved", 4, 8, {"group": 8}),
    "interleaved_5_stages_on_2_ranks": ("interleaved", 2, 3, {"stages": 5}),
    "zb_h1_4_ranks_8_microbatches": ("zb_h1", 4, 8, {}),
    "zb_h1_3_stages_on_2_ranks": ("zb_h1", 2, 4, {"placement": (0, 0, 1)}),
    "zb_h2_4_ranks_8_microbatches": ("zb_h2", 4, 8, {}),
    "zb_h2_4_ranks_3_microbatches": ("zb_h2", 4, 3, {}),
    "zb_v_4_ranks_8_microbatches": ("zb_v", 4, 8, {}),
    "zb_v_2_ranks_3_microbatches": ("zb_v", 2, 3, {}),
    "v_half_4_ranks_8_microbatches": ("v_half", 4, 8, {}),
    "v_half_5_ranks_7_microbatches": ("v_half", 5, 7, {}),
    "v_min_4_ranks_8_microbatches": ("v_min", 4, 8, {}),
    "v_min_6_ranks_6_microbatches": ("v_min", 6, 6, {}),
    "dualpipe_v_4_ranks_9_microbatches": ("dualpipe_v", 4, 9, {}),
    "dualpipe_v_4_ranks_3_microbatches": ("dualpipe_v", 4, 3, {}),
    "dualpipe_8_ranks_10_microbatches": ("dualpipe", 8, 10, {}),
    "dualpipe_2_ranks_2_microbatches": ("dualpipe", 2, 2, {}),
}
# With programs: the plainest, and stages in a line, in turn, in a V and in two copies.
PROGRAMS = {
    "gpipe_4_ranks_6_microbatches",
    "1f1b_4_ranks_8_microbatches",
    "1f1b_4_ranks_2_microbatches",
    "1f1b_5_stages_on_2_ranks",
    "1f1b_4_stages_in_turn_on_2_ranks",
    "interleaved_5_stages_on_2_ranks",
    "zb_v_2_ranks_3_microbatches",
    "dualpipe_2_ranks_2_microbatches",
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
    """``X1 from 0 tag 0``."""
    return f"{edge.pool}{edge.stage} {'to' if edge.direction == 'send' else 'from'} {edge.peer} tag {edge.tag}"


def text(case):
    name, ranks, micros, unusual = CASES[case]
    stages = unusual.get("stages", len(unusual.get("placement", ())))
    schedule = build(name, stages, ranks, micros, unusual.get("placement"), group=unusual.get("group", 0))
    lines = [str(schedule), draw(replay(schedule, Costs.unit(schedule.stages)), 144)]
    programs = lower(schedule, [Lifetimes("W", "F", "W", "B")] * schedule.stages)
    check(programs)
    for program in programs if case in PROGRAMS else ():
        lines += [f"rank {program.rank}: {', '.join(map(channel, program.edges)) or 'no messages'}"]
        lines += [f"  {words(instruction)}" for instruction in program.instructions]
    return "\n".join(lines).rstrip("\n") + "\n"


@pytest.mark.parametrize("case", CASES)
def test_golden(case):
    assert text(case) == (FOLDER / f"{case}.txt").read_text()


def test_every_golden_has_its_case():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(text(name))
