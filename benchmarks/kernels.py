"""Where the time of a step goes, kernel by kernel, and how far each is from what bounds it.

    python -m benchmarks.kernels [--quick] [--json FILE] [--shape SHAPE] [--threads N] [--each]

The recorded passes of a microbatch run as in training, but call by call with a clock between, so that every kernel
finds the caches as it would. Its limit is the longer of its FLOPs at the product peak and its bytes at the speed of a
copy, both measured in turn with the passes; bytes are those of its operands, once each, so a kernel whose operands are
still in a cache may beat the copy. Whole steps follow, and how much of them is not spent in C.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from benchmarks.peer_hpcpipe import config_of, microbatch_of, write_dataset
from benchmarks.shape import Job, Shape, parse, synthetic_tokens
from benchmarks.step import machine
from hpcpipe.backends import cpu
from hpcpipe.backends.null import PASSES, Call
from hpcpipe.comm.local import LocalWorld
from hpcpipe.job import Job as Training
from hpcpipe.rehearsal import rehearse
from hpcpipe.steps import Steps

SHAPE = "8,8,512,256,8,8192"
COPIED = 64 << 20  # bytes of a copy: more than caches hold


class Timed(NamedTuple):
    """A call of a recording, prepared to run alone."""

    name: str
    call: Call
    handle: Any
    bases: Any


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--shape", type=parse, default=SHAPE, metavar="L,H,C,T,B,V[,K]", help=f"default {SHAPE}")
    parser.add_argument("--threads", type=int, help="default: one for each core of the affinity mask")
    parser.add_argument("--each", action="store_true", help="a line for each shape of a kernel's operands")
    args = parser.parse_args(argv)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads or None])
    training = prepared(args.shape)
    backend = training.backend
    calls = timed(training)
    rounds = 4 if args.quick else 15
    seconds, peaks, copies = np.zeros((rounds, len(calls))), [], []
    target, source = (np.ones(COPIED // 4, np.float32) for _ in range(2))
    for turn in range(-1, rounds):
        peaks.append(backend.matmul_peak(0.1))
        copies.append(copy_speed(backend, target, source))
        for i, (_, _, handle, bases) in enumerate(calls):
            begin = perf_counter()
            backend.run(handle, training.executor.arena, bases, training.executor.memory.work)
            seconds[turn, i] = perf_counter() - begin  # the first turn is written over
    training.executor.clear("GRAD")
    whole, native = steps(training, rounds)
    report = table(calls, np.median(seconds, axis=0), median(peaks), median(copies), args.each)
    report |= {"machine": machine(), "threads": backend.threads, "level": backend.level, "shape": args.shape._asdict()}
    report |= {"step": whole, "native": native}
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def prepared(shape: Shape) -> Training:
    """A run of one rank before its first step."""
    load = cpu.load
    clocked = patch.object(cpu, "load", lambda level: Clocked(load(level)))
    with TemporaryDirectory(prefix="hpcpipe-bench-") as name, clocked:
        folder = Path(name)
        write_dataset(folder, Job(shape, {}, synthetic_tokens(shape, 1)))
        training = Training(config_of(shape, folder, microbatch_of(shape)), LocalWorld(1).links[0])
        rehearse(training)
    return training


def timed(training: Training) -> list[Timed]:
    """All calls of the first microbatch, in the order of F, B and W."""
    executor, found = training.executor, []
    for kind in PASSES:
        instruction = next(i for i in training.program.instructions if i.kind == kind)
        stage, bases = executor.stages[instruction.stage], executor.bases(instruction)
        for call in stage.recording.passes[kind]:
            handle = training.backend.compile([call], lambda t, s=stage: s.layout.where[t.id])
            found.append(Timed(call.kernel, call, handle, bases))
    return found


class Clocked:
    """The native library with a clock around its walk."""

    def __init__(self, library: Any) -> None:
        self.library, self.seconds = library, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.library, name)

    def hp_run(self, *args: Any) -> None:
        """Runs a recording."""
        begin = perf_counter()
        self.library.hp_run(*args)
        self.seconds += perf_counter() - begin


def steps(training: Training, rounds: int) -> tuple[float, float]:
    """Seconds of a step, data and optimizer with it, and how many of them the native library had; medians."""
    clock: Clocked = training.backend._lib
    training.predicted = rehearse(training)
    training.tell = lambda *_: None
    run, found = Steps(training), []
    for step in range(4 * rounds):
        before, begin = clock.seconds, perf_counter()
        run.run(step, False)
        run.settle()
        found.append((perf_counter() - begin, clock.seconds - before))
    whole, native = (float(each) for each in np.median(found[rounds:], axis=0))
    return whole, native


def copy_speed(backend: Any, target: np.ndarray, source: np.ndarray) -> float:
    """Bytes per second, read and written, of each thread's share of a copy."""
    parts = np.array_split(np.arange(target.size), backend.threads)
    spans = [slice(int(part[0]), int(part[-1]) + 1) for part in parts]
    with ThreadPoolExecutor(backend.threads) as pool:
        best = float("inf")
        for _ in range(3):
            begin = perf_counter()
            list(pool.map(lambda span: np.copyto(target[span], source[span]), spans))
            best = min(best, perf_counter() - begin)
    return 2 * target.nbytes / best


def table(calls: Sequence[Timed], seconds: np.ndarray, peak: float, copy: float, each: bool) -> dict[str, Any]:
    """Time, FLOPs and bytes by kernel, and the share of its limit that it reaches."""
    rows: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0, 0.0])
    for one, took in zip(calls, seconds.tolist(), strict=True):
        flops, moved = one.call.flops, one.call.nbytes
        sizes = " ".join(f"{k}={v}" for k, v in one.call.env.items() if k in (*one.call.row.dims, *one.call.row.ints))
        row = rows[f"{one.name} {sizes}" if each else one.name]
        for i, value in enumerate((1, took, flops, moved, max(flops / peak, moved / copy))):
            row[i] += value
    keys = ("calls", "seconds", "flops", "bytes", "limit")
    ordered = sorted(rows.items(), key=lambda item: -item[1][1])
    found = [{"kernel": name} | dict(zip(keys, row, strict=True)) for name, row in ordered]
    return {"peak": peak, "copy": copy, "kernels": found}


def show(report: dict[str, Any]) -> None:
    """The table."""
    rows, total = report["kernels"], sum(row["seconds"] for row in report["kernels"])
    width = max(len(row["kernel"]) for row in rows)
    print(
        f"{report['machine']}, {report['threads']} threads, {report['level']}, {Shape(**report['shape'])}, a microbatch"
    )
    print(f"products {report['peak'] / 1e9:.0f} GFLOP/s, copy {report['copy'] / 1e9:.1f} GB/s")
    print(f"{'':<{width}} calls        ms   share  GFLOP/s     GB/s  of its limit")
    for row in rows:
        gflops, moved, limit = (row[key] / row["seconds"] for key in ("flops", "bytes", "limit"))
        ms = 1e3 * row["seconds"]
        share = row["seconds"] / total
        print(f"{row['kernel']:<{width}} {row['calls']:>5.0f} {ms:>9.3f} {share:>7.1%} {gflops / 1e9:>8.1f} "
              f"{moved / 1e9:>8.1f} {limit:>12.0%}")  # fmt: skip
    flops, limit = (sum(row[key] for row in rows) / total for key in ("flops", "limit"))
    print(f"{'all':<{width}} {'':>5} {1e3 * total:>9.3f} {'':>7} {flops / 1e9:>8.1f} {'':>8} {limit:>12.0%}")
    print(f"a step of {1e3 * report['step']:.2f} ms, {1 - report['native'] / report['step']:.2%} of it outside of C")


if __name__ == "__main__":
    sys.exit(main())
