"""Where the time of a step goes on a rank: computing, waiting for messages, waiting for work, and what is left.

In: the clock readings around every instruction, and for each received message when its sender let go of it. A wait
until then is idle (the schedule's bubble), after it is communication that was not hidden. Idle time belongs to the
warm-up (before the rank's first B), the cool-down (after its last F) or the steady part between.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.program import DO, POOLS, Program

Array = npt.NDArray[Any]

# Of one step, in seconds. ``cooldown`` includes waiting for the slowest rank, ``optimizer`` is norm and update.
PARTS = ("compute", "exposed", "warmup", "steady", "cooldown", "optimizer", "other")


class Wait(NamedTuple):
    """The longest wait of a step: seconds, and for what, in the schedule's language."""

    seconds: float
    what: str


class Account:
    """Sorts the instructions of a program once; ``parts`` then is a few sums over a run's clock."""

    def __init__(self, program: Program) -> None:
        self.program = program
        do = program.table[:, 0]
        index = {kind: np.flatnonzero(do == DO.index(kind)) for kind in DO}
        self.compute = np.concatenate([index[kind] for kind in ("F", "B", "W")])
        pools = np.array([POOLS.index(slot.pool) for slot in program.slots] or [0])
        arrives = np.isin(pools[program.table[index["WAIT"], -1]], (POOLS.index("X"), POOLS.index("DY")))
        self.receives = index["WAIT"][arrives]
        self.others = np.concatenate([index["WAIT"][~arrives], index["SEND"], index["POST"], index["REDUCE"]])
        first_b = index["B"].min(initial=len(do))
        last_f = index["F"].max(initial=-1)
        self.early, self.late = self.receives < first_b, self.receives > last_f
        self.late &= ~self.early

    def parts(self, clock: Array, released: Array) -> Array:
        """Seconds of compute, exposed, warmup, steady, cooldown of one run.

        ``clock`` has a reading before the first instruction and one after each; ``released`` when the message of each
        of ``receives`` was sent, on this rank's clock.
        """
        spent = np.diff(clock)
        waited = spent[self.receives]
        idle = np.clip(released - clock[self.receives], 0.0, waited)
        exposed = (waited - idle).sum() + spent[self.others].sum()
        steady = ~(self.early | self.late)
        return np.array(
            [spent[self.compute].sum(), exposed, idle[self.early].sum(), idle[steady].sum(), idle[self.late].sum()]
        )

    def worst(self, clock: Array) -> Wait:
        """The longest wait for a message."""
        if not len(self.receives):
            return Wait(0.0, "")
        spent = np.diff(clock)[self.receives]
        at = int(spent.argmax())
        return Wait(float(spent[at]), str(self.program.awaited(int(self.receives[at]))[0]))
