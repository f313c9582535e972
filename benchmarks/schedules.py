"""Every named schedule simulated: idle time and memory beside the published ones, how long it takes to make and prove
one, and what a search gains where costs are not equal.

    python -m benchmarks.schedules [--quick] [--json FILE]

Idle time is counted between a rank's own first and last op, with passes of one unit; memory in microbatches of a rank's
layers, from their F to their W. Formulas are for a gradient that leaves after B (docs/schedules.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any

from benchmarks.step import machine
from hpcpipe.schedule.check import check
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import SCHEDULES, build, consecutive, draft, folded, held, in_turn, period
from hpcpipe.schedule.op import ScheduleError
from hpcpipe.schedule.program import Lifetimes, lower
from hpcpipe.schedule.replay import replay
from hpcpipe.schedule.search import search

# name -> idle units, and microbatches held, of P ranks with enough microbatches and F = B = W = 1 (per rank, so that
# a pass of one of two stages is half a unit); None where the paper gives no formula.
PUBLISHED: dict[str, tuple[Callable[[int], float] | None, Callable[[int, int], float]]] = {
    "gpipe": (lambda p: 2 * (p - 1), lambda p, m: m),
    "1f1b": (lambda p: 2 * (p - 1), lambda p, m: p),
    "interleaved": (lambda p: 2 * (p - 1) / 2, lambda p, m: p + (p - 1) / 2),
    "zb_h1": (lambda p: p - 1, lambda p, m: p),
    "zb_h2": (lambda p: 0, lambda p, m: 2 * p - 1),
    "zb_v": (lambda p: 0, lambda p, m: p),
    "v_half": (None, lambda p, m: p / 2 + 1),
    "v_min": (None, lambda p, m: (p + 4) / 3),
    "dualpipe_v": (lambda p: (p - 1) / 2 * 2, lambda p, m: p + 0.5),
    "dualpipe": (lambda p: (p / 2 - 1) * 2, lambda p, m: p + 1),
}
LARGE = (("1f1b", 8, 32, 0), ("zb_v", 8, 32, 0), ("1f1b", 64, 256, 0), ("zb_v", 64, 256, 0),
         ("interleaved", 64, 256, 512))  # fmt: skip
KEEPS_X = Lifetimes("W", "F", "W", "B")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; a schedule that cannot be proven raises."""
    parser = argparse.ArgumentParser(prog="benchmarks.schedules", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was found")
    args = parser.parse_args(argv)
    report: dict[str, Any] = {"machine": machine()}
    report["formulas"] = formulas(((4, 16),) if args.quick else ((2, 8), (4, 16), (8, 32), (16, 64)))
    report["proof"] = proof(LARGE[:3] if args.quick else LARGE)
    report["search"] = searches((2, 4) if args.quick else (2, 4, 8))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def formulas(shapes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Idle time and memory beside the published ones."""
    print("units of F = B = W = 1, microbatches of a rank's layers")
    print(f"{'':<12} {'P':>3} {'M':>4} {'idle':>6} {'formula':>8} {'held':>6} {'formula':>8}")
    found = []
    for name, (idle, memory) in PUBLISHED.items():
        for p, m in shapes:
            schedule = build(name, 0, p, m)
            per_rank = schedule.stages // p / schedule.chains
            timeline = replay(schedule, Costs.unit(schedule.stages))
            row = {
                "schedule": name, "ranks": p, "micros": m,
                "idle": (period(timeline) - max(timeline.busy(r) for r in range(p))) / per_rank,
                "idle_formula": idle(p) if idle else None,
                "held": max(held(schedule, r) for r in range(p)), "held_formula": memory(p, m),
            }  # fmt: skip
            found.append(row)
            told = "" if row["idle_formula"] is None else f"{row['idle_formula']:g}"
            numbers = f"{row['idle']:>6g} {told:>8} {row['held']:>6g} {row['held_formula']:>8.3g}"
            print(f"{name:<12} {p:>3} {m:>4} {numbers}")
    return found


def proof(cases: Sequence[tuple[str, int, int, int]]) -> list[dict[str, Any]]:
    """Seconds of making, lowering (which proves the table) and checking the programs, the least of three."""
    head = f"{'made':>7} {'lowered':>8} {'checked':>8} {'all':>7} s"
    print(f"\n{'':<12} {'P':>3} {'M':>4} {'stages':>6} {'ops':>8} {head}")
    found = []
    for name, p, m, stages in cases:
        best: tuple[float, ...] = (inf,)
        for _ in range(3):
            marks = [time.perf_counter()]
            schedule = draft(name, stages, p, m)
            marks.append(time.perf_counter())
            programs = lower(schedule, [KEEPS_X] * schedule.stages)
            marks.append(time.perf_counter())
            check(programs)
            marks.append(time.perf_counter())
            best = min(best, (marks[3] - marks[0], *(b - a for a, b in pairwise(marks))))
        ops = sum(map(len, schedule.rows))
        found.append({"schedule": name, "ranks": p, "micros": m, "stages": schedule.stages, "seconds": best})
        parts = f"{best[1]:>7.3f} {best[2]:>8.3f} {best[3]:>8.3f} {best[0]:>7.3f}"
        print(f"{name:<12} {p:>3} {m:>4} {schedule.stages:>6} {ops:>8,} {parts}", flush=True)
    return found


def searches(ranks: Sequence[int]) -> list[dict[str, Any]]:
    """The search beside the best name of as many stages, for some costs."""
    head = f"{'best name':<12} {'its step':>9} {'search':>9} {'gain':>7}"
    print(f"\n{'costs':<22} {'P':>3} {'stages':>6} {'memory':>7} {head}")
    found = []
    for p in ranks:
        for stages in (p, 2 * p):
            for label, costs in costs_of(stages).items():
                for limit in (inf, 0.75 * p * stages / p):
                    found.append(compared(label, costs, p, stages, 4 * p, limit))
    return found


def costs_of(stages: int) -> dict[str, Costs]:
    """Equal passes; passes as they come; a heavy head; messages that take time."""
    one, head = (1.0,) * stages, (1.0,) * (stages - 1) + (1.6,)
    return {
        "equal": Costs(one, one, one),
        "F:B:W 1:1.1:0.9": Costs(one, (1.1,) * stages, (0.9,) * stages),
        "head 1.6": Costs(head, head, head),
        "head 1.6, message 0.1": Costs(head, head, head, 0.1),
    }


def compared(label: str, costs: Costs, ranks: int, stages: int, micros: int, limit: float) -> dict[str, Any]:
    """One line: the time from step to step, when steps follow each other without a stop."""
    names, hold = {}, [1.0] * stages
    for name, family in SCHEDULES.items():
        with suppress(ScheduleError):
            if family.chains == 1:
                names[name] = build(name, stages, ranks, micros)
    places = [consecutive(stages, ranks), in_turn(stages, ranks)]
    places += [folded(stages, ranks)] if stages == 2 * ranks else []
    result = search(places, micros, costs, hold, [limit] * ranks, list(names.values()))
    per_rank = stages / ranks
    fitting = {n: s for n, s in names.items() if max(held(s, r) for r in range(ranks)) * per_rank <= limit}
    best = min(fitting, key=lambda n: period(replay(fitting[n], costs)), default="")
    before = period(replay(fitting[best], costs)) if best else inf
    after = period(replay(result, costs))
    gain = f"{100 * (1 - after / before):.1f} %" if best else ""
    told = f"{best or 'none fits':<12} {before:>9.2f} {after:>9.2f} {gain:>7}"
    print(f"{label:<22} {ranks:>3} {stages:>6} {limit:>7g} {told}", flush=True)
    return {"costs": label, "ranks": ranks, "stages": stages, "limit": limit, "best": best, "before": before,
            "after": after}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
