"""Every schedule run beside its prediction, and what a slow link does to it.

    python -m benchmarks.bubble [--quick] [--json FILE] [--schedules NAME…] [--only table|early|link]

Two ranks compute; four ranks, more than most desks have cores for, are paced: each pass sleeps as long as its share of
the FLOPs says. The prediction is the schedule replayed with passes measured just before and after. The second table
shows steps that wait for the norm of the whole gradient beside steps that do not. The third delays every message by
half a pass, over shared memory and over TCP, in turn with runs that delay nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.peer_hpcpipe_pipeline import launcher
from benchmarks.step import machine, spread
from hpcpipe.schedule.families import SCHEDULES, default_stages

PACE = 0.01  # seconds of a pass in paced runs, on average
DELAY, LINKED = 0.5 * PACE, 64  # seconds that a message takes longer, and microbatches, in runs over a slow link
ROUND = 5  # steps between two rehearsals; the first one of them is not counted
TRANSPORTS = {"shared memory": "self,sm", "TCP": "self,tcp"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every run came to its end."""
    parser = argparse.ArgumentParser(prog="benchmarks.bubble", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=list(SCHEDULES), metavar="NAME")
    parser.add_argument("--only", choices=("table", "early", "link"))
    args = parser.parse_args(argv)
    report: dict[str, Any] = {
        "machine": machine(),
        "cores": len(os.sched_getaffinity(0)),
        "table": [],
        "early": [],
        "link": [],
    }
    print(f"{report['machine']}, {report['cores']} cores")
    rounds, steps = (2, 8) if args.quick else (5, 14)
    for part in (table, early, link):
        if args.only in (None, part.__name__):
            part(args.schedules, rounds, steps, report.setdefault(part.__name__, []))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def table(names: Sequence[str], rounds: int, steps: int, found: list[dict[str, Any]]) -> None:
    """Predicted beside measured."""
    print("\npredicted and measured step, median of rounds; bubble: ideal is 0, then predicted and measured")
    print(f"{'':<12} {'ranks':>5} {'passes':<7} {'predicted':>10} {'measured':>10} {'difference %':>22} "
          f"{'bubble':>15}  exposed  warm-up  steady  cool-down  optimizer  other, % of the step; "
          "the most that the parts miss of one")  # fmt: skip
    for ranks, pace in ((2, 0.0), (4, PACE)):
        for name in names:
            turns = ask(ranks, name, ROUND, pace, rounds=2 * rounds)
            found.append({"schedule": name, "ranks": ranks, "pace": pace, "turns": turns})
            show(name, ranks, pace, turns)


def show(name: str, ranks: int, pace: float, turns: Sequence[Mapping[str, Any]]) -> None:
    """One line of the table."""
    if "refused" in turns[0]:
        print(f"{name:<12} {ranks:>5} refused: {turns[0]['refused']}")
        return
    off = [100 * (turn["measured"] / turn["predicted"] - 1) for turn in turns]
    middle = {key: median(turn[key] for turn in turns) for key in ("predicted", "measured", "bubble")}
    parts = {k: 100 * median(t["parts"][k] / t["measured"] for t in turns) for k in turns[0]["parts"]}
    shares = "  ".join(f"{parts[k]:7.1f}" for k in ("exposed", "warmup", "steady", "cooldown", "optimizer", "other"))
    times = f"{middle['predicted']:>8.3f} s {middle['measured']:>8.3f} s {spread(off, '+.1f'):>22}"
    bubbles = f"{turns[0]['predicted_bubble']:>6.1%} {middle['bubble']:>7.1%}"
    lost = f"{100 * max(turn['unaccounted'] for turn in turns):>6.2f}"
    print(f"{name:<12} {ranks:>5} {'paced' if pace else 'real':<7} {times} {bubbles}  {shares}  {lost}", flush=True)


def early(names: Sequence[str], rounds: int, steps: int, found: list[dict[str, Any]]) -> None:
    """The update on a guess beside the update that waits for the slowest rank."""
    print("\n4 paced ranks: idle share of a step, as (time between steps - compute) / time between steps")
    for name in names:
        pairs = [[ask(4, name, steps, PACE, early=early)[0] for early in (False, True)] for _ in range(rounds)]
        found.append({"schedule": name, "pairs": pairs})
        idle = [[100 * (1 - turn["parts"]["compute"] / turn["between"]) for turn in pair] for pair in pairs]
        faster = [100 * (1 - guess["between"] / wait["between"]) for wait, guess in pairs]
        waits, guesses = (spread([pair[i] for pair in idle], ".1f") for i in (0, 1))
        told = f"waits for the norm {waits} %, guesses {guesses} %"
        print(f"{name:<12} {told}, a step is shorter by {spread(faster, '.1f')} %", flush=True)


def link(names: Sequence[str], rounds: int, steps: int, found: list[dict[str, Any]]) -> None:
    """A delay on every message, in turn with none, and what filling and draining the pipeline cannot but pay for it."""
    print(f"\nslow messages, passes of about {1e3 * PACE:.0f} ms, {LINKED} microbatches, paced: the step is longer by")
    for ranks in (2, 4):
        for transport, modules in TRANSPORTS.items():
            for name in names:
                pairs = [
                    [
                        ask(ranks, name, steps, PACE, late, modules, LINKED // SCHEDULES[name].chains)[0]
                        for late in (0.0, DELAY)
                    ]
                    for _ in range(max(rounds // 2, 1))
                ]
                found.append({"schedule": name, "ranks": ranks, "transport": transport, "delay": DELAY, "pairs": pairs})
                change = [100 * (slow["between"] / fast["between"] - 1) for fast, slow in pairs]
                least = median(100 * 2 * (ranks - 1) * DELAY / fast["between"] for fast, _ in pairs)
                told = f"{spread(change, '+.1f')} %, of which filling the pipeline once at least {least:.1f} %"
                print(f"{name:<12} {ranks} ranks, {transport:<14} {1e3 * DELAY:.0f} ms later: {told}", flush=True)


def ask(
    ranks: int,
    name: str,
    steps: int,
    pace: float,
    delay: float = 0.0,
    transport: str = "",
    micros: int = 0,
    early: bool | None = None,
    rounds: int = 1,
) -> list[dict[str, Any]]:
    """The rounds of one run of its own."""
    asked = {
        "schedule": name, "steps": steps, "rounds": rounds, "pace": pace, "delay": delay, "early": early,
        "micros": micros or 4 * ranks, "microbatch": 2, "stages": default_stages(name, ranks),
    }  # fmt: skip
    environment = os.environ | ({"OMPI_MCA_btl": transport, "OMPI_MCA_pml": "ob1"} if transport else {})
    command = [launcher(), "-n", str(ranks), sys.executable, "-m", "benchmarks.bubble_rank", json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    answers = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith('{"')]
    if done.returncode or not answers:
        raise SystemExit(f"benchmarks.bubble: {name} on {ranks} ranks failed: {(done.stdout + done.stderr)[-800:]}")
    turns: list[dict[str, Any]] = json.loads(answers[-1])["turns"]
    return turns


if __name__ == "__main__":
    sys.exit(main())
