"""Statistics, JSON lines and the drawing."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import build
from hpcpipe.schedule.op import Op, ScheduleError
from hpcpipe.schedule.replay import replay
from hpcpipe.schedule.timeline import Event, Timeline, draw

MEASURED = Timeline(
    (
        Event(0, Op("F", 0, 0), 10.25, 11.0),
        Event(1, Op("F", 1, 0), 11.0, 12.0),
        Event(1, Op("B", 1, 0), 12.0, 13.25),
        Event(0, Op("B", 0, 0), 13.5, 14.25),
    ),
    2,
)


def test_statistics():
    assert MEASURED.makespan == 4.0
    assert [MEASURED.busy(r) for r in (0, 1)] == [1.5, 2.25]
    assert [MEASURED.idle(r) for r in (0, 1)] == [2.5, 1.75]
    assert MEASURED.bubble == 1 - 3.75 / 8
    assert MEASURED.rows == ((Op("F", 0, 0), Op("B", 0, 0)), (Op("F", 1, 0), Op("B", 1, 0)))


def test_an_empty_timeline_has_no_bubble():
    empty = Timeline((), 3)
    assert (empty.makespan, empty.bubble, empty.busy(2)) == (0.0, 0.0, 0)
    assert len(draw(empty).splitlines()) == 3 + 1


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1e6), st.floats(0, 10)), max_size=20))
def test_json_lines_round_trip(rows):
    timeline = Timeline(tuple(Event(r, Op("W", r, i), t, t + d) for i, (r, t, d) in enumerate(rows)), 4)
    assert Timeline.from_jsonl(timeline.to_jsonl()) == timeline


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"rank": 0, "op": "F0.0", "start": 1.0', "line 3 of the timeline"),
        ('{"rank": 0, "start": 1.0, "end": 2.0}', "line 3 of the timeline"),
        ('{"rank": 0, "op": "Q0.0", "start": 1.0, "end": 2.0}', "'Q0.0' is not an op"),
    ],
)
def test_a_broken_line_is_named(line, message):
    text = Timeline((Event(0, Op("F", 0, 0), 0.0, 1.0),), 1).to_jsonl() + line + "\n"
    with pytest.raises(ScheduleError, match=message):
        Timeline.from_jsonl(text)


def test_cells_are_as_wide_as_their_ops_are_long():
    timeline = replay(build("1f1b", 2, 2, 2), Costs((2, 2), (3, 3), (1, 1)))
    assert draw(timeline, 17 + len("rank 0 || 100 %"), legend=False) == (
        "rank 0 |0>1>   0<<=  1<<=|  71 %\n"
        "rank 1 |  0>0<<=1>1<<=   |  71 %\n"
    )  # fmt: skip


def test_the_stage_is_written_where_a_rank_has_several_and_there_is_room():
    timeline = replay(build("gpipe", 2, 1, 1), Costs.unit(2))
    assert draw(timeline, 24 + len("rank 0 || 100 %"), legend=False) == "rank 0 |0.0>1.0>1.0<1.0=0.0<0.0=| 100 %\n"


def test_a_number_too_long_for_its_cell_keeps_its_last_digit():
    timeline = replay(build("gpipe", 1, 1, 12), Costs.unit(1))
    assert draw(timeline, 72 + len("rank 0 || 100 %"), legend=False).endswith("9<9=0<0=1<1=| 100 %\n")
    assert draw(timeline, 108 + len("rank 0 || 100 %"), legend=False).endswith("10=11<11=| 100 %\n")


def test_ops_narrower_than_a_column_become_a_shade():
    top, *_, bottom, legend = draw(replay(build("1f1b", 8, 8, 48), Costs.unit(8)), 90).splitlines()
    assert re.fullmatch(r"rank 0 \|>{4} +#+<+\|  91 %", top)
    assert re.fullmatch(r"rank 7 \| {3}#+ {3}\|  91 %", bottom)
    assert legend.split("   ")[-2:] == ["# both", "blank: mostly idle"]


@given(st.integers(1, 12), st.integers(1, 20), st.integers(20, 160), st.tuples(*[st.floats(0.01, 9)] * 3))
@settings(max_examples=40)
def test_no_line_is_wider_than_asked(ranks, micros, width, times):
    costs = Costs(*((t,) * ranks for t in times))
    lines = draw(replay(build("1f1b", ranks, ranks, micros), costs), width).splitlines()
    assert max(map(len, lines)) <= max(width, len("rank 10 || 100 %") + 8)
    assert len({len(line) for line in lines[:ranks]}) == 1
