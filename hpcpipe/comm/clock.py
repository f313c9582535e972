"""One clock for all ranks: how far a rank's own is behind that of rank 0.

Processes of one machine share a clock; between machines one rank each asks rank 0, several times, and takes the answer
that came back fastest (Cristian 1989): it is wrong by at most that time.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from hpcpipe.comm.link import Link

TRIES = 8


def shift(link: Link) -> float:
    """Seconds to add to ``perf_counter`` here for rank 0's reading at the same moment. Collective."""
    hosts = link.bcast(link.gather(link.hostname) or [])
    found = {hosts[0]: 0.0}
    for rank, host in enumerate(hosts):
        if host not in found:
            found[host] = _asked(link, rank if link.rank == 0 else 0) if link.rank in (0, rank) else 0.0
    told = link.bcast(link.gather(found) or [])
    first = {host: rank for rank, host in reversed(list(enumerate(hosts)))}
    return told[first[link.hostname]][link.hostname]


def _asked(link: Link, peer: int) -> float:
    """What to add to my clock for the peer's."""
    mine, theirs = np.zeros(1), np.zeros(1)
    best, answer = float("inf"), 0.0
    for _ in range(TRIES):
        link.sendrecv(mine, theirs, peer)  # both are here now: what the next one brings was written no earlier
        mine[0] = begin = perf_counter()
        link.sendrecv(mine, theirs, peer)
        end = perf_counter()
        if end - begin < best:
            best, answer = end - begin, float(theirs[0]) - (begin + end) / 2
    return answer
