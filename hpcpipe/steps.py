"""The steps of a run: inputs, the pipeline, the sum over all ranks, the update, and the account of where the time went.

The update needs the norm of the whole gradient, and so the slowest rank. Where the schedule gains by it, a rank does
not wait: it updates on the guess that nothing will be clipped, begins the next step, and asks before that step changes
a gradient, when the answer is there. A wrong guess voids the step and everything is done again, so the bits are always
those of the plain order; after a step that clipped, the next update waits (after Qi et al. 2023, section 4,
post-validation; nothing is approximated or undone by arithmetic here).
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

import numpy as np

from hpcpipe.comm.link import Sum
from hpcpipe.job import Job
from hpcpipe.runtime.account import PARTS, Wait
from hpcpipe.runtime.optimizer import learning_rate
from hpcpipe.runtime.standing import LAST
from hpcpipe.runtime.suspect import suspect
from hpcpipe.schedule.families import period
from hpcpipe.schedule.op import KINDS, Op

ASIDE = 1024  # ranks up to which each tells its longest wait in the sum
NAMED = 1_000_000  # stages, and microbatches, that the number of an op can tell apart


class Pending(NamedTuple):
    """A step whose sum is under way: its number, rate, whether its update was made on a guess, and seconds here: when
    it began, until the sum began, and of the whole.
    """

    step: int
    rate: float
    sum: Sum
    guessed: bool
    began: float
    before: float
    whole: float = 0.0


class Verdict(NamedTuple):
    """What the ranks know together after a step."""

    loss: float
    norm: float
    scale: float
    stop: bool
    written: int  # ranks that have written their share of a checkpoint since the last step
    parts: dict[str, float]
    worst: tuple[int, Wait]

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(self.loss + self.norm))


class Steps:
    """Runs one step after another; ``loss`` and ``stop`` are those of the last one that is settled."""

    def __init__(self, job: Job) -> None:
        self.job, self.early = job, job.plan.early
        self.loss, self.stop = job.loss, False
        self.pending: Pending | None = None
        self.verdict: Verdict | None = None
        self.voided = 0  # steps that were done again
        self.guessing = False  # whether the next update is made on a guess: not after a step that clipped
        predicted = job.predicted
        # Where nobody waits for the slowest rank between two steps, the next one begins before this one ends.
        self.expected = period(predicted) if self.early else predicted.makespan
        self.busy = sum(predicted.busy(rank) for rank in range(predicted.ranks)) / predicted.ranks
        self.bubble = 1 - self.busy / self.expected if self.expected else 0.0
        names, copies, size = len(job.plan.names), job.plan.copies, job.link.size
        self._aside = size if size <= ASIDE else 0
        # One sum carries: squares by name, losses by copy, the wish to stop, shares of a checkpoint that are written,
        # seconds by part, each rank's longest wait.
        sizes = (names, copies, 1, 1, len(PARTS), self._aside, self._aside)
        self.totals = np.zeros(sum(sizes))
        ends = np.cumsum(sizes)
        (
            self.squares, self.losses, self.asked, self.shares, self.parts, self.waits, self.ops,
        ) = np.split(self.totals, ends[:-1])  # fmt: skip

    def run(self, step: int, asked: bool) -> None:
        """Step ``step``, counted from 0. ``asked`` is this rank's wish to stop."""
        job, began = self.job, perf_counter()
        job.feed("train", step)
        if not job.program.run(self._judge if self.pending else None):
            self._redo()
            job.program.run()
        self._close(step, asked, began)
        if not self.guessing:
            self.settle()

    def written(self) -> int:
        """How many ranks have written their share of a checkpoint; known to all ranks, and told once."""
        found = self.verdict.written if self.verdict else 0
        if self.verdict:
            self.verdict = self.verdict._replace(written=0)
        return found

    def rest(self, step: int) -> bool:
        """Whether, after ``step`` steps, the state must be settled: to be looked at, saved, or left."""
        config = self.job.config
        due = self.job.due(step, config.checkpoint.every) or self.job.evaluation_due(step)
        return self.stop or due or step == config.train.steps

    def settle(self) -> None:
        """Waits for the sum of the last step and makes its update final."""
        pending = self.pending
        if pending is None:
            return
        if not self._judge():
            self._redo()
        elif not pending.guessed:
            self._timed(self._update)
            self._tell()

    # --- the end of a step

    def _close(self, step: int, asked: bool, began: float) -> None:
        """Sums tied gradients, starts the sum over all ranks and, on a guess, updates."""
        job, ended = self.job, perf_counter()
        job.sum_ties(step)
        self.totals[:] = 0
        job.optimizer.squares(self.squares)
        for copy, loss in job.losses(job.program):
            self.losses[copy] = loss
        self.asked[0], self.shares[0] = asked, job.written()
        now, pipeline = perf_counter(), job.program.parts()
        # A step that was void and done again counts as one: the first try is in "other".
        between = float(job.program.clock[0]) - began + float(ended - job.program.clock[-1])
        self.parts[:] = (*pipeline, now - ended + job.program.asking, between)
        if self._aside:
            wait = job.program.account.worst(job.program.clock)
            self.waits[job.link.rank] = wait.seconds
            self.ops[job.link.rank] = _number(wait.what)
        rate = learning_rate(step, job.config.optimizer, job.config.train)
        with job.where.waiting(f"the sum over all ranks after step {step + 1}", owed=LAST):
            under_way = job.link.start_allreduce(self.totals)
        self.pending = Pending(step, rate, under_way, self.guessing, began, now - began)
        if self.guessing:
            job.hold()
            job.optimizer.guess(step, rate)
            self.pending = self.pending._replace(whole=perf_counter() - began)

    def _judge(self) -> bool:
        """Waits for the sum; whether all is finite and, where the update was made on a guess, that was right."""
        job, pending = self.job, self.pending
        assert pending is not None
        begin = perf_counter()
        with job.where.waiting(f"the sum over all ranks after step {pending.step + 1}", owed=LAST):
            pending.sum.wait()
        waited = perf_counter() - begin
        norm, scale = job.optimizer.scale(self.squares)
        each = self.parts / job.link.size
        if pending.guessed:
            each[PARTS.index("optimizer")] += pending.whole - pending.before  # the guess
        else:  # the sum is where the fast wait for the slow; ranks do not begin at the same moment to the microsecond
            cooldown = PARTS.index("cooldown")
            each[cooldown] = max(each[cooldown] + pending.before + waited - each.sum(), 0.0)
        rank = int(self.waits.argmax()) if self._aside else 0
        wait = Wait(float(self.waits[rank]), _named(self.ops[rank])) if self._aside else Wait(0.0, "")
        loss = float(self.losses.sum()) / job.plan.tokens
        stop = bool(self.asked[0] > 0)
        shares = round(float(self.shares[0]))
        parts = dict(zip(PARTS, each.tolist(), strict=True))
        self.verdict = Verdict(loss, norm, scale, stop, shares, parts, (rank, wait))
        self.guessing = self.early and self.verdict.finite and scale == 1.0
        if not pending.guessed:
            return self.verdict.finite
        if self.guessing:
            job.optimizer.keep()
            self._tell()
        return self.guessing

    def _redo(self) -> None:
        """A wrong guess: everything back to before it, then the update as it must be."""
        verdict, pending = self.verdict, self.pending
        assert verdict is not None and pending is not None
        if not verdict.finite:
            if pending.guessed:
                self.job.optimizer.take_back()
            self.job.link.agree(
                f"step {pending.step + 1}: loss {verdict.loss} and gradient norm {verdict.norm} are not finite"
                f"{self._blamed()}; lower optimizer.lr, lengthen optimizer.warmup or set optimizer.clip, and start "
                "again: the run goes on from its newest checkpoint"
            )
        if pending.guessed:
            self.job.optimizer.take_back()
            self.voided += 1
        self._update()
        self._tell()

    def _blamed(self) -> str:
        """Where it came from: the first tensor of a forward pass, or else the first gradient on the way back."""
        job = self.job
        told = job.link.bcast(job.link.gather((job.place, suspect(job.executor, job.program))) or [])
        found = [sentence for _, sentence in sorted(told) if sentence]
        if found:
            return f" ({found[0]})"
        backward = zip(reversed(job.plan.names), reversed(self.squares.tolist()), strict=True)
        bad = next((name for name, square in backward if not np.isfinite(square)), "")
        return f" (the gradient of {bad} is the first on the way back that is not)" if bad else ""

    def _update(self) -> None:
        verdict, pending = self.verdict, self.pending
        assert verdict is not None and pending is not None
        self.job.hold()
        self.job.optimizer.update(pending.step, pending.rate, verdict.scale)

    def _timed(self, work: Callable[[], None]) -> None:
        assert self.verdict is not None
        begin = perf_counter()
        work()
        self.verdict.parts["optimizer"] += perf_counter() - begin

    def _tell(self) -> None:
        """The step is final: rank 0 writes it down."""
        verdict, pending = self.verdict, self.pending
        assert verdict is not None and pending is not None
        self.loss, self.stop, self.pending = verdict.loss, verdict.stop, None
        parts, (rank, wait) = verdict.parts, verdict.worst
        seconds = pending.whole or perf_counter() - pending.began  # of this rank; the parts are means over ranks
        idle = parts["warmup"] + parts["steady"] + parts["cooldown"]
        values = {
            "loss": verdict.loss,
            "grad_norm": verdict.norm,
            "lr": pending.rate,
            "bubble": idle / (idle + parts["compute"] + parts["exposed"]),
            "predicted_bubble": self.bubble,
            "predicted_seconds": self.expected + self.job.optimizer_seconds,
            "ideal_seconds": self.busy + self.job.optimizer_seconds,
            "parts": parts,
        }
        if self.voided:
            values["voided"] = self.voided
        if wait.what:
            values["worst_wait"] = {"rank": rank, "op": wait.what, "seconds": wait.seconds}
        self.job.tell(pending.step + 1, seconds, values)


def _number(op: str) -> float:
    """An op as a number that a float64 holds exactly; 0 for none."""
    if not op:
        return 0.0
    kind, stage, micro = Op.parse(op)
    return float((KINDS.index(kind) * NAMED + stage) * NAMED + micro + 1)


def _named(number: float) -> str:
    if not number:
        return ""
    rest, micro = divmod(int(number) - 1, NAMED)
    kind, stage = divmod(rest, NAMED)
    return str(Op(KINDS[kind], stage, micro))
