"""A step as trace events for ui.perfetto.dev: every op, message and save of every rank, above what was predicted.

In: the measured timeline, the predicted one, or both, and spans of the other streams (send, receive, reduce, save).
Out: one file in the Trace Event Format: a process per rank, a thread per stream, an arrow from every SEND to its WAIT,
and the microbatches that a rank holds as a counter. It is written event by event: a million of them are never held as
text.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from hpcpipe.config import UserError
from hpcpipe.schedule.op import Op, needs
from hpcpipe.schedule.timeline import Event, Timeline

STREAMS = ("compute", "send", "receive", "reduce", "save")
KINDS = {"F": "forward", "B": "input gradient", "W": "weight gradient"}
# What a rank holds of a microbatch: from F to B what F saved, from B to W what B owes; and when an op changes it.
HELD = {"F": (1, 0), "B": (-1, 1), "W": (0, -1)}
TICK = 0.001  # microseconds: times in the file are whole nanoseconds

Flops = Mapping[tuple[str, int], float]


class Span(NamedTuple):
    """Something on a stream of a rank that is no op, on the timeline's clock.

    A SEND and its WAIT have the same ``message``, "F2.7" for what F2.7 made; other spans have none.
    """

    rank: int
    stream: str
    name: str
    start: float
    end: float
    message: str = ""


class Slice(NamedTuple):
    """Where an arrow may begin or end: a thread, and from when to when in microseconds."""

    pid: int
    tid: int
    start: float
    end: float


class Group(NamedTuple):
    """The processes of one timeline: rank r is process ``first`` + r, its threads are numbered through.

    Viewers keep process and thread 0 for themselves, and take one number for one thread.
    """

    timeline: Timeline
    first: int
    origin: float  # the time that is 0 in the file
    spans: Mapping[tuple[int, str], list[tuple[int, Span]]]  # by rank and stream: the thread of each
    threads: Mapping[int, Mapping[int, str]]  # by rank: names by number, the ops' first

    def place(self, rank: int, thread: int, start: float, end: float) -> Slice:
        return Slice(self.first + rank, thread, _us(start - self.origin), _us(end - self.origin))

    def of(self, event: Event) -> Slice:
        return self.place(event.rank, next(iter(self.threads[event.rank])), event.start, event.end)


def write(
    path: Path,
    timeline: Timeline | None,
    predicted: Timeline | None = None,
    flops: Flops | None = None,
    spans: Iterable[Span] = (),
    hosts: Sequence[str] = (),
) -> None:
    """Writes the trace; UserError where the file cannot be written. ``timeline`` is what was measured, if anything was.

    ``flops``: of one microbatch by kind of op and stage; ``hosts``: the machine of each rank. Times are seconds. Both
    timelines have one first start, and a rank's prediction lies under what it did.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write('{"displayTimeUnit":"ms","traceEvents":[')
            between = "\n"
            for event in events(timeline, predicted, flops or {}, spans, hosts):
                file.write(between + event)
                between = ",\n"
            file.write("\n]}\n")
        part.replace(path)
    except OSError as error:
        raise UserError(f"trace: {path} cannot be written ({error.strerror}); choose another file") from None
    finally:
        with suppress(OSError):  # gone already, or never there
            part.unlink()


def events(
    timeline: Timeline | None, predicted: Timeline | None, flops: Flops, spans: Iterable[Span], hosts: Sequence[str]
) -> Iterator[str]:
    """The trace events, each as JSON: of the measured processes, then of the predicted ones."""
    ranks = timeline.ranks if timeline else 0
    by_stream = _by_stream(spans, ranks)
    starts = [timeline.start] if timeline and timeline.events else []
    origin = min([row[0].start for row in by_stream.values()] + starts, default=0.0)
    threads, arrows = count(1), count(1)
    if timeline is not None:
        measured = _group(timeline, 1, origin, by_stream, threads)
        yield from _names(measured, 0, hosts, "")
        yield from _ops(measured, flops)
        yield from _spans(measured)
        for before, after in (*_messages(measured), *_crossings(measured)):
            yield from _arrow(before, after, next(arrows))
    if predicted is not None:
        lead = starts[0] - origin if starts else 0.0
        other = _group(predicted, 1 + ranks, predicted.start - lead, {}, threads)
        yield from _names(other, 1, hosts, ", predicted")
        yield from _ops(other, flops)
        for before, after in _crossings(other):
            yield from _arrow(before, after, next(arrows))


def _by_stream(spans: Iterable[Span], ranks: int) -> dict[tuple[int, str], list[Span]]:
    """The spans of each rank and stream in the order of their starts; ValueError for one that is nowhere."""
    rows: dict[tuple[int, str], list[Span]] = {}
    for span in spans:
        if span.stream not in STREAMS or not 0 <= span.rank < ranks or not span.start <= span.end:
            raise ValueError(f"{span} is on no stream of {ranks} ranks, or ends before it starts")
        rows.setdefault((span.rank, span.stream), []).append(span)
    return {
        key: sorted(row, key=lambda span: (span.start, -span.end, span.name, span.message))
        for key, row in sorted(rows.items())
    }


def _group(
    timeline: Timeline, first: int, origin: float, rows: Mapping[tuple[int, str], list[Span]], numbers: Iterator[int]
) -> Group:
    """Numbers the threads: one for a rank's ops, then as many for a stream as it has spans at the same time.

    The slices of a thread must not cross. Spans of the stream "compute" have a thread beside the one of the ops.
    """
    placed: dict[tuple[int, str], list[tuple[int, Span]]] = {}
    names: dict[int, dict[int, str]] = {}
    for rank in range(timeline.ranks):
        own = names.setdefault(rank, {next(numbers): "compute"})
        for stream in STREAMS:
            lanes: list[tuple[float, int]] = []  # the end of the last span of a thread, the thread
            for span in rows.get((rank, stream), ()):
                if lanes and lanes[0][0] <= span.start:
                    thread = lanes[0][1]
                    heapq.heapreplace(lanes, (span.end, thread))
                else:
                    thread = next(numbers)
                    own[thread] = "beside the ops" if stream == "compute" else stream
                    heapq.heappush(lanes, (span.end, thread))
                placed.setdefault((rank, stream), []).append((thread, span))
    return Group(timeline, first, origin, placed, names)


def _names(group: Group, below: int, hosts: Sequence[str], suffix: str) -> Iterator[str]:
    """Metadata: what processes and threads are called, and that a rank's prediction comes after the rank."""
    for rank, threads in group.threads.items():
        host = f" on {hosts[rank]}" if rank < len(hosts) and not suffix else ""
        pid = group.first + rank
        yield _json(ph="M", name="process_name", pid=pid, args={"name": f"rank {rank}{suffix}{host}"})
        yield _json(ph="M", name="process_sort_index", pid=pid, args={"sort_index": 2 * rank + below})
        for place, (tid, name) in enumerate(threads.items()):
            yield _json(ph="M", name="thread_name", pid=pid, tid=tid, args={"name": name})
            yield _json(ph="M", name="thread_sort_index", pid=pid, tid=tid, args={"sort_index": place})


def _ops(group: Group, flops: Flops) -> Iterator[str]:
    """A slice per op, and a counter of what its rank holds; F takes room when it starts, B and W give it at their end.

    Written without the json module: most of a file is this, and nothing in it has to be escaped.
    """
    trained = any(event.op.kind != "F" for event in group.timeline.events)
    for row in group.timeline.by_rank:
        saved = owed = 0
        for event in row:
            op, (pid, tid, start, end) = event.op, group.of(event)
            args = f'"stage":{op.stage},"microbatch":{op.micro}'
            work = flops.get((op.kind, op.stage))
            if work is not None:
                args += f',"flops":{float(work)!r}'
                if event.end > event.start:
                    args += f',"TFLOP/s":{round(work / (event.end - event.start) / 1e12, 3)!r}'
            yield (
                f'{{"ph":"X","name":"{op}","cat":"{KINDS[op.kind]}","pid":{pid},"tid":{tid},"ts":{start!r},'
                f'"dur":{round(end - start, 3)!r},"args":{{{args}}}}}'
            )
            if trained:  # in an evaluation nothing is kept
                saved, owed = saved + HELD[op.kind][0], owed + HELD[op.kind][1]
                yield (
                    f'{{"ph":"C","name":"microbatches held","pid":{pid},"ts":{(start if op.kind == "F" else end)!r},'
                    f'"args":{{"saved":{saved},"owed":{owed}}}}}'
                )


def _spans(group: Group) -> Iterator[str]:
    """A slice per span."""
    for (rank, stream), row in group.spans.items():
        for thread, span in row:
            pid, tid, start, end = group.place(rank, thread, span.start, span.end)
            args = {"message": span.message} if span.message else {}
            length = round(end - start, 3)
            yield _json(ph="X", name=span.name, cat=stream, pid=pid, tid=tid, ts=start, dur=length, args=args)


def _messages(group: Group) -> Iterator[tuple[Slice, Slice]]:
    """Every SEND with its WAIT: an arrow from the start of one to the end of the other, when the data is there."""
    sent = {
        span.message: group.place(rank, thread, span.start, span.end) for rank, thread, span in _named(group, "send")
    }
    for rank, thread, span in _named(group, "receive"):
        if span.message in sent:
            (pid, tid, start, _), wait = sent[span.message], group.place(rank, thread, span.start, span.end)
            last = max(wait.start, round(wait.end - TICK, 3))
            yield Slice(pid, tid, start, start), wait._replace(start=last)


def _named(group: Group, stream: str) -> Iterator[tuple[int, int, Span]]:
    for (rank, which), row in group.spans.items():
        if which == stream:
            yield from ((rank, thread, span) for thread, span in row if span.message)


def _crossings(group: Group) -> Iterator[tuple[Slice, Slice]]:
    """Ops on two ranks of which the second needed the first, where no SEND says how it got there."""
    sent = {span.message for _, _, span in _named(group, "send")}
    where: dict[Op, Event] = {event.op: event for event in group.timeline.events}
    stages = 1 + max((op.stage for op in where), default=0)
    for event in group.timeline.events:
        for op in needs(event.op, stages):
            before = where.get(op)
            # A timeline does not say where one copy of the model ends and the next begins; the times do.
            if before is None or before.rank == event.rank or before.start >= event.start or str(op) in sent:
                continue
            left, right = group.of(before), group.of(event)
            # An arrow belongs to the op that its beginning lies in; clocks of two ranks may differ by more than a gap.
            leaves = max(left.start, min(round(left.end - TICK, 3), right.start))
            yield left._replace(end=leaves), right


def _arrow(before: Slice, after: Slice, number: int) -> Iterator[str]:
    """From the end of one slice to the start of another; none where the clocks say that it goes back in time."""
    if before.end <= after.start:
        common: dict[str, Any] = {"name": "message", "cat": "message", "id": number}
        yield _json(ph="s", **common, pid=before.pid, tid=before.tid, ts=before.end)
        yield _json(ph="f", bp="e", **common, pid=after.pid, tid=after.tid, ts=after.start)


def _json(**event: Any) -> str:
    return json.dumps(event, separators=(",", ":"), allow_nan=False)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
