"""Saving a run's state: each rank of the first replica its share, then one commit that makes them a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.config import UserError, to_toml
from hpcpipe.job import Job


def save(job: Job, step: int, loss: float) -> None:
    """A checkpoint after ``step`` steps. Failing to write leaves the run and the last checkpoint as they are."""
    folder, record, error = write.step_folder(job.out, step), None, None
    what = f"the checkpoint of step {step}"
    if job.replica == 0:
        try:
            record = write.write_shard(folder, job.place, _pieces(job))
        except UserError as problem:
            error = str(problem)
    with job.where.waiting(what, patient=True):
        found = job.link.gather((record, error))
    if found is not None:
        error, notes = next((e for _, e in found if e), None), []
        try:
            if error is None:
                write.commit(folder, [r for r, _ in found if r is not None], _attributes(job, step, loss))
                notes = write.prune(job.out, job.config.checkpoint.keep, deep=False)
        except UserError as problem:
            error = str(problem)
        if error:
            write.discard(folder)
        for line in (f"NOT saved: {error}" if error else f"saved {folder}", *notes):
            job.say(line)
    with job.where.waiting(what, patient=True):
        job.unsaved = job.link.bcast(error)


def _pieces(job: Job) -> Iterator[write.Piece]:
    for name in job.counted:
        for kind, view in zip(KINDS, job.views(name), strict=True):
            yield write.Piece(name, kind, view.shape, (0,) * view.ndim, view)


def _attributes(job: Job, step: int, loss: float) -> dict[str, str | int | float]:
    return {
        "config": to_toml(job.config),
        "schedule": str(job.plan.schedule),
        "copies": job.plan.copies,
        "plan_digest": job.plan.digest,
        "step": step,
        "tokens": step * job.plan.tokens,
        "loss": loss,
        "data_digest": job.data.digest,
    }
