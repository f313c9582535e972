"""What a rank holds while it trains, and what it does at each point of the loop; the only file that knows everybody.

Before step 0: plan, arena, data, groups of ranks, the values of a checkpoint or the initial ones. In a step: inputs,
what crosses ranks, the update. After it: validation, checkpoints, the record of the run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpcpipe import measure, model, resume, seat
from hpcpipe.checkpoint.layout import KINDS, Index
from hpcpipe.checkpoint.lock import Lock
from hpcpipe.comm import clock
from hpcpipe.comm.link import Link
from hpcpipe.config import Config, UserError, digest, grid
from hpcpipe.data import TOKENIZER, Dataset
from hpcpipe.planner.plan import Plan, plan, resolve
from hpcpipe.progress import DONE, Progress
from hpcpipe.runtime import share
from hpcpipe.runtime.culprit import Crew
from hpcpipe.runtime.executor import Bound, Executor, Stage
from hpcpipe.runtime.optimizer import AdamW
from hpcpipe.runtime.reduce import Reducer
from hpcpipe.runtime.standing import LAST, Whereabouts, meet
from hpcpipe.runtime.watch import Watch
from hpcpipe.schedule.program import MAX_TAG
from hpcpipe.schedule.timeline import Event, Timeline, draw

T = TypeVar("T")
TAGS_OF_EVALUATION = MAX_TAG + 1
PRODUCTS = "products.json"  # in the run's folder: the algorithms of a GPU's products
REGIONS = "PARAM", "MOMENT1", "MOMENT2"  # of the arena, for the kinds of a checkpoint


class Job:
    """Everything a rank holds: plan, arena, data, optimizer, the groups it belongs to, and where the run stands."""

    def __init__(self, config: Config, link: Link) -> None:
        self.link: Any = link
        self.unsaved: str | None = None
        # What saving has to say in a step: to be asked before an update, and whether this rank's share is written.
        self.hold: Callable[[], None] = lambda: None
        self.written: Callable[[], bool] = lambda: False
        self._prepare(config)
        link = self.link  # from here on the one that knows the device's memory, too
        self._check_alike()
        ranks, replicas = len(self.plan.ranks), self.plan.replicas
        self.replica, self.place = divmod(link.rank, ranks)
        self.mine = self.plan.ranks[self.place]
        # My pipeline, whose ranks the programs speak of.
        first = link.rank - self.place
        self.pipeline = (link.group(range(first, first + ranks)) if replicas > 1 else None) or link
        self.mates: dict[int, tuple[int, ...]] = {}  # of each of my stages that has copies, the ranks that hold them
        self.copies = self._copies()
        self.shift = clock.shift(link)
        self.locks: list[Lock] = []  # on the run's folder, by rank 0
        self._together(self._open_folder)
        self.resumed, self.warnings = resume.find(self.out, link, config.checkpoint.mirror)
        self.warnings += [lock.warning for lock in self.locks if lock.warning]
        self.step = self.resumed.step if self.resumed else 0
        self.loss = float(self.resumed.attributes["loss"]) if self.resumed else float("nan")
        self._peak = self._measure_peak()
        self.seat.recall(self.out / PRODUCTS)
        self._together(self._allocate)
        links = dict.fromkeys((self.pipeline, *self.copies.values()))
        self.chosen = self.seat.ready(links, self.executor.arena, self.out / PRODUCTS)
        self._together(self._load)
        self.progress: Progress | None = None
        self.optimizer_seconds = 0.0  # of norm and update, as predicted
        self.where = Whereabouts(self.program, self.evaluation, self.step, first, link.size, self.mates)
        self.meeting = meet(self.out, link)
        crew = Crew(link.rank, self.hosts, [rank.program for rank in self.plan.ranks])
        self.watch = Watch(config.pipeline.timeout, self.where.now, crew, self.meeting, link.abort)

    # --- before step 0

    def begin(self, predicted: Timeline) -> None:
        """The record and the watch start; ``predicted`` is the step of one pipeline, in seconds."""
        self.predicted = predicted
        self._together(self._start_progress)
        self._together(self._write_plan)
        self.watch.start()

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

    def _prepare(self, config: Config) -> None:
        def open_all() -> None:
            grid(config.pipeline, self.link.size)
            self.data = Dataset.open(config.data.path)
            self.config = resolve(config, self.data.vocab)

        def lay_out() -> None:
            self.plan: Plan = plan(self.config, self.link.size, self.seat.threads, self.backend.real, prices=prices)
            self.out = Path(config.out)
            self.data.check(self.config)

        self._together(open_all)
        self.seat = seat.take(self.config, self.link, TAGS_OF_EVALUATION)
        self.backend, self.link, self.hosts = self.seat.backend, self.seat.link, self.seat.hosts
        measured = config.pipeline.cut == "measured"
        prices = measure.prices(self.config, self.backend) if measured and self.link.rank == 0 else None
        prices = self.link.bcast(prices)
        self._together(lay_out)

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

    def _copies(self) -> dict[int, Link]:
        """For each of my stages the ranks that hold its copies, in the order of the copies; none where it is alone."""
        schedule, ranks = self.plan.schedule, len(self.plan.ranks)
        if self.plan.copies == 1:
            return {}
        groups: dict[tuple[int, ...], Link] = {}
        found = {}
        for stage in sorted(self.mine.stages, key=lambda s: s % schedule.depth):  # all members in one order
            places = schedule.placement[stage % schedule.depth :: schedule.depth]
            members = tuple(ranks * replica + place for replica in range(self.plan.replicas) for place in places)
            if members not in groups:
                group = self.link.group(members)
                assert group is not None
                groups[members] = group
            found[stage], self.mates[stage] = groups[members], members
        return found

    def _allocate(self) -> None:
        p, mine, config = self.plan, self.mine, self.config
        self.seat.check_memory(mine.memory.total)
        depth = p.schedule.depth
        ends = ("layer.0.", f"layer.{config.model.layers - 1}.")  # recipes leave these blocks and the head alone
        whole = frozenset(name for name in p.names if name.startswith((*ends, "head.")))
        stages = {s: Stage(p.stages[s % depth].recording, mine.layouts[s], whole) for s in mine.stages}
        self.executor = Executor(mine.memory, stages, self.backend, self.pipeline, self.shift)
        self.reducer = Reducer(self.executor, mine.params, self.copies)
        self.program = self.executor.bind(mine.program, self.reducer.stage)
        self.evaluation = self.executor.bind(mine.evaluation, tags=TAGS_OF_EVALUATION) if mine.evaluation else None
        # Of every parameter one rank tells its squares and saves it: the one that holds it in the first copy.
        first = {name for s in mine.stages if s < depth and not self.replica for name in p.stages[s].layer.params}
        self.counted = [name for name in mine.params.owned if name in first and name not in p.ties]
        # Where the copies of the model divide the moments, every rank saves what it owns.
        self.own = share.spans(mine.params, {stage: link.rank for stage, link in self.copies.items()})
        own = self.own, self.spread if mine.params.shards > 1 else None
        self.optimizer = AdamW(self.executor, mine.params, config.optimizer, p.names, self.counted, *own)
        # Of every microbatch of every copy: what the loader fills.
        self.inputs: list[tuple[int, int, Any, Any, Any]] = []
        micros = mine.memory.resident["INPUT"][1] // mine.memory.stride if mine.memory.stride else 0
        for chain in dict.fromkeys(s // depth for s in mine.stages):
            for m in range(micros):
                ids, targets, key = (self.executor.input(name, m, chain) for name in ("ids", "targets", "key"))
                self.inputs.append((chain, m, ids, targets, key))

    def _open_folder(self) -> None:
        """Rank 0 makes the run's folder; what an earlier run said of its end no longer holds."""
        if self.link.rank:
            return
        tokenizer = self.data.tokenizer
        if self.out.resolve() == self.data.path.resolve():
            raise UserError(f"out and data.path are the same folder, {self.out}; give the run a folder of its own")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.locks.append(Lock(self.out))
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
            owner, at = self.plan.ties.get(name, name), self.mine.params.param[name]
            values = self.executor.array("PARAM", self.backend.real * at, self.mine.params.shapes[name])
            if self.resumed is None:
                values[...] = model.initial(owner, specs[owner], self.config.seed)
                continue
            self.backend.load(values, partial(self.resumed.read, "parameter", owner))
            for kind, start, view in self.owned(name):
                if kind != "parameter":
                    box = [slice(s, s + n) for s, n in zip(start, view.shape, strict=True)]
                    self.backend.load(view, partial(self.resumed.read, kind, owner, slices=box))
        self.optimizer.refresh()

    def owned(self, name: str) -> Iterator[tuple[str, Index, Any]]:
        """What is this rank's own of a tensor: (kind, where it begins in the tensor, the values in place), by boxes."""
        for start, extent, *at in share.boxes(self.mine.params, self.own, name):
            for kind, region, offset in zip(KINDS, REGIONS, (*at, at[1]), strict=True):
                yield kind, start, self.executor.array(region, self.backend.real * offset, extent)

    def spread(self) -> None:
        """All copies of the model have the parameters of which each has updated its share."""
        for stage, mates in self.mates.items():
            with self.where.waiting(f"the parameters of the other copies of stage {stage}", LAST, mates):
                self.reducer.spread(stage)

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

    def _write_plan(self) -> None:
        """What is predicted, for whoever looks at the run's folder."""
        if self.link.rank == 0:
            memory = [{"rank": i, **rank.memory.by_use()} for i, rank in enumerate(self.plan.ranks)]
            found = {"digest": self.plan.digest, "memory": memory}
            try:
                (self.out / "predicted.jsonl").write_text(self.predicted.to_jsonl(), encoding="utf-8")
                (self.out / "plan.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            except OSError as error:
                raise UserError(f"out: {self.out} cannot be written ({error.strerror}); make room") from None

    def _banner(self) -> Iterator[str]:
        p, c = self.plan, self.config
        seat = f"a GPU in {c.train.compute}" if self.backend.on_device else f"{self.backend.threads} threads"
        yield (
            f"{c.model.family}, {model.parameter_count(c.model):,} parameters; {len(p.stages)} stages x "
            f"{p.replicas} replicas x {seat}; {c.pipeline.schedule}, "
            f"{p.micros} microbatches of {c.train.microbatch} x {c.train.length} tokens"
        )
        most = p.most
        yield (
            f"{most / 2**20:,.0f} MiB per rank at most, {p.flops / 1e9:,.1f} GFLOP per step, products peak at "
            f"{self._peak / 1e9:,.0f} GFLOP/s, predicted bubble {self.predicted.bubble:.0%}"
        )
        if len(self.levels) > 1:
            yield f"ranks use different instructions ({', '.join(self.levels)}): another layout gives other bits"
        yield from (*self.seat.lines, *self.chosen, *self.warnings)
        if self.resumed is not None:
            changed = resume.changes(self.resumed, c, self.data.digest, p.copies)
            yield f"resumed from {self.resumed.path} at step {self.step}" + (
                f"; {changed} changed since: the result will be another" if changed else ""
            )

    # --- what steps are made of

    def feed(self, split: str, step: int) -> None:
        """Writes the inputs of every microbatch of a step; ranks without embedding or loss have none."""
        c, p = self.config, self.plan
        micros = p.micros if split == "train" else c.eval.microbatches // p.copies
        batch = c.train.batch if split == "train" else c.eval.microbatches * c.train.microbatch
        for chain, micro, ids, targets, key in self.inputs:
            copy = self.replica * p.schedule.chains + chain
            if micro < micros and (ids is not None or targets is not None):
                self.data.batch(
                    split, step, micro, copy, batch=batch, microbatch=c.train.microbatch, replicas=p.copies,
                    length=c.train.length, seed=c.seed, out=(ids, targets),
                )  # fmt: skip
            if micro < micros and key is not None:
                key[:] = (c.seed, step, copy * micros + micro, split == "train")
        if split == "train":
            self.where.step = step + 1

    def losses(self, program: Bound) -> Iterator[tuple[int, float]]:
        """(copy of the model, its loss in the program's last run) of the copies whose loss is on this rank."""
        depth, chains = self.plan.schedule.depth, self.plan.schedule.chains
        for chain in range(chains):
            if (chain + 1) * depth - 1 in self.mine.stages:
                yield self.replica * chains + chain, program.loss(range(chain * depth, (chain + 1) * depth))

    def sum_ties(self, step: int) -> None:
        """A tied parameter's two gradients, each summed over the copies of the model, become one: owner + copy."""
        p, own = self.plan, self.mine.params
        depth, where = p.schedule.depth, p.schedule.placement
        tied = f"tied gradient in step {step + 1}"
        for copy, owner in p.ties.items():
            ends = [(c + p.stage_of(copy), c + p.stage_of(owner)) for c in range(0, p.schedule.stages, depth)]
            for at, _ in ends:
                if at in self.mine.stages and owner in own.param:
                    with self.where.waiting(f"the other copies of a {tied}", LAST, self.mates.get(at, ())):
                        self.reducer.tied(copy, at)
            if copy in own.param and owner in own.param:
                self.reducer.tie(copy, self.place)
                continue
            for at, other in ends:
                if self.place in (where[at], where[other]):
                    peer = where[other] if self.place == where[at] else where[at]
                    with self.where.waiting(f"the other end of a {tied}", LAST, self.where.only(peer)):
                        self.reducer.tie(copy, peer)

    def evaluation_due(self, step: int) -> bool:
        """Whether ``step`` is followed by an evaluation."""
        c = self.config
        return self.evaluation is not None and (self.due(step, c.eval.every) or step == c.train.steps)

    def evaluate(self, step: int) -> None:
        """Validation loss over fixed windows, when it is due."""
        if self.evaluation is None or not self.evaluation_due(step):
            return
        c = self.config
        self.feed("val", 0)
        self.evaluation.run()
        losses = np.zeros(self.plan.copies)  # one term each: their sum must not depend on the transport
        for copy, loss in self.losses(self.evaluation):
            losses[copy] = loss
        with self.where.waiting(f"the validation loss after step {step}"):
            self.link.allreduce(losses)
        if not np.isfinite(losses.sum()):
            self.link.agree(f"step {step}: the validation loss is not finite; lower optimizer.lr and start again")
        if self.progress:
            tokens = c.eval.microbatches * c.train.microbatch * c.train.length
            self.progress.evaluated(step, float(losses.sum()) / tokens)

    def save_due(self, step: int) -> bool:
        """Whether ``step`` is followed by a checkpoint."""
        return self.due(step, self.config.checkpoint.every) or step == self.config.train.steps

    def due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps happens after ``step``."""
        return every > 0 and step % every == 0

    def tell(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Rank 0 writes a step down."""
        if self.progress:
            self.progress.step(step, seconds, values)

    def say(self, line: str) -> None:
        """A line that stays, from rank 0."""
        if self.progress:
            self.progress.say(line)

    # --- the end

    def release(self) -> None:
        """The run's folder is free for another job."""
        for lock in self.locks:
            lock.release()

    def close(self, loss: float, stopped: bool) -> None:
        """The measured timeline, and the completion record of a run that ended well."""
        with self.where.waiting("the end of the run", patient=True):
            self.link.agree(self.unsaved)
            ran = self.program.runs > 0
            # One origin for all, on the clock of rank 0.
            first = self.link.bcast(float(self.program.clock[0]) + self.shift) - self.shift
            parts = self.link.gather(self.program.events(first) if ran and self.replica == 0 else [])
            events = tuple(event for part in parts or [] for event in part)
            self._together(lambda: self._record(events, loss, stopped))
        self.watch.stop()
        if self.meeting is not None and self.link.rank == 0:
            self.meeting.remove()

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
            drawn = draw(timeline, 96).splitlines()
            for line in (*self.progress.account(), "the last step:", *drawn):
                self.progress.say(line)
        else:
            self.progress.say(f"nothing to do: {self.out} has {self.step} steps already, train.steps is {steps}")
