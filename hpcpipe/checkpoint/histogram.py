"""How the values of tensors are distributed: counted piece by piece, so that memory does not grow with the tensor.

Two counts of the finite values: by size, four bins to a factor of two, which needs no range and shows all decades; and
in equal bins from the least to the largest. The first pass over a tensor counts sizes and finds its ends, the second
counts between them. Counts do not depend on the pieces in which the tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hpcpipe.checkpoint import inspect, report
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError

BINS = 100  # of equal width
PER_OCTAVE = 4  # bins of size to a factor of two
LOWEST, HIGHEST = -1073, 1024  # binary exponents of float64, as frexp gives them
FRACTIONS = tuple(2.0 ** (i / PER_OCTAVE - 1) for i in range(1, PER_OCTAVE))  # where a mantissa of [0.5, 1) is cut
RAMP = " .:-=+*#%@"
WIDTH = 24  # characters of a histogram in text

Array = np.ndarray[Any, Any]


def named(checkpoint: Checkpoint, only: str = "") -> list[str]:
    """The names of a checkpoint's tensors that match a pattern such as ``layer.*.mlp.*``; UserError where none does."""
    names = list(dict.fromkeys(name for _, name in checkpoint.layout))
    found = [name for name in names if not only or fnmatchcase(name, only)]
    if only and not found:
        raise UserError(
            f"inspect: no tensor of {checkpoint.path} is called {only!r}; it has {', '.join(names[:3])} ..."
        )
    return found


def facts(checkpoint: Checkpoint, only: str = "") -> list[dict[str, Any]]:
    """One row for each tensor and each of its kinds, as JSON-able values; one that cannot be read has ``problem``."""
    keys = [(kind, name) for name in named(checkpoint, only) for kind in KINDS if (kind, name) in checkpoint.layout]
    return [{"name": name, "kind": kind, **tensor(checkpoint, kind, name)} for kind, name in keys]


def tensor(checkpoint: Checkpoint, kind: str, name: str) -> dict[str, Any]:
    """The counts of one tensor: ``magnitude`` of its values that are not 0, ``linear`` of all that are finite."""
    sizes = np.zeros((HIGHEST - LOWEST + 1) * PER_OCTAVE, np.int64)
    count = nan = inf = zeros = negative = 0
    low, high = math.inf, -math.inf
    try:
        for values in _pieces(checkpoint, kind, name):
            finite = values[np.isfinite(values)]
            bad = int(np.isnan(values).sum())
            count, nan, inf = count + values.size, nan + bad, inf + values.size - finite.size - bad
            zeros += int((finite == 0).sum())
            negative += int((finite < 0).sum())
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            sizes += _sizes(finite)
        linear = _linear(checkpoint, kind, name, low, high)
    except UserError as error:
        return {"problem": str(error)}
    told = {"count": count, "nan": nan, "inf": inf, "zeros": zeros, "negative": negative}
    ends = {"min": low, "max": high} if low <= high else {"min": None, "max": None}
    return {**told, **ends, "magnitude": _magnitude(sizes), "linear": linear}


def _pieces(checkpoint: Checkpoint, kind: str, name: str) -> Iterator[Array]:
    for _, values in inspect.stream(checkpoint, kind, name):
        yield values.astype(np.float64).ravel()


def _sizes(finite: Array) -> Array:
    """How many values are in each bin of size."""
    fraction, exponent = np.frexp(np.abs(finite[finite != 0]))
    part = np.searchsorted(FRACTIONS, fraction, side="right")
    bins = (exponent.astype(np.int64) - LOWEST) * PER_OCTAVE + part
    return np.bincount(bins, minlength=(HIGHEST - LOWEST + 1) * PER_OCTAVE)


def _magnitude(sizes: Array) -> dict[str, Any] | None:
    """From the first bin that holds something to the last one; None where all are 0."""
    held = np.flatnonzero(sizes)
    if not held.size:
        return None
    first, last = int(held[0]), int(held[-1])
    edges = [_edge(i) for i in range(first, last + 2)]
    return {"per_octave": PER_OCTAVE, "edges": edges, "counts": sizes[first : last + 1].tolist()}


def _edge(index: int) -> float | None:
    """Where a bin of size begins: 2 to the power of quarters; the end of float64 has no number."""
    exponent, part = divmod(index, PER_OCTAVE)
    edge = float(np.ldexp((0.5, *FRACTIONS)[part], exponent + LOWEST)) if exponent + LOWEST <= HIGHEST else math.inf
    return edge if math.isfinite(edge) else None


def _linear(checkpoint: Checkpoint, kind: str, name: str, low: float, high: float) -> dict[str, Any] | None:
    """Equal bins over all finite values; None where there are none, or no bins between them."""
    if not low <= high or not math.isfinite(high - low):
        return None
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # all the same: room on both sides
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    counts = np.zeros(BINS, np.int64)
    for values in _pieces(checkpoint, kind, name):
        counts += np.histogram(values[np.isfinite(values)], BINS, (low, high))[0]
    return {"edges": np.linspace(low, high, BINS + 1).tolist(), "counts": counts.tolist()}


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each tensor: its ends and its two histograms, darker where more values are."""
    told = [["histograms", "", "least", "least to largest", "largest", "size", "", "zeros", "NaN", "Inf"]]
    shown = ""
    for row in rows:
        first = [row["name"] if row["name"] != shown else "", report.LABELS[row["kind"]]]
        shown = row["name"]
        if "problem" in row:
            told.append([*first, *[""] * 2, "unreadable", *[""] * 5])
            continue
        ends = ["" if row[end] is None else f"{row[end]:+.2e}" for end in ("min", "max")]
        bad = [f"{row[what]:,}" for what in ("zeros", "nan", "inf")]
        sizes = row["magnitude"]
        span = "all 0" if sizes is None else f"{_short(sizes['edges'][0])} to {_short(sizes['edges'][-1])}"
        told.append([*first, ends[0], _drawn(row["linear"]), ends[1], span, _drawn(sizes), *bad])
    return [line.rstrip() for line in report.table(told, "<<><><<>>>")]


def _short(edge: float | None) -> str:
    return "inf" if edge is None else f"{edge:.1e}"


def _drawn(histogram: Mapping[str, Any] | None) -> str:
    """Counts as characters, from the first bin to the last one; the fullest column is the darkest."""
    if histogram is None:
        return ""
    counts = histogram["counts"]
    columns = [0.0] * WIDTH
    for i, count in enumerate(counts):  # a bin may cover several columns, or share one
        first, last = i * WIDTH // len(counts), max(i * WIDTH // len(counts) + 1, (i + 1) * WIDTH // len(counts))
        for column in range(first, last):
            columns[column] += count / (last - first)
    most = max(columns)
    steps = len(RAMP) - 1
    return "|" + "".join(RAMP[math.ceil(steps * value / most)] for value in columns) + "|"
