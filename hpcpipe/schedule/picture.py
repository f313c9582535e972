"""Timelines as pictures: one SVG for people.

Several timelines (predicted, measured) are stacked over one axis of time; each begins at its own first start. Many ops
become one shape per lane and kind, and where they are narrower than a pixel or two a lane becomes columns that are
filled by the share of each kind, as coarse as it takes: a picture has some 4 MB at most, however long the step is and
however many ranks there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from math import floor, log10
from typing import NamedTuple

from hpcpipe.schedule.timeline import Event, Timeline

COLOURS = {"F": "#3f6fa8", "B": "#d57a29", "W": "#569467"}
NAMES = {"F": "F forward", "B": "B input gradient", "W": "W weight gradient"}
IDLE, INK, GREY, OTHER = "#e6e9ed", "#1f2933", "#66707a", "#8a7fa8"
LEFT, RIGHT, LEGEND, TITLE, AXIS = 62, 48, 32, 22, 26  # pixels beside and between the lanes

LANES = 256  # ranks that are shown; of more, some at even distances
OPS = 15_000  # ops that are drawn each with its name, about 90 bytes
BOXES = 150_000  # ops that are drawn where they are, about 20 bytes
NARROW = 1.5  # pixels that an op then has on average
COLUMNS = 550  # of a lane whose ops are not
LARGEST = 4_000_000  # characters; with more, columns are made wider

SI = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


class Frame(NamedTuple):
    """Where the lanes are and how time becomes pixels."""

    width: int
    span: float  # time that the axis shows
    unit: str
    pitch: int  # pixels from lane to lane
    named: bool  # every op is drawn and says its name
    columns: int  # of a lane whose ops are merged; 0 = every op is drawn
    letter: float  # pixels of the microbatch numbers; 0 = none

    @property
    def scale(self) -> float:
        """Pixels per unit of time."""
        return (self.width - LEFT - RIGHT) / self.span

    @property
    def lane(self) -> int:
        """Pixels of a lane's height."""
        return self.pitch - (4 if self.pitch >= 16 else 2 if self.pitch >= 8 else 1)


def svg(timelines: Mapping[str, Timeline], width: int = 1200) -> str:
    """One self-contained picture: a lane per rank, a box per op, its name and duration where the pointer rests.

    ``timelines`` are drawn in their order, under their names. The axis is in seconds, or in units where all times are
    whole numbers, as with unit costs.
    """
    frame = _frame(timelines, width)
    text = _picture(timelines, frame)
    while len(text) > LARGEST and frame.columns > 16:
        frame = frame._replace(columns=max(16, int(0.9 * frame.columns * LARGEST / len(text))))
        text = _picture(timelines, frame)
    return text


def _picture(timelines: Mapping[str, Timeline], frame: Frame) -> str:
    body = list(_legend(timelines, frame))
    width, y = frame.width, float(LEGEND)
    for name, timeline in timelines.items():
        body += _panel(name, timeline, frame, y)
        y += TITLE + frame.pitch * len(_shown(timeline)) + 8
    body += _axis(frame, y)
    height = _n(y + AXIS)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11" fill="{INK}">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#fff"/>', *body, "</svg>"]) + "\n"


def _frame(timelines: Mapping[str, Timeline], width: int) -> Frame:
    """The frame of all timelines together, so that equal lengths are equal times."""
    span = max((t.makespan for t in timelines.values()), default=0.0) or 1.0
    most = max((len(_shown(t)) for t in timelines.values()), default=1)
    events = [e for t in timelines.values() for rank in _shown(t) for e in t.by_rank[rank]]
    frame = Frame(width, span, _unit(timelines), max(4, min(24, 768 // max(most, 1))), True, 0, 0.0)
    lengths = sorted((e.end - e.start) * frame.scale for e in events) or [0.0]
    if len(events) > BOXES or sum(lengths) / len(lengths) < NARROW:
        return frame._replace(named=False, columns=COLUMNS)
    # Letters that fit most ops, and where those are too small to be read, some that fit the few long ones.
    digits = len(str(max((e.op.micro for e in events), default=0)))
    fit = (lengths[len(lengths) // 5] - 1.8) / (0.58 * digits)
    letter = min(11.0, 0.72 * frame.lane, fit if fit >= 7 else 9.0)
    return frame._replace(named=len(events) <= OPS, letter=letter if letter >= 7 else 0.0)


def _unit(timelines: Mapping[str, Timeline]) -> str:
    """Clocks never show whole seconds only; the engine does where the costs are whole numbers."""
    whole = all(float(x).is_integer() for t in timelines.values() for e in t.events for x in (e.start, e.end))
    return "units" if whole else "s"


def _shown(timeline: Timeline) -> Sequence[int]:
    """The ranks that get a lane."""
    if timeline.ranks <= LANES:
        return range(timeline.ranks)
    return [i * (timeline.ranks - 1) // (LANES - 1) for i in range(LANES)]


def _legend(timelines: Mapping[str, Timeline], frame: Frame) -> Iterator[str]:
    """Colours and, where it is so, that shades or columns have a meaning."""
    x = float(LEFT)
    for colour, text in [*((COLOURS[kind], name) for kind, name in NAMES.items()), (IDLE, "idle")]:
        yield f'<rect x="{_n(x)}" y="9" width="12" height="12" fill="{colour}"/>'
        yield f'<text x="{_n(x + 17)}" y="19">{text}</text>'
        x += 34 + 6.2 * len(text)
    notes = []
    if frame.columns:
        notes.append("many ops: a column shows the share of each in its time")
    elif any(len({e.op.stage for e in row}) > 1 for t in timelines.values() for row in t.by_rank):
        notes.append("lighter: a rank's later stages")
    yield from (f'<text x="{_n(x + 6)}" y="19" fill="{GREY}">{note}</text>' for note in notes)


def _panel(name: str, timeline: Timeline, frame: Frame, y: float) -> Iterator[str]:
    """One timeline: its title, then lane by lane background, ops, label and busy share."""
    ranks, start, makespan = _shown(timeline), timeline.start, timeline.makespan
    facts = f"{amount(makespan, frame.unit)}, bubble {timeline.bubble:.1%}"
    if len(ranks) < timeline.ranks:
        facts += f"; {len(ranks)} of {timeline.ranks:,} ranks"
    yield (
        f'<text x="{LEFT}" y="{_n(y + 14)}" font-size="12"><tspan font-weight="600">{escape(name)}</tspan>'
        f'<tspan dx="8" fill="{GREY}">{facts}</tspan></text>'
    )
    yield f'<text x="{frame.width - 4}" y="{_n(y + 14)}" text-anchor="end" fill="{GREY}">busy</text>'
    y += TITLE
    boxes = "".join(f"M{LEFT} {_n(y + i * frame.pitch)}h{_n(makespan * frame.scale)}v{frame.lane}H{LEFT}z"
                    for i in range(len(ranks)))  # fmt: skip
    yield f'<path fill="{IDLE}" d="{boxes}"/>'
    bottom = _n(y + frame.pitch * len(ranks))
    grid = "".join(f"M{_n(LEFT + t * frame.scale)} {_n(y)}V{bottom}" for t in _ticks(frame)[0])
    yield f'<path stroke="#fff" d="{grid}"/>'
    every = -(-12 // frame.pitch)  # a label needs 12 pixels
    for i, rank in enumerate(ranks):
        events = timeline.by_rank[rank]
        yield f'<g transform="translate({LEFT} {_n(y + i * frame.pitch)})">'
        yield from (_columns if frame.columns else _ops)(events, start, frame)
        if i % every == 0:
            share = timeline.busy(rank) / makespan if makespan > 0 else 0.0
            at, far = _n(frame.lane / 2 + 4), frame.width - LEFT - 4
            yield f'<text x="-8" y="{at}" text-anchor="end">rank {rank}</text>'
            yield f'<text x="{far}" y="{at}" text-anchor="end">{share:.0%}</text>'
        yield "</g>"


def _ops(events: Sequence[Event], start: float, frame: Frame) -> Iterator[str]:
    """A box per op, grouped by colour, and the microbatch in those that have room for it."""
    stages = sorted({e.op.stage for e in events})
    groups: dict[tuple[str, int], list[Event]] = {}
    for event in events:
        groups.setdefault((event.op.kind, stages.index(event.op.stage)), []).append(event)
    for (kind, chunk), alike in groups.items():
        light = 0.6 * chunk / max(len(stages) - 1, 1)
        fill = _lighter(COLOURS.get(kind, OTHER), light)
        places = [((e.start - start) * frame.scale, (e.end - e.start) * frame.scale) for e in alike]
        # Neighbours of one colour stay apart.
        boxes = [(e, x, max(w - min(0.6, 0.2 * w), 0.3)) for e, (x, w) in zip(alike, places, strict=True)]
        if not frame.named:
            path = "".join(f"M{_n(x)} 0h{_n(w)}v{frame.lane}h-{_n(w)}z" for _, x, w in boxes)
            yield f'<path fill="{fill}" d="{path}">{_summary(alike, frame)}</path>'
            continue
        yield f'<g fill="{fill}">' + "".join(
            f'<rect x="{_n(x)}" width="{_n(w)}" height="{frame.lane}">'
            f"<title>{e.op} {amount(e.end - e.start, frame.unit)}</title></rect>"
            for e, x, w in boxes
        ) + "</g>"  # fmt: skip
        if frame.letter:
            yield _numbers(boxes, frame, "#fff" if light < 0.35 else INK, len(stages) > 1)


def _numbers(boxes: Sequence[tuple[Event, float, float]], frame: Frame, ink: str, several: bool) -> str:
    """The microbatch in each box that has room for it; the stage too where a rank has several."""
    words = []
    for event, x, w in boxes:
        _, stage, micro = event.op
        names = [*([f"{stage}.{micro}"] if several else []), str(micro)]
        fits = next((name for name in names if 0.58 * frame.letter * len(name) + 1 <= w), "")
        words += [f'<text x="{_n(x + w / 2)}">{fits}</text>'] if fits else []
    return (
        f'<g fill="{ink}" font-size="{_n(frame.letter)}" text-anchor="middle" pointer-events="none" '
        f'transform="translate(0 {_n(frame.lane / 2 + 0.36 * frame.letter)})">{"".join(words)}</g>'
    )


def _summary(events: Sequence[Event], frame: Frame) -> str:
    """What a shape that stands for many ops of a kind says."""
    kind, time = events[0].op.kind, sum(e.end - e.start for e in events)
    return f"<title>{NAMES.get(kind, kind)}: {len(events):,} ops, {amount(time, frame.unit)}</title>"


def _columns(events: Sequence[Event], start: float, frame: Frame) -> Iterator[str]:
    """A shape per kind: in each column as high as the kind's share of the column's time, on top of one another."""
    alike: dict[str, list[Event]] = {kind: [] for kind in COLOURS}
    for event in events:
        alike.setdefault(event.op.kind, []).append(event)
    below = [0.0] * frame.columns
    for kind, own in alike.items():
        if own:
            above = [min(a + b, 1.0) for a, b in zip(below, _shares(own, start, frame), strict=True)]
            path = _steps(below, above, (frame.width - LEFT - RIGHT) / frame.columns, frame.lane)
            yield f'<path fill="{COLOURS.get(kind, OTHER)}" d="{path}">{_summary(own, frame)}</path>'
            below = above


def _shares(events: Sequence[Event], start: float, frame: Frame) -> list[float]:
    """The share of each column's time that these events take."""
    rate, shares = frame.columns / frame.span, [0.0] * (frame.columns + 1)
    for event in events:
        first, last = (event.start - start) * rate, (event.end - start) * rate
        left, right = int(first), min(int(last), frame.columns)
        if left == right:
            shares[left] += last - first
            continue
        shares[left] += left + 1 - first
        for column in range(left + 1, right):
            shares[column] += 1.0
        shares[right] += last - right
    return shares[:-1]


def _steps(below: Sequence[float], above: Sequence[float], width: float, height: float) -> str:
    """Boxes from ``below`` to ``above`` (shares of the height), columns of the same extent in one box."""
    half = [(round(2 * height * a), round(2 * height * b)) for a, b in zip(below, above, strict=True)]  # half pixels
    path, first = [], 0
    for i in range(1, len(half) + 1):
        if i == len(half) or half[i] != half[first]:
            top, bottom = half[first]
            if bottom > top:
                x = _n(first * width)
                path.append(f"M{x} {_n(top / 2)}H{_n(i * width)}v{_n((bottom - top) / 2)}H{x}z")
            first = i
    return "".join(path)


def _axis(frame: Frame, y: float) -> Iterator[str]:
    """Ticks and their times below the lowest lane."""
    times, factor, unit = _ticks(frame)
    marks = "".join(f"M{_n(LEFT + t * frame.scale)} {_n(y - 8)}v5" for t in times)
    yield f'<path stroke="{GREY}" d="{marks}"/>'
    digits = max(0, -floor(log10((times[1] - times[0]) / factor) + 1e-9)) if len(times) > 1 else 0
    for t in times:
        text = f"{t / factor:,.{digits}f}" + (f" {unit}" if t == times[-1] else "")
        yield f'<text x="{_n(LEFT + t * frame.scale)}" y="{_n(y + 9)}" text-anchor="middle" fill="{GREY}">{text}</text>'


def _ticks(frame: Frame) -> tuple[list[float], float, str]:
    """Round times over the span, some ten of them, and the unit that they are written in."""
    rough = frame.span / max(frame.width / 120, 2)
    power = 10.0 ** floor(log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    times = [i * step for i in range(int(frame.span / step + 1e-6) + 1)]
    if frame.unit != "s":
        return times, 1.0, frame.unit
    return times, *next((pair for pair in SI if frame.span >= 2 * pair[0]), SI[-1])


def amount(time: float, unit: str = "s") -> str:
    """A duration in words: ``12.3 ms``."""
    if unit != "s":
        return f"{time:,.0f} {unit}" if time >= 1000 else f"{time:.3g} {unit}"
    factor, name = next((pair for pair in SI if abs(time) >= 0.9995 * pair[0]), SI[-1]) if time else SI[0]
    return f"{time / factor:,.0f} {name}" if abs(time) >= 999.5 * factor else f"{time / factor:.3g} {name}"


def _lighter(colour: str, share: float) -> str:
    """The colour with a share of white in it."""
    parts = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (255 - p) * share):02x}" for p in parts)


def _n(x: float) -> str:
    """A number of pixels in as few characters as a hundredth of a pixel needs."""
    return f"{x:.2f}".rstrip("0").rstrip(".")
