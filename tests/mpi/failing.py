"""A program that fails in the way its first argument names: the last rank does, the others wait for it.

``stands still POINT RANK TURN train RUN.toml ...`` is a training run in which a rank's whole process stops when it has
done something (POINTS) for the TURN-th time (fed: for step TURN), as on a node that freezes.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from typing import Any

import numpy as np

from hpcpipe.comm import mpi
from hpcpipe.comm.link import JobError

POINTS = {
    "fed": ("hpcpipe.job", "Job.feed"),
    "stepped": ("hpcpipe.runtime.executor", "Bound.run"),
    "wrote a shard": ("hpcpipe.checkpoint.write", "_write"),
    "wrote a master": ("hpcpipe.checkpoint.write", "_write_plain"),
}


def stand_still(here: int, point: str, rank: str, turn: str) -> None:
    """Arms the point on this rank, if it is the one."""
    module, where = POINTS[point]
    *path, name = where.split(".")
    owner: Any = importlib.import_module(module)
    for step in path:
        owner = getattr(owner, step)
    real, left = getattr(owner, name), [int(turn)]

    def stops(*args: Any) -> Any:
        result = real(*args)
        left[0] -= 1
        if left[0] == 0 if point != "fed" else args[1:] == ("train", int(turn) - 1):
            os.kill(os.getpid(), signal.SIGSTOP)
        return result

    if here == int(rank):
        setattr(owner, name, stops)


how = sys.argv[1]
link = mpi.connect()
fails = link.rank == link.size - 1
if link.rank == 0:
    print("started", flush=True)
if how == "exception":
    if fails:
        raise RuntimeError("the last rank has lost its way")
    link.barrier()
elif how == "exception while others compute":
    if fails:
        raise RuntimeError("the last rank has lost its way")
    while True:
        time.sleep(0.01)
elif how == "exception while others receive":
    if fails:
        raise RuntimeError("the last rank has lost its way")
    channel = link.receiver(link.size - 1, 1, np.zeros(10))
    channel.start()
    channel.wait()
elif how == "abort":
    if fails:
        link.abort("the disk is full; make room and start again")
    link.barrier()
elif how.startswith("agree"):
    kind, n = how.split()[1:3] if " " in how else ("", "0")
    if kind:  # a message that the error leaves on its way
        peer = (link.rank + 1) % link.size
        buffer = np.zeros(int(n))
        channel = link.sender(peer, 1, buffer) if kind == "sent" else link.receiver(peer, 1, buffer)
        channel.start()
    try:
        link.agree("model.layers is 0" if fails else None)
    except JobError as error:
        if link.rank == 0:
            print(f"hpcpipe: {error}", file=sys.stderr, flush=True)
        link.close()
        sys.exit(2)
elif how == "exception after the end":
    link.close()
    if fails:
        raise RuntimeError("the last rank has lost its way")
    sys.exit()
elif how == "stands still":
    from hpcpipe.__main__ import main

    stand_still(link.rank, *sys.argv[2:5])
    sys.exit(main(sys.argv[5:]))
else:
    raise SystemExit(f"unknown: {how}")
print(f"rank {link.rank} went on", flush=True)
