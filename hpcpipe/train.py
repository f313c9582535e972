"""THE loop: what a training run does, step by step, in one screen.

One SPMD program: every rank computes the same plan, holds its stages, and meets the others in point-to-point messages
during the step and in one small sum after it. ``job`` is what has to exist before step 0.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from hpcpipe.comm.link import Link
from hpcpipe.config import Config
from hpcpipe.job import Job


def train(config: Config, link: Link) -> float:
    """Trains until ``train.steps`` or until a signal asks to stop; returns the last loss."""
    stop = False
    job = Job(config, link)
    loss = job.loss
    with signals() as asked:
        if job.step == 0:
            job.evaluate(0)
        for step in range(job.step, job.config.train.steps):
            began = time.perf_counter()
            job.feed("train", step)
            job.program.run()
            loss, norm, rate, bubble, stop = job.finish(step, bool(asked))
            job.tell(step + 1, time.perf_counter() - began, loss=loss, grad_norm=norm, lr=rate, bubble=bubble)
            job.evaluate(step + 1)
            if job.due(step + 1, job.config.checkpoint.every) or stop or step + 1 == job.config.train.steps:
                job.save(step + 1, loss)
            if stop:
                break
        job.close(loss, stop)
    return loss


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGUSR1 instead of dying of them, so that the step can end and be saved."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may hear signals
        yield asked
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(n) for n in numbers]

    def note(number: int, _: object) -> None:
        # Asked again: at once then. (A launcher may send the first one twice.)
        if asked and time.monotonic() - when[0] > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        asked.append(number)
        when.append(time.monotonic())

    when: list[float] = []
    for number in numbers:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
