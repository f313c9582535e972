"""When every op ran: one type for what was predicted and for what was measured.

Events come from the engine (any unit of time) or from the executor's clock (seconds). The same statistics, the same
drawing and the same JSON-lines form serve both, so that a prediction and a measurement can be laid side by side.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import gcd, isfinite
from typing import Any, NamedTuple

from hpcpipe.schedule.op import Op, ScheduleError

# The character that fills an op in a drawing: activations go right, gradients go left, weights stay.
FILL = {"F": ">", "B": "<", "W": "="}
LEGEND = ("3> forward of microbatch 3", "3< input gradient", "3= weight gradient")
# Where an op is narrower than a column, a column shows what most of its time goes to, or that both directions mix.
DENSE = ("> forward", "< input and weight gradient", "# both", "blank: mostly idle")


class Event(NamedTuple):
    """One op on one rank, from ``start`` to ``end``."""

    rank: int
    op: Op
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Events in the order in which each rank started them."""

    events: tuple[Event, ...]
    ranks: int

    @cached_property
    def start(self) -> float:
        return min((e.start for e in self.events), default=0.0)

    @cached_property
    def end(self) -> float:
        return max((e.end for e in self.events), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first start to the last end on any rank."""
        return self.end - self.start

    @cached_property
    def by_rank(self) -> tuple[tuple[Event, ...], ...]:
        """The events of each rank."""
        rows: list[list[Event]] = [[] for _ in range(self.ranks)]
        for event in self.events:
            rows[event.rank].append(event)
        return tuple(tuple(row) for row in rows)

    @property
    def rows(self) -> tuple[tuple[Op, ...], ...]:
        """The ops of each rank: the schedule that this timeline is a recording of."""
        return tuple(tuple(e.op for e in row) for row in self.by_rank)

    def busy(self, rank: int) -> float:
        """Time that the rank spends in ops."""
        return sum(e.end - e.start for e in self.by_rank[rank])

    def idle(self, rank: int) -> float:
        """Time between the first start and the last end of the whole pipeline in which the rank computes nothing."""
        return self.makespan - self.busy(rank)

    @property
    def bubble(self) -> float:
        """Idle share of all ranks' time, 0 to 1."""
        total = self.makespan * self.ranks
        return 1.0 - sum(self.busy(rank) for rank in range(self.ranks)) / total if total > 0 else 0.0

    def to_jsonl(self) -> str:
        """One line for the whole, then one per event: ``{"rank": 0, "op": "F0.0", "start": 0.0, "end": 1.5}``."""
        lines = [json.dumps({"ranks": self.ranks})]
        lines += [json.dumps({"rank": e.rank, "op": str(e.op), "start": e.start, "end": e.end}) for e in self.events]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_jsonl(cls, text: str) -> Timeline:
        """Reads ``to_jsonl`` back; raises ScheduleError naming the line that it cannot read."""
        ranks, events = 0, []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                if number == 1:
                    ranks = int(row["ranks"])
                else:
                    events.append(_event(row, ranks))
            except (ValueError, KeyError, TypeError) as error:
                raise ScheduleError(f"line {number} of the timeline cannot be read ({error}): {line[:60]!r}") from None
        return cls(tuple(events), ranks)


def _event(row: Mapping[str, Any], ranks: int) -> Event:
    """An event from its JSON object; ValueError where it is on no rank or at no time."""
    event = Event(int(row["rank"]), Op.parse(row["op"]), float(row["start"]), float(row["end"]))
    if not 0 <= event.rank < ranks:
        raise ValueError(f"rank {event.rank} of {ranks}")
    if not isfinite(event.end - event.start) or event.end < event.start:
        raise ValueError(f"from {event.start} to {event.end}")
    return event


def draw(timeline: Timeline, width: int = 96, legend: bool = True) -> str:
    """The timeline as text of at most ``width`` columns, one line per rank with its busy share, idle time blank."""
    label = len(f"rank {timeline.ranks - 1}")
    scale = _columns_per_time(timeline, max(width - label - len(" || 100 %"), 8))
    columns = round(timeline.makespan * scale)
    busy = sum(e.end - e.start for e in timeline.events)
    dense = busy * scale < len(timeline.events)
    lines = []
    for rank, events in enumerate(timeline.by_rank):
        share = 100 * timeline.busy(rank) / timeline.makespan if timeline.makespan > 0 else 0
        body = (_dense_row if dense else _row)(events, timeline.start, scale, columns)
        lines.append(f"{f'rank {rank}':<{label}} |{body}| {share:3.0f} %")
    if legend:
        words = " " * (label + 2) + "   ".join(DENSE if dense else LEGEND)
        lines += [words] if len(words) <= width else []
    return "\n".join(lines) + "\n"


def _columns_per_time(timeline: Timeline, columns: int) -> float:
    """Columns per unit of time; whole columns per tick where all times are multiples of one tick, for even cells."""
    if timeline.makespan <= 0:
        return 1.0
    times = {t - timeline.start for e in timeline.events for t in (e.start, e.end)}
    if all(float(t).is_integer() for t in times):
        tick = gcd(*(int(t) for t in times))
        ticks = int(timeline.makespan) // tick
        if ticks <= columns:
            return (columns // ticks) / tick
    return columns / timeline.makespan


def _row(events: Sequence[Event], start: float, scale: float, columns: int) -> str:
    """One rank's ops as characters: the microbatch number where it fits, then the fill of the kind."""
    cells = [" "] * columns
    several = len({e.op.stage for e in events}) > 1
    for event in events:
        first = min(round((event.start - start) * scale), columns)
        last = min(round((event.end - start) * scale), columns)
        cells[first:last] = _cell(event.op, last - first, several)
    return "".join(cells)


def _dense_row(events: Sequence[Event], start: float, scale: float, columns: int) -> str:
    """One rank's ops where a column holds several: which directions most of the column's time goes to."""
    forward, backward = [0.0] * columns, [0.0] * columns
    for event in events:
        share = forward if event.op.kind == "F" else backward
        first, last = (event.start - start) * scale, (event.end - start) * scale
        for column in range(int(first), min(int(last) + 1, columns)):
            share[column] += max(min(last, column + 1) - max(first, column), 0.0)
    return "".join(_shade(forward, backward, column) for column in range(columns))


def _shade(forward: Sequence[float], backward: Sequence[float], column: int) -> str:
    """The character of one column: blank where mostly idle, mixed where both directions are within a column of it."""
    if forward[column] + backward[column] < 0.5:
        return " "
    near = slice(max(column - 1, 0), column + 2)
    f, b = sum(forward[near]), sum(backward[near])
    if min(f, b) > 0.1:
        return "#"
    return FILL["F"] if f > b else FILL["B"]


def _cell(op: Op, room: int, several: bool) -> str:
    """``room`` characters for one op; the stage is written too where a rank has several and there is room."""
    names = [f"{op.stage}.{op.micro}"] if several else []
    name = next((n for n in [*names, str(op.micro), str(op.micro % 10)] if len(n) < room), "")
    return name + FILL[op.kind] * (room - len(name))
