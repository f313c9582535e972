"""Whole steps on one GPU: hpcpipe beside JAX and PyTorch on one shape, in alternating rounds.

In: the shape's name. Out: tokens/s, share of the dense peak, idle compute stream, memory and losses of each contestant,
with the ratios within a round. Every contestant is a process that has built, compiled and warmed up; whoever is not
timed is stopped. Where not all fit on the device together they play in groups, and the table says which.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

from benchmarks.contest import Competitor, Failed, Process, start
from benchmarks.shape import Shape, parse, write

OURS = "hpcpipe:bfloat16"
DEEP = 24  # layers from which JAX scans over them: unrolled, they compile for minutes
AGREE = 1e-2  # relative difference of the first losses, in bfloat16, that still counts as the same model
TURN = 1.0  # seconds of one turn, about
STATE = 18  # bytes for each parameter: itself, gradient, two moments in float32, and its bfloat16 copy
KEPT, LOGITS = 40, 10  # bytes for each token and channel of a layer, each token and word: what a microbatch keeps
ROOM = 0.9  # share of the free memory that the contestants may take together
RESERVE = 3 * TURN  # seconds for each turn of those who are ready: nobody may compile in them


class Case(NamedTuple):
    """A shape, and the sequences of a microbatch, the same for all."""

    shape: Shape
    microbatch: int
    fp8: bool = False  # hpcpipe takes part in FP8 as well


CASES = {
    "gpt2-124M": Case(parse("12,12,768,1024,16,50304"), 16),
    "gpt2-1.5B": Case(parse("48,25,1600,1024,16,50304"), 4, fp8=True),
    "llama-1B": Case(parse("22,32,2048,4096,4,32000,4"), 2),
    "gpt2-350M": Case(parse("24,16,1024,1024,16,50304"), 8),
}
TOYS = {  # the same names where nothing is measured
    name: Case(parse("2,4,32,16,4,64" + (",2" if case.shape.kv_heads else "")), 2, case.fp8)
    for name, case in CASES.items()
}


def contestants(case: Case, peers: Mapping[str, str]) -> list[Competitor]:
    """Who takes part; ``peers`` are jax and torch with the interpreters that have them."""
    names = [OURS]
    if "jax" in peers:
        names.append("jax:scan-dpa-gather" if case.shape.layers >= DEEP else "jax:unroll-dpa-gather")
    if "torch" in peers:
        names.append("torch:compile")
    names += ["hpcpipe:fp8"] if case.fp8 else []
    return [Competitor.named(name, sys.executable, peers.get(name.partition(":")[0], "")) for name in names]


def needed(case: Case) -> float:
    """Bytes of one contestant, roughly, for the choice of who is on the device together."""
    shape, tokens = case.shape, case.microbatch * case.shape.length
    parameters = sum(math.prod(size) for size in shape.parameters.values())
    return float(STATE * parameters + tokens * (KEPT * shape.layers * shape.width + LOGITS * shape.vocabulary))


def contest(
    name: str, rounds: int, peers: Mapping[str, str], device: Mapping[str, Any], limit: float, toy: bool = False
) -> dict[str, Any]:
    """All contestants on one shape; what failed is among the ``failures``, in sentences. ``limit``: seconds in all."""
    case = (TOYS if toy else CASES)[name]
    players = contestants(case, peers)
    fitting = max(1, int(ROOM * float(device["free"]) // needed(case)))
    groups = [players[i : i + fitting] for i in range(0, len(players), fitting)]
    result: dict[str, Any] = {
        "shape": case.shape._asdict(), "microbatch": case.microbatch, "flops": case.shape.flops,
        "tokens": case.shape.tokens, "groups": [[player.name for player in group] for group in groups],
        "failures": {}, "runs": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="hpcpipe-gpu-") as folder:
        job, end = Path(folder) / "job.npz", monotonic() + 0.95 * limit
        write(job, case.shape, device="rehearsal" if toy else "cuda", microbatch=case.microbatch)
        turns = _Turns(job, rounds, end, result)
        for group in groups:
            turns.play(group)
    judge(result, device)
    return result


class _Turns:
    """Starts contestants and gives them their turns, until the time is over."""

    def __init__(self, job: Path, rounds: int, end: float, result: dict[str, Any]) -> None:
        self.job, self.rounds, self.end, self.result = job, rounds, end, result

    def play(self, players: Sequence[Competitor]) -> None:
        """Rounds of A, B, C, …; who fails is out."""
        running: dict[str, Process] = {}
        try:
            for player in players:
                self._start(player, running)
            steps = {name: self._steps(name, running) for name in list(running)}
            for _ in range(self.rounds):
                for name in list(running):
                    self._turn(name, running, steps[name])
        finally:
            for process in running.values():
                process.end()

    def _left(self, kept: int = 0) -> float:
        """Seconds that may be spent on one thing; ``kept``: contestants whose turns must still have theirs."""
        return self.end - monotonic() - RESERVE * self.rounds * kept

    def _start(self, player: Competitor, running: dict[str, Process]) -> None:
        cores, left = len(os.sched_getaffinity(0)), self._left(len(running) + 1)
        try:
            if left < 1:
                raise Failed("no time was left to start it")
            process = start(player, self.job, cores, compilers=cores, patience=left)
        except Failed as error:
            self.result["failures"][player.name] = str(error)
            return
        running[player.name] = process
        self.result["runs"][player.name] = {**process.ready, "turns": []}

    def _steps(self, name: str, running: dict[str, Process]) -> int:
        """Steps of a turn; asking costs two, which are not counted."""
        answer = self._asked(name, running, 2)
        return max(2, min(200, round(TURN / max(answer["seconds"] / 2, 1e-9)))) if answer else 0

    def _turn(self, name: str, running: dict[str, Process], steps: int) -> None:
        answer = self._asked(name, running, steps)
        if answer:
            self.result["runs"][name]["turns"].append({**answer, "steps": steps})

    def _asked(self, name: str, running: dict[str, Process], steps: int) -> dict[str, Any] | None:
        if self._left() < 1:
            return None
        try:
            running[name].patience = self._left()
            return running[name].ask({"steps": steps})
        except Failed as error:
            self.result["failures"][name] = f"while it was timed: {error}"
            running.pop(name).end()
            return None


def judge(result: dict[str, Any], device: Mapping[str, Any]) -> None:
    """Adds rates, ratios within a round, the share of the peak, and whether all trained the same model."""
    peak, base = device.get("peak"), result["runs"].get(OURS, {"turns": [], "losses": []})
    ours: list[float] = []
    for name, run in result["runs"].items():
        rates = [result["tokens"] * turn["steps"] / turn["seconds"] for turn in run["turns"]]
        ours = rates if name == OURS else ours
        run["tokens_per_second"] = rates
        run["ratio"] = [mine / its for mine, its in zip(ours, rates, strict=False)]  # how much faster we are
        run["mfu"] = [result["flops"] / result["tokens"] * rate / peak for rate in rates] if peak else []
        run["idle"] = [turn["idle"] for turn in run["turns"] if "idle" in turn]
        run["device_bytes"] = max((turn.get("device_bytes", 0.0) for turn in run["turns"]), default=0.0)
        pairs = zip(run["losses"], base["losses"], strict=False)
        run["agrees"] = bool(base["losses"]) and all(abs(a - b) <= AGREE * abs(b) for a, b in pairs)


def spread(values: Sequence[float], form: str) -> str:
    """median (least-largest), or a dash."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})" if values else "-"


def table(name: str, result: Mapping[str, Any], toy: bool) -> list[str]:
    """The table of one shape in lines; without numbers where they mean nothing."""
    shape = Shape(**result["shape"])
    how = "in alternating rounds: " + ", then ".join(", ".join(group) for group in result["groups"])
    said = f"{name}: {shape} (layers, heads, width, length, sequences, vocabulary[, key/value heads]), microbatches of "
    lines = [said + f"{result['microbatch']}, {result['flops'] / 1e12:.2f} TFLOP a step; {how}"]
    head = ["", "tokens/s", "hpcpipe is faster by", "share of peak", "idle", "GiB", "loss 1", "loss 5", "agrees"]
    rows = [head]
    for who, run in result["runs"].items():
        numbers = [
            spread(run["tokens_per_second"], ",.0f"), "" if who == OURS else spread(run["ratio"], ".2f"),
            spread([100 * each for each in run["mfu"]], ".1f"), spread([100 * each for each in run["idle"]], ".1f"),
            f"{run['device_bytes'] / 2**30:.1f}",
        ]  # fmt: skip
        told = ["rehearsed"] * len(numbers) if toy else numbers
        rows.append(
            [who, *told, f"{run['losses'][0]:.4f}", f"{run['losses'][-1]:.4f}", "yes" if run["agrees"] else "NO"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    lines += [f"  {who}: {run['about']}" for who, run in result["runs"].items()]
    return lines + [f"  {who} is left out: {why}" for who, why in result["failures"].items()]
