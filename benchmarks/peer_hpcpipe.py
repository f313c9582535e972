"""hpcpipe in the contest: the rank that ``hpcpipe train`` would start alone, one process with all cores of the mask.

The loop is that of ``hpcpipe.train`` without evaluation and checkpoints, which the peers do not have either;
weights and tokens are those of the job. On the CPU the variant is the number of sequences in a microbatch; by default
as many as make 1024 tokens, which keeps a microbatch's activations small and its products large enough. On a GPU it is
what products multiply (``train.compute``, by default bfloat16), and the microbatch is the job's.
"""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from benchmarks.shape import OPTIMIZER, THETA, Job, Shape
from benchmarks.worker import More, Run, serve
from hpcpipe import data, model
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import Config, DataConfig, DeviceConfig, ModelConfig, OptimizerConfig, TrainConfig, loads, to_toml
from hpcpipe.job import Job as Training
from hpcpipe.rehearsal import rehearse
from hpcpipe.steps import Steps

FOREVER = 1 << 30  # steps; the driver says when it is over


def config_of(shape: Shape, folder: Path, microbatch: int, backend: str = "cpu", compute: str = "float32") -> Config:
    """The run file of a shape, at a constant rate; UserError for what this version does not compute."""
    o = OPTIMIZER
    model = ModelConfig(
        family="llama" if shape.kv_heads else "gpt2", layers=shape.layers, heads=shape.heads, width=shape.width,
        kv_heads=shape.kv_heads, ffn=shape.ffn, context=shape.length, vocab=shape.vocabulary, tied=not shape.kv_heads,
        theta=THETA,
    )  # fmt: skip
    optimizer = OptimizerConfig(
        lr=o.lr, min_lr=o.lr, warmup=0, beta1=o.beta1, beta2=o.beta2, eps=o.eps, weight_decay=o.weight_decay,
        clip=o.clip,
    )  # fmt: skip
    made = Config(
        out=str(folder / "run"), model=model, data=DataConfig(str(folder)), optimizer=optimizer,
        train=TrainConfig(steps=FOREVER, batch=shape.sequences, microbatch=microbatch, compute=compute),
        device=DeviceConfig(backend=backend),
    )  # fmt: skip
    return loads(to_toml(made), "benchmark")  # checked, as a file of a user's


def microbatch_of(shape: Shape) -> int:
    """The largest number of sequences that divides the batch and makes at most 1024 tokens, at least one."""
    fitting = [n for n in range(1, shape.sequences + 1) if shape.sequences % n == 0 and n * shape.length <= 1024]
    return max(fitting, default=1)


def write_dataset(folder: Path, job: Job) -> None:
    """A folder as ``hpcpipe prepare`` makes it; what is trained on is written straight into the inputs instead."""
    splits = {}
    for name in data.SPLITS:
        file = folder / f"{name}.bin"
        job.tokens.astype("<u4").tofile(file)
        splits[name] = data.Split(file.name, job.tokens.size, 1, data.crc32(file))
    (folder / data.MANIFEST).write_text(data.manifest("uint32", job.shape.vocabulary, 0, splits, {}))


class Tokens:
    """Stands in for the data set of a run: the job's tokens, batch after batch."""

    def __init__(self, tokens: NDArray[np.int32]) -> None:
        self.tokens = tokens

    def batch(self, split: str, step: int, micro: int, copy: int, *, microbatch: int, out: Any, **_: int) -> None:
        """Writes ids and targets of a microbatch; None where a rank wants only one of them."""
        ids, targets = out
        piece = self.tokens[step % len(self.tokens), micro * microbatch : (micro + 1) * microbatch]
        if ids is not None:
            ids[:] = piece[:, :-1].ravel()
        if targets is not None:
            targets[:] = piece[:, 1:].ravel()


def prepared(job: Job, microbatch: int, backend: str, compute: str) -> Training:
    """A run of one rank before its first step, with the job's weights and tokens."""
    with TemporaryDirectory(prefix="hpcpipe-bench-") as folder:
        write_dataset(Path(folder), job)
        config = config_of(job.shape, Path(folder), microbatch, backend, compute)
        given = patch.object(model, "initial", lambda name, spec, seed: job.weights[name])
        with given if job.weights else nullcontext():
            training = Training(config, LocalWorld(1).links[0])
        training.begin(rehearse(training))
    training.data = Tokens(job.tokens)
    return training


def loop(training: Training) -> Run:
    """What trains steps and returns their losses."""
    steps = Steps(training)

    def run(first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            steps.run(step, False)
            steps.settle()
            losses.append(steps.loss)
        return losses

    return run


def build(job: Job, threads: int, variant: str) -> tuple[Run, str] | tuple[Run, str, More]:
    """The training loop; threads come from the affinity mask, as in a run."""
    if job.device != "cpu":
        return on_a_gpu(job, variant or "bfloat16")
    microbatch = int(variant or microbatch_of(job.shape))
    training = prepared(job, microbatch, "cpu", "float32")
    if training.backend.threads != threads:
        raise ValueError(f"hpcpipe runs {training.backend.threads} threads, the contest is for {threads}")
    about = f"{training.backend.level}, {described(training)}, {threads} threads"
    return loop(training), about


def described(training: Training) -> str:
    """Microbatches, memory and FLOPs of a run."""
    arena = training.mine.memory.total / 2**20
    flops = f"{training.plan.flops / 1e9:.1f} GFLOP recorded (norms, activations and softmax among them)"
    return f"microbatches of {training.config.train.microbatch}, arena {arena:.0f} MiB, {flops}"


def on_a_gpu(job: Job, compute: str) -> tuple[Run, str, More]:
    """The same on a device, or on host memory that poses as one; with the share of a step that it has no work in."""
    from benchmarks.gpu_gaps import Gaps

    around = ExitStack()  # for the life of this process
    if job.device == "rehearsal":
        from tests.gpu.host_run import gpus

        around.enter_context(gpus(1))
    training = prepared(job, job.microbatch or job.shape.sequences, "cuda", compute)
    training.tell = lambda *_: None  # no line for each step
    gaps = Gaps(training)
    run = gaps.timed(loop(training))

    def more() -> dict[str, float]:
        return {"device_bytes": float(training.mine.memory.total), "idle": gaps.idle}

    about = [training.backend.level, compute, described(training), *training.chosen]
    return run, "; ".join(about), more


if __name__ == "__main__":
    serve(build)
