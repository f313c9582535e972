"""Saving a run's state beside its steps: written from where it lies, while the next step computes.

Parameters and moments change only at an update. So a save is a thread that writes them out of the arena, and an update
that comes before it is done waits for it: nothing is copied, and where a step takes longer than a write nothing waits.
Each rank of the first replica writes its share, or every rank where the copies divide the moments; when all have, rank
0 commits, which makes it a checkpoint, and only then is it called saved.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from time import perf_counter

from hpcpipe.checkpoint import mirror, origin, room, write
from hpcpipe.checkpoint.layout import KINDS, ShardRecord
from hpcpipe.checkpoint.master import Value
from hpcpipe.config import UserError, to_toml
from hpcpipe.job import Job


class Saver:
    """One save at a time: the next one waits for the last. All methods but ``hold`` are collective."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pending: _Save | None = None
        self.origin = _origin(job)
        self.room = room.going_on(job.out, job.resumed)
        # What this rank wrote last, from when to when: of two saves at most, a share, a commit and copies each.
        self.times: deque[tuple[str, float, float]] = deque(maxlen=6)
        job.hold, job.written = self.hold, self._written

    def save(self, step: int, loss: float) -> None:
        """Begins to write the state after ``step``. Failing leaves the run and the last checkpoint as they are."""
        self.finish()
        self.pending = _Save(self.job, step, loss, self.origin, self.times, self.room)

    def hold(self) -> None:
        """Before a parameter or a moment changes: what is being written must be out."""
        if self.pending is not None:
            self.pending.hold()

    def poll(self, written: int) -> None:
        """After a step: ``written`` ranks have written their share, as all know; when all have, it is committed."""
        if self.pending is not None and not self.pending.gathered and written == writers(self.job):
            self.pending.gather()
        if self.pending is not None and self.pending.over:
            self.pending.tell()

    def finish(self) -> None:
        """Waits until the last save is a checkpoint, or is known not to be one."""
        if self.pending is None:
            return
        if not self.pending.gathered:
            self.pending.gather()
        self.pending.end()
        self.pending = None

    def _written(self) -> bool:
        return self.pending is not None and self.pending.written


class _Save:
    """One state on its way to the disk."""

    def __init__(
        self,
        job: Job,
        step: int,
        loss: float,
        about: dict[str, Value],
        times: deque[tuple[str, float, float]],
        disk: room.Room,
    ) -> None:
        self.job, self.folder, self.times, self.room = job, write.step_folder(job.out, step), times, disk
        self.what = f"the checkpoint of step {step}"
        self.attributes = about | _attributes(job, step, loss)
        self.record: ShardRecord | None = None
        self.error: str | None = None
        self.gathered, self.told = False, False
        self.waited, self.began = 0.0, perf_counter()  # seconds that steps have stood still for it, and its start
        self.bytes = 0
        self.committer: Thread | None = None
        self.copier: Thread | None = None
        self.copied: list[str] = []  # what went wrong with second copies
        self.lines: list[str] = []
        if job.link.rank == 0:
            self.lines += self.room.make(_bytes(job))
        job.executor.settle()  # a device may still be at the last update
        with job.where.waiting(self.what, patient=True):
            job.link.barrier()  # nobody writes before there is room
        writes = job.link.rank < writers(job)
        self.writer = Thread(target=self._write, name="checkpoint", daemon=True) if writes else None
        if self.writer:
            self.writer.start()
        self.waited = perf_counter() - self.began

    # --- on every rank that writes

    def _write(self) -> None:
        with self._heard("write"):
            self.record = write.write_shard(self.folder, self.job.link.rank, _pieces(self.job))

    @contextmanager
    def _heard(self, what: str) -> Iterator[None]:
        """What goes wrong inside is kept as a sentence: in a thread nobody would hear of it. Times are kept, too."""
        begin = perf_counter()
        try:
            yield
        except UserError as problem:
            self.error = str(problem)
        except Exception as problem:
            self.error = f"{self.what} failed: {type(problem).__name__}: {problem}"
        self.times.append((f"{what} {self.folder.name}", begin, perf_counter()))

    @property
    def written(self) -> bool:
        """Whether this rank's share is out, or has failed, and nobody has been told."""
        return self.writer is not None and not self.gathered and not self.writer.is_alive()

    def hold(self) -> None:
        if self.writer is not None and self.writer.is_alive():
            begin = perf_counter()
            with self.job.where.waiting(f"{self.what} to be written here", ranks=(), patient=True):
                self.writer.join()
            self.waited += perf_counter() - begin

    def gather(self) -> None:
        """What all ranks have written comes to rank 0, which commits it beside the next steps."""
        self.hold()
        begin = perf_counter()
        with self.job.where.waiting(self.what, patient=True):
            found = self.job.link.gather((self.record, self.error, self.waited))
        self.gathered = True
        if found is not None:
            self.error = next((error for _, error, _ in found if error), None)
            self.waited = max(waited for *_, waited in found)
            records = [record for record, *_ in found if record is not None]
            self.bytes = sum(record["bytes"] for record in records)
            self.committer = Thread(target=self._commit, args=(records,), name="commit", daemon=True)
            self.committer.start()
        if self.job.config.checkpoint.mirror:
            good = found is not None and not self.error
            self._copy([(record["file"], record["digest"]) for record in records] if good else [])
        self.waited += perf_counter() - begin

    def _copy(self, files: list[tuple[str, str]]) -> None:
        """Begins to copy the shards that are this rank's to copy, of those (file, digest) that rank 0 tells."""
        job = self.job
        with job.where.waiting(self.what, patient=True):
            files = job.link.bcast(files)
        own = [files[writer] for writer in range(len(files)) if mirror.holder(job.hosts, writer) == job.link.rank]

        def keep() -> None:
            begin = perf_counter()
            try:
                self.copied += mirror.keep(self.folder, self._place, own)
            except Exception as problem:
                self.copied.append(f"copies of {self.what} failed: {type(problem).__name__}: {problem}")
            self.times.append((f"copy {self.folder.name}", begin, perf_counter()))

        if own:
            self.copier = Thread(target=keep, name="copy", daemon=True)
            self.copier.start()

    # --- on rank 0

    def _commit(self, records: list[ShardRecord]) -> None:
        keep = self.job.config.checkpoint
        with self._heard("commit"):
            if self.error:
                write.discard(self.folder)  # what the others have written; a commit that fails does so by itself
            else:
                write.commit(self.folder, records, self.attributes)
                self.room.newest = self.folder
                write.note(self.folder)
                self.lines += write.prune(
                    self.job.out, keep.keep, deep=False, every=keep.keep_every, committed=self.folder
                )
        self.room.full = write.FULL in (self.error or "")

    @property
    def over(self) -> bool:
        """Whether it is known, on this rank, what has become of it."""
        return self.committer is not None and not self.committer.is_alive()

    def tell(self) -> None:
        """Says once what has become of it."""
        if self.told or self.committer is None:
            return
        self.told, seconds = True, perf_counter() - self.began
        done = f"saved {self.folder}: {self.bytes / 2**20:,.0f} MiB in {seconds:.2f} s"
        done += f", for which the steps waited {1e3 * self.waited:.0f} ms"
        for line in (*self.lines, f"NOT saved: {self.error}" if self.error else done):
            self.job.say(line)

    def end(self) -> None:
        """Waits for the commit; every rank learns whether there was one."""
        if self.committer is not None:
            begin = perf_counter()
            with self.job.where.waiting(self.what, patient=True):
                self.committer.join()
            self.waited += perf_counter() - begin
            self.tell()
        with self.job.where.waiting(self.what, patient=True):
            self.job.unsaved = self.job.link.bcast(self.error)
        if self.job.config.checkpoint.mirror:
            self._end_copies()

    def _end_copies(self) -> None:
        """Waits for the copies; what was copied of checkpoints that are no longer kept goes with them."""
        with self.job.where.waiting(f"the copies of {self.what}", patient=True):
            if self.copier is not None:
                self.copier.join()
                mirror.tidy(self.folder, self._place)
            told = self.job.link.gather(self.copied) or []
        for line in (line for part in told for line in part):
            self.job.say(line)

    @property
    def _place(self) -> Path:
        return mirror.place(self.job.config.checkpoint.mirror, self.job.link.hostname, self.job.out)


def _bytes(job: Job) -> int:
    """Of the whole state, without what explains it."""
    params = (item for stage in job.plan.stages for item in stage.layer.params.items())
    elements = sum(math.prod(spec.shape) for name, spec in params if name not in job.plan.ties)
    return len(KINDS) * job.backend.real * elements


def writers(job: Job) -> int:
    """How many ranks write: the first so many."""
    return job.link.size if job.mine.params.shards > 1 else len(job.plan.ranks)


def _pieces(job: Job) -> Iterator[write.Piece]:
    shared = [name for name in job.mine.params.owned if name not in job.plan.ties]
    for name in shared if job.mine.params.shards > 1 else job.counted:
        for kind, start, view in job.owned(name):
            yield write.Piece(name, kind, job.mine.params.shapes[name], start, job.backend.host(view))


def _origin(job: Job) -> dict[str, Value]:
    """What holds for every checkpoint of a run: units, program, machines, MPI. Collective."""
    device = job.backend.driver.properties if job.backend.on_device else None
    place = origin.place(job.link.hostname, *((device.name, device.bus) if device else ()))
    with job.where.waiting("what the ranks run on", patient=True):
        places = job.link.gather(place)
    if places is None:
        return {}
    told = getattr(getattr(job.link, "inner", job.link), "library", None)
    mpi = {"version.mpi": origin.first_words(told()[0])} if told else {}
    kernels = f"{job.backend.name}: {', '.join(job.levels)}"
    return {**origin.MEANING, **origin.program(), **mpi, "kernels": kernels, "hardware": origin.hardware(places)}


def _attributes(job: Job, step: int, loss: float) -> dict[str, Value]:
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
