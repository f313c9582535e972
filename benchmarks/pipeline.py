"""Trains one GPT on two ranks in hpcpipe and in torch.distributed.pipelining in turn, and prints them side by side.

    python -m benchmarks.pipeline [--quick] [--json FILE] [--shape SHAPE] [--schedules NAME…] [--peers-python PATH]

Each schedule runs in both, each rank is a thread on a core of its own, and both have the same cut, weights and tokens.
Every competitor has built and warmed up before the first round; a round measures the matrix-product peak, then each
competitor for the same number of steps while the others wait. Ratios are between counterparts, within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate, combinations, pairwise
from pathlib import Path
from statistics import median
from typing import IO, Any, NamedTuple

from benchmarks.contest import Failed, Process, start_peak, vendor_shim
from benchmarks.shape import Shape, parse, write
from benchmarks.step import AGREE, PEERS, machine, progress, rounds, spread, summarise
from benchmarks.worker import Run

RANKS = 2
MICROBATCH = 2  # sequences
SHAPE = "8,8,512,256,16,8192"
PLACEMENTS = {"1f1b": (0, 1), "interleaved": (0, 1, 0, 1), "zb_v": (0, 1, 1, 0)}  # stages on ranks, in both


# --- what a worker is told


class Layout(NamedTuple):
    """A schedule and how many slots (embedding, layers, head) each stage has; written ``zb_v:3,2,3,2``."""

    schedule: str
    cut: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        schedule, _, cut = text.partition(":")
        return cls(schedule, tuple(int(slots) for slots in cut.split(",")))

    def __str__(self) -> str:
        return f"{self.schedule}:{','.join(map(str, self.cut))}"

    @property
    def placement(self) -> tuple[int, ...]:
        """The rank of each stage."""
        return PLACEMENTS[self.schedule]

    @property
    def stages(self) -> int:
        return len(self.cut)

    def slots(self, stage: int) -> tuple[int, int]:
        """The first slot of a stage and the one after its last."""
        ends = (0, *accumulate(self.cut))
        return ends[stage], ends[stage + 1]

    def micros(self, shape: Shape) -> int:
        """Microbatches of a step."""
        return shape.sequences // MICROBATCH


def balanced(shape: Shape, schedule: str) -> Layout:
    """The cut whose busiest rank, and then whose longest stage, has the fewest FLOPs; the same for both sides."""
    c, placement = shape.width, PLACEMENTS[schedule]
    layer, head = 12 * c * c + (shape.length + 1) * c, c * shape.vocabulary
    sums = (0, *accumulate([0, *[layer] * shape.layers, head]))

    def burden(ends: Sequence[int]) -> tuple[int, int]:
        stages = [sums[b] - sums[a] for a, b in pairwise((0, *ends, len(sums) - 1))]
        ranks = [sum(n for n, r in zip(stages, placement, strict=True) if r == rank) for rank in range(RANKS)]
        return max(ranks), max(stages)

    ends = min(combinations(range(1, shape.layers + 2), len(placement) - 1), key=burden)
    return Layout(schedule, tuple(b - a for a, b in pairwise((0, *ends, shape.layers + 2))))


def leading(train: Run, follower: IO[str] | None) -> Run:
    """``train``, after telling the other rank, which is such a worker too; both warm up without being told."""

    def both(first: int, count: int) -> list[float]:
        if follower is not None and first > 0:
            follower.write(json.dumps({"steps": count}) + "\n")
            follower.flush()
        return train(first, count)

    return both


# --- the driver


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every competitor ran and their losses agree, else 1."""
    args = arguments(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:RANKS])
    shape: Shape = args.shape
    steps = max(1, round(args.seconds * 1e11 / shape.flops))
    print(f"{machine()}, {RANKS} ranks of one thread, float32, {args.rounds} rounds of {steps} steps")
    print(
        f"{shape} (layers, heads, width, length, sequences, vocabulary), {shape.sequences // MICROBATCH} microbatches:"
    )
    print(f"{shape.tokens} tokens and {shape.flops / 1e9:.1f} GFLOP a step", flush=True)
    result: dict[str, Any] = {"machine": machine(), "agree": AGREE, "shape": shape._asdict(), "flops": shape.flops}
    result |= {"steps": steps, "good": True, "runs": {}}
    try:
        contest(shape, args, result)
    except Failed as error:  # in the middle of a round: the rounds before it say nothing about the rest
        print(f"benchmarks.pipeline: a process failed while it was timed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if result["good"] else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--shape", type=parse, default=SHAPE, metavar="L,H,C,T,B,V", help=f"default {SHAPE}")
    parser.add_argument("--schedules", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS, metavar="NAME",
                        help=f"default {' '.join(PLACEMENTS)}")  # fmt: skip
    parser.add_argument("--peers-python", type=Path, default=PEERS, metavar="PATH", help="interpreter that has torch")
    args = parser.parse_args(argv)
    args.rounds, args.seconds = (3, 0.4) if args.quick else (7, 15.0)
    if args.shape.sequences % MICROBATCH or args.shape.sequences < RANKS * MICROBATCH:
        parser.error(f"{args.shape.sequences} sequences are not {RANKS} or more microbatches of {MICROBATCH}")
    if args.shape.layers + 2 < 2 * RANKS:
        parser.error(f"{args.shape.layers} layers cannot be cut into {2 * RANKS} stages; use {2 * RANKS - 2} or more")
    if not args.peers_python.exists():
        parser.error(f"torch is looked for in {args.peers_python}; run `make bench` once, or pass --peers-python PATH")
    if len(os.sched_getaffinity(0)) < RANKS:
        parser.error(f"{RANKS} ranks need {RANKS} cores, this process may use {len(os.sched_getaffinity(0))}")
    return args


def contest(shape: Shape, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """Starts everybody, runs the rounds, prints the table and leaves all that was measured in ``result``."""
    running: dict[str, Process] = {}
    with tempfile.TemporaryDirectory(prefix="hpcpipe-bench-") as folder:
        job = Path(folder) / "job.npz"
        write(job, shape)
        shim = vendor_shim(Path(folder))
        try:
            running["peak"] = start_peak(Path(folder))
            for schedule in args.schedules:
                layout = balanced(shape, schedule)
                for side, python in (("hpcpipe", Path(sys.executable)), ("torch", args.peers_python)):
                    name = f"{side} {schedule}"
                    progress(f"{name} warms up")
                    try:
                        running[name] = start(side, python, job, layout, shim)
                    except Failed as error:
                        result["good"] = False
                        progress("")
                        print(f"{name} is left out: {error}", flush=True)
            result["peaks"] = rounds(running, result["steps"], args.rounds, result["runs"])
        finally:
            for process in running.values():
                process.end()
    if result["runs"]:
        summarise(result, shape)
        compare(result["runs"])
        show(result, shape)


def start(side: str, python: Path, job: Path, layout: Layout, shim: str) -> Process:
    """Two ranks that have warmed up; raises Failed."""
    command = [str(python), "-m", f"benchmarks.peer_{side}_pipeline", str(job), "--threads", str(RANKS)]
    preload = ":".join(filter(None, (shim, os.environ.get("LD_PRELOAD")))) if side == "torch" else ""
    log = job.with_name(f"{side}-{layout.schedule}.log")
    process = Process([*command, "--variant", str(layout)], log, {"LD_PRELOAD": preload} if preload else {})
    process.ready["about"] += ", MKL's AVX-512 kernels enabled on this vendor" if shim and side == "torch" else ""
    return process


def compare(runs: dict[str, Any]) -> None:
    """How many times faster hpcpipe is than each counterpart of its, round by round."""
    for name, run in runs.items():
        side, schedule = name.split()
        ours = runs.get(f"hpcpipe {schedule}") if side == "torch" else None
        rates = zip(ours["tokens_per_second"], run["tokens_per_second"], strict=True) if ours else ()
        run["ratio"] = [mine / its for mine, its in rates]


def show(result: dict[str, Any], shape: Shape) -> None:
    """The table."""
    form = "{:<20} {:>24} {:>8} {:>19} {:>14} {:>8} {:>8} {:>8}  {}"
    print(
        form.format(
            "", "tokens/s", "GFLOP/s", "hpcpipe is faster by", "of the peak", "loss 1", "loss 5", "last", "agree"
        )
    )
    for name, run in result["runs"].items():
        rate = median(run["tokens_per_second"]) * shape.flops / shape.tokens
        ratio = spread(run["ratio"], ".2f") if run["ratio"] else ""
        share = spread([100 * share for share in run["share"]], ".0f") + " %"
        losses = (f"{run['losses'][0]:.5f}", f"{run['losses'][-1]:.5f}", f"{run['last_loss']:.4f}")
        agrees = "yes" if run["agrees"] else "NO"
        print(
            form.format(
                name, spread(run["tokens_per_second"], ",.0f"), f"{rate / 1e9:.1f}", ratio, share, *losses, agrees
            )
        )
    print("median (least-largest) over the rounds; agree: the first five losses, with those of the first line")
    for name, run in result["runs"].items():
        print(f"  {name}: {run['about']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
