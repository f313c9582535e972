"""The page about a run: what the folder holds is on it, what is missing is not, what is damaged is a sentence."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from hpcpipe import charts
from hpcpipe.__main__ import main
from hpcpipe.charts import Curve
from hpcpipe.report import Metrics, page
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.timeline import Event, Timeline

TIMELINE = Timeline(tuple(Event(r, Op(k, r, 0), i + r, i + r + 0.5) for i, k in enumerate("FBW") for r in (0, 1)), 2)
PARTS = {
    "compute": 0.3, "exposed": 0.01, "warmup": 0.03, "steady": 0.0, "cooldown": 0.04, "optimizer": 0.02, "other": 0.0
}  # fmt: skip


def step(number: int, **more: Any) -> dict[str, Any]:
    return {
        "step": number, "loss": 4 / number, "grad_norm": 1.0, "lr": 1e-3, "bubble": 0.2, "tokens": 1000 * number,
        "seconds": 0.4, "tokens_per_s": 2500.0, "flops_per_s": 1e10, "peak_share": 0.5, **more,
    }  # fmt: skip


def folder(path: Path, records: list[Any], **files: str) -> Path:
    """A run's folder: lines of metrics (objects, or text as it is) and other files."""
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def captions(text: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", text)


PLAIN = [
    "Loss",
    "Gradient norm, before clipping",
    "Tokens per second",
    "Share of the measured product peak",
    "Bubble: share of the ranks' time that is idle",
    "Learning rate",
]


def test_a_folder_with_metrics_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, [step(1), step(2), {"step": 2, "validation_loss": 2.5}])
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}/report\.html, [\d.]+ KiB\n", told)
    text = (tmp_path / "report.html").read_text()
    assert captions(text) == PLAIN
    assert "The run has not ended: it still runs, was stopped or broke off; 2 steps took 800 ms." in text
    assert "The best validation loss, 2.5000, was at step 2." in text
    assert "The last step" not in text and "Memory" not in text and "<th>" not in text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]


def test_a_folder_with_everything(tmp_path: Path) -> None:
    waits = [{"rank": 5, "op": "F4.7", "seconds": 0.012}, {"rank": 1, "op": "B0.1", "seconds": 0.002}]
    more = {"parts": PARTS, "predicted_seconds": 0.38, "predicted_bubble": 0.18}
    folder(
        tmp_path,
        [step(i, **more, worst_wait=waits[i - 1]) for i in (1, 2)],
        timeline__jsonl=TIMELINE.to_jsonl(),
        predicted__jsonl=TIMELINE.to_jsonl(),
        done__json='{"steps": 2, "loss": 2.0}',
        plan__json=json.dumps({"memory": [{"rank": 0, "param": 3 << 20, "grad": 1 << 19}, {"rank": 1, "param": 0}]}),
    )
    text, notes = page(tmp_path)
    assert notes == []
    assert captions(text) == [*PLAIN, "Where the time of a step goes, mean of all ranks"]
    assert "The run ended well" in text
    assert "A step was predicted to take 380 ms and took 400 ms (+5.3%)." in text
    assert "The longest wait was that of rank 5 for F4.7 in step 1, 12 ms." in text
    assert "predicted above measured" in text and text.count("<title>F0.0 500 ms</title>") == 2
    assert "<tr><td>0</td><td>3.00</td><td>0.50</td><td>3.50</td></tr>" in text
    assert "exposed communication  2.5%" in text and "steady state" not in text  # nothing is idle there


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    text, _ = page(folder(tmp_path, [step(1, parts=PARTS), step(2, parts=PARTS)], timeline__jsonl=TIMELINE.to_jsonl()))
    outside = set(re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", text)) | set(re.findall(r"@import.*", text))
    assert outside == set() and "<script" not in text and "<metadata" not in text
    used = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert set(used) <= set(re.findall(r'id="([^"]+)"', text))
    assert text.count("<svg") == text.count("</svg>") == 8 and text.count("<style") == 1


def test_one_step_of_one_rank(tmp_path: Path) -> None:
    text, _ = page(folder(tmp_path, [step(1, parts=PARTS)]))
    assert "1 step took 400 ms" in text and len(captions(text)) == 7


# --- what is not right


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("timeline.jsonl", '{"ranks": 1}\n{"rank": 0, "op": "F0.0", "sta', "timeline.jsonl is left out: line 2 of the"),
        ("timeline.jsonl", '{"ranks": 1}\n', "timeline.jsonl is left out: it holds no events"),
        ("predicted.jsonl", '{"ranks": 1}\n{"rank": 7, "op": "F0.0", "start": 0, "end": 1}', "rank 7 of 1"),
        ("done.json", '{"steps": ', "done.json cannot be read and is left out ("),
        ("plan.json", '{"memory": [[1, 2]]}', "plan.json has a table of memory that is no list of ranks"),
        ("plan.json", '{"memory": [{"rank": 0, "param": "much"}]}', "plan.json has a table of memory"),
    ],
)
def test_what_is_damaged_is_left_out_with_a_sentence(
    name: str, content: str, note: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path, [step(1), step(2)]).joinpath(name).write_text(content)
    assert main(["report", str(tmp_path)]) == 0
    told, where = capsys.readouterr().out.splitlines()
    assert note in told and where.startswith(str(tmp_path))
    assert captions((tmp_path / "report.html").read_text()) == PLAIN


def test_lines_that_are_no_records_are_counted(tmp_path: Path) -> None:
    text, notes = page(folder(tmp_path, [step(1), "[1]", step(2), "5", '{"loss": 1}', '{"step": 3, "lo']))
    assert notes == ["4 lines of metrics.jsonl cannot be read and are left out"]
    assert notes[0] in text and "2 steps took" in text


def test_values_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    odd = {"loss": float("nan"), "parts": {"compute": None}, "worst_wait": 3, "lr": "high"}
    text, notes = page(folder(tmp_path, [step(1, **odd), step(2, parts=[1]), step(3)]))
    assert notes == [] and captions(text) == PLAIN


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "has no metrics.jsonl; give the folder of a run"),
        ("", "holds no step yet; try again when the run has done one"),
        ("\0\0\0\n", "holds no step yet"),
    ],
)
def test_a_folder_without_steps_is_a_sentence(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path, [step(1)])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "lost" / "x.html")]) == 2
    assert "cannot be written (No such file or directory); choose another --out" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    folder(tmp_path, [step(1)])
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "hpcpipe: report: the charts need matplotlib; install it with `pip install 'hpcpipe[report]'`\n"
    )


# --- long runs


def test_a_long_run_is_thinned_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "POINTS", 10)
    metrics = Metrics()
    for i in range(1, 1001):
        metrics.line(json.dumps(step(i, parts=PARTS)))
    loss, compute = metrics.curves["loss"], metrics.parts["compute"]
    assert 10 <= len(loss) <= 20 and loss.each == 64
    assert loss.column(0)[-1] == 1000 and loss.column(3)[0] == 4.0 and loss.last == 4 / 1000
    assert compute.column(0) == loss.column(0) and compute.column(1) == pytest.approx([0.3] * len(loss))
    assert metrics.seconds == pytest.approx(400)


@pytest.mark.parametrize("count", [1, 7, 19, 20, 21, 57, 400])
def test_a_thinned_curve_keeps_sum_and_extremes(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts, "POINTS", 10)
    curve, values = Curve(), [((i * 37) % 101) / 7 for i in range(count)]
    for i, value in enumerate(values):
        curve.add(i, value)
    points = curve.points
    sizes = [curve.each] * (count // curve.each) + [count % curve.each] * (count % curve.each > 0)
    assert len(points) == len(sizes) == len(curve) <= 20
    assert sum(n * mean for n, (_, mean, _, _) in zip(sizes, points, strict=True)) == pytest.approx(sum(values))
    assert min(p[2] for p in points) == min(values) and max(p[3] for p in points) == max(values)


def test_smoothing_keeps_the_ends_and_the_mean_of_a_line() -> None:
    line = [float(i) for i in range(200)]
    assert charts._smooth(line) == pytest.approx(line)
    assert charts._smooth(line[:50]) == line[:50]


def test_a_few_values_far_off_leave_the_axis() -> None:
    low, high = charts._limits([1.0] * 200 + [2.0] * 200 + [1e6], zero=False)
    assert 0.9 < low < 1 and 2 < high < 2.1
    assert charts._limits([0.2, 0.4], zero=True)[0] == 0
    assert charts._limits([5.0], zero=False) == (4.75, 5.25)
