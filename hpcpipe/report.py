"""One HTML page about a run, made from what its folder holds; it needs nothing but itself to be looked at.

In go ``metrics.jsonl``, read line by line, the timelines of the last step, the completion record, the memory of the
plan and what the newest checkpoint says of the model; only the first must be there. What is missing or damaged is left
out, with a sentence on the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from hpcpipe import charts, model
from hpcpipe.charts import Curve
from hpcpipe.checkpoint import read
from hpcpipe.checkpoint.report import number, size
from hpcpipe.config import Config, UserError, loads
from hpcpipe.schedule import picture
from hpcpipe.schedule.op import Schedule, ScheduleError
from hpcpipe.schedule.timeline import Timeline

METRICS, DONE, PLAN, PAGE = "metrics.jsonl", "done.json", "plan.json", "report.html"
TIMELINES = {"predicted": "predicted.jsonl", "measured": "timeline.jsonl"}
# Where the time of a step goes, in the order in which it is stacked: what it is called here, and its colour.
PARTS = {
    "compute": ("compute", "#3f6fa8"),
    "optimizer": ("optimizer", "#569467"),
    "exposed": ("exposed communication", "#d57a29"),
    "warmup": ("idle: warm-up", "#9aa5b1"),
    "steady": ("idle: steady state", "#b05c6e"),
    "cooldown": ("idle: cool-down", "#c9d0d8"),
    "other": ("other", "#8a7fa8"),
}
PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


class Fact(NamedTuple):
    """A word and what it stands for."""

    name: str
    value: str


class Metrics:
    """What ``metrics.jsonl`` says, folded while it is read: thinned curves, last values, extremes."""

    def __init__(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.parts: dict[str, Curve] = {name: Curve() for name in PARTS}
        self.last: dict[str, Any] = {}
        self.steps = self.unreadable = 0
        self.seconds = 0.0
        self.best: tuple[float, int] | None = None  # validation loss, step
        self.wait: tuple[float, int, str] | None = None  # seconds, step, "rank 5 for F4.7"

    @classmethod
    def of(cls, path: Path) -> Metrics:
        """UserError where the file is missing or holds no step."""
        found = cls()
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for line in file:
                    found.line(line)
        except OSError as error:
            raise UserError(f"report: {path} cannot be read ({error.strerror}); give the folder of a run") from None
        if not found.steps:
            raise UserError(f"report: {path} holds no step yet; try again when the run has done one")
        return found

    def line(self, text: str) -> None:
        """One more line; one that is no record of a step is counted."""
        try:
            record = json.loads(text)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            self.unreadable += 1
            return
        for key, value in record.items():
            if key != "step" and _real(value):
                self.curves.setdefault(key, Curve()).add(step, value)
        self._parts(step, record.get("parts"))
        validation, wait = record.get("validation_loss"), record.get("worst_wait")
        if _real(validation) and (self.best is None or validation < self.best[0]):
            self.best = validation, step
        if isinstance(wait, dict) and _real(wait.get("seconds")):
            self.wait = max(self.wait or (0.0, 0, ""), (wait["seconds"], step, _waited(wait)))
        if "loss" in record:
            self.steps, self.last = step, record
            self.seconds += record["seconds"] if _real(record.get("seconds")) else 0.0

    def _parts(self, step: int, parts: Any) -> None:
        if isinstance(parts, dict) and parts and all(_real(value) for value in parts.values()):
            unnamed = sum(value for name, value in parts.items() if name not in PARTS)
            for name, curve in self.parts.items():
                curve.add(step, parts.get(name, 0.0) + (unnamed if name == "other" else 0.0))

    def median(self, key: str) -> float | None:
        """The median of a quantity over the (thinned) run."""
        values = sorted(self.curves[key].column(1)) if key in self.curves else []
        return values[len(values) // 2] if values else None

    def newest(self, key: str) -> float | None:
        """The value of a quantity at the last step that has it."""
        return self.curves[key].last if key in self.curves else None


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _waited(wait: Mapping[str, Any]) -> str:
    return f"rank {wait.get('rank', '?')} for {wait.get('op', '?')}"


def report(run_dir: str, out: str | None = None) -> None:
    """Writes the page of a run, by default into its folder, and says where it is; UserError where that fails."""
    folder = Path(run_dir)
    if not (folder / METRICS).is_file():
        raise UserError(f"report: {folder} has no {METRICS}; give the folder of a run")
    file = Path(out) if out else folder / PAGE
    text, notes = page(folder)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise UserError(f"report: {file} cannot be written ({error.strerror}); choose another --out") from None
    for line in [*notes, f"{file}, {size(file.stat().st_size)}"]:
        print(line)


def page(folder: Path) -> tuple[str, list[str]]:
    """The page of a run's folder, and a sentence for each thing that was left out of it."""
    metrics, notes = Metrics.of(folder / METRICS), list[str]()
    if metrics.unreadable:
        notes.append(f"{metrics.unreadable} lines of {METRICS} cannot be read and are left out")
    about, config = _about(folder, notes)
    timelines = {name: t for name, file in TIMELINES.items() if (t := _timeline(folder / file, notes)) is not None}
    memory, done = _memory(folder / PLAN, notes), _json(folder / DONE, notes)
    title = escape(folder.resolve().name)
    body = [
        f"<h1>{title}</h1>",
        f"<p>{escape(' '.join(_summary(metrics, done)))}</p>",
        _tiles(metrics),
        _facts(about),
        '<div class="grid">',
        *_charts(metrics),
        "</div>",
    ]
    if timelines:
        both = "predicted above measured" if len(timelines) == 2 else next(iter(timelines))
        body += [f"<h2>The last step, {both}</h2>", f'<div class="wide">{picture.svg(timelines)}</div>']
    if memory:
        body += ["<h2>Memory per rank, MiB</h2>", _memory_table(memory)]
    if config:
        body.append(f"<details><summary>Configuration</summary><pre>{escape(config)}</pre></details>")
    body += [f'<p class="note">{escape(note)}.</p>' for note in notes]
    return HEAD.format(title=title) + "\n".join(body) + "\n</main></body></html>\n", notes


# --- what the folder holds


def _json(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """An object in a file, None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read and is left out ({error})")
        return None
    return found if isinstance(found, dict) else {}


def _timeline(path: Path, notes: list[str]) -> Timeline | None:
    try:
        found = Timeline.from_jsonl(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, ScheduleError) as error:
        notes.append(f"{path.name} is left out: {error}")
        return None
    if not found.events:
        notes.append(f"{path.name} is left out: it holds no events")
        return None
    return found


def _memory(path: Path, notes: list[str]) -> list[dict[str, int]]:
    """What each rank allocates, bytes by use; a rank is its place in the list where it is not named."""
    rows = (_json(path, notes) or {}).get("memory", [])
    if isinstance(rows, list) and all(isinstance(row, dict) and all(map(_real, row.values())) for row in rows):
        return [{"rank": i, **row} for i, row in enumerate(rows)]
    notes.append(f"{path.name} has a table of memory that is no list of ranks; it is left out")
    return []


def _about(folder: Path, notes: list[str]) -> tuple[list[Fact], str]:
    """What the newest checkpoint says of model and layout, and its configuration."""
    complete = read.complete(folder)
    if not complete:
        return [], ""
    try:
        checkpoint = read.Checkpoint.open(complete[-1])
        text = str(checkpoint.attributes.get("config", ""))
        c, s = loads(text, "its config"), Schedule.parse(str(checkpoint.attributes.get("schedule", "")))
    except (UserError, ScheduleError) as error:
        notes.append(f"what the newest checkpoint, {complete[-1].name}, says is left out: {error}")
        return [Fact("newest checkpoint", complete[-1].name)], ""
    saved = Fact("newest checkpoint", f"{complete[-1].name}, saved {checkpoint.attributes.get('created', '?')}")
    return [*_settings(c, s), saved], text


def _settings(c: Config, s: Schedule) -> Iterator[Fact]:
    """Model, layout and training of a resolved config."""
    m, t, o = c.model, c.train, c.optimizer
    shape = f"{_many(m.layers, 'layer')}, {_many(m.heads, 'head')} ({m.kv_heads} kv), width {m.width}, ffn {m.ffn}"
    yield Fact("model", f"{m.family}, {model.parameter_count(m):,} parameters: {shape}, vocabulary {m.vocab:,}")
    copies = f" x {c.pipeline.replicas} replicas" if c.pipeline.replicas > 1 else ""
    layout = f"{_many(s.stages, 'stage')} on {_many(s.ranks, 'rank')}{copies}"
    yield Fact("pipeline", f"{s.name}, {layout}, {_many(s.micros, 'microbatch')} each")
    yield Fact("step", f"{_many(t.batch, 'sequence')} of {t.length} tokens in microbatches of {t.microbatch}")
    warmup = f"{o.schedule} after {_many(o.warmup, 'step')} of warm-up"
    yield Fact("optimizer", f"AdamW, rate {o.lr:g}, {warmup}, seed {c.seed}")


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('h') else 's'}"


# --- what the page says


def _summary(m: Metrics, done: Mapping[str, Any] | None) -> Iterator[str]:
    """The run in sentences."""
    end = "ended well" if done is not None else "has not ended: it still runs, was stopped or broke off"
    yield f"The run {end}; {_many(m.steps, 'step')} took {_time(m.seconds)}."
    losses = m.curves["loss"].points if "loss" in m.curves else []
    if len(losses) > 1:
        yield f"The training loss went from {losses[0][1]:.4f} to {losses[-1][1]:.4f}."
    if m.best:
        yield f"The best validation loss, {m.best[0]:.4f}, was at step {m.best[1]:,}."
    took, planned = m.median("seconds"), m.median("predicted_seconds")
    if took and planned:
        amount = picture.amount
        yield f"A step was predicted to take {amount(planned)} and took {amount(took)} ({took / planned - 1:+.1%})."
    if m.wait and m.wait[0] > 0:
        yield f"The longest wait was that of {m.wait[2]} in step {m.wait[1]:,}, {picture.amount(m.wait[0])}."


def _time(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else picture.amount(seconds)


def _tiles(m: Metrics) -> str:
    """The numbers that one asks for first; what happens at every step as its median."""
    shown = [
        ("training loss", m.newest("loss"), "{:.4f}", "last step"),
        ("validation loss", m.newest("validation_loss"), "{:.4f}", "newest"),
        ("tokens/s", m.median("tokens_per_s"), "{:,.0f}", "median"),
        ("per second", m.median("flops_per_s"), "FLOP", "median"),
        ("of product peak", m.median("peak_share"), "{:.0%}", "median"),
        ("bubble", m.median("bubble"), "{:.1%}", _against(m.median("predicted_bubble"), "{:.1%}")),
        ("a step", m.median("seconds"), "", _against(m.median("predicted_seconds"), "")),
    ]
    tiles = [
        f"<div><b>{_worded(value, form)}</b><span>{name}</span><small>{note}</small></div>"
        for name, value, form, note in shown
        if value is not None
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _worded(value: float, form: str) -> str:
    """By a format; as FLOP with a prefix; as a duration where there is no form."""
    if form == "FLOP":
        factor, prefix = next(((f, p) for f, p in PREFIXES if value >= f), PREFIXES[-1])
        return f"{value / factor:.3g} {prefix}FLOP"
    return form.format(value) if form else picture.amount(value)


def _against(predicted: float | None, form: str) -> str:
    return "median" if predicted is None else f"predicted {_worded(predicted, form)}"


def _facts(facts: list[Fact]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts)
    return f'<table class="facts">{rows}</table>' if rows else ""


def _charts(m: Metrics) -> Iterator[str]:
    """A figure for each quantity that the run wrote down."""
    c, shown = m.curves, []
    if "loss" in c:
        validation = ("validation", c.get("validation_loss", Curve()))
        shown.append(("Loss", charts.lines(c["loss"], "training", marked=validation), c["loss"]))
    for key, title, options in (
        ("grad_norm", "Gradient norm, before clipping", {"log": True}),
        ("tokens_per_s", "Tokens per second", {"zero": True}),
        ("peak_share", "Share of the measured product peak", {"zero": True, "percent": True}),
        ("bubble", "Bubble: share of the ranks' time that is idle", {"zero": True, "percent": True}),
        ("lr", "Learning rate", {"zero": True, "smooth": False}),
    ):
        if key in c:
            level = m.median(f"predicted_{key}")
            line: dict[str, Any] = {**options, "level": None if level is None else ("predicted", level)}
            shown.append((title, charts.lines(c[key], "measured", **line), c[key]))
    for title, svg, curve in shown:
        yield _figure(title, svg, curve)
    if len(m.parts["compute"]):
        parts = {name: (m.parts[key], colour) for key, (name, colour) in PARTS.items() if any(m.parts[key].column(1))}
        level = m.median("predicted_seconds")
        svg = charts.stack(parts, "seconds", None if level is None else ("predicted", level))
        yield _figure("Where the time of a step goes, mean of all ranks", svg, m.parts["compute"], "wide")


def _figure(title: str, svg: str, curve: Curve, kind: str = "chart") -> str:
    thinned = f" <small>means and extremes of {curve.each} steps</small>" if curve.each > 1 else ""
    return f'<figure class="{kind}"><figcaption>{title}{thinned}</figcaption>{svg}</figure>'


def _memory_table(rows: list[dict[str, int]]) -> str:
    """Ranks down, uses across, the sum of each rank at the end."""
    uses = list(dict.fromkeys(use for row in rows for use in row if use not in ("rank", "total")))
    head = "".join(f"<th>{escape(use)}</th>" for use in ("rank", *uses, "in all"))
    lines = []
    for row in rows:
        total = row.get("total", sum(row.get(use, 0) for use in uses))
        cells = [number(row["rank"]), *(f"{row.get(use, 0) / 2**20:,.2f}" for use in uses), f"{total / 2**20:,.2f}"]
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{"".join(lines)}</table></div>'


HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title} - hpcpipe</title>
<style>
body {{ margin: 0; background: #f4f5f7; color: #1f2933; font: 14px/1.5 system-ui, Helvetica, Arial, sans-serif }}
main {{ max-width: 1200px; margin: 0 auto; padding: 24px 28px 40px; background: #fff }}
h1 {{ font-size: 24px; margin: 0 0 8px }}
h2 {{ font-size: 16px; margin: 28px 0 8px }}
p {{ margin: 0 0 16px; max-width: 62em }}
svg {{ display: block; width: 100%; height: auto }}
.tiles {{ display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 16px }}
.tiles div {{ flex: 1 1 120px; padding: 10px 14px; background: #f4f5f7; border-radius: 4px }}
.tiles b, .tiles span, .tiles small {{ display: block }}
.tiles b {{ font-size: 20px; font-variant-numeric: tabular-nums }}
small, .note, figcaption small {{ color: #66707a; font-weight: normal; font-size: 12px }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
.facts th {{ text-align: left; font-weight: normal; color: #66707a; padding: 1px 24px 1px 0; vertical-align: top;
  white-space: nowrap }}
.numbers th {{ font-weight: normal; color: #66707a; position: sticky; top: 0; background: #fff }}
.numbers th, .numbers td {{ text-align: right; padding: 2px 14px; border-bottom: 1px solid #e6e9ed }}
.scroll {{ max-height: 480px; overflow: auto; display: inline-block; max-width: 100% }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 20px 28px; margin: 24px 0 0 }}
figure {{ margin: 0 }}
.wide {{ grid-column: 1 / -1; overflow-x: auto }}
.wide svg {{ min-width: 700px }}
figcaption {{ font-weight: 600; margin: 0 0 2px }}
figure svg * {{ stroke-linejoin: round; stroke-linecap: butt }}
details {{ margin: 28px 0 0 }}
pre {{ background: #f4f5f7; padding: 12px 16px; overflow-x: auto; font-size: 12px }}
.note {{ margin: 16px 0 0 }}
@media print {{ body {{ background: #fff }} .scroll {{ max-height: none }} figure {{ break-inside: avoid }} }}
</style></head><body><main>
"""
