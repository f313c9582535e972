"""What ``inspect`` knows of a run's history and of its tensors' values, as text, as JSON, and drawn: a PNG or a page.

In: a checkpoint or a run folder, read a few MiB at a time. Tensors whose names differ in their numbers alone, such as
the layers', share a panel, from dark to light. A page needs nothing but itself to be looked at.
"""

from __future__ import annotations

import json as json_
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import inf, nan
from pathlib import Path
from typing import Any

from hpcpipe import charts
from hpcpipe.charts import Curve, Panel, Row
from hpcpipe.checkpoint import histogram as histograms
from hpcpipe.checkpoint import history as histories
from hpcpipe.checkpoint import inspect, read
from hpcpipe.checkpoint.master import FILE
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.checkpoint.report import number, size
from hpcpipe.config import UserError
from hpcpipe.report import HEAD, METRICS, Metrics

FORMS = (".png", ".html")
MOST = 40  # rows of a PNG, which no program opens when it is too tall
LOSSES = ("loss", "validation_loss")
LONG = ("about", "config", "schedule", "layout")  # attributes that are no line of a table
NUMBER = re.compile(r"([^.]+)\.(\d+)(?=\.|$)")
BINS = histograms.PER_OCTAVE
MOMENTS = {"parameter": "values", "moment1": "first moment", "moment2": "second moment"}


def look(
    path: str, history: bool = False, histogram: bool = False, only: str = "", json: bool = False, plot: str = ""
) -> str:
    """What is asked for, in words or as JSON, and drawn into the file ``plot``, whose ending says how.

    Only to draw, without a word of what: all that there is. ``only`` is a pattern of tensors' names. UserError for
    what is damaged, except in a history, which tells it and goes on.
    """
    if plot and Path(plot).suffix not in FORMS:
        raise UserError(f"inspect: {plot} is to be drawn: end its name in {' or '.join(FORMS)}")
    told = history or histogram
    run = not (Path(path) / FILE).is_file() and bool(read.step_folders(path))
    found = facts(Path(path), history or (run and not told), histogram or not told, only)
    notes = list(_drawn(found, Path(plot))) if plot else []
    if json:
        return json_.dumps(inspect.finite(found), indent=1, allow_nan=False)
    return "\n".join([*(_lines(found) if told or not plot else ()), *notes])


def facts(path: Path, history: bool, histogram: bool, only: str = "") -> dict[str, Any]:
    """``history`` and ``curves`` of a run, ``histograms`` of its newest whole checkpoint or of this one."""
    found: dict[str, Any] = {"path": str(path), "history": None, "curves": None, "checkpoint": None, "histograms": None}
    if history:
        found["history"] = histories.facts(path, only)
        found["curves"] = _curves(path / METRICS)
        if not histogram and not found["history"]["steps"]:
            return found
    newest = Checkpoint.open(histories.newest_whole(found["history"]) if history else path)
    found["checkpoint"] = {"path": str(newest.path), "step": newest.step, "attributes": dict(newest.attributes)}
    if histogram:
        if not history and (wrong := newest.verify()):
            raise UserError(f"inspect: the values in {newest.path} are not counted: {wrong[0]}")
        found["histograms"] = histograms.facts(newest, only)
    return found


def _curves(file: Path) -> dict[str, list[dict[str, float]]]:
    """The losses of a run's metrics, thinned; none where it has none."""
    try:
        metrics = Metrics.of(file)
    except UserError:
        return {}
    keys = ("step", "mean", "least", "largest")
    curves = ((name, metrics.curves[name]) for name in LOSSES if name in metrics.curves)
    return {name: [dict(zip(keys, point, strict=True)) for point in curve.points] for name, curve in curves}


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    if found["history"]:
        yield from histories.lines(found["history"])
    if found["history"] and found["histograms"]:
        yield ""
    if found["histograms"]:
        yield f"step {found['checkpoint']['step']}, {found['checkpoint']['path']}"
        yield from histograms.lines(found["histograms"])


# --- drawn


def _drawn(found: Mapping[str, Any], file: Path) -> Iterator[str]:
    """Draws, and says what has become of it."""
    rows, title = list(_rows(found)), Path(found["path"]).resolve().name
    if file.suffix == ".png":
        data = charts.sheet(title, rows[:MOST])
        if len(rows) > MOST:
            yield f"the picture has the first {MOST} of {len(rows)} rows; a page has all, --only chooses"
    else:
        data = _page(found, rows, title).encode()
    part = file.with_name(file.name + ".part")
    try:
        part.write_bytes(data)
        part.replace(file)
    except OSError as error:
        raise UserError(f"inspect: {file} cannot be written ({error.strerror}); choose another name") from None
    yield f"{file}, {size(len(data))}"


def _rows(found: Mapping[str, Any]) -> Iterator[Row]:
    """First what moved over the steps, then what the values are now."""
    if history := found["history"]:
        yield _training(history, found["curves"])
        for family, tensors in _families(history["tensors"]).items():
            yield Row(f"{family}, over the steps", _moves(tensors, history["steps"]))
    if found["histograms"]:
        step = found["checkpoint"]["step"]
        for family, tensors in _families(found["histograms"]).items():
            yield Row(f"{family}, at step {step:,}", _values(tensors))


def _training(history: Mapping[str, Any], curves: Mapping[str, Any]) -> Row:
    """The loss, by the metrics or else by the checkpoints, and what all parameters together did."""
    loss = Curve()
    for row in history["checkpoints"]:
        if row["loss"] is not None:
            loss.add(row["step"], row["loss"])
    told = {name: _curve(points) for name, points in curves.items()}
    draw = charts.course(told.get("loss", loss), "training", marked=("validation", told.get(LOSSES[1], Curve())))
    whole = _moves([("", history["all"])], history["steps"], " of all parameters")
    return Row("training", [Panel("loss, nats per token", draw, steps=True), *whole])


def _curve(points: Sequence[Mapping[str, float]]) -> Curve:
    """A curve as it was, from points that may each stand for several steps."""
    curve = Curve()
    curve.rows = [(p["step"], p["mean"], p["least"], p["largest"]) for p in points]
    curve.each = 1 if all(p["least"] == p["largest"] for p in points) else 2
    return curve


def _moves(tensors: Sequence[tuple[str, Mapping[str, Any]]], steps: Sequence[int], whose: str = "") -> list[Panel]:
    def threads(key: str) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        return {label: (steps, [nan if value is None else value for value in row[key]]) for label, row in tensors}

    return [
        Panel(f"rms{whose}", charts.threads(threads("rms")), steps=True),
        Panel(f"change{whose} since the checkpoint before", charts.threads(threads("change"), zero=True), True, True),
    ]


def _values(tensors: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Panel]:
    """Values in equal bins, then everything by size."""

    def counted(kind: str, which: str) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
        rows = [(label, row.get(which)) for label, row in tensors if row["kind"] == kind]
        return {
            label: ([inf if edge is None else edge for edge in histogram["edges"]], histogram["counts"])
            for label, histogram in rows
            if histogram is not None
        }

    kinds = [kind for kind in MOMENTS if any(row["kind"] == kind for _, row in tensors)]
    panels = [Panel(f"{MOMENTS[kinds[0]]}, equal bins", charts.steps(counted(kinds[0], "linear"), decades=False))]
    for kind in kinds:
        panels.append(
            Panel(
                f"|{MOMENTS[kind]}|, {BINS} bins to a factor of 2",
                charts.steps(counted(kind, "magnitude"), decades=True),
            )
        )
    return panels


def _families(tensors: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Tensors by their names without the numbers in them: ``layer.*.norm1.weight`` -> [("layer 0", ...), ...]."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for tensor in tensors:
        label = ", ".join(f"{what} {which}" for what, which in NUMBER.findall(tensor["name"])) or tensor["name"]
        found.setdefault(NUMBER.sub(r"\1.*", tensor["name"]), []).append((label, tensor))
    return found


# --- the page


def _page(found: Mapping[str, Any], rows: Sequence[Row], title: str) -> str:
    told = found["checkpoint"]["attributes"] if found["checkpoint"] else {}
    body = [f"<h1>{escape(title)}</h1>", *([_about(found["checkpoint"])] if told else ())]
    if found["history"]:
        body += ["<h2>Checkpoints</h2>", _checkpoints(found["history"]["checkpoints"])]
    body.append('<div class="grid">')
    for row in rows:
        caption = escape(row.title)
        body.append(f'<figure class="wide"><figcaption>{caption}</figcaption>{charts.strip(row)}</figure>')
    body.append("</div>")
    if found["histograms"]:
        text = "\n".join(histograms.lines(found["histograms"]))
        body.append(f"<h2>Values of each tensor</h2><pre>{escape(text)}</pre>")
    if told.get("config"):
        body.append(f"<details><summary>Configuration</summary><pre>{escape(str(told['config']))}</pre></details>")
    return HEAD.format(title=escape(title)) + "\n".join(body) + "\n</main></body></html>\n"


def _about(checkpoint: Mapping[str, Any]) -> str:
    """What the checkpoint says of itself, a line each."""
    short = {"checkpoint": checkpoint["path"], "step": checkpoint["step"]}
    for key, value in checkpoint["attributes"].items():
        if key not in LONG and not key.startswith("units."):
            short[key] = value
    lines = (f"<tr><th>{escape(key)}</th><td>{escape(number(value))}</td></tr>" for key, value in short.items())
    return f'<table class="facts">{"".join(lines)}</table>'


def _checkpoints(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{word}</th>" for word in ("step", "tokens", "loss", "MiB", "saved", ""))
    lines = []
    for row in rows:
        held = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:,.2f}"
        told = [*(number(row[key]) for key in ("step", "tokens", "loss")), held, row["created"] or ""]
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in (*told, row["problem"] or "whole"))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{"".join(lines)}</table></div>'
