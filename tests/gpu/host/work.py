"""Streams of work that is not done yet, events that order them, and captures: what CUDA promises and nothing more.

A queue's head may run when it is ready; which ready head does, is for the caller to choose. A capture keeps work of
the streams that it spread to by events; a graph of it runs as one piece of its stream's work, its own queues in any
order that its own events allow.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class CaptureError(RuntimeError):
    """What a real device refuses around stream capture."""


@dataclass(eq=False)
class Mark:
    """A point of a stream's time; ``capture`` is the one that it belongs to, if it does."""

    done: bool = False
    time: float = 0.0
    capture: Capture | None = None


@dataclass(eq=False)
class Event:
    """Done until it is recorded; then as its last mark."""

    timing: bool
    recorded: bool = False
    mark: Mark = field(default_factory=lambda: Mark(done=True))


@dataclass(eq=False)
class Action:
    """A piece of work; the function returns False where it cannot be done yet and wants to be asked again."""

    what: str
    function: Callable[[], Any]


@dataclass(eq=False)
class Record:
    mark: Mark


@dataclass(eq=False)
class Wait:
    mark: Mark


@dataclass(eq=False)
class Run:
    """A graph that was launched."""

    queues: list[deque[Work]]
    before: Run | None  # the same graph's launch before this one, which must be over

    @property
    def over(self) -> bool:
        return not any(self.queues)


Work = Action | Record | Wait | Run


@dataclass(eq=False)
class Stream:
    """``weight``: how likely its work is to be next, against other streams'."""

    number: int
    weight: float
    queue: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None

    def give(self, work: Work) -> None:
        if self.capture is None:
            self.queue.append(work)
        else:
            self.capture.queues.setdefault(self, []).append(work)


@dataclass(eq=False)
class Capture:
    """``queues`` is what was kept, by stream, the stream that began it first; ``thread`` is who captures."""

    origin: Stream
    thread: int = field(default_factory=threading.get_ident)
    queues: dict[Stream, list[Work]] = field(default_factory=dict)
    over: bool = False

    def __post_init__(self) -> None:
        self.queues[self.origin] = []

    def end(self) -> Graph:
        """CaptureError if a stream that it spread to was not joined to the first one again."""
        self.over = True
        for stream in self.queues:
            stream.capture = None
        covered = self._covered()
        for stream, works in self.queues.items():
            if covered.get(stream, 0) < len(works):
                raise CaptureError(f"the capture's work on stream {stream.number} was not joined to its first stream")
        return Graph([list(works) for works in self.queues.values()])

    def _covered(self) -> dict[Stream, int]:
        """How much of each queue the end of the first one depends on."""
        place = {
            work.mark: (stream, index)
            for stream, works in self.queues.items()
            for index, work in enumerate(works)
            if isinstance(work, Record)
        }
        covered: dict[Stream, int] = {}
        ends = [(self.origin, len(self.queues[self.origin]))]
        while ends:
            stream, end = ends.pop()
            before = covered.get(stream, 0)
            covered[stream] = max(before, end)
            ends += [place[w.mark] for w in self.queues[stream][before:end] if isinstance(w, Wait)]
        return {stream: n + self._trailing(stream, n) for stream, n in covered.items()}

    def _trailing(self, stream: Stream, n: int) -> int:
        """Marks and waits after the last piece of work that somebody depends on are not work."""
        rest = self.queues[stream][n:]
        return len(rest) if all(isinstance(work, Record) for work in rest) else 0


@dataclass(eq=False)
class Graph:
    queues: list[list[Work]]
    last: Run | None = None

    def run(self) -> Run:
        """A launch of its own, with marks of its own."""
        fresh: dict[Mark, Mark] = {}

        def again(work: Work) -> Work:
            if isinstance(work, Record):
                return Record(fresh.setdefault(work.mark, Mark()))
            if isinstance(work, Wait):
                return Wait(fresh.setdefault(work.mark, Mark()))
            return work

        before = None if self.last is None or self.last.over else self.last
        self.last = Run([deque(again(work) for work in works) for works in self.queues], before)
        return self.last


def heads(queue: deque[Work]) -> list[deque[Work]]:
    """The queues below ``queue`` whose first piece may be done now."""
    while queue and isinstance(first := queue[0], Run) and first.over:
        queue.popleft()
    if not queue:
        return []
    first = queue[0]
    if isinstance(first, Wait):
        return [queue] if first.mark.done else []
    if isinstance(first, Run):
        ready = first.before is None or first.before.over
        return [head for inner in first.queues for head in heads(inner)] if ready else []
    return [queue]
