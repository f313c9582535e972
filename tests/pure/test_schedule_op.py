"""Ops, the dependency rule and the text form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.schedule.families import build
from hpcpipe.schedule.op import Op, Schedule, ScheduleError, boundaries, needs


def ops(text):
    return tuple(Op.parse(word) for word in text.split())


@pytest.mark.parametrize(
    ("op", "stages", "expected"),
    [
        ("F0.3", 4, ""),
        ("F2.3", 4, "F1.3"),
        ("B3.3", 4, "F3.3"),
        ("B1.3", 4, "F1.3 B2.3"),
        ("W1.3", 4, "B1.3"),
        ("B0.0", 1, "F0.0"),
        ("W0.0", 1, "B0.0"),
    ],
)
def test_needs(op, stages, expected):
    assert needs(Op.parse(op), stages) == ops(expected)


def test_op_text():
    assert str(Op("F", 4, 7)) == "F4.7"
    assert Op.parse("W12.345") == Op("W", 12, 345)


@pytest.mark.parametrize("text", ["", "F4", "F4.", "G4.7", "F4.7 ", "f4.7", "F-1.0", "F4.7.1", "4F7"])
def test_what_is_no_op_is_refused(text):
    with pytest.raises(ScheduleError, match="is not an op"):
        Op.parse(text)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [((0, 1, 2), (0, 1)), ((0, 0, 1, 1), (1,)), ((0, 1, 0, 1), (0, 1, 2)), ((0,), ()), ((0, 0), ())],
)
def test_boundaries(placement, expected):
    assert boundaries(placement) == expected


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 5), st.integers(0, 4), st.integers(1, 6))
def test_text_round_trip(name, ranks, extra, micros):
    schedule = build(name, ranks + extra, ranks, micros)
    assert Schedule.parse(str(schedule)) == schedule


def test_round_trip_of_a_rank_without_ops():
    schedule = Schedule("odd", (ops("F0.0 B0.0 W0.0"), ()), (0,), 1)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "F0.0 B0.0 W0.0\n", "schedule x, many microbatches, stages on ranks 0\nF0.0\n"])
def test_a_text_without_its_heading_is_refused(text):
    with pytest.raises(ScheduleError, match="first line"):
        Schedule.parse(text)


def test_only():
    schedule = build("1f1b", 2, 2, 3)
    assert schedule.only("F").rows == (ops("F0.0 F0.1 F0.2"), ops("F1.0 F1.1 F1.2"))
