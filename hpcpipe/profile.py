"""The trace of a run's last step, asked for with ``train --profile``; it changes no result.

In: the clock of each rank's program (on a device, its marks), when the optimizer worked, when saves were written. Out:
one file of ``trace``, from rank 0, on whose clock everything is: the ranks of the first replica, each above what was
predicted of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from hpcpipe.config import UserError
from hpcpipe.job import Job
from hpcpipe.planner.describe import flops
from hpcpipe.runtime.executor import Bound
from hpcpipe.runtime.optimizer import AdamW
from hpcpipe.runtime.reduce import Reducer
from hpcpipe.schedule.op import KINDS
from hpcpipe.schedule.timeline import Event, Timeline
from hpcpipe.trace import Span, write

FILE = "trace.json"
# What is timed beside the program: methods, and what they are called in the trace.
OPTIMIZER = {
    "squares": "norm",
    "update": "update",
    "guess": "update on a guess",
    "keep": "rest of the update",
    "take_back": "update taken back",
}
REDUCER = {"tied": "sum copies of {}", "tie": "tie {}", "spread": "parameters of the copies of stage {}"}


class Timed:
    """Stands for ``inner``, and keeps when each of its ``methods`` worked last, by their names in the trace."""

    def __init__(self, inner: Any, methods: Mapping[str, str], settle: Callable[[], None]) -> None:
        """``settle`` waits for the end of work that a device may still be at when a method returns."""
        self.inner, self.methods, self.settle = inner, methods, settle
        self.last: dict[str, tuple[float, float]] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        return partial(self._timed, self.methods[name], found) if name in self.methods else found

    def _timed(self, called: str, method: Callable[..., Any], *args: Any) -> Any:
        begin = perf_counter()
        found = method(*args)
        self.settle()
        self.last[called.format(*args)] = begin, perf_counter()
        return found


class Profile:
    """Listens to a job that is ready to begin, and writes at its end. Both are collective."""

    def __init__(self, job: Job, file: str | None) -> None:
        """``file`` is what the user named, "" for one in the run's folder; None: nothing is timed or written."""
        self.job, self.path = job, None if file is None else Path(file) if file else job.out / FILE
        self.optimizer = Timed(job.optimizer, OPTIMIZER, job.executor.settle)
        self.reducer = Timed(job.reducer, REDUCER, job.executor.settle)
        if self.path is not None:
            job.optimizer, job.reducer = cast(AdamW, self.optimizer), cast(Reducer, self.reducer)
            job.link.agree(_lacking(self.path) if job.link.rank == 0 else None)

    def close(self, saves: Iterable[tuple[str, float, float]]) -> None:
        """Writes the trace, after the last step and the last save; ``saves`` are names, beginnings and ends here."""
        job = self.job
        if self.path is None:
            return
        if not job.program.runs:
            return job.say("no step was done: there is nothing to write a trace of")
        first = job.link.bcast(float(job.program.clock[0]) + job.shift) - job.shift
        mine = (job.program.events(first), list(self._spans(first, saves))) if job.replica == 0 else ([], [])
        parts = job.link.gather(mine)
        error = None
        try:
            if parts is not None:
                self._write(parts)
        except UserError as problem:
            error = str(problem)
        job.link.agree(error)
        job.say(f"the trace of the last step: {self.path}, for ui.perfetto.dev")

    def _write(self, parts: Iterable[tuple[list[Event], list[Span]]]) -> None:
        assert self.path is not None
        job, ranks = self.job, len(self.job.plan.ranks)
        events, spans = (tuple(x for part in each for x in part) for each in zip(*parts, strict=True))
        timeline = Timeline(events, ranks)
        write(self.path, timeline, job.predicted, flops(job.plan), spans, job.hosts[:ranks])

    def _spans(self, first: float, saves: Iterable[tuple[str, float, float]]) -> Iterator[Span]:
        """What this rank did in the step beside its ops, in seconds since ``first`` of its clock."""
        job, start = self.job, float(self.job.program.clock[0])
        rows = [*_messages(job.program, job.copies), *self._asking()]
        rows += [("compute", name, "", *times) for name, times in self.optimizer.last.items()]
        rows += [("reduce", name, "", *times) for name, times in self.reducer.last.items()]
        if job.evaluation is not None and job.evaluation.runs:
            clock = job.evaluation.clock
            rows.append(("compute", "validation", "", float(clock[0]), float(clock[-1])))
        rows = [row for row in rows if row[3] >= start]  # not of the steps before
        rows += [("save", name, "", begin, end) for name, begin, end in saves if end >= start]
        for stream, name, message, begin, end in rows:
            yield Span(job.place, stream, name, begin - first, end - first, message)

    def _asking(self) -> Iterator[tuple[str, str, str, float, float]]:
        """The question, in the middle of a step, whether the one before was right."""
        program = self.job.program
        if self.job.plan.early and program.asking:
            begin = float(program.clock[program.turning])
            yield "reduce", "sum of the step before", "", begin, begin + program.asking


def _messages(program: Bound, copies: Mapping[int, Any]) -> Iterator[tuple[str, str, str, float, float]]:
    """(stream, name, message, start, end) of every SEND, WAIT and POST, and of REDUCE where a stage has ``copies``."""
    begins, ends = program.starts().tolist(), program.clock[1:].tolist()
    reductions = program.marks.reductions if program.marks else {}
    for at, instruction in enumerate(program.instructions):
        kind, stage = instruction.kind, instruction.stage
        if kind in KINDS or (kind == "REDUCE" and stage not in copies):
            continue
        begin, end = reductions.get(at, (begins[at], ends[at]))
        if kind == "REDUCE":
            yield "reduce", f"reduce stage {stage}", "", begin, end
            continue
        op, _, arrives = program.program.awaited(at)
        if kind == "SEND":
            yield "send", f"send {op}", str(op), begin, end
        elif kind == "POST":
            yield "receive", f"post {op}", "", begin, end
        elif arrives:
            yield "receive", f"wait {op}", str(op), begin, end
        else:
            yield "send", f"wait until {op} is taken", "", begin, end


def _lacking(path: Path) -> str | None:
    """Why no file can be written there, as can be known before step 0."""
    if path.is_dir():
        return f"train: --profile {path} is a folder; name a file"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        return f"train: --profile {path} cannot be written (no such folder, or not writable); choose another file"
    return None
