"""One pure function from a config to everything a run needs: cut, schedule, programs, memory, predicted time.

Every rank computes the same ``Plan`` from the same config; the plan is never sent, only its digest is compared. Nothing
here knows MPI, and no array is touched: stages are recorded on the null backend and priced from the recording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf
from typing import Any

from hpcpipe import model
from hpcpipe.backends.null import Recording
from hpcpipe.config import Config, UserError, grid, microbatches, to_toml
from hpcpipe.planner import schedules, slots
from hpcpipe.planner.costs import CORE, GPU, Cost, Device, price
from hpcpipe.planner.cut import bounds
from hpcpipe.runtime import arena
from hpcpipe.runtime.arena import Layout, Memory, Parameters
from hpcpipe.schedule import families, program
from hpcpipe.schedule.check import check
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.families import period
from hpcpipe.schedule.op import Schedule
from hpcpipe.schedule.program import POOLS, Lifetimes, Program
from hpcpipe.schedule.replay import replay
from hpcpipe.schedule.timeline import Timeline

GIB = 2**30
TRIES = 8  # cuts that are laid out to keep a memory limit
WORTH = 0.01  # share of a step that an early update must save to be worth its memory


@dataclass(frozen=True)
class StagePlan:
    """One stage: which slots of the chain it holds, its recording and its price per microbatch."""

    slots: tuple[str, ...]
    layer: Any
    recording: Recording
    cost: Cost
    shards: int = 1  # ranks that divide its moments

    def together(self, config: Config) -> StagePlan:
        """The stage with its W done within its B."""
        (F, B, W), x = self.cost, self.recording.x
        recording = slots.recorded(config, self.layer, x.shape if x else None, merged=True)
        return replace(self, recording=recording, cost=Cost(F, B + W, 0.0))

    def held(self, real: int) -> int:
        """Bytes that one microbatch holds from its F to its W."""
        return slots.Slot(self.layer, self.recording).held(real)

    def weight(self, flying: int, real: int) -> int:
        """Bytes that grow with the stage's slots, with so many microbatches on their way."""
        return self.state(real) + flying * self.held(real)

    def state(self, real: int) -> int:
        """Bytes of parameters, gradients and moments."""
        return slots.Slot(self.layer, self.recording).state(real, self.shards)


@dataclass(frozen=True)
class RankPlan:
    """What one pipeline rank (of every replica alike) holds and executes."""

    stages: tuple[int, ...]
    params: Parameters
    layouts: Mapping[int, Layout]
    memory: Memory
    program: Program
    evaluation: Program | None


@dataclass(frozen=True)
class Plan:
    """The whole run. ``threads`` and ``real`` are what the memory was computed for."""

    config: Config
    replicas: int
    micros: int  # microbatches per step and copy of the model
    stages: tuple[StagePlan, ...]  # of one copy
    schedule: Schedule
    ranks: tuple[RankPlan, ...]
    timeline: Timeline
    ties: Mapping[str, str]
    early: bool = False  # update before the norm of the whole gradient is known, on a guess

    @cached_property
    def digest(self) -> str:
        """Names the plan: equal digests mean the same cut, programs and memory on every rank."""
        text = [to_toml(self.config), str(self.schedule), str([s.slots for s in self.stages])]
        # Not all of the memory: `work` depends on a rank's threads.
        text += [f"{r.memory.pools}{r.program.table.tolist()}" for r in self.ranks]
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """Every parameter that has values of its own, in the order of the chain."""
        return [name for stage in self.stages for name in stage.layer.params if name not in self.ties]

    @property
    def copies(self) -> int:
        """Copies of the model: replicas times the schedule's chains. Copy c is chain c % chains of replica c // chains.

        Losses and gradients depend on their number, and on nothing else of the layout.
        """
        return self.replicas * self.schedule.chains

    @property
    def expected(self) -> float:
        """Predicted seconds from one step to the next."""
        return period(self.timeline) if self.early else self.timeline.makespan

    @property
    def most(self) -> int:
        """Bytes of the fullest rank."""
        return max(rank.memory.total for rank in self.ranks)

    @property
    def flops(self) -> float:
        """Floating-point operations of one optimizer step over all ranks, counted from the recordings."""
        each = sum(stage.recording.flops(name) for stage in self.stages for name in "FBW")
        return each * self.micros * self.copies

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.config.train.batch * self.config.train.length

    def stage_of(self, name: str) -> int:
        """The stage that holds a parameter."""
        return next(i for i, stage in enumerate(self.stages) if name in stage.layer.params)


def resolve(config: Config, vocab: int = 0) -> Config:
    """The config with the model's sizes and the sequence length filled in; ``vocab`` is the data's, 0 if not known."""
    m = model.resolve(config.model, vocab, config.train.length)
    return replace(config, model=m, train=replace(config.train, length=config.train.length or m.context))


def plan(
    config: Config,
    total: int,
    threads: int = 1,
    real: int = 4,
    device: Device | None = None,
    prices: Mapping[str, Cost] | None = None,
) -> Plan:
    """The plan of a resolved config on ``total`` ranks of ``threads`` threads; UserError if it cannot be laid out.

    ``prices`` are measured costs of the slots by kind; without them ``device`` says what they cost.
    """
    ranks, replicas = grid(config.pipeline, total)
    gpu = config.device.backend == "cuda"
    given = 1 if gpu else threads, real, device or (GPU if gpu else CORE), prices or {}
    found, refused = [], None
    for shape in schedules.shapes(config.pipeline, ranks, config.model.layers + 2):
        try:
            found.append(_plan(config, shape, replicas, *given))
        except UserError as error:
            refused = refused or error
    if refused and not found:
        raise refused
    return min(found, key=lambda plan: plan.expected)


def _plan(
    config: Config,
    shape: schedules.Shape,
    replicas: int,
    threads: int,
    real: int,
    device: Device,
    prices: Mapping[str, Cost],
) -> Plan:
    copies = replicas * shape.chains
    micros = microbatches(config.train, copies)
    _check_evaluation(config, copies)
    limit, ties = config.pipeline.memory * GIB or inf, model.ties(config.model)
    closely = not ties if config.optimizer.early is None else config.optimizer.early

    flying = slots.in_flight(schedules.draft(config.pipeline, shape, micros)) if limit < inf else []

    def laid_out(room: Sequence[float]) -> Plan:
        parts = _stages(config, shape, flying, device, prices, real, room, copies if config.optimizer.shard else 1)
        message = device.latency + slots.message(config, real) / device.link
        costs = _costs([part.cost for part in parts] * shape.chains, message)
        held = [part.held(real) for part in parts]
        spare = [*room]  # for activations
        for rank, part in zip(shape.placement, parts * shape.chains, strict=True):
            spare[rank] -= part.state(real)
        schedule = schedules.build(config.pipeline, shape, micros, costs, held, spare, closely)
        merged = _merged(schedule)
        parts = tuple(part.together(config) if i in merged else part for i, part in enumerate(parts))
        timeline = replay(schedule, _costs([part.cost for part in parts] * shape.chains, message))
        early = config.optimizer.early
        if early is None:
            early = _gains(timeline) and not _crossed(parts, schedule, ties)
        laid = _ranks(config, parts, schedule, ties, replicas, threads, real, early)
        found = Plan(config, replicas, micros, parts, schedule, laid, timeline, ties, early)
        if early and config.optimizer.early is None and found.most > limit:  # a gain in time is no reason to not fit
            laid = _ranks(config, parts, schedule, ties, replicas, threads, real, False)
            found = replace(found, ranks=laid, early=False)
        return found

    return _within(limit, shape.ranks, flying, real, laid_out)


def _within(
    limit: float, ranks: int, flying: Sequence[int], real: int, laid_out: Callable[[Sequence[float]], Plan]
) -> Plan:
    """The plan whose fullest rank keeps ``limit`` bytes. The cut weighs what grows with its parts; what comes on top of
    it on each rank (messages, temporaries) is known once all is laid out, and left free at the next try.
    """
    found = laid_out([limit] * ranks)
    depth, on_top = found.schedule.depth, [0.0] * ranks
    for _ in range(TRIES):
        if found.most <= limit:
            break
        for rank, part in enumerate(found.ranks):
            weighed = sum(found.stages[s % depth].weight(flying[s % depth], real) for s in part.stages)
            on_top[rank] = max(on_top[rank], part.memory.total - weighed)
        with suppress(UserError):
            found = laid_out([limit - bytes for bytes in on_top])
    _check_limit(limit, found)
    return found


def _check_limit(limit: float, found: Plan) -> None:
    if found.most > limit:
        rank = max(range(len(found.ranks)), key=lambda r: found.ranks[r].memory.total)
        raise UserError(
            f"plan: rank {rank} needs {found.most / GIB:.3g} GiB, pipeline.memory is {limit / GIB:.3g}; try a schedule "
            'that holds less (v_half, v_min), train.microbatch = 1, train.activations = "bfloat16", '
            'train.recompute = "block" or more ranks'
        )


def _gains(timeline: Timeline) -> bool:
    """Whether steps can follow each other faster than a whole one takes: no rank waits for the slowest between two."""
    return period(timeline) < (1 - WORTH) * timeline.makespan


def _crossed(parts: Sequence[StagePlan], schedule: Schedule, ties: Mapping[str, str]) -> bool:
    """Whether the two ends of a tie are on two ranks, which then meet at the end of every step anyway."""
    stage = {name: i for i, part in enumerate(parts) for name in part.layer.params}
    return any(schedule.placement[stage[a]] != schedule.placement[stage[b]] for a, b in ties.items())


def _merged(schedule: Schedule) -> set[int]:
    """Stages (of one copy) whose every B is followed by its W and sends nothing on: the two are one pass."""
    depth, where = schedule.depth, schedule.placement
    found = set(range(depth)) - {s % depth for s, rank in enumerate(where) if s % depth and where[s - 1] != rank}
    for row in (schedule.rows[where[s]] for s in range(schedule.stages) if s % depth in found):
        for op, then in pairwise(row):
            if op.kind == "B" and (then.kind, *then[1:]) != ("W", *op[1:]):
                found.discard(op.stage % depth)
    return found


def _costs(prices: Sequence[Cost], message: float) -> Costs:
    return Costs(tuple(p.F for p in prices), tuple(p.B for p in prices), tuple(p.W for p in prices), message)


def _check_evaluation(config: Config, copies: int) -> None:
    if config.eval.every and config.eval.microbatches % copies:
        raise UserError(
            f"eval.microbatches = {config.eval.microbatches} cannot be shared by {copies} copies of the model; "
            f"use a multiple of {copies}"
        )


def _stages(
    config: Config,
    shape: schedules.Shape,
    flying: Sequence[int],
    device: Device,
    prices: Mapping[str, Cost],
    real: int,
    room: Sequence[float],
    shards: int,
) -> tuple[StagePlan, ...]:
    """The cut; ``room`` are the bytes that each rank's state and activations may take, ``flying`` the microbatches that
    each stage holds at once (none where memory is no matter), ``shards`` the ranks that divide its moments.
    """
    whole = slots.chain(config)
    alone, names = slots.alone(config, whole), list(whole.children)
    found = prices or slots.roofline(alone, device)
    costs = [found[slots.kind(name)].total for name in names]
    state = slots.sums(names, {kind: slot.state(real, shards) for kind, slot in alone.items()})
    held = slots.sums(names, {kind: slot.held(real) for kind, slot in alone.items()})
    limit, where = max(room), shape.placement[: shape.depth]
    taken = [limit - room[rank] if rank not in where[:s] else 0.0 for s, rank in enumerate(where)] if flying else []
    edges = bounds(
        config.pipeline.cut, costs, shape.depth, placement=where, limit=limit,
        bytes_of=lambda stage, a, b: (
            state[b] - state[a] + flying[stage] * (held[b] - held[a]) + taken[stage] if flying else 0.0
        ),
    )  # fmt: skip
    parts = []
    for i, layer in enumerate(model.cut(whole, edges)):
        recording = slots.recorded(config, layer, slots.activation(config) if i else None)
        mine = tuple(names[edges[i] : edges[i + 1]])
        cost = _sum(found[slots.kind(name)] for name in mine) if prices else price(recording, device)
        parts.append(StagePlan(mine, layer, recording, cost, shards))
    return tuple(parts)


def _sum(costs: Iterable[Cost]) -> Cost:
    return Cost(*(sum(each) for each in zip(*costs, strict=True)))


def _ranks(
    config: Config,
    parts: tuple[StagePlan, ...],
    schedule: Schedule,
    ties: Mapping[str, str],
    replicas: int,
    threads: int,
    real: int,
    early: bool,
) -> tuple[RankPlan, ...]:
    held = [tuple(s for s, r in enumerate(schedule.placement) if r == rank) for rank in range(schedule.ranks)]
    depth, copies, gpu = schedule.depth, replicas * schedule.chains, config.device.backend == "cuda"
    shard = config.optimizer.shard
    params = [arena.parameters({s: parts[s % depth].layer for s in mine}, ties, copies, shard) for mine in held]
    inputs = [arena.input_offsets([(s // depth, parts[s % depth].recording) for s in mine]) for mine in held]
    layouts: dict[int, Layout] = {}
    for rank, mine in enumerate(held):
        for s in mine:
            recording = parts[s % depth].recording
            layouts[s] = arena.layout(recording, params[rank], inputs[rank][0], real, s // depth, gpu)
    lifetimes: list[Lifetimes] = [layouts[s].lifetimes for s in range(schedule.stages)]
    programs = program.lower(schedule, lifetimes)
    check(programs)
    evaluations: tuple[Program | None, ...] = (None,) * len(programs)
    eval_micros = config.eval.microbatches // copies
    if config.eval.every:
        forward = families.forward_only(schedule.placement, eval_micros, schedule.chains)
        evaluations = program.lower(forward, lifetimes, forward_only=True)
        check(evaluations)
    found = []
    for rank, mine in enumerate(held):
        own = {s: layouts[s] for s in mine}
        both = [p.counts for p in (programs[rank], evaluations[rank]) if p is not None]
        counts = {(s, pool): max(c.get((s, pool), 0) for c in both) for s in mine for pool in POOLS}
        micros = max(schedule.micros, eval_micros if config.eval.every else 0)
        scratch = arena.scratch_elements(params[rank], copies)
        memory = arena.arrange(
            own, counts, params[rank], inputs[rank], micros, scratch, threads, real, early,
            half=slots.compute(config) == "h", on_device=gpu,
        )  # fmt: skip
        found.append(RankPlan(mine, params[rank], own, memory, programs[rank], evaluations[rank]))
    return tuple(found)
