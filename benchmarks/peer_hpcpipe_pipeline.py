"""hpcpipe in the contest of pipelines: two ranks under mpirun, one thread each.

The process that is started becomes mpirun. Both ranks are the same worker; rank 0 is asked, through mpirun, and tells
rank 1 through a named pipe, where it waits without taking time from whoever is measured. The variant is a ``Layout``.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from benchmarks.peer_hpcpipe import Tokens, config_of, write_dataset
from benchmarks.pipeline import MICROBATCH, RANKS, Layout, leading
from benchmarks.shape import Job
from benchmarks.worker import Run, die_with_parent, serve
from hpcpipe.comm import mpi
from hpcpipe.comm.link import Link
from hpcpipe.config import Config, DeviceConfig, PipelineConfig
from hpcpipe.job import Job as Training
from hpcpipe.placement import cores
from hpcpipe.rehearsal import rehearse
from hpcpipe.steps import Steps


def main() -> None:
    """Becomes mpirun, or one of its ranks."""
    started = mpi.launcher(os.environ)
    if started is None or started.size != RANKS:
        die_with_parent()
        os.execv(launcher(), [launcher(), "-n", str(RANKS), sys.executable, "-m", __spec__.name, *sys.argv[1:]])
    link = mpi.connect()
    cores.bind(cores.share([(link.hostname, cores.allowed())] * link.size, link.rank))
    orders = Path(link.bcast(f"{sys.argv[1]}.{os.getpid()}"))
    if link.rank == 0:
        os.mkfifo(orders)
    link.barrier()
    with orders.open("r" if link.rank else "w") as stream:
        if link.rank:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # mpirun would mix its answers with those of rank 0
            sys.stdin = stream
        serve(partial(build, link, None if link.rank else stream))
    link.close()


def launcher() -> str:
    """The mpirun of this environment."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(f"there is no mpirun beside {sys.executable} or on the PATH; run `make build`")
    return found


def pipeline_config(job: Job, folder: Path, layout: Layout) -> Config:
    """The run file of a job on two ranks."""
    return replace(
        config_of(job.shape, folder, MICROBATCH),
        pipeline=PipelineConfig(ranks=RANKS, schedule=layout.schedule, stages=layout.stages, cut=layout.cut),
        device=DeviceConfig(threads=1),
    )


def steps_of(job: Job, link: Link, layout: Layout) -> Steps:
    """What ``hpcpipe train`` has before its first step, with the job's weights and tokens."""
    with TemporaryDirectory(prefix="hpcpipe-bench-") as own:
        folder = Path(link.bcast(own))
        if link.rank == 0:
            write_dataset(folder, job)
        link.barrier()
        training = Training(pipeline_config(job, folder, layout), link)
        training.begin(rehearse(training))
        link.barrier()
    params, real = training.mine.params, training.backend.real
    for name in params.owned:
        view = training.executor.array("PARAM", real * params.param[name], params.shapes[name])
        view[...] = job.weights[training.plan.ties.get(name, name)]
    training.data = Tokens(job.tokens)
    return Steps(training)


def build(link: Link, follower: IO[str] | None, job: Job, threads: int, variant: str) -> tuple[Run, str]:
    """The training loop of one rank; rank 0 leads."""
    layout = Layout.parse(variant)
    steps = steps_of(job, link, layout)

    def train(first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            steps.run(step, False)
            if first == 0 or step + 1 == first + count:  # as the warm-up is compared loss by loss, a turn by its last
                steps.settle()
            losses.append(steps.loss)
        return losses

    backend = steps.job.backend
    level = getattr(backend, "level", backend.name)
    return leading(train, follower), f"{level}, {layout}, {layout.micros(job.shape)} microbatches, MPI"


if __name__ == "__main__":
    main()
