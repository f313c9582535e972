"""Curves over the steps of a run and histograms, as inline SVG or PNG; the only importer of matplotlib, and only when
something is drawn.

Values come thinned (``Curve``), so that a chart of a million steps is as small as one of a thousand. Charts for a page
have no title and no font of their own: the page around them has.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite, nan
from typing import Any, NamedTuple

from hpcpipe.config import UserError

POINTS = 1500  # a curve keeps up to twice as many
INK, GREY, GRID = "#1f2933", "#66707a", "#e6e9ed"
FIRST, SECOND = "#3f6fa8", "#c2571a"
SIZE = (5.9, 2.5)  # inches; the page scales it
WIDE, TALL = 11.9, 1.5  # inches: a row of panels, and the axes in it
LEFT, BETWEEN, RIGHT, BELOW, ABOVE, HEADING = 0.62, 0.66, 0.15, 0.42, 0.24, 0.26  # inches around them
SHADES = 24  # lines of one panel; of more, so many at even distances
DOTS = 110  # of a PNG, per inch
FULL = 20  # values in a bin
SETTINGS = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": "#b8c0c8",
    "axes.labelcolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
}


class Curve:
    """One quantity over steps: means of so many values in a row that there are a few thousand, and their extremes."""

    def __init__(self) -> None:
        self.each = 1  # values in a point
        self.rows: list[tuple[float, float, float, float]] = []  # last step, mean, least, largest
        self._open: list[tuple[float, float]] = []
        self.last = nan

    def add(self, step: float, value: float) -> None:
        """The next value; steps only grow."""
        self.last = value
        self._open.append((step, value))
        if len(self._open) == self.each:
            self.rows.append(self._closed())
            self._open = []
        if len(self.rows) == 2 * POINTS:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [(b[0], (a[1] + b[1]) / 2, min(a[2], b[2]), max(a[3], b[3])) for a, b in pairs]
            self.each *= 2

    def _closed(self) -> tuple[float, float, float, float]:
        values = [value for _, value in self._open]
        return self._open[-1][0], sum(values) / len(values), min(values), max(values)

    @property
    def points(self) -> list[tuple[float, float, float, float]]:
        """(last step, mean, least, largest) in order."""
        return [*self.rows, self._closed()] if self._open else self.rows

    def column(self, which: int) -> list[float]:
        """One of the four numbers, of all points."""
        return [point[which] for point in self.points]

    def __len__(self) -> int:
        return len(self.rows) + bool(self._open)


def lines(
    curve: Curve,
    label: str,
    *,
    marked: tuple[str, Curve] | None = None,
    level: tuple[str, float] | None = None,
    percent: bool = False,
    zero: bool = False,
    log: bool = False,
    smooth: bool = True,
) -> str:
    """A curve with its smoothed course, another one as marked points, a dashed level.

    ``zero``: the axis begins there; ``log``: it is logarithmic where the values need it. UserError where matplotlib is
    missing.
    """

    return _chart(course(curve, label, marked, level, zero, log, smooth), percent)


def course(
    curve: Curve,
    label: str,
    marked: tuple[str, Curve] | None = None,
    level: tuple[str, float] | None = None,
    zero: bool = False,
    log: bool = False,
    smooth: bool = True,
) -> Callable[[Any], None]:
    """What ``lines`` draws, for axes that are there."""

    def draw(ax: Any) -> None:
        steps, means = curve.column(0), curve.column(1)
        course = _smooth(means) if smooth else means
        if curve.each > 1:
            ax.fill_between(steps, curve.column(2), curve.column(3), color=FIRST, alpha=0.2, linewidth=0)
        elif course is not means:
            ax.plot(steps, means, color=FIRST, alpha=0.35, linewidth=0.7)
        ax.plot(steps, course, color=FIRST, label=label, marker="o" if len(steps) == 1 else None, markersize=3)
        shown = list(means)
        if marked is not None and len(marked[1]):
            x, y = marked[1].column(0), marked[1].column(1)
            size = 3.5 if len(x) <= 60 else 0
            ax.plot(x, y, color=SECOND, label=marked[0], marker="o" if size else None, markersize=size, linewidth=1.1)
            shown += y
        if level is not None:
            ax.axhline(level[1], color=GREY, linestyle="--", linewidth=1, label=level[0])
            shown.append(level[1])
        if log and 0 < 20 * min(shown) < max(shown):
            ax.set_yscale("log")
        else:
            ax.set_ylim(*_limits(shown, zero))
        if marked is not None or level is not None:
            ax.legend(loc="best", handlelength=1.6)

    return draw


def stack(parts: Mapping[str, tuple[Curve, str]], label: str, level: tuple[str, float] | None = None) -> str:
    """Areas on top of one another: name -> (curve, colour), with each one's share of the whole in the legend."""

    def draw(ax: Any) -> None:
        steps = next(iter(parts.values()))[0].column(0)
        rows = [_smooth(curve.column(1)) for curve, _ in parts.values()]
        if len(steps) == 1:
            steps, rows = [steps[0] - 0.5, steps[0] + 0.5], [[*row, *row] for row in rows]
        whole = sum(map(sum, rows)) or 1.0
        names = [f"{name}  {sum(row) / whole:.1%}" for name, row in zip(parts, rows, strict=True)]
        ax.stackplot(steps, *rows, labels=names, colors=[colour for _, colour in parts.values()], linewidth=0)
        if level is not None:
            ax.axhline(level[1], color=INK, linestyle="--", linewidth=1, label=level[0])
        heights = [sum(column) for column in zip(*rows, strict=True)]
        ax.set_ylim(0, _limits(heights + ([level[1]] if level else []), True)[1])
        ax.margins(x=0)
        ax.set_ylabel(label)
        handles, texts = ax.get_legend_handles_labels()
        ax.legend(handles[::-1], texts[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.1)

    return _chart(draw, False, (2 * SIZE[0] + 0.2, SIZE[1]))


class Panel(NamedTuple):
    """One pair of axes in a row: what is above it, what draws on it, whether it is over steps."""

    title: str
    draw: Callable[[Any], None]
    steps: bool = False
    percent: bool = False


class Row(NamedTuple):
    """Panels side by side that are about one thing."""

    title: str
    panels: Sequence[Panel]


def threads(named: Mapping[str, tuple[Sequence[float], Sequence[float]]], zero: bool = False) -> Callable[[Any], None]:
    """Lines (x, y) with a name each, from dark to light in their order; the ends of the order are in the legend."""

    def draw(ax: Any) -> None:
        for name, colour, label in _shaded(list(named)):
            x, y = named[name]
            ax.plot(x, y, color=colour, label=label, linewidth=1.1, marker="o" if len(x) <= 30 else None, markersize=2)
        values = [value for _, y in named.values() for value in y if isfinite(value)]
        if values:
            ax.set_ylim(*_limits(values, zero))
        _legend(ax, len(named))

    return draw


def steps(named: Mapping[str, tuple[Sequence[float], Sequence[float]]], decades: bool) -> Callable[[Any], None]:
    """Histograms (edges, counts) with a name each, as shares of all that is counted.

    ``decades``: the edges are sizes, and each bin covers an equal ratio. Else they are values; bins are joined where
    they would hold a few each, and shares are logarithmic where they differ much, so that tails are seen.
    """

    def draw(ax: Any) -> None:
        if not named:
            ax.text(0.5, 0.5, "nothing to count", transform=ax.transAxes, ha="center", va="center", color=GREY)
            ax.set_xticks([])
            ax.set_yticks([])
            return
        shown: list[float] = []
        for name, colour, label in _shaded(list(named)):
            edges, counts = named[name] if decades else _joined(*named[name])
            shares = [count / (sum(counts) or 1) for count in counts]
            shown += [share for share in shares if share > 0]
            ax.stairs(shares, edges, color=colour, label=label, linewidth=1.0)
        if decades:
            ax.set_xscale("log")
        if not decades and shown and max(shown) > 30 * min(shown):
            ax.set_yscale("log")
        else:
            ax.set_ylim(bottom=0)
        _legend(ax, len(named))

    return draw


def _joined(edges: Sequence[float], counts: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """The same histogram in wider bins, so that those in use hold about FULL values each."""
    joined = 1
    while len(counts) % (2 * joined) == 0 and sum(counts) < FULL * len(counts) / joined:
        joined *= 2
    if sum(counts) < FULL * len(counts) / joined and len(counts) % (5 * joined) == 0:
        joined *= 5
    return edges[::joined], [sum(counts[i : i + joined]) for i in range(0, len(counts), joined)]


def sheet(title: str, rows: Sequence[Row]) -> bytes:
    """All rows below one another, as a PNG."""
    data = io.BytesIO()
    with _matplotlib() as (figure_of, _):
        figure = _laid_out(figure_of, rows, title)
        figure.savefig(data, format="png", dpi=DOTS, metadata={"Software": None})
    return data.getvalue()


def strip(row: Row) -> str:
    """One row as an SVG element, without its title."""
    text = io.StringIO()
    with _matplotlib() as (figure_of, _):
        figure = _laid_out(figure_of, [row], "")
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue())


def _laid_out(figure_of: Any, rows: Sequence[Row], title: str) -> Any:
    """Axes at places given in inches, so that those of all rows are under one another; titles where there are any."""
    heading = HEADING if title else 0.0
    each = heading + ABOVE + TALL + BELOW
    high = each * len(rows) + 2 * heading
    figure = figure_of(figsize=(WIDE, high))
    if title:
        figure.text(LEFT / WIDE / 2, 1 - HEADING / high, title, fontsize=13, va="center", weight="bold")
    for i, row in enumerate(rows):
        top = high - 2 * heading - i * each
        if title:
            figure.text(LEFT / WIDE / 2, (top - 0.6 * HEADING) / high, row.title, fontsize=9.5, weight="bold")
        wide = (WIDE - LEFT - RIGHT - BETWEEN * (len(row.panels) - 1)) / len(row.panels)
        for j, panel in enumerate(row.panels):
            left, bottom = LEFT + j * (wide + BETWEEN), top - each + BELOW
            ax = figure.add_axes((left / WIDE, bottom / high, wide / WIDE, TALL / high))
            ax.set_title(panel.title, loc="left", fontsize=7.5, color=GREY, pad=3)
            _draw(ax, panel)
    return figure


def _draw(ax: Any, panel: Panel) -> None:
    """A panel on its axes: what it shows, and ticks that can be read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    ax.tick_params(labelsize=7)
    panel.draw(ax)
    if not len(ax.get_yticks()):
        return
    if panel.steps:
        _over_steps(ax)
    elif ax.get_xscale() == "log":
        _over_decades(ax)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.6g}"))
    if ax.get_yscale() == "linear":
        ax.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        ax.yaxis.set_major_locator(LogLocator(numticks=5))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y, panel.percent or not panel.steps)))
    ax.minorticks_off()


def _over_decades(ax: Any) -> None:
    """Powers of ten; where there are not two of them, the ends and the middle."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator

    low, high = ax.get_xlim()
    if high < 100 * low:
        ax.xaxis.set_major_locator(FixedLocator([low * (high / low) ** at for at in (0.05, 0.5, 0.95)]))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}"))
    else:
        ax.xaxis.set_major_locator(LogLocator(numticks=6))


def _shaded(names: Sequence[str]) -> list[tuple[str, Any, str | None]]:
    """(name, colour, label) of the lines to draw: the first and the last one have a label, all have where it is few."""
    from matplotlib import colormaps

    count = min(len(names), SHADES)
    shown = [names[round(i * (len(names) - 1) / max(count - 1, 1))] for i in range(count)]
    colours = [FIRST] if count == 1 else [colormaps["viridis"](0.9 * i / (count - 1)) for i in range(count)]
    labels = [name if count <= 3 or i in (0, count - 1) else None for i, name in enumerate(shown)]
    return list(zip(shown, colours, labels, strict=True))


def _legend(ax: Any, count: int) -> None:
    if count > 1:
        ax.legend(loc="best", handlelength=1.2, fontsize=6.5, labelspacing=0.2, borderpad=0.1)


@contextmanager
def _matplotlib() -> Iterator[tuple[Any, Any]]:
    """Figures that look as ours do: (Figure, the module of tickers); UserError where there is no matplotlib."""
    try:
        from matplotlib import rc_context, ticker
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("report: the charts need matplotlib; install it with `pip install 'hpcpipe[report]'`") from None
    with rc_context(SETTINGS):  # type: ignore[arg-type]
        yield Figure, ticker


def _over_steps(ax: Any) -> None:
    """Whole steps, with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    if ax.get_xlim()[1] - ax.get_xlim()[0] < 1:
        ax.set_xlim(*(round(x) + d for x, d in zip(ax.get_xlim(), (-1, 1), strict=True)))
    ax.set_xlabel("step")


def _chart(draw: Callable[[Any], None], percent: bool, size: tuple[float, float] = SIZE) -> str:
    """One pair of axes over steps, drawn on and turned into an SVG element."""
    with _matplotlib() as (figure_of, ticker):
        figure = figure_of(figsize=size, layout="constrained")
        ax = figure.add_subplot()
        ax.margins(x=0.01)
        draw(ax)
        _over_steps(ax)
        if ax.get_yscale() == "linear":
            ax.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: _tick(y, percent)))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue())


def _inline(document: str) -> str:
    """The SVG element alone, without what would clash with other charts of the page or speak to all of it."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", svg, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", re.sub(r"\n\s*", "\n", svg))


def _smooth(values: list[float]) -> list[float]:
    """The mean over a window of a fortieth of the points; the same list where there are too few."""
    most = len(values) // 80
    if most == 0:
        return values
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    halves = [min(most, i, len(values) - 1 - i) for i in range(len(values))]  # the ends stay what they are
    return [(sums[i + half + 1] - sums[i - half]) / (2 * half + 1) for i, half in enumerate(halves)]


def _limits(values: Sequence[float], zero: bool) -> tuple[float, float]:
    """An axis for almost all values: a few that lie far off, like a first step, may leave it."""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 100]
    low, high = (min(low, 0.0), max(high, 0.0)) if zero else (low, high)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if zero and low == 0 else low - room), high + room


def _tick(y: float, percent: bool) -> str:
    return f"{100 * y:.3g}%" if percent else f"{y:,.0f}" if abs(y) >= 1000 else f"{y:.4g}"
