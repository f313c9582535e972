"""The profile of a step: valid trace events, on threads whose slices nest, with arrows that hold on to both ends."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.config import UserError
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.timeline import Event, Timeline
from hpcpipe.trace import STREAMS, Span, events, write

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
    whole = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert whole["displayTimeUnit"] == "ms" and set(whole) == {"displayTimeUnit", "traceEvents"}
    found: list[dict[str, Any]] = whole["traceEvents"]
    threads: dict[int, set[int]] = {}
    slices: dict[int, list[tuple[float, float]]] = {}
    for e in found:
        assert e["ph"] in "XCMsf" and isinstance(e["name"], str) and e["pid"] > 0
        if "tid" in e:
            assert e["tid"] > 0
            threads.setdefault(e["tid"], set()).add(e["pid"])
        if e["ph"] == "X":
            assert e["ts"] >= 0 and e["dur"] >= 0 and e["cat"]
            slices.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"]))
    assert all(len(pids) == 1 for pids in threads.values())  # one number, one thread
    for row in slices.values():
        row.sort()
        for (_, end), (start, _) in pairwise(row):
            assert end <= start + 1e-6
    arrows_hold(found, slices)
    named = Counter((e["pid"], e["tid"]) for e in found if e["name"] == "thread_name")
    assert set(named.values()) <= {1} and {(e["pid"], e["tid"]) for e in found if e["ph"] == "X"} <= set(named)
    return found


def arrows_hold(found: list[dict[str, Any]], slices: dict[int, list[tuple[float, float]]]) -> None:
    """A flow is one start and one end with the same id, not back in time, each inside a slice of its thread."""
    starts, ends = ({e["id"]: e for e in found if e["ph"] == ph} for ph in "sf")
    assert set(starts) == set(ends) and len(starts) + len(ends) == sum(e["ph"] in "sf" for e in found)
    for number, start in starts.items():
        end = ends[number]
        assert (start["name"], start["cat"], end["bp"]) == (end["name"], end["cat"], "e")
        assert start["ts"] <= end["ts"]
        for e in (start, end):
            assert any(a <= e["ts"] <= b + 1e-6 for a, b in slices[e["tid"]])


def of(found: list[dict[str, Any]], ph: str) -> list[dict[str, Any]]:
    return [e for e in found if e["ph"] == ph]


def names(found: list[dict[str, Any]], what: str) -> list[str]:
    return [e["args"]["name"] for e in found if e["name"] == what]


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
    assert written(tmp_path / "t.json", Timeline((), 0)) == []
    assert (
        of(written(tmp_path / "t.json", Timeline((), 1), spans=[Span(0, "save", "s", 1e9, 1e9 + 1)]), "X")[0]["ts"] == 0
    )


@pytest.mark.parametrize("place", ["missing/t.json", "file/t.json"])
def test_a_file_that_cannot_be_written(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"profile: .*t\.json cannot be written"):
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
