"""One rank of the bubble benchmark, under mpirun: a short run of which rank 0 prints what was predicted and measured.

    mpirun -n P python -m benchmarks.bubble_rank '{"schedule": "zb_v", "steps": 5, "rounds": 3, "pace": 0.01, ...}'

A round is a few steps between two rehearsals, whose mean is its prediction: a machine changes its speed within seconds.

``pace`` > 0 replaces every pass by a sleep (F, B and W of a rank's layers take that many seconds each): then more ranks
than cores can be alone on their device, as they are on a cluster. ``delay`` seconds are added to every message.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.peer_hpcpipe import config_of, write_dataset
from benchmarks.shape import Job, parse, synthetic_tokens
from hpcpipe import job as job_module
from hpcpipe.backends.null import Call, Tensor
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.comm import mpi
from hpcpipe.config import DeviceConfig, PipelineConfig, UserError
from hpcpipe.job import Job as Training
from hpcpipe.rehearsal import rehearse
from hpcpipe.runtime import executor
from hpcpipe.steps import Steps

PORTIONS = 4  # of a pass
SHAPES = {"real": "8,8,192,128,{},1024", "paced": "14,4,128,256,{},128"}  # sequences: those of all microbatches


class PacedBackend(ReferenceBackend):
    """Computes nothing; a pass of a stage takes ``seconds``, whatever is not one takes none."""

    name = level = "paced"

    def __init__(self, seconds: float) -> None:
        super().__init__("float32")
        self.seconds = seconds
        self.shares: dict[int, float] = {}  # of a recorded call in its pass, by identity

    def compile(self, calls: Sequence[Call], where: Callable[[Tensor], tuple[int, int]]) -> Any:
        """Seconds."""
        return self.seconds * sum(self.shares.get(id(call), 0.0) for call in calls)

    def run(self, handle: Any, memory: Any, bases: Any, work: int = -1) -> None:
        """Sleeps until the pass would be through."""
        end = time.perf_counter() + handle
        time.sleep(max(handle - 2e-4, 0.0))
        while time.perf_counter() < end:
            time.sleep(0)

    def matmul_peak(self, seconds: float = 0.2) -> float:
        """Not measured."""
        return 1e9


class PacedExecutor(executor.Executor):
    """Tells its backend which calls make a pass."""

    def __init__(self, memory: Any, stages: Any, backend: PacedBackend, *rest: Any) -> None:
        for stage in stages.values():
            for calls in stage.recording.passes.values():
                total = sum(call.flops for call in calls) or 1.0
                backend.shares |= {id(call): call.flops / total for call in calls}
        super().__init__(memory, stages, backend, *rest)


class DelayedLink:
    """A link whose messages take longer: a receive is over ``delay`` seconds after its sender let go, or later."""

    def __init__(self, link: Any, delay: float) -> None:
        self._link, self._delay = link, delay

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def receiver(self, peer: int, tag: int, buffer: Any) -> Any:
        """The link's own, and then the rest of the delay. The last number of a message is when it was sent."""
        channel, delay = self._link.receiver(peer, tag, buffer), self._delay

        class Late:
            start, done = channel.start, channel.done

            @staticmethod
            def wait() -> None:
                channel.wait()
                time.sleep(max(float(buffer[-1]) + delay - time.perf_counter(), 0.0))

        return Late()


def main() -> None:
    """Runs and reports."""
    asked = json.loads(sys.argv[1])
    link = mpi.connect()
    link = DelayedLink(link, asked["delay"]) if asked["delay"] else link
    shape = parse(SHAPES["paced" if asked["pace"] else "real"].format(asked["micros"] * asked["microbatch"]))
    if asked["pace"]:
        backend = PacedBackend(asked["pace"] * link.size / asked["stages"])
        executor.PORTION = shape.flops / (3 * asked["stages"] * asked["micros"]) / PORTIONS
        job_module.open_backend = lambda name, threads: backend
        job_module.Executor = PacedExecutor
    with TemporaryDirectory(prefix="hpcpipe-bench-") as own:
        folder = Path(link.bcast(own))
        if link.rank == 0:
            write_dataset(folder, Job(shape, {}, synthetic_tokens(shape, 1)))
        link.barrier()
        os.dup2(2, 1) if link.rank else None
        steps = run(link, folder, shape, asked)
        link.barrier()
    if link.rank == 0:
        print("\n" + json.dumps(steps), file=sys.stderr)
    link.close()


def run(link: Any, folder: Path, shape: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """Predicted and measured seconds of a step, and where they went."""
    config = replace(
        config_of(shape, folder, asked["microbatch"]),
        pipeline=PipelineConfig(schedule=asked["schedule"], stages=asked["stages"]),
        device=DeviceConfig(threads=1),
    )
    config = replace(
        config, model=replace(config.model, tied=False), optimizer=replace(config.optimizer, early=asked["early"])
    )
    try:
        training = Training(config, link)
    except UserError as error:
        return {"turns": [{"refused": str(error)}]}
    told: list[tuple[float, float, Any]] = []
    training.begin(rehearse(training))
    training.tell = lambda step, seconds, values: told.append((time.perf_counter(), seconds, values))
    turns = []
    for number in range(asked["rounds"]):
        told.clear()
        steps = Steps(training)
        for step in range(number * asked["steps"], (number + 1) * asked["steps"]):
            steps.run(step, False)
        steps.settle()
        turns.append(turn(told[1:]) | {"early": training.plan.early})
        training.predicted = rehearse(training)
        after = Steps(training).expected + training.optimizer_seconds
        turns[-1]["predicted"] = (turns[-1]["predicted"] + after) / 2
    return {"turns": turns}


def turn(told: Sequence[tuple[float, float, Any]]) -> dict[str, Any]:
    """Medians over steps: seconds, time from one step to the next, shares, parts."""
    values = [v for *_, v in told]
    middle = {key: float(np.median([v[key] for v in values])) for key in ("predicted_seconds", "bubble")}
    parts = {name: float(np.median([v["parts"][name] for v in values])) for name in values[0]["parts"]}
    return {
        "predicted": middle["predicted_seconds"],
        "measured": float(np.median([seconds for _, seconds, _ in told])),
        "between": float(np.median(np.diff([at for at, *_ in told]))),
        "ideal": parts["compute"] + parts["optimizer"],
        "predicted_bubble": values[0]["predicted_bubble"],
        "bubble": middle["bubble"],
        "parts": parts,
        "unaccounted": max(abs(1 - sum(v["parts"].values()) / seconds) for _, seconds, v in told),
    }


if __name__ == "__main__":
    main()
