"""What a rank holds while it trains, and what it does at each point of the loop; the only file that knows everybody.

Before step 0: plan, arena, data, groups of ranks, the values of a checkpoint or the initial ones. In a step: inputs,
what crosses ranks, the update. After it: validation, checkpoints, the record of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from hpcpipe import model, resume
from hpcpipe.backends.backend import open_backend
from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.comm.link import Link
from hpcpipe.config import Config, UserError, digest, grid, to_toml
from hpcpipe.data import TOKENIZER, Dataset
from hpcpipe.placement import cores, memory
from hpcpipe.planner.plan import Plan, plan, resolve
from hpcpipe.progress import DONE, Progress
from hpcpipe.runtime.executor import Executor, Stage
from hpcpipe.runtime.optimizer import AdamW, learning_rate
from hpcpipe.runtime.reduce import Reducer
from hpcpipe.runtime.watch import Watch
from hpcpipe.schedule.program import MAX_TAG
from hpcpipe.schedule.timeline import Event, Timeline, draw

T = TypeVar("T")
TAGS_OF_EVALUATION = MAX_TAG + 1


class Step(NamedTuple):
    """What the ranks know together after a step."""

    loss: float
    grad_norm: float
    lr: float
    bubble: float
    stop: bool


class Job:
    """Everything a rank holds: plan, arena, data, optimizer, the groups it belongs to, and where the run stands."""

    def __init__(self, config: Config, link: Link) -> None:
        self.link = link
        self.unsaved: str | None = None
        threads = self._threads(config)
        self._prepare(config, threads)
        self._check_alike()
        ranks, replicas = len(self.plan.ranks), self.plan.replicas
        self.replica, self.place = divmod(link.rank, ranks)
        self.mine = self.plan.ranks[self.place]
        # My pipeline, whose ranks the programs speak of, and the ranks that hold my stages in the other replicas.
        first = link.rank - self.place
        self.pipeline = (link.group(range(first, first + ranks)) if replicas > 1 else None) or link
        self.peers = link.group(range(self.place, link.size, ranks)) if replicas > 1 else None
        self._together(self._open_folder)
        self.resumed, self.warnings = resume.find(self.out, link)
        self.step = self.resumed.step if self.resumed else 0
        self.loss = float(self.resumed.attributes["loss"]) if self.resumed else float("nan")
        self._together(self._allocate)
        self._together(self._load)
        self._peak = self._measure_peak()
        self.progress: Progress | None = None
        self._together(self._start_progress)
        self.waits_for = ""  # what a collective is for, while it is waited for
        self.watch = Watch(config.pipeline.timeout, self._where, self._hang)
        self.watch.start()

    # --- before step 0

    def _threads(self, config: Config) -> int:
        """Threads of this rank; cores are shared out among the ranks of a node that may use the same ones."""
        masks = self._everybody((self.link.hostname, cores.allowed()))
        mine = cores.share(masks, self.link.rank)
        if not config.device.threads:
            cores.bind(mine)
        return config.device.threads or len(mine)

    def _everybody(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        return self.link.bcast(self.link.gather(value) or [])

    def _together(self, work: Any) -> None:
        """Does local work that may fail on one rank; if it does, every rank ends with that rank's sentence."""
        error = None
        try:
            work()
        except UserError as problem:
            error = str(problem)
        self.link.agree(error)

    def _prepare(self, config: Config, threads: int) -> None:
        def work() -> None:
            grid(config.pipeline, self.link.size)
            self.data = Dataset.open(config.data.path)
            self.config = resolve(config, self.data.vocab)
            self.backend = open_backend(config.device.backend, threads)
            self.plan: Plan = plan(self.config, self.link.size, threads, self.backend.real)
            self.out = Path(config.out)
            self.data.check(self.config)

        self._together(work)

    def _check_alike(self) -> None:
        """Every rank must have started with the same config, see the same data and come to the same plan."""
        seen = self._everybody((digest(self.config), self.data.digest, self.plan.digest))
        for i, what in enumerate(("config", "data", "plan")):
            other = [rank for rank, digests in enumerate(seen) if digests[i] != seen[0][i]]
            if other:
                self.link.agree(
                    f"rank {other[0]} was started with another {what} than rank 0 ({len(other)} of {self.link.size} "
                    "ranks differ); start all ranks with the same file, overrides, data and version"
                )
        self.levels = sorted(set(self._everybody(self.backend.level)))

    def _allocate(self) -> None:
        p, mine, config = self.plan, self.mine, self.config
        _check_memory(mine.memory.total, self.link)
        stages = {s: Stage(p.stages[s].recording, mine.layouts[s]) for s in mine.stages}
        self.executor = Executor(mine.memory, stages, self.backend, self.pipeline)
        self.reducer = Reducer(self.executor, mine.params, self.peers)
        self.program = self.executor.bind(mine.program, self.reducer.stage)
        self.evaluation = self.executor.bind(mine.evaluation, tags=TAGS_OF_EVALUATION) if mine.evaluation else None
        self.optimizer = AdamW(self.executor, mine.params, config.optimizer, p.names)
        where = p.schedule.placement
        self.ties = [(copy, where[p.stage_of(copy)], where[p.stage_of(owner)]) for copy, owner in p.ties.items()]
        self.totals = np.zeros(len(p.names) + p.replicas + 3)
        self.inputs = [
            [self.executor.input(name, m) for name in ("ids", "targets", "key")]
            for m in range(mine.memory.resident["INPUT"][1] // mine.memory.stride if mine.memory.stride else 0)
        ]

    def _open_folder(self) -> None:
        """Rank 0 makes the run's folder; what an earlier run said of its end no longer holds."""
        if self.link.rank:
            return
        tokenizer = self.data.tokenizer
        if self.out.resolve() == self.data.path.resolve():
            raise UserError(f"out and data.path are the same folder, {self.out}; give the run a folder of its own")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / DONE).unlink(missing_ok=True)
            if tokenizer.is_file():
                shutil.copyfile(tokenizer, self.out / TOKENIZER)
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be written ({error.strerror}); choose another folder") from None

    def _load(self) -> None:
        """Values and moments from the checkpoint, on any layout, or the initial ones, made from seed and name only."""
        specs = {name: spec for stage in self.plan.stages for name, spec in stage.layer.params.items()}
        if self.resumed:
            resume.check_same_model(self.resumed, {name: specs[name].shape for name in self.plan.names})
        for name in self.mine.params.owned:
            owner, views = self.plan.ties.get(name, name), self._views(name)
            if self.resumed is None:
                views[0][...] = model.initial(owner, specs[owner], self.config.seed)
            else:
                for kind, view in zip(KINDS, views, strict=True):
                    self.resumed.read(kind, owner, view)

    def _views(self, name: str) -> tuple[Any, Any, Any]:
        """Parameter, first and second moment of one tensor, in place."""
        start, shape = self.backend.real * self.mine.params.param[name], self.mine.params.shapes[name]
        view = self.executor.array
        return view("PARAM", start, shape), view("MOMENT1", start, shape), view("MOMENT2", start, shape)

    def _measure_peak(self) -> float:
        """FLOP/s of matrix products of all ranks at once."""
        self.link.barrier()
        peak = np.array([self.backend.matmul_peak(0.2)])
        self.link.allreduce(peak)
        return float(peak[0])

    def _start_progress(self) -> None:
        if self.link.rank == 0:
            c, p = self.config, self.plan
            self.progress = Progress(
                self.out, c.train.steps, p.flops, p.tokens, self._peak, c.train.log_every, self.step
            )
            for line in self._banner():
                self.progress.say(line)

    # --- while others are waited for

    def _where(self) -> tuple[Hashable, str]:
        """Where this rank stands, and what it waits for, in the schedule's language."""
        for bound in (self.program, self.evaluation):
            at = -1 if bound is None else bound.at
            if bound is not None and at >= 0:
                kind, stage, *_ = bound.instructions[at]
                waited_for = bound.program.waiting(at) if kind == "WAIT" else ""
                if kind == "REDUCE" and self.peers is not None:
                    waited_for = f"the gradients of stage {stage} from the other replicas"
                return (id(bound), bound.runs, at), waited_for
        return self.waits_for, self.waits_for

    def _hang(self, sentence: str) -> None:
        self.link.abort(f"{sentence}; the job ends, start it again to continue from its newest checkpoint")

    def _sum(self, array: Any, what: str) -> None:
        """Sums over all ranks; ``what`` names it in the report of a hang."""
        self.waits_for = what
        self.link.allreduce(array)
        self.waits_for = ""

    def _banner(self) -> Iterator[str]:
        p, c = self.plan, self.config
        yield (
            f"{c.model.family}, {model.parameter_count(c.model):,} parameters; {len(p.stages)} stages x "
            f"{p.replicas} replicas x {self.backend.threads} threads; {c.pipeline.schedule}, "
            f"{p.micros} microbatches of {c.train.microbatch} x {c.train.length} tokens"
        )
        most = max(rank.memory.total for rank in p.ranks)
        yield (
            f"{most / 2**20:,.0f} MiB per rank at most, {p.flops / 1e9:,.1f} GFLOP per step, products peak at "
            f"{self._peak / 1e9:,.0f} GFLOP/s, predicted bubble {p.timeline.bubble:.0%}"
        )
        if len(self.levels) > 1:
            yield f"ranks use different instructions ({', '.join(self.levels)}): another layout gives other bits"
        yield from self.warnings
        if self.resumed is not None:
            changed = resume.changes(self.resumed, c, self.data.digest)
            yield f"resumed from {self.resumed.path} at step {self.step}" + (
                f"; {changed} changed since: the result will be another" if changed else ""
            )

    # --- one step

    def feed(self, split: str, step: int) -> None:
        """Writes the inputs of every microbatch of a step; ranks without embedding or loss have none."""
        c, replicas = self.config, self.plan.replicas
        micros = self.plan.micros if split == "train" else c.eval.microbatches // replicas
        batch = c.train.batch if split == "train" else c.eval.microbatches * c.train.microbatch
        for micro, (ids, targets, key) in enumerate(self.inputs[:micros]):
            if ids is not None or targets is not None:
                self.data.batch(
                    split, step, micro, self.replica, batch=batch, microbatch=c.train.microbatch, replicas=replicas,
                    length=c.train.length, seed=c.seed, out=(ids, targets),
                )  # fmt: skip
            if key is not None:
                key[:] = (c.seed, step, self.replica * micros + micro, split == "train")

    def finish(self, step: int, stop: bool) -> Step:
        """Sums what crosses ranks, clips, updates. One sum over ranks carries norm, loss, clock, the wish to stop."""
        self.waits_for = f"the other copy of a tied gradient in step {step + 1}"
        self.reducer.tied_copies()
        for copy, *ends in self.ties:
            if self.place in ends:
                self.reducer.tie(copy, ends[0] if self.place == ends[1] else ends[1])
        names, totals = len(self.plan.names), self.totals
        totals[:] = 0
        if self.replica == 0:
            self.optimizer.squares(totals[:names])
        clocks = self.program.clock
        totals[names + self.replica] = self.program.loss
        totals[-3:] = stop, self.program.busy, clocks[-1] - clocks[0]
        self._sum(totals, f"the sum over all ranks after step {step + 1}")
        loss = float(totals[names:-3].sum()) / self.plan.tokens
        norm, scale = self.optimizer.scale(totals[:names])
        if not np.isfinite(norm + loss):
            self.link.agree(
                f"step {step + 1}: loss {loss} and gradient norm {norm} are not finite; lower optimizer.lr, lengthen "
                "optimizer.warmup or set optimizer.clip, and start again: the run goes on from its newest checkpoint"
            )
        rate = learning_rate(step, self.config.optimizer, self.config.train)
        self.optimizer.update(step, rate, scale)
        return Step(loss, norm, rate, float(1 - totals[-2] / totals[-1]), totals[-3] > 0)

    def evaluate(self, step: int) -> None:
        """Validation loss over fixed windows, when it is due."""
        c = self.config
        if self.evaluation is None or not (self.due(step, c.eval.every) or step == c.train.steps):
            return
        self.feed("val", 0)
        self.evaluation.run()
        losses = np.zeros(self.plan.replicas)  # one term each: their sum must not depend on the transport
        losses[self.replica] = self.evaluation.loss
        self._sum(losses, f"the validation loss after step {step}")
        if not np.isfinite(losses.sum()):
            self.link.agree(f"step {step}: the validation loss is not finite; lower optimizer.lr and start again")
        if self.progress:
            tokens = c.eval.microbatches * c.train.microbatch * c.train.length
            self.progress.evaluated(step, float(losses.sum()) / tokens)

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after ``step``."""
        return every > 0 and step % every == 0

    def tell(self, step: int, seconds: float, **values: float) -> None:
        """Rank 0 writes the step down."""
        if self.progress:
            self.progress.step(step, seconds, values)

    # --- after it

    def save(self, step: int, loss: float) -> None:
        """A checkpoint after ``step`` steps. Failing to write leaves the run and the last checkpoint as they are."""
        folder, record, error = write.step_folder(self.out, step), None, None
        if self.replica == 0:
            try:
                record = write.write_shard(folder, self.place, self._pieces())
            except UserError as problem:
                error = str(problem)
        found = self.link.gather((record, error))
        if found is not None:
            error, notes = next((e for _, e in found if e), None), []
            try:
                if error is None:
                    write.commit(folder, [r for r, _ in found if r is not None], self._attributes(step, loss))
                    notes = write.prune(self.out, self.config.checkpoint.keep, deep=False)
            except UserError as problem:
                error = str(problem)
            if error:
                write.discard(folder)
            assert self.progress is not None
            for line in (f"NOT saved: {error}" if error else f"saved {folder}", *notes):
                self.progress.say(line)
        self.unsaved = self.link.bcast(error)

    def _pieces(self) -> Iterator[write.Piece]:
        for name in self.mine.params.owned:
            if name not in self.plan.ties:
                for kind, view in zip(KINDS, self._views(name), strict=True):
                    yield write.Piece(name, kind, view.shape, (0,) * view.ndim, view)

    def _attributes(self, step: int, loss: float) -> dict[str, str | int | float]:
        return {
            "config": to_toml(self.config),
            "schedule": str(self.plan.schedule),
            "plan_digest": self.plan.digest,
            "step": step,
            "tokens": step * self.plan.tokens,
            "loss": loss,
            "data_digest": self.data.digest,
        }

    def close(self, loss: float, stopped: bool) -> None:
        """The measured timeline, and the completion record of a run that ended well."""
        self.watch.stop()
        self.link.agree(self.unsaved)
        first = float(self.program.clock[0])
        parts = self.link.gather(self.program.events(first) if first and self.replica == 0 else [])
        events = tuple(event for part in parts or [] for event in part)
        self._together(lambda: self._record(events, loss, stopped))

    def _record(self, events: tuple[Event, ...], loss: float, stopped: bool) -> None:
        if self.progress is None:
            return
        timeline, steps = Timeline(events, len(self.plan.ranks)), self.config.train.steps
        try:
            if events:
                (self.out / "timeline.jsonl").write_text(timeline.to_jsonl(), encoding="utf-8")
            if not stopped:
                self.progress.done({"steps": max(self.step, steps), "loss": loss, "plan": self.plan.digest})
        except OSError as error:
            raise UserError(f"out: {self.out} cannot be written ({error.strerror}); the checkpoint is saved") from None
        if stopped:
            self.progress.say("stopped, as asked; start it again to go on from here")
        if events:
            for line in (f"last step, measured (bubble {timeline.bubble:.0%}):", *draw(timeline, 96).splitlines()):
                self.progress.say(line)
        else:
            self.progress.say(f"nothing to do: {self.out} has {self.step} steps already, train.steps is {steps}")


def _check_memory(need: int, link: Link) -> None:
    """Refuses an arena that this node cannot hold; ``need`` is this rank's bytes."""
    free = memory.free_bytes()
    if free is not None and need > (have := free // link.node_ranks()[1]):
        raise UserError(
            f"rank {link.rank} needs {need / 2**30:.1f} GiB, its share of this machine's free memory is "
            f'{have / 2**30:.1f} GiB; try train.microbatch = 1, train.recompute = "block" or more pipeline stages'
        )
