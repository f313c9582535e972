"""Timelines as pictures: every op is there, timelines share an axis, size is bounded."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.__main__ import main
from hpcpipe.schedule import picture
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.picture import amount, svg
from hpcpipe.schedule.timeline import Event, Timeline
from small_run import run_toml

SVG = "{http://www.w3.org/2000/svg}"


def steps(ranks: int, micros: int, unit: float = 0.01, late: float = 0.0, chunks: int = 1) -> Timeline:
    """All forwards as a wave, then B and W as a wave back; stage s is on rank s % ranks."""
    events, stages = [], ranks * chunks
    for m in range(micros):
        for s in range(stages):
            start = late + (m * chunks + s // ranks + s % ranks) * unit
            events.append(Event(s % ranks, Op("F", s, m), start, start + unit))
            back = late + (micros * chunks + ranks + stages + 2 * m * chunks + 3 * (stages - s)) * unit
            events += [
                Event(s % ranks, Op("B", s, m), back, back + unit),
                Event(s % ranks, Op("W", s, m), back + unit, back + 2 * unit),
            ]
    return Timeline(tuple(events), ranks)


def texts(root: ET.Element, tag: str) -> list[str]:
    return ["".join(e.itertext()) for e in root.iter(SVG + tag)]


# --- one picture


def test_every_op_is_a_box_that_says_its_name_and_duration() -> None:
    timeline = steps(3, 4)
    root = ET.fromstring(svg({"measured": timeline}))
    assert sorted(texts(root, "title")) == sorted(f"{e.op} 10 ms" for e in timeline.events)
    assert {"rank 0", "rank 1", "rank 2", "busy", "idle", "F forward"} <= set(texts(root, "text"))


def test_a_box_is_where_and_as_long_as_its_op() -> None:
    timeline = Timeline((Event(0, Op("F", 0, 3), 5.0, 6.0), Event(0, Op("B", 0, 3), 8.0, 9.5)), 1)
    room = 1200 - picture.LEFT - picture.RIGHT
    root = ET.fromstring(svg({"t": timeline}))
    boxes = {box[0].text: box for box in root.iter(SVG + "rect") if len(box)}
    forward, backward = boxes["F0.3 1 s"], boxes["B0.3 1.5 s"]
    assert float(forward.get("x", "")) == 0 and float(backward.get("x", "")) == pytest.approx(room * 3 / 4.5, abs=0.01)
    assert float(forward.get("width", "")) == pytest.approx(room / 4.5, abs=1)
    assert texts(root, "text").count("3") == 2 and "56%" in texts(root, "text")


def test_timelines_share_the_axis_and_begin_at_its_left() -> None:
    """The later and slower one is the wider one; what takes as long is as wide."""
    short, long = steps(2, 3), steps(2, 6, late=100.0)
    root = ET.fromstring(svg({"predicted": short, "measured": long}))
    titles = texts(root, "text")
    assert any(t.startswith("predicted") for t in titles) and any(t.startswith("measured") for t in titles)
    boxes = [box for box in root.iter(SVG + "rect") if len(box)]
    widths = {float(box.get("width", "")) for box in boxes}
    assert max(widths) - min(widths) < 0.02
    assert [float(box.get("x", "")) for box in boxes if (box[0].text or "").startswith("F0.0 ")] == [0, 0]
    assert len([t for t in titles if t.endswith(" ms")]) == 1  # one axis


@pytest.mark.parametrize(("limits", "shapes"), [({}, 0), ({"OPS": 10}, 1), ({"BOXES": 10}, 1), ({"NARROW": 1e3}, 1)])
def test_many_ops_become_a_shape_per_lane_and_kind(
    limits: dict[str, float], shapes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(picture, name, value)
    titles = texts(ET.fromstring(svg({"t": steps(2, 6)})), "title")
    assert len(titles) == (2 * 3 if shapes else 2 * 6 * 3)
    assert titles.count("F forward: 6 ops, 60 ms") == 2 * shapes


def test_merged_columns_cover_the_time_of_their_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The area of a kind's shape is its share of the lane."""
    monkeypatch.setattr(picture, "BOXES", 10)
    timeline = steps(2, 40, 0.0037)
    root = ET.fromstring(svg({"t": timeline}))
    lane = 24 - 4
    for group, rank in zip(root.iter(SVG + "g"), (0, 1), strict=True):
        for shape, kind in zip(group.iter(SVG + "path"), "FBW", strict=True):
            boxes = re.findall(r"M([\d.]+) [\d.]+H([\d.]+)v([\d.]+)", shape.get("d", ""))
            area = sum((float(b) - float(a)) * float(h) for a, b, h in boxes)
            time = sum(e.end - e.start for e in timeline.by_rank[rank] if e.op.kind == kind)
            assert area / lane / 1090 == pytest.approx(time / timeline.makespan, rel=0.06)


def test_a_picture_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "BOXES", 100)
    whole = svg({"t": steps(8, 100)})
    monkeypatch.setattr(picture, "LARGEST", len(whole) // 2)
    small = svg({"t": steps(8, 100)})
    assert len(small) <= len(whole) // 2 and texts(ET.fromstring(small), "title")


def test_of_very_many_ranks_some_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "LANES", 5)
    words = texts(ET.fromstring(svg({"t": steps(9, 2)})), "text")
    assert [w for w in words if w.startswith("rank ")] == [f"rank {r}" for r in (0, 2, 4, 6, 8)]
    assert any("5 of 9 ranks" in w for w in words)


def test_later_stages_of_a_rank_are_lighter() -> None:
    root = ET.fromstring(svg({"t": steps(2, 3, chunks=2)}))
    colours = {g.get("fill") for g in root.iter(SVG + "g")} - {None, "#fff", picture.INK}
    assert set(picture.COLOURS.values()) < colours and len(colours) == 6
    assert "lighter: a rank's later stages" in texts(root, "text")
    assert "3.1" in texts(root, "text")  # stage and microbatch where a rank has several stages


def test_whole_numbers_are_units() -> None:
    root = ET.fromstring(svg({"t": steps(2, 3, 1)}))
    assert "F1.0 1 units" in texts(root, "title") and any(t.endswith("units") for t in texts(root, "text"))


def test_a_name_may_have_any_characters() -> None:
    assert "<a & b>" in "".join(texts(ET.fromstring(svg({"<a & b>": steps(1, 1)})), "text"))


def test_a_timeline_of_nothing_can_be_drawn() -> None:
    for timelines in ({}, {"t": Timeline((), 2)}, {"t": Timeline((Event(0, Op("F", 0, 0), 1.5, 1.5),), 1)}):
        ET.fromstring(svg(timelines))


@given(st.integers(1, 6), st.integers(1, 12), st.floats(1e-9, 1e4), st.integers(200, 2000))
@settings(max_examples=25)
def test_nothing_lies_outside(ranks: int, micros: int, unit: float, width: int) -> None:
    root = ET.fromstring(svg({"t": steps(ranks, micros, unit)}, width))
    for box in root.iter(SVG + "rect"):
        if len(box):
            right = picture.LEFT + float(box.get("x", "")) + float(box.get("width", ""))
            assert right <= width - picture.RIGHT + 0.5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 s"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (1.234, "1.23 s"), (4.2e-7, "420 ns"), (1234.5, "1,234 s")],
)
def test_durations(seconds: float, words: str) -> None:
    assert amount(seconds) == words


# --- what a person types


def test_plan_writes_what_it_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, drawing = (tmp_path / name for name in ("run.toml", "plan.svg"))
    config.write_text(run_toml(tmp_path / "none", tmp_path / "run", "llama", model__vocab=61))
    assert main(["plan", str(config), "--ranks", "2", "--svg", str(drawing)]) == 0
    with_file = capsys.readouterr().out
    assert len(texts(ET.parse(drawing).getroot(), "title")) == 2 * 6 * 3
    assert main(["plan", str(config), "--ranks", "2"]) == 0
    assert capsys.readouterr().out == with_file


def test_inspect_draws_what_was_predicted_above_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, drawing = tmp_path / "timeline.jsonl", tmp_path / "step.svg"
    measured.write_text(steps(2, 3).to_jsonl())
    assert main(["inspect", str(measured), "--svg", str(drawing)]) == 0
    alone = capsys.readouterr().out
    assert "predicted" not in drawing.read_text()
    (tmp_path / "predicted.jsonl").write_text(steps(2, 3, 0.009).to_jsonl())
    assert main(["inspect", str(measured), "--svg", str(drawing)]) == 0
    assert capsys.readouterr().out == alone  # the text is that of the measured one
    words = [w for w in texts(ET.parse(drawing).getroot(), "text") if "bubble" in w]
    assert words[0].startswith("predicted")
    assert len(words) == 2 and words[1].startswith("measured")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"rank": 2, "op": "F0.0", "start": 0.0, "end": 1.5}', "rank 2 of 2"),
        ('{"rank": 0, "op": "F0.0", "start": "soon", "end": 1.5}', "could not convert string to float"),
        ('{"rank": 0, "op": "F0.0", "start": 0.0, "end": NaN}', "from 0.0 to nan"),
        ('{"rank": 0, "op": "F0.0", "start": 2.0, "end": 1.0}', "from 2.0 to 1.0"),
    ],
)
def test_an_event_nowhere_or_never_is_a_sentence(
    line: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tmp_path / "timeline.jsonl"
    measured.write_text(steps(2, 1).to_jsonl() + line + "\n")
    assert main(["inspect", str(measured)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_a_damaged_prediction_and_a_lost_folder_are_sentences(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tmp_path / "timeline.jsonl"
    measured.write_text(steps(2, 1).to_jsonl())
    assert main(["inspect", str(measured), "--svg", str(tmp_path / "lost" / "x.svg")]) == 2
    assert "x.svg cannot be written (No such file or directory); choose another file" in capsys.readouterr().err
    (tmp_path / "predicted.jsonl").write_text('{"ranks": 2}\n')
    assert main(["inspect", str(measured), "--svg", str(tmp_path / "x.svg")]) == 2
    assert "predicted.jsonl holds no events" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--svg", str(tmp_path / "x.svg")]) == 2
    assert "give a run's timeline.jsonl" in capsys.readouterr().err
