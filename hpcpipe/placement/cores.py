"""Cores of the node for each rank.

The launcher's binding where it bound, a fair and disjoint share where it did not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def allowed() -> tuple[int, ...]:
    """The cores this process may run on, which is what the launcher, cgroup or taskset left it."""
    return (
        tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else tuple(range(os.cpu_count() or 1))
    )


def share(masks: Sequence[tuple[str, tuple[int, ...]]], rank: int) -> tuple[int, ...]:
    """This rank's cores, given (host, allowed cores) of every rank.

    Ranks of one host with the same mask split it evenly and without overlap; where they outnumber the cores each gets
    one, in turn.
    """
    host, mine = masks[rank]
    peers = [r for r, (h, mask) in enumerate(masks) if h == host and mask == mine]
    place, each = peers.index(rank), len(mine) // len(peers)
    return mine[place * each : (place + 1) * each] if each else (mine[place % len(mine)],)


def bind(cores: Sequence[int]) -> None:
    """Keeps this process, and the threads it starts from now on, on these cores."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
