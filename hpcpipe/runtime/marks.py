"""The time of a device: the host only hands work out, so a step's clock comes from events around each computation.

In: events before and after every F, B and W on the compute stream, and every REDUCE on its own. Out: waiting for them
in order, so that a watch sees which one a rank is at, and the readings that a host's clock would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter, sleep
from typing import Any

import numpy as np
import numpy.typing as npt

NAP = 20e-6  # seconds between two looks at an event


class Marks:
    """Of one program. ``device`` makes, records and compares events; ``waits`` are the numbers of its receives."""

    def __init__(self, device: Any, waits: Sequence[int], meanwhile: Callable[[], None] = lambda: None) -> None:
        self.device, self._waits, self._meanwhile = device, frozenset(waits), meanwhile
        self._events: dict[int, tuple[Any, Any]] = {}  # before and after each computation, in their order
        self._reductions: dict[int, tuple[Any, Any]] = {}
        self._last, self._now = device.event(), 0.0  # recorded behind all of a run, and when that was on this clock
        self.reductions: dict[int, tuple[float, float]] = {}  # from when to when each REDUCE of the last run took

    def around(
        self, at: int, work: Callable[[], None], after: Sequence[Callable[[], None]], name: str
    ) -> Callable[[], None]:
        """``work`` between its two marks, then ``after``; ``name`` is what a profiler calls it."""
        begin, end = self._events[at] = self.device.event(), self.device.event()
        record, push, pop = self.device.record, self.device.driver.push_range, self.device.driver.pop_range

        def marked() -> None:
            record(begin)
            push(name)
            work()
            pop()
            record(end)
            for each in after:
                each()

        return marked

    def beside(self, at: int, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` of the stream of reductions between two marks there."""
        begin, end = self._reductions[at] = self.device.event(), self.device.event()

        def marked() -> None:
            with self.device.beside():
                self.device.record(begin)
            work()
            with self.device.beside():
                self.device.record(end)

        return marked

    def drain(self, numbers: Sequence[int], at: Callable[[int], None]) -> None:
        """Waits for the computations among ``numbers``, one after the other; ``at`` is told which."""
        self.device.join()
        done = self.device.driver.done
        for i in numbers:
            if i in self._events:
                at(i)
                while not done(self._events[i][1]):
                    self._meanwhile()
                    sleep(NAP)
        self.device.record(self._last)
        self.device.settle()
        self._now = perf_counter()

    def read(self, clock: npt.NDArray[np.float64]) -> None:
        """Writes the readings of the last run, which has been drained, after its start: one after each instruction.

        Time between two computations belongs to the message that was waited for in between, if there was one.
        """
        if not self._events:
            return
        now, last, seconds = self._now, self._last, self.device.driver.seconds
        self.reductions = {
            i: (now - seconds(begin, last), now - seconds(end, last)) for i, (begin, end) in self._reductions.items()
        }
        previous = float(clock[0])
        done = 0
        for i, events in self._events.items():
            begin, end = (now - seconds(event, last) for event in events)
            begin = max(begin, previous)
            between = [j for j in range(done, i) if j in self._waits]
            turn = between[-1] if between else i
            clock[done + 1 : turn + 1] = previous
            clock[turn + 1 : i + 1] = begin
            clock[i + 1] = previous = max(end, begin)
            done = i + 1
        clock[done + 1 :] = previous
