"""THE loop: what a training run does, step by step, in one screen.

One SPMD program: every rank computes the same plan, holds its stages, and meets the others in point-to-point messages
during the step and in one small sum after it. ``job`` is what has to exist before step 0, ``steps`` what a step is.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpcpipe.comm.link import Link
from hpcpipe.config import Config, UserError
from hpcpipe.job import Job
from hpcpipe.profile import Profile
from hpcpipe.rehearsal import rehearse
from hpcpipe.saving import Saver
from hpcpipe.steps import Steps


def train(config: Config, link: Link, profile: str | None = None) -> float:
    """Trains until ``train.steps`` or until a signal asks to stop; returns the last loss.

    ``profile`` is the file for the trace of the last step; empty for one in the run's folder, None for no trace.
    """
    with signals(signal.SIGTERM, signal.SIGUSR1) as early:  # a large state takes minutes to load
        job = Job(config, link)
        try:
            return _train(job, Profile(job, profile), early)
        finally:
            job.release()


def _train(job: Job, profile: Profile, early: list[int]) -> float:
    job.begin(rehearse(job))
    steps, saver = Steps(job), Saver(job)
    try:
        return _loop(job, steps, saver, profile, early)
    except UserError as error:
        if getattr(error, "everywhere", False):  # every rank is here: what is being written may become a checkpoint
            saver.finish()
        raise


def _loop(job: Job, steps: Steps, saver: Saver, profile: Profile, early: list[int]) -> float:
    with signals(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) as asked, job.watch:
        asked += early
        if job.step == 0:
            job.evaluate(0)
        for step in range(job.step, job.config.train.steps):
            steps.run(step, bool(asked))
            saver.poll(steps.written())
            if steps.rest(step + 1):
                steps.settle()
                job.evaluate(step + 1)
                if steps.stop or job.save_due(step + 1):
                    saver.save(step + 1, steps.loss)
                if steps.stop:
                    break
        saver.finish()
        job.close(steps.loss, steps.stop)
        profile.close(saver.times)
    return steps.loss


@contextmanager
def signals(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Collects signals instead of dying of them, so that the step can end and be saved."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may hear signals
        yield asked
        return
    before = [signal.getsignal(n) for n in numbers]

    def note(number: int, _: object) -> None:
        # Ctrl-C again: at once then. (A launcher may send the first one twice, a scheduler TERM and USR1 as it likes.)
        if number == signal.SIGINT and when and time.monotonic() - when[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        when.append(time.monotonic())  # before asked: another signal may come in between
        asked.append(number)

    when: list[float] = []
    for number in numbers:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
