"""The rehearsal: what the passes of a run take on the machine it found, measured before step 0.

Every rank runs F, B and W of each of its stages a few times, all ranks at once as they will in a step, on real inputs
and without a message; two neighbours swap one, and the norm is taken. The schedule replayed with these costs is what
the run is then measured against. It leaves no trace: gradients are cleared, parameters are not touched.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np

from hpcpipe.job import Job
from hpcpipe.planner import slots
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import KINDS
from hpcpipe.schedule.replay import replay
from hpcpipe.schedule.timeline import Timeline

ROUNDS = 4  # the first one meets cold memory and is not counted


def rehearse(job: Job) -> Timeline:
    """The predicted step of one pipeline, in seconds; the same on every rank. Collective."""
    if job.backend.on_device:
        _practise(job)
    job.feed("train", job.step)
    job.executor.upload()
    job.link.barrier()
    own = {stage: _passes(job, stage) for stage in job.mine.stages}
    job.executor.clear("GRAD")
    told = job.link.bcast(job.link.gather((own, _message(job), _optimizer(job))) or [])
    ranks = told[: len(job.plan.ranks)]
    stages = {stage: costs for rank, *_ in ranks for stage, costs in rank.items()}
    F, B, W = (tuple(stages[s][i] for s in range(len(stages))) for i in range(len(KINDS)))
    job.optimizer_seconds = max(each for *_, each in ranks)
    return replay(job.plan.schedule, Costs(F, B, W, max(each for _, each, _ in ranks)))


def _practise(job: Job) -> None:
    """What sums gradients runs once, on zeros, so that no step makes a graph or a connection."""
    for instruction in job.program.instructions:
        if instruction.kind == "REDUCE":
            job.reducer.stage(instruction.stage)
    job.backend.join()
    job.sum_ties(job.step)
    job.executor.settle()


def _optimizer(job: Job) -> float:
    """Seconds of norm and update. An update cannot be tried without a trace: it is taken to move eight times the bytes
    of the norm at the same speed (32 to 4 for each parameter). Copies that update a share each then swap these.
    """
    squares, shards = np.zeros(len(job.plan.names)), job.mine.params.shards
    best, swap = float("inf"), float("inf") if shards > 1 else 0.0
    for _ in range(ROUNDS):
        begin = perf_counter()
        job.optimizer.squares(squares)
        best = min(best, perf_counter() - begin)
        if shards > 1:
            begin = perf_counter()
            job.spread()
            job.executor.settle()
            swap = min(swap, perf_counter() - begin)
    return best * (1 + 8 / shards) + swap


def _passes(job: Job, stage: int) -> list[float]:
    """Seconds of F, B and W of a stage on one microbatch."""
    found = list(zip(job.program.instructions, job.program.calls, strict=True))
    calls = [next(call for i, call in found if i[:2] == (kind, stage)) for kind in KINDS]
    seconds = np.zeros((ROUNDS, len(KINDS)))
    for row in seconds:
        for i, call in enumerate(calls):
            begin = perf_counter()
            call()
            job.executor.settle()
            row[i] = perf_counter() - begin
    return [float(x) for x in np.median(seconds[1:], axis=0)]  # a step adds up passes as they come, not the best


def _message(job: Job) -> float:
    """Seconds of one message between two ranks: the first two of the pipeline swap one both ways."""
    if job.pipeline.size < 2 or job.place > 1:
        return 0.0
    c = job.config
    words = -(-slots.message(c, job.backend.real) // 64) * 16  # of 4 bytes, in whole lines
    room, best = job.backend.allocate(8 * words), float("inf")
    send, recv = (job.backend.array(room, at, (words,), "i") for at in (0, 4 * words))
    for _ in range(ROUNDS):
        begin = perf_counter()
        job.pipeline.sendrecv(send, recv, 1 - job.place)
        job.executor.settle()
        best = min(best, perf_counter() - begin)
    if job.backend.on_device:
        job.backend.forget(room)
    return best
