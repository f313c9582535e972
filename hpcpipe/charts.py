"""Curves over the steps of a run as inline SVG; the only importer of matplotlib, and only when a chart is drawn.

Values come thinned (``Curve``), so that a chart of a million steps is as small as one of a thousand. Charts have no
title and no font of their own: the page around them has.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import Any

from hpcpipe.config import UserError

POINTS = 1500  # a curve keeps up to twice as many
INK, GREY, GRID = "#1f2933", "#66707a", "#e6e9ed"
FIRST, SECOND = "#3f6fa8", "#c2571a"
SIZE = (5.9, 2.5)  # inches; the page scales it
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

    return _chart(draw, percent)


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


def _chart(draw: Callable[[Any], None], percent: bool, size: tuple[float, float] = SIZE) -> str:
    """One pair of axes over steps, drawn on and turned into an SVG element."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, MaxNLocator
    except ImportError:
        raise UserError("report: the charts need matplotlib; install it with `pip install 'hpcpipe[report]'`") from None
    with rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        ax = figure.add_subplot()
        ax.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        ax.margins(x=0.01)
        draw(ax)
        if ax.get_yscale() == "linear":
            ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y, percent)))
        if ax.get_xlim()[1] - ax.get_xlim()[0] < 1:
            ax.set_xlim(*(round(x) + d for x, d in zip(ax.get_xlim(), (-1, 1), strict=True)))
        ax.set_xlabel("step")
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
