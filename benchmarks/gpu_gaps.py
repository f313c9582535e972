"""How much of a step the compute stream of a GPU has nothing to do, from events around all that is given to it.

In: a prepared run of one rank on a device. Out: its training loop, and after it the share of the device's time that was
neither in a pass (F, B, W: the events that the executor records anyway) nor in the norm and the update (events of our
own). A pass is one graph; what is idle between two kernels inside of it is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.worker import Run


class Gaps:
    """``idle`` is the share of the last run that was timed."""

    def __init__(self, training: Any) -> None:
        self.training, self.backend = training, training.backend
        self.idle = 0.0
        self._free: list[tuple[Any, Any]] = []  # pairs of events
        self._used: list[tuple[Any, Any]] = []
        self._whole = self._pair()
        optimizer = training.optimizer
        for name in ("squares", "update"):
            setattr(optimizer, name, self._around(getattr(optimizer, name)))

    def _pair(self) -> tuple[Any, Any]:
        return self.backend.event(), self.backend.event()

    def _around(self, work: Callable[..., None]) -> Callable[..., None]:
        def marked(*args: Any) -> None:
            begin, end = pair = self._free.pop() if self._free else self._pair()
            self.backend.record(begin)
            work(*args)
            self.backend.record(end)
            self._used.append(pair)

        return marked

    def timed(self, run: Run) -> Run:
        """The loop with a look at the passes' events after each step, when the device has come to their end."""
        seconds = self.backend.driver.seconds

        def looked(first: int, count: int) -> list[float]:
            losses, busy = [], 0.0
            begin, end = self._whole
            self.backend.record(begin)
            for step in range(first, first + count):
                losses += run(step, 1)
                busy += sum(seconds(*pair) for pair in self.training.program.marks._events.values())
            self.backend.record(end)
            self.backend.settle()
            busy += sum(seconds(*pair) for pair in self._used)
            self._free, self._used = [*self._free, *self._used], []
            self.idle = 1 - busy / seconds(begin, end)
            return losses

        return looked
