"""The profile of a step: valid trace events, on threads whose slices nest, with arrows that hold on to both ends."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.__main__ import main
from hpcpipe.config import UserError
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.timeline import Event, Timeline
from hpcpipe.trace import STREAMS, Span, events, write
from tests.small_run import run_toml
from tests.trace_file import inside, names, of, read

FLOPS = {(kind, stage): 2e9 * (stage + 1) for kind in "FBW" for stage in range(8)}


def step(ranks: int, micros: int, late: float = 0.0) -> Timeline:
    """All forwards as a wave, then B and W as a wave back; an op takes 10 ms."""
    found = []
    for m in range(micros):
        for s in range(ranks):
            start, back = late + (m + s) * 0.01, late + (micros + 2 * ranks + 2 * m - 2 * s) * 0.01
            found += [
                Event(s, Op("F", s, m), start, start + 0.01),
                Event(s, Op("B", s, m), back, back + 0.01),
                Event(s, Op("W", s, m), back + 0.01, back + 0.02),
            ]
    return Timeline(tuple(sorted(found, key=lambda e: (e.rank, e.start))), ranks)


def messages(timeline: Timeline, skew: float = 0.0) -> list[Span]:
    """A SEND after every op whose result leaves its rank, and the WAIT for it on the other rank."""
    spans = []
    for e in timeline.events:
        to = e.rank + {"F": 1, "B": -1, "W": 0}[e.op.kind]
        if to != e.rank and 0 <= to < timeline.ranks:
            spans.append(Span(e.rank, "send", f"SEND {e.op}", e.end, e.end + 0.004, str(e.op)))
            spans.append(Span(to, "receive", f"WAIT {e.op}", e.end - 0.03 + skew, e.end + 0.004 + skew, str(e.op)))
    return spans


def written(path: Path, *args: Any, **more: Any) -> list[dict[str, Any]]:
    """What is in the file, held against the rules of the format."""
    write(path, *args, **more)
    return read(path)


def test_ops_are_where_they_were(tmp_path: Path) -> None:
    timeline = step(3, 4, late=100.0)
    found = written(tmp_path / "t.json", timeline, flops=FLOPS)
    ops = {e["name"]: e for e in of(found, "X")}
    assert set(ops) == {str(e.op) for e in timeline.events}
    one = ops["F2.1"]
    assert (one["pid"], one["ts"], one["dur"], one["cat"]) == (3, 30000.0, 10000.0, "forward")
    assert one["args"] == {"stage": 2, "microbatch": 1, "flops": 6e9, "TFLOP/s": 0.6}
    assert names(found, "process_name") == ["rank 0", "rank 1", "rank 2"]
    assert set(names(found, "thread_name")) == {"compute"}
    assert "flops" not in of(written(tmp_path / "t.json", timeline), "X")[0]["args"]


def test_arrows_from_op_to_op_where_no_message_is_known(tmp_path: Path) -> None:
    found = written(tmp_path / "t.json", step(3, 4))
    assert len(of(found, "s")) == 4 * 2 * 2  # each microbatch crosses two boundaries, twice
    ends = {e["id"]: (e["pid"], e["ts"]) for e in of(found, "f")}
    arrows = {(e["pid"], e["ts"], *ends[e["id"]]) for e in of(found, "s")}
    assert (1, 9999.999, 2, 10000.0) in arrows  # F0.0 to F1.0
    assert (3, 69999.999, 2, 80000.0) in arrows  # B2.0 to B1.0


def test_arrows_go_from_an_op_to_the_one_on_another_rank_that_needs_it(tmp_path: Path) -> None:
    found = written(tmp_path / "t.json", step(3, 2), step(3, 2, late=4.0))
    starts, ends = ({e["id"]: e for e in of(found, ph)} for ph in "sf")
    assert len(starts) == 2 * 2 * 2 * 2
    pairs = [(inside(found, starts[i]), inside(found, ends[i]), starts[i]["pid"] > 3) for i in starts]
    forward = [(f"F{s}.{m}", f"F{s + 1}.{m}") for s in (0, 1) for m in (0, 1)]
    backward = [(f"B{s + 1}.{m}", f"B{s}.{m}") for s in (0, 1) for m in (0, 1)]
    assert sorted(pairs) == sorted((*pair, below) for pair in forward + backward for below in (False, True))
    assert all((starts[i]["pid"] > 3) == (ends[i]["pid"] > 3) for i in starts)  # never from one timeline to the other


def test_stages_of_one_rank_send_nothing(tmp_path: Path) -> None:
    ops = [Op("F", s, 0) for s in range(3)] + [Op(kind, s, 0) for s in (2, 1, 0) for kind in "BW"]
    alone = Timeline(tuple(Event(0, op, i, i + 1.0) for i, op in enumerate(ops)), 1)
    found = written(tmp_path / "t.json", alone, alone)
    assert len(of(found, "X")) == 2 * 9 and of(found, "s") == []


def test_arrows_from_each_send_to_its_wait(tmp_path: Path) -> None:
    timeline = step(3, 2)
    spans = messages(timeline)
    found = written(tmp_path / "t.json", timeline, spans=spans)
    threads = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    assert [threads[e["tid"]] for e in of(found, "s")] == ["send"] * 8
    assert [threads[e["tid"]] for e in of(found, "f")] == ["receive"] * 8
    slices = {e["name"]: e for e in of(found, "X")}
    wait = slices["WAIT F0.1"]
    assert (wait["pid"], wait["args"], wait["cat"]) == (2, {"message": "F0.1"}, "receive")
    last = round(wait["ts"] + wait["dur"] - 0.001, 3)
    assert last in [e["ts"] for e in of(found, "f") if e["tid"] == wait["tid"]]


def test_one_message_that_is_known_keeps_the_other_arrows(tmp_path: Path) -> None:
    timeline = step(2, 2)
    found = written(tmp_path / "t.json", timeline, spans=[s for s in messages(timeline) if s.message == "F0.0"])
    assert len(of(found, "s")) == 4


def test_no_arrow_goes_back_in_time(tmp_path: Path) -> None:
    timeline = step(2, 2)
    assert of(written(tmp_path / "t.json", timeline, spans=messages(timeline, skew=-0.1)), "s") == []


def test_what_a_rank_holds(tmp_path: Path) -> None:
    found = written(tmp_path / "t.json", step(2, 3))
    for pid in (1, 2):
        held = [(e["args"]["saved"], e["args"]["owed"]) for e in of(found, "C") if e["pid"] == pid]
        assert held == [(1, 0), (2, 0), (3, 0), (2, 1), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)]
    forward = Timeline(tuple(e for e in step(2, 3).events if e.op.kind == "F"), 2)
    assert of(written(tmp_path / "t.json", forward), "C") == []


def test_a_prediction_lies_under_its_rank(tmp_path: Path) -> None:
    measured, predicted = step(2, 2, late=50.0), step(2, 2, late=7.0)
    spans = [Span(1, "save", "shard 1", 49.5, 51.0)]
    found = written(tmp_path / "t.json", measured, predicted, spans=spans, hosts=["node-a", 'node "b"'])
    order = {e["pid"]: e["args"]["sort_index"] for e in found if e["name"] == "process_sort_index"}
    title = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    assert [title[pid] for pid in sorted(title, key=lambda pid: order[pid])] == [
        "rank 0 on node-a",
        "rank 0, predicted",
        'rank 1 on node "b"',
        "rank 1, predicted",
    ]
    twice = [e["ts"] for e in of(found, "X") if e["name"] == "F0.0"]
    assert twice == [500000.0, 500000.0]  # half a second after the save, which began first
    assert [e["ts"] for e in of(found, "X") if e["name"] == "shard 1"] == [0.0]


def test_a_prediction_may_be_all_there_is(tmp_path: Path) -> None:
    found = written(tmp_path / "t.json", None, step(2, 3, late=7.0), FLOPS)
    assert names(found, "process_name") == ["rank 0, predicted", "rank 1, predicted"]
    assert len(of(found, "X")) == 2 * 3 * 3 and len(of(found, "s")) == 2 * 3
    one = next(e for e in of(found, "X") if e["name"] == "F1.2")
    assert (one["pid"], one["tid"], one["ts"], one["dur"]) == (2, 2, 30000.0, 10000.0)
    with pytest.raises(ValueError, match="is on no stream of 0 ranks"):
        write(tmp_path / "t.json", None, step(2, 1), spans=[Span(0, "send", "x", 0, 1)])


def test_spans_at_the_same_time_are_on_threads_of_their_own(tmp_path: Path) -> None:
    spans = [Span(0, "send", f"SEND F0.{i}", 0.001 * i, 0.001 * i + 0.0025) for i in range(6)]
    spans += [Span(0, "compute", "update", 0.0, 0.05), Span(0, "reduce", "REDUCE 0", 0.03, 0.04)]
    found = written(tmp_path / "t.json", step(1, 2), spans=spans)
    assert names(found, "thread_name") == ["compute", "beside the ops", "send", "send", "send", "reduce"]
    assert sum(e["cat"] == "send" for e in of(found, "X")) == 6


def test_what_is_nowhere_is_refused(tmp_path: Path) -> None:
    for span in (Span(2, "send", "x", 0, 1), Span(0, "sent", "x", 0, 1), Span(0, "send", "x", 1, 0)):
        with pytest.raises(ValueError, match="is on no stream of 2 ranks"):
            write(tmp_path / "t.json", step(2, 1), spans=[span])
    with pytest.raises(ValueError):
        write(tmp_path / "t.json", step(2, 1), spans=[Span(0, "send", "x", 0, float("inf"))])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_a_trace_too(tmp_path: Path) -> None:
    assert written(tmp_path / "t.json", Timeline((), 0)) == written(tmp_path / "t.json", None) == []
    assert of(written(tmp_path / "t.json", Timeline((), 2), Timeline((), 2)), "X") == []
    (short,) = of(written(tmp_path / "t.json", Timeline((Event(0, Op("F", 0, 0), 1.5, 1.5),), 1), flops=FLOPS), "X")
    assert (short["dur"], "TFLOP/s" in short["args"]) == (0, False)
    assert (
        of(written(tmp_path / "t.json", Timeline((), 1), spans=[Span(0, "save", "s", 1e9, 1e9 + 1)]), "X")[0]["ts"] == 0
    )


@pytest.mark.parametrize("place", ["missing/t.json", "file/t.json"])
def test_a_file_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"trace: .*t\.json cannot be written"):
        write(tmp_path / place, step(1, 1))
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.sampled_from(STREAMS),
            st.integers(0, 10**9),
            st.integers(0, 10**8),
            st.sampled_from(["", "F0.0", "F0.1", "B1.0"]),
        ),
        max_size=30,
    ),
    st.randoms(use_true_random=False),
)
def test_any_spans_make_a_valid_file_whatever_their_order(tmp_path_factory, rows, random) -> None:
    spans = [Span(r, stream, f"{i} ✓", a * 1e-9, (a + n) * 1e-9, m) for i, (r, stream, a, n, m) in enumerate(rows)]
    path = tmp_path_factory.getbasetemp() / "any.json"
    written(path, step(2, 2), step(2, 2), FLOPS, spans)
    first = path.read_bytes()
    written(path, step(2, 2), step(2, 2), FLOPS, random.sample(spans, len(spans)))
    assert path.read_bytes() == first


def test_a_long_step_is_not_held_as_text(tmp_path: Path) -> None:
    timeline = step(1, 2_000)
    _ = timeline.by_rank, timeline.start
    tracemalloc.start()
    try:
        write(tmp_path / "t.json", timeline, flops=FLOPS)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < (tmp_path / "t.json").stat().st_size / 2


def test_events_are_one_json_object_each() -> None:
    for line in events(step(2, 1), None, {}, [], []):
        assert "\n" not in line and isinstance(json.loads(line), dict)


# --- what a person types


def test_plan_writes_what_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, file = tmp_path / "run.toml", tmp_path / "plan.json"
    config.write_text(run_toml(tmp_path / "none", tmp_path / "run", "llama", model__vocab=61))
    assert main(["plan", str(config), "--ranks", "2", "--trace", str(file)]) == 0
    with_file = capsys.readouterr().out
    found = read(file)
    assert names(found, "process_name") == ["rank 0, predicted", "rank 1, predicted"]
    assert sorted(e["name"] for e in of(found, "X")) == sorted(
        f"{k}{s}.{m}" for k in "FBW" for s in "01" for m in range(6)
    )
    assert all(e["args"]["flops"] > 0 for e in of(found, "X") if e["name"][0] == "F")
    assert main(["plan", str(config), "--ranks", "2"]) == 0
    assert capsys.readouterr().out == with_file


def test_inspect_writes_what_was_measured_above_what_was_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timeline, file = tmp_path / "timeline.jsonl", tmp_path / "t.json"
    timeline.write_text(step(2, 3, late=5.0).to_jsonl())
    assert main(["inspect", str(timeline), "--trace", str(file)]) == 0
    alone = capsys.readouterr().out
    assert names(read(file), "process_name") == ["rank 0", "rank 1"]
    (tmp_path / "predicted.jsonl").write_text(step(2, 3).to_jsonl())
    assert main(["inspect", str(timeline), "--trace", str(file)]) == 0
    assert capsys.readouterr().out == alone  # the text is that of the measured one
    found = read(file)
    order = {e["pid"]: e["args"]["sort_index"] for e in found if e["name"] == "process_sort_index"}
    title = {e["pid"]: e["args"]["name"] for e in found if e["name"] == "process_name"}
    shown = [title[pid] for pid in sorted(title, key=lambda pid: order[pid])]
    assert shown == ["rank 0", "rank 0, predicted", "rank 1", "rank 1, predicted"]
    assert [e["ts"] for e in of(found, "X") if e["name"] == "F0.0"] == [0, 0]
    assert main(["inspect", str(tmp_path / "predicted.jsonl"), "--trace", str(file)]) == 0
    assert names(read(file), "process_name") == ["rank 0, predicted", "rank 1, predicted"]


def test_a_lost_folder_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timeline = tmp_path / "timeline.jsonl"
    timeline.write_text(step(2, 1).to_jsonl())
    assert main(["inspect", str(timeline), "--trace", str(tmp_path / "lost" / "t.json")]) == 2
    error = capsys.readouterr().err
    assert "t.json cannot be written (No such file or directory); choose another file" in error
    assert error.count("\n") == 1
    assert main(["inspect", str(tmp_path), "--trace", str(tmp_path / "x.json")]) == 2
    assert "give a run's timeline.jsonl" in capsys.readouterr().err
