"""Trains the same GPT shapes in hpcpipe, JAX and PyTorch in turn on the same cores and prints them side by side.

    python -m benchmarks.step [--quick] [--json FILE] [--shapes SHAPE…] [--competitors NAME…] [--peers-python PATH]

Every competitor is a process that has built, compiled and warmed up before the first round. A round measures the
matrix-product peak, then each competitor for the same number of steps, all others stopped; ratios are taken within a
round, so that a machine whose speed drifts drifts under both. What is counted and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contest import Competitor, Failed, Process, start, start_peak, vendor_shim
from benchmarks.shape import Shape, parse, write

SHAPES = (
    "4,4,128,64,12,65", "6,6,384,256,16,65", "8,8,512,256,8,8192", "12,12,768,512,4,50304", "8,8,512,1024,2,32000,2",
)  # fmt: skip
PEERS = Path(__file__).resolve().parent.parent / ".venv-peers/bin/python"
AGREE = 1e-3  # relative difference of the first losses that still counts as the same model

COMPETITORS = ("hpcpipe", "jax", "torch", "torch:compile")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every competitor ran and their losses agree, else 1."""
    args = arguments(argv)
    mask = sorted(os.sched_getaffinity(0))[: args.threads or None]
    os.sched_setaffinity(0, mask)
    report: dict[str, Any] = {"machine": machine(), "threads": len(mask), "agree": AGREE, "shapes": []}
    print(f"{report['machine']}, {len(mask)} threads, float32, {args.rounds} rounds")
    try:
        for shape in args.shapes:
            report["shapes"].append(contest(shape, args, len(mask)))
    except Failed as error:  # in the middle of a round: the rounds before it say nothing about the rest
        print(f"benchmarks.step: a process failed while it was timed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(r["good"] for r in report["shapes"]) else 1


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with shapes parsed and competitors resolved."""
    parser = argparse.ArgumentParser(prog="benchmarks.step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="three short rounds")
    parser.add_argument("--rounds", type=int, help="default 7, or 3 with --quick")
    parser.add_argument("--seconds", type=float, help="aimed length of one turn at 100 GFLOP/s; default 1.5, or 0.4")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="L,H,C,T,B,V[,K]",
                        help="layers,heads,width,length,sequences,vocabulary")  # fmt: skip
    parser.add_argument("--competitors", nargs="+", default=COMPETITORS, metavar="NAME[:VARIANT]",
                        help=f"the first is compared with each other one; default {' '.join(COMPETITORS)}")  # fmt: skip
    parser.add_argument("--peers-python", type=Path, default=PEERS if PEERS.exists() else sys.executable,
                        metavar="PATH", help="interpreter that has torch and jax; default .venv-peers/bin/python if "
                        "there is one, else this one")  # fmt: skip
    parser.add_argument("--threads", type=int, default=0, help="cores used by all; default: the affinity mask")
    parser.add_argument("--stock-mkl", action="store_true", help="let PyTorch's MKL keep its slow path on AMD")
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (3 if args.quick else 7)
    args.seconds = args.seconds or (0.4 if args.quick else 1.5)
    try:
        args.shapes = [parse(text) for text in args.shapes]
        args.competitors = [Competitor.named(text, sys.executable, str(args.peers_python)) for text in args.competitors]
    except ValueError as error:
        parser.error(str(error))
    if args.threads < 0 or args.rounds < 1:
        parser.error(f"--threads {args.threads} and --rounds {args.rounds} must not be negative or zero rounds")
    missing = [c for c in args.competitors if not Path(c.python).exists()]
    if missing:
        parser.error(f"{missing[0].name} needs {missing[0].python}; run `make bench`, or pass --peers-python PATH")
    return args


def machine() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def contest(shape: Shape, args: argparse.Namespace, threads: int) -> dict[str, Any]:
    """All competitors on one shape; prints its table and returns all that was measured."""
    steps = max(1, min(200, round(args.seconds * 1e11 / shape.flops)))
    parameters = sum(size[0] * (size[1] if len(size) > 1 else 1) for size in shape.parameters.values())
    print(f"\n{shape} (layers, heads, width, length, sequences, vocabulary, for Llama its key/value heads):")
    print(f"{parameters / 1e6:.2f} M parameters,", end=" ")
    print(f"{shape.tokens} tokens and {shape.flops / 1e9:.1f} GFLOP a step, {steps} steps a turn; "
          "counted are the products of the mathematics, causal attention's visible half, once", flush=True)
    with tempfile.TemporaryDirectory(prefix="hpcpipe-bench-") as folder:
        job = Path(folder) / "job.npz"
        write(job, shape)
        preload = "" if args.stock_mkl else vendor_shim(Path(folder))
        running: dict[str, Process] = {}
        result: dict[str, Any] = {"shape": shape._asdict(), "flops": shape.flops, "steps": steps, "good": True}
        result["runs"] = {}
        try:
            running["peak"] = start_peak(Path(folder))
            for competitor in args.competitors:
                progress(f"{competitor.name} compiles")
                try:
                    running[competitor.name] = start(competitor, job, threads, preload)
                except Failed as error:
                    result["good"] = False
                    progress("")
                    print(f"{competitor.name} is left out: {error}", flush=True)
            result["peaks"] = rounds(running, steps, args.rounds, result["runs"])
        finally:
            for process in running.values():
                process.end()
    summarise(result, shape)
    show(result)
    return result


def rounds(running: dict[str, Process], steps: int, count: int, runs: dict[str, Any]) -> list[float]:
    """Rounds of peak, A, B, C, …; fills ``runs`` by competitor and returns the peaks in FLOP/s."""
    peaks = []
    contestants = {name: process for name, process in running.items() if name != "peak"}
    for name, process in contestants.items():
        runs[name] = {**process.ready, "turns": []}
    for number in range(count):
        peaks.append(float(running["peak"].ask({"seconds": 0.6})["flops"]))
        for name, process in contestants.items():
            runs[name]["turns"].append(process.ask({"steps": steps}))
        progress(f"round {number + 1} of {count}")
    progress("")
    return peaks


def progress(text: str) -> None:
    """One line that overwrites itself, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def summarise(result: dict[str, Any], shape: Shape) -> None:
    """Adds to every run its rates, the ratio of the first competitor to it, its share of the peak and its losses."""
    names = list(result["runs"])
    for run in result["runs"].values():
        turns = run["turns"]
        run["tokens_per_second"] = [shape.tokens * result["steps"] / turn["seconds"] for turn in turns]
        rates = [shape.flops / shape.tokens * rate for rate in run["tokens_per_second"]]
        run["share"] = [rate / peak for rate, peak in zip(rates, result["peaks"], strict=True)]
        first = result["runs"][names[0]]["tokens_per_second"]
        run["ratio"] = [ours / its for ours, its in zip(first, run["tokens_per_second"], strict=True)]
        run["peak_bytes"], run["steady_bytes"] = (max(t[key] for t in turns) for key in ("peak_bytes", "steady_bytes"))
        run["last_loss"] = turns[-1]["loss"]
        reference = result["runs"][names[0]]["losses"]
        run["loss_differences"] = [abs(a - b) / abs(b) for a, b in zip(run["losses"], reference, strict=True)]
        run["agrees"] = all(difference <= AGREE for difference in run["loss_differences"])  # a NaN does not
        result["good"] = result["good"] and run["agrees"]


def spread(values: Sequence[float], form: str) -> str:
    """median (least - largest)"""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def show(result: dict[str, Any]) -> None:
    """The table of one shape."""
    if not result["runs"]:
        print("no competitor ran")
        return
    base = next(iter(result["runs"]))
    head = ["", "tokens/s", f"{base} is faster by", "share of peak", "peak RSS MiB", "steady", "compile s",
            "loss 1", "loss 5", "last", "agree"]  # fmt: skip
    rows = [head]
    for name, run in result["runs"].items():
        rows.append([
            name, spread(run["tokens_per_second"], ",.0f"), spread(run["ratio"], ".2f") if name != base else "",
            spread([100 * s for s in run["share"]], ".0f") + " %", f"{run['peak_bytes'] / 2**20:.0f}",
            f"{run['steady_bytes'] / 2**20:.0f}", f"{run['setup_seconds'] + run['warm_seconds']:.1f}",
            f"{run['losses'][0]:.5f}", f"{run['losses'][-1]:.5f}", f"{run['last_loss']:.4f}",
            "" if name == base else "yes" if run["agrees"] else "NO",
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    print(f"peak {spread([p / 1e9 for p in result['peaks']], '.0f')} GFLOP/s; median (least-largest) over the rounds, "
          f"ratios within a round; last: the loss of step {run['turns'][-1]['step']}")  # fmt: skip
    for name, run in result["runs"].items():
        print(f"  {name}: {run['about']}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
