"""Ends a job that stands still and says where: a rank that has waited too long names what for, and from whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable


class Watch(threading.Thread):
    """Looks at ``where()`` from beside: (a mark that changes with every bit of progress, what is waited for or "").

    When the mark has not changed for ``seconds`` while something is waited for, ``report`` gets a sentence, once.
    """

    def __init__(
        self, seconds: float, where: Callable[[], tuple[Hashable, str]], report: Callable[[str], object]
    ) -> None:
        super().__init__(daemon=True, name="watch")
        self.seconds, self.where, self.report = seconds, where, report
        self._stopped = threading.Event()

    def run(self) -> None:
        mark, since = None, time.monotonic()
        while not self._stopped.wait(min(1.0, self.seconds / 4)):
            now, (seen, waited_for) = time.monotonic(), self.where()
            if seen != mark or not waited_for:
                mark, since = seen, now
            elif now - since > self.seconds:
                self.report(f"has waited {now - since:.0f} s for {waited_for}")
                return

    def stop(self) -> None:
        """Nothing is reported from here on."""
        self._stopped.set()
