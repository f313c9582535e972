"""Reads a file of trace events; holds it against the rules of the format, and the profile of a run against the run."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hpcpipe.schedule.op import needs
from hpcpipe.schedule.timeline import Timeline


def read(path: Path) -> list[dict[str, Any]]:
    """The trace events of a file that is valid."""
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
    """The events of one phase: X slices, s and f the ends of arrows, C counters, M names."""
    return [e for e in found if e["ph"] == ph]


def names(found: list[dict[str, Any]], what: str) -> list[str]:
    """What processes (``process_name``) or threads (``thread_name``) are called."""
    return [e["args"]["name"] for e in found if e["name"] == what]


def inside(found: list[dict[str, Any]], arrow: dict[str, Any]) -> str:
    """The name of the one slice that an arrow's end lies in."""
    (name,) = [
        e["name"] for e in of(found, "X")
        if (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"]) and e["ts"] <= arrow["ts"] < e["ts"] + e["dur"]
    ]  # fmt: skip
    return name


def hold_to_the_step(path: Path, run: Path) -> dict[str, list[dict[str, Any]]]:
    """Of the profile of a run: each op once and when the run says it was, an arrow for each message, spans in the step.

    Returns the slices of the measured ranks by the name of their thread.
    """
    found, timeline = read(path), Timeline.from_jsonl((run / "timeline.jsonl").read_text())
    threads = {e["tid"]: e["args"]["name"] for e in found if e["name"] == "thread_name"}
    slices: dict[str, list[dict[str, Any]]] = {}
    for e in of(found, "X"):
        if e["pid"] <= timeline.ranks:
            slices.setdefault(threads[e["tid"]], []).append(e)
    ops = {(e["pid"] - 1, e["name"]): e for e in slices["compute"]}
    assert len(ops) == len(slices["compute"]) and set(ops) == {(e.rank, str(e.op)) for e in timeline.events}
    late = [ops[e.rank, str(e.op)]["ts"] - 1e6 * e.start for e in timeline.events]
    assert max(late) - min(late) < 0.01  # microseconds: one clock for all
    hold_messages(found, timeline, slices)
    for rank in range(timeline.ranks):
        beside = {e["name"]: e for e in slices["beside the ops"] if e["pid"] == rank + 1}
        norm, update = beside["norm"], next(e for name, e in beside.items() if "update" in name)
        assert norm["ts"] + norm["dur"] <= update["ts"] + 0.01
        spans = [e for stream in ("send", "receive", "reduce") for e in slices.get(stream, []) if e["pid"] == rank + 1]
        ends = [e["ts"] + e["dur"] for e in (*spans, *slices["compute"]) if e["pid"] == rank + 1]
        assert max(ends) <= norm["ts"] + 0.01
        assert any(e["pid"] == rank + 1 and e["ts"] >= norm["ts"] for e in slices["save"])
    return slices


def hold_messages(found: list[dict[str, Any]], timeline: Timeline, slices: dict[str, list[dict[str, Any]]]) -> None:
    """Whatever an op on another rank needs is sent once, waited for once, and an arrow joins the two."""
    where = {e.op: e.rank for e in timeline.events}
    stages = 1 + max(op.stage for op in where)
    crossing = {(op, after) for after in where for op in needs(after, stages) if where[op] != where[after]}
    sent = {e["args"]["message"]: e for e in slices.get("send", []) if e["args"]}
    awaited = {e["args"]["message"]: e for e in slices.get("receive", []) if e["args"]}
    assert sent.keys() == awaited.keys() == {str(op) for op, _ in crossing}
    assert all(e["name"] == f"send {op}" for op, e in sent.items())
    assert all(e["name"] == f"wait {op}" for op, e in awaited.items())
    assert {(op, sent[str(op)]["pid"] - 1, awaited[str(op)]["pid"] - 1) for op, _ in crossing} == {
        (op, where[op], where[after]) for op, after in crossing
    }
    ends = {e["id"]: e for e in of(found, "f") if e["pid"] <= timeline.ranks}
    begins = {e["id"]: e for e in of(found, "s") if e["pid"] <= timeline.ranks}
    assert len(begins) == len(ends) == len(sent)
    for op in sent:
        assert any(_in(begins[i], sent[op]) and _in(ends[i], awaited[op]) for i in begins)


def _in(arrow: dict[str, Any], box: dict[str, Any]) -> bool:
    return arrow["tid"] == box["tid"] and box["ts"] <= arrow["ts"] <= box["ts"] + box["dur"]
