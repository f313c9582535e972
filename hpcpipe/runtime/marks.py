"""The time of a device: the host only hands work out, so a step's clock comes from events around each computation.

In: events before and after every F, B and W, recorded on the compute stream. Out: waiting for them in order, so that a
watch sees which one a rank is at, and the readings that a host's clock would have given.
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

    def __init__(self, device: Any, waits: Sequence[int]) -> None:
        self.device, self._waits = device, frozenset(waits)
        self._events: dict[int, tuple[Any, Any]] = {}  # before and after each computation, in their order

    def around(self, at: int, work: Callable[[], None], after: Sequence[Callable[[], None]]) -> Callable[[], None]:
        """``work`` between its two marks, then ``after``."""
        begin, end = self._events[at] = self.device.event(), self.device.event()
        record = self.device.record

        def marked() -> None:
            record(begin)
            work()
            record(end)
            for each in after:
                each()

        return marked

    def drain(self, numbers: Sequence[int], at: Callable[[int], None]) -> None:
        """Waits for the computations among ``numbers``, one after the other; ``at`` is told which."""
        self.device.join()
        done = self.device.driver.done
        for i in numbers:
            if i in self._events:
                at(i)
                while not done(self._events[i][1]):
                    sleep(NAP)
        self.device.settle()

    def read(self, clock: npt.NDArray[np.float64]) -> None:
        """Writes the readings of the last run, which has been drained, after its start: one after each instruction.

        Time between two computations belongs to the message that was waited for in between, if there was one.
        """
        if not self._events:
            return
        now, seconds = perf_counter(), self.device.driver.seconds
        last = self._events[max(self._events)][1]
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
