"""One rank with all cores, a rank for each core, and more ranks than cores: the same step, as `mpirun` starts it.

    python -m benchmarks.layouts [--quick] [--json FILE] [--shape SHAPE] [--rounds N]

Each turn is a short run of its own under mpirun, without settings for binding: ranks find their cores by themselves.
Turns alternate over the layouts; tokens/s are those of the run's own record, without its first steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from benchmarks.peer_hpcpipe import config_of, microbatch_of, write_dataset
from benchmarks.peer_hpcpipe_pipeline import launcher
from benchmarks.shape import Job, Shape, arguments, parse, synthetic_tokens
from benchmarks.step import machine, spread
from hpcpipe.config import to_toml

SHAPES = ("4,4,128,64,48,65", "8,8,512,256,8,8192")
COLD = 2  # first steps that do not count


class Layout(NamedTuple):
    """Ranks of a pipeline, copies of it, and its schedule."""

    ranks: int
    replicas: int
    schedule: str = "1f1b"

    def __str__(self) -> str:
        size = self.ranks * self.replicas
        how = "alone" if size == 1 else f"{self.replicas} replicas" if self.ranks == 1 else self.schedule
        return f"{size} rank{'s' * (size > 1)}, {how}"


def layouts(cores: int) -> tuple[Layout, ...]:
    """One rank; a rank for each core, as replicas and as a pipeline; twice as many ranks as cores."""
    return Layout(1, 1), Layout(1, cores), Layout(cores, 1), Layout(cores, 1, "zb_h1"), Layout(2 * cores, 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    args = arguments("benchmarks.layouts", __doc__, quick="three rounds of fewer steps", rounds="7").parse_args(argv)
    rounds = args.rounds or (3 if args.quick else 7)
    cores = len(os.sched_getaffinity(0))
    print(f"{machine()}, {cores} cores, {rounds} rounds; a ratio is over one rank with all cores, within a round")
    found = []
    for shape in args.shape or [parse(text) for text in SHAPES]:
        steps = COLD + max(4, round((3e11 if args.quick else 1e12) / shape.flops))
        with TemporaryDirectory(prefix="hpcpipe-bench-") as name:
            folder = Path(name)
            write_dataset(folder, Job(shape, {}, synthetic_tokens(shape, 2)))
            rates = [[run(shape, folder, one, steps) for one in layouts(cores)] for _ in range(rounds)]
        found.append({"shape": str(shape), "steps": steps, "tokens_per_second": rates})
        print(f"\n{shape}: {steps - COLD} steps of {shape.sequences * shape.length} tokens")
        for i, one in enumerate(layouts(cores)):
            ratios = [turn[i] / turn[0] for turn in rates]
            print(f"{one!s:<22} {median(turn[i] for turn in rates):>10,.0f} tokens/s   {spread(ratios, '.2f')}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "shapes": found}, indent=1))
    return 0


def run(shape: Shape, folder: Path, layout: Layout, steps: int) -> float:
    """Tokens per second of one run."""
    mine = shape.sequences // layout.replicas
    # A pipeline is filled by two microbatches for each rank, where there are as many sequences.
    most = min(microbatch_of(shape), max(1, mine // (2 * layout.ranks)) if layout.ranks > 1 else mine)
    config = config_of(shape, folder, max(n for n in range(1, most + 1) if mine % n == 0))
    file, out = folder / "run.toml", folder / "run"
    file.write_text(to_toml(config))
    sets = {
        "train.steps": steps, "train.log_every": 1, "pipeline.ranks": layout.ranks,
        "pipeline.replicas": layout.replicas, "pipeline.schedule": layout.schedule,
    }  # fmt: skip
    words = [launcher(), "-n", str(layout.ranks * layout.replicas), sys.executable, "-m", "hpcpipe", "train", str(file)]
    for key, value in sets.items():
        words += ["--set", f"{key}={value}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"benchmarks.layouts: {layout} failed: {(done.stdout + done.stderr)[-800:]}")
    told = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in told if "loss" in line][COLD:]
    for old in sorted(out.rglob("*"), reverse=True):
        old.unlink() if old.is_file() else old.rmdir()
    return shape.sequences * shape.length * len(seconds) / float(np.sum(seconds))


if __name__ == "__main__":
    sys.exit(main())
