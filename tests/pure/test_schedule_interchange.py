"""The CSV of PyTorch's pipelining: round trips, files as a person would write them, and every sentence of refusal."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.schedule.families import SCHEDULES, build
from hpcpipe.schedule.interchange import load, read, write
from hpcpipe.schedule.op import Op, Schedule, ScheduleError
from hpcpipe.schedule.replay import validate

# Two ranks, one stage each, two microbatches: 1F1B as PyTorch dumps it (idle steps are empty cells).
ONE_F_ONE_B = "0F0,0F1,,,0B0,,0B1\n,1F0,1B0,1F1,1B1\n"
MESSAGES = """\
0UNSHARD,0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1,0REDUCE_GRAD,0RESHARD
1UNSHARD,1RECV_F0,1F0,1RECV_F1,1B0,1SEND_B0,1F1,1B1,1SEND_B1,1REDUCE_GRAD,1RESHARD
"""


def rows(*texts):
    return tuple(tuple(Op.parse(word) for word in text.split()) for text in texts)


@st.composite
def schedules(draw):
    """Any named schedule, gpipe and 1f1b on any placement; then W moved back at random, which never makes it stop."""
    ranks, micros = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    name = draw(st.sampled_from([name for name, family in SCHEDULES.items() if family.chains == 1]))
    placement = None
    if SCHEDULES[name].anywhere:
        placement = draw(st.permutations([*range(ranks), *draw(st.lists(st.integers(0, ranks - 1), max_size=4))]))
    schedule = build(name, len(placement or ()), ranks, micros, placement)
    return replace(schedule, rows=tuple(map(draw(delays()), schedule.rows)))


def delays():
    """A function from a row to a row whose W come later or not, in microbatch order or not."""
    return st.integers(0, 9).map(lambda seed: lambda row: later(row, random.Random(seed)) if seed else row)


def later(row, rng):
    done, owed = [], []
    for op in row:
        (owed if op.kind == "W" else done).append(op)
        if owed and rng.random() < 0.3:
            done.append(owed.pop(rng.randrange(len(owed))))
    return (*done, *owed)


# --- round trips


@given(schedules(), st.booleans())
def test_round_trip(schedule, communication):
    text = write(schedule, communication)
    assert read(text, schedule.name) == schedule
    assert write(read(text, schedule.name), communication) == text


@given(schedules())
def test_messages_come_in_the_order_in_which_they_are_sent(schedule):
    lines = [line.split(",") for line in write(schedule, communication=True).splitlines()]
    for a in range(schedule.ranks):
        for b in range(schedule.ranks):
            assert sent(lines[a], b, schedule.placement) == received(lines[b], a, schedule.placement)


def sent(line, to, placement):
    """(kind, stage that receives, microbatch) of the messages to a rank, in order."""
    found = []
    for cell in line:
        for kind, step in (("F", 1), ("B", -1)):
            stage, word, micro = cell.partition(f"SEND_{kind}")
            if word and placement[int(stage) + step] == to:
                found.append((kind, int(stage) + step, micro))
    return found


def received(line, source, placement):
    found = []
    for cell in line:
        for kind, step in (("F", 1), ("B", -1)):
            stage, word, micro = cell.partition(f"RECV_{kind}")
            if word and placement[int(stage) - step] == source:
                found.append((kind, int(stage), micro))
    return found


@given(schedules(), st.integers(0, 99))
def test_a_lost_message_is_missed(schedule, seed):
    """Whichever message is taken out of a file, the reader says so (unless it was the only pair and both are gone)."""
    lines = [line.split(",") for line in write(schedule, communication=True).splitlines()]
    places = [(r, i) for r, line in enumerate(lines) for i, cell in enumerate(line) if "SEND" in cell or "RECV" in cell]
    if places:
        rank, at = random.Random(seed).choice(places)
        lost = lines[rank].pop(at)
        with pytest.raises(ScheduleError, match=f"needs {lost} (before|after) it, because .* there is none"):
            read("\n".join(map(",".join, lines)), "x")


@given(st.text(alphabet='0123FIBWSEND_RCV();,OLAP "\n', max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = read(text, "x")
    except ScheduleError as error:
        assert str(error).startswith("x: ")
    else:
        assert read(write(schedule), "x") == schedule


def test_forwards_alone():
    forwards = build("1f1b", 2, 2, 2).only("F")
    assert write(forwards) == "0F0,0F1\n1F0,1F1\n"
    assert write(forwards, communication=True) == ("0F0,0SEND_F0,0F1,0SEND_F1\n1RECV_F0,1RECV_F1,1F0,1F1\n")
    assert read(write(forwards, communication=True), forwards.name) == forwards


# --- by hand


def test_read():
    schedule = read(ONE_F_ONE_B, "1f1b")
    assert schedule.rows == rows("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1", "F1.0 B1.0 W1.0 F1.1 B1.1 W1.1")
    assert schedule == build("1f1b", 2, 2, 2)


def test_write():
    schedule = build("1f1b", 2, 2, 2)
    assert write(schedule) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    assert write(schedule, communication=True) == (
        "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n1RECV_F0,1RECV_F1,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n"
    )


def test_messages_and_sharding_are_dropped():
    assert read(MESSAGES, "1f1b") == read(ONE_F_ONE_B, "1f1b")


def test_their_b_is_both_halves_and_their_i_is_ours():
    schedule = read("0F0,0F1,0B0,0I1,0W1\n", "x")
    assert schedule.rows == rows("F0.0 F0.1 B0.0 W0.0 B0.1 W0.1")
    assert read("0F0,0F1,0I0,0I1,0W0,0W1\n", "x").rows == rows("F0.0 F0.1 B0.0 B0.1 W0.0 W0.1")


def test_a_w_apart_from_its_b_is_written_apart():
    schedule = Schedule("x", rows("F0.0 F0.1 B0.0 B0.1 W0.1 W0.0"), (0,), 2)
    assert write(schedule) == "0F0,0F1,0I0,0B1,0W0\n"


def test_an_overlap_is_its_parts_in_order():
    text = "0F0,(1F0;1B0)OVERLAP_F_B,( 0F1 ; 0B0 )OVERLAP_F_B,(1F1;1B1)OVERLAP_F_B,0B1\n"
    expected = "F0.0 F1.0 B1.0 W1.0 F0.1 B0.0 W0.0 F1.1 B1.1 W1.1 B0.1 W0.1"
    assert read(text, "x").rows == rows(expected)
    validate(read(text, "x"))


def test_messages_inside_an_overlap_are_in_their_place():
    text = "0F0,0SEND_F0,(0RECV_B0;0B0)OVERLAP_F_B\n(1RECV_F0;1F0;1B0)OVERLAP_F_B,1SEND_B0\n"
    assert read(text, "x").rows == rows("F0.0 B0.0 W0.0", "F1.0 B1.0 W1.0")


def test_stages_of_one_rank_send_nothing():
    v = build("1f1b", 4, 2, 1, (0, 1, 1, 0))
    assert write(v, communication=True) == (
        "0F0,0SEND_F0,3RECV_F0,3F0,3B0,3SEND_B0,0RECV_B0,0B0\n1RECV_F0,1F0,2F0,2SEND_F0,2RECV_B0,2B0,1B0,1SEND_B0\n"
    )


@pytest.mark.parametrize(
    "text",
    [
        ONE_F_ONE_B.replace("\n", "\r\n"),
        ONE_F_ONE_B.replace(",", " , "),
        ONE_F_ONE_B.replace("\n", ",,\n"),
        ONE_F_ONE_B + "\n\n  \n",
        ONE_F_ONE_B.removesuffix("\n"),
        ONE_F_ONE_B.replace("0F1", '"0F1"'),
    ],
)
def test_how_it_was_typed_does_not_matter(text):
    assert read(text, "1f1b") == read(ONE_F_ONE_B, "1f1b")


def test_nothing_is_put_in_order_or_proven():
    backwards = read("0F0,0F1,0I0,0I1,0W1,0W0\n", "x")
    assert backwards.rows == rows("F0.0 F0.1 B0.0 B0.1 W0.1 W0.0")
    with pytest.raises(ScheduleError, match=r"rank 0 runs W0\.0 after W0\.1, but the W of a stage run in"):
        validate(backwards)
    with pytest.raises(ScheduleError, match="a second time"):
        validate(read("0F0,0F0,0B0\n", "x"))
    with pytest.raises(ScheduleError, match="nothing can go on"):
        validate(read("0B0,0F0\n", "x"))


# --- what is refused


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "x: there is nothing in it; write one row per rank, such as 0F0,0B0"),
        ("\n \n", "x: there is nothing in it"),
        ("0F0,0X0", "x: rank 0, cell 1 reads '0X0', which is no action; write stage, action and microbatch, as in 2F0"),
        ("0F0\n1F", "x: rank 1, cell 0 reads '1F', which is no action"),
        ("0F0,F0", "x: rank 0, cell 1 reads 'F0', which is no action"),
        ("0F0,0F0.", "x: rank 0, cell 1 reads '0F0.', which is no action"),
        ("0F-1", "x: rank 0, cell 0 reads '0F-1', which is no action"),
        ("0F1000000", "x: rank 0, cell 0 reads '0F1000000', which is no action"),
        ("0F0,(0F1;)OVERLAP_F_B", r"x: rank 0, cell 1 reads '\(0F1;\)OVERLAP_F_B', which is no action"),
        ("()OVERLAP_F_B", r"x: rank 0, cell 0 reads '\(\)OVERLAP_F_B', which is no action"),
        ("(0F0;0B0)OVERLAP", r"x: rank 0, cell 0 reads '\(0F0;0B0\)OVERLAP', which is no action"),
        ("0F0,UNSHARD", "x: rank 0, cell 1 reads 'UNSHARD', which is no action"),
        ("0F0\n,,\n1F0", "x: rank 1 computes nothing; each row is a rank and needs an F, I, B or W"),
        ("0F0\n1UNSHARD,1RECV_F0", "x: rank 1 computes nothing"),
        ("0F0,1F0\n0F1", r"x: rank 1, cell 0 \(0F1\) stands on another rank than rank 0, cell 0 \(0F0\)"),
        ("0F0\n2F0", "x: stage 1 is nowhere, although stage 2 is; number them from 0 without gaps"),
        ("1F0", "x: stage 0 is nowhere, although stage 1 is"),
        ("0F0,0F2", "x: microbatch 1 is nowhere, although microbatch 2 is"),
        ('0F0,"0F1', "x: line 1 is not CSV \\(unexpected end of data\\); write one row per rank"),
        ("0F" + "0" * 140000, r"x: line . is not CSV \(field larger than field limit \(131072\)\)"),
    ],
)
def test_refused(text, sentence):
    with pytest.raises(ScheduleError, match=sentence) as raised:
        read(text, "x")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "0SEND_F1,", "",
            r"rank 0, cell 3 \(0F1\) needs 0SEND_F1 after it, because stage 1 is on rank 1; there is none",
        ),
        (
            "0F0,0SEND_F0", "0SEND_F0,0F0",
            r"rank 0, cell 2 \(0F0\) needs 0SEND_F0 after it, because .*; it is at rank 0, cell 1 \(0SEND_F0\)",
        ),
        (
            "1RECV_F1,", "",
            r"rank 1, cell 5 \(1F1\) needs 1RECV_F1 before it, because stage 0 is on rank 0; there is none",
        ),
        (
            "0RECV_B0,0B0", "0B0,0RECV_B0",
            r"rank 0, cell 5 \(0B0\) needs 0RECV_B0 before it, because stage 1 is on rank 1; it is at rank 0, cell 6",
        ),
        (
            "1SEND_B0", "0SEND_B0",
            r"rank 1, cell 4 \(1B0\) needs 1SEND_B0 after it, because stage 0 is on rank 0; there is none",
        ),
        ("0REDUCE", "1SEND_B1,0REDUCE", r"rank 1, cell 8 \(1SEND_B1\) stands there a second time"),
        ("0REDUCE", "0SEND_B1,0REDUCE", r"rank 0, cell 9 \(0SEND_B1\) moves nothing: no pass on another rank"),
        ("0REDUCE", "1RECV_B0,0REDUCE", r"rank 0, cell 9 \(1RECV_B0\) moves nothing"),
        ("0REDUCE", "0SEND_F7,0REDUCE", r"rank 0, cell 9 \(0SEND_F7\) moves nothing"),
    ],
)  # fmt: skip
def test_messages_out_of_place(old, new, sentence):
    assert old in MESSAGES
    with pytest.raises(ScheduleError, match=f"^x: {sentence}"):
        read(MESSAGES.replace(old, new), "x")


def test_a_message_on_the_wrong_rank():
    text = "0F0,0SEND_F0,1RECV_F0\n1F0\n"
    with pytest.raises(ScheduleError, match=r"\(1F0\) needs 1RECV_F0 before it, .*; it is at rank 0, cell 2"):
        read(text, "x")


def test_a_message_between_stages_of_one_rank():
    with pytest.raises(ScheduleError, match=r"rank 0, cell 1 \(0SEND_F0\) moves nothing"):
        read("0F0,0SEND_F0,1F0\n", "x")


def test_messages_of_what_cannot_run_are_not_written():
    with pytest.raises(ScheduleError, match="nothing can go on"):
        write(Schedule("x", rows("F1.0", "B0.0 F0.0"), (1, 0), 1), communication=True)


def test_several_chains_are_not_written():
    with pytest.raises(ScheduleError, match="no way to say that there are 2 chains"):
        write(Schedule("x", rows("F0.0 F1.0"), (0, 0), 1, chains=2))


# --- files


def test_a_file_is_read_by_what_it_holds(tmp_path):
    schedule = build("1f1b", 2, 2, 2)
    ours, theirs, windows = tmp_path / "a.csv", tmp_path / "1f1b.txt", tmp_path / "1f1b by hand.csv"
    ours.write_text(str(schedule))
    theirs.write_text(write(schedule, communication=True))
    windows.write_text(write(schedule), encoding="utf-8-sig", newline="\r\n")
    assert load(str(ours)) == load(str(theirs)) == schedule
    assert load(str(windows)).rows == schedule.rows
    assert Schedule.parse(str(load(str(windows)))).name == "1f1b_by_hand"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"0F0,\xff", "is not UTF-8 text; a schedule is a text or a CSV file"),
        (b"0F0,0Q0\n", ": plan: rank 0, cell 1 reads '0Q0'"),
        (b"schedule x\nF0.0\n", ": the first line of a schedule reads 'schedule x'"),
        (b"schedule x, 1 microbatches, stages on ranks 0\nF0.0 0F0\n", ": '0F0' is not an op"),
        (b"schedule x, " + b"1" * 5000 + b" microbatches, stages on ranks 0\n", "Exceeds the limit"),
        (b"", ": plan: there is nothing in it"),
    ],
)
def test_a_bad_file_is_named(tmp_path, content, sentence):
    path = tmp_path / "plan.csv"
    path.write_bytes(content)
    with pytest.raises(ScheduleError) as raised:
        load(str(path))
    assert str(raised.value).startswith(str(path)) and sentence in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none.csv"
    with pytest.raises(ScheduleError, match=r"none\.csv cannot be read \(No such file or directory\); name a file"):
        load(str(missing))
    with pytest.raises(ScheduleError, match=r"cannot be read \(Is a directory\)"):
        load(str(tmp_path))
    with pytest.raises(ScheduleError, match=r"cannot be read \(.*null"):
        load("a\0b")
