"""One pure function from a config to everything a run needs: cut, schedule, programs, memory, predicted time.

Every rank computes the same ``Plan`` from the same config; the plan is never sent, only its digest is compared. Nothing
here knows MPI, and no array is touched: stages are recorded on the null backend and priced from the recording.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from hpcpipe import model
from hpcpipe.backends.null import Recording, record
from hpcpipe.config import Config, UserError, grid, microbatches, to_toml
from hpcpipe.planner.costs import CORE, Cost, Device, price
from hpcpipe.planner.cut import bounds
from hpcpipe.runtime import arena
from hpcpipe.runtime.arena import Layout, Memory, Parameters
from hpcpipe.schedule import engine, policies, program
from hpcpipe.schedule.check import check
from hpcpipe.schedule.op import Schedule
from hpcpipe.schedule.program import POOLS, Lifetimes, Program
from hpcpipe.schedule.timeline import Timeline


@dataclass(frozen=True)
class StagePlan:
    """One stage: which slots of the chain it holds, its recording and its price per microbatch."""

    slots: tuple[str, ...]
    layer: Any
    recording: Recording
    cost: Cost


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
    micros: int  # microbatches per step and replica
    stages: tuple[StagePlan, ...]
    schedule: Schedule
    ranks: tuple[RankPlan, ...]
    timeline: Timeline
    ties: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """Names the plan: equal digests mean the same cut, programs and memory on every rank."""
        text = [to_toml(self.config), str(self.schedule), str([s.slots for s in self.stages])]
        text += [f"{r.memory.pools}{r.program.instructions}" for r in self.ranks]  # `work` depends on a rank's threads
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]

    @property
    def names(self) -> list[str]:
        """Every parameter that has values of its own, in the order of the chain."""
        return [name for stage in self.stages for name in stage.layer.params if name not in self.ties]

    @property
    def flops(self) -> float:
        """Floating-point operations of one optimizer step over all ranks, counted from the recordings."""
        each = sum(stage.recording.flops(name) for stage in self.stages for name in "FBW")
        return each * self.micros * self.replicas

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


def plan(config: Config, ranks: int, threads: int = 1, real: int = 4, device: Device = CORE) -> Plan:
    """The plan of a resolved config on ``ranks`` ranks of ``threads`` threads; UserError if it cannot be laid out."""
    stages, replicas = grid(config.pipeline, ranks)
    micros = microbatches(config.train, replicas)
    _check_evaluation(config, replicas)
    chain = _chain(config)
    parts = _stages(config, chain, stages, device)
    schedule = policies.build(config.pipeline.schedule, stages, stages, micros)
    prices = [part.cost for part in parts]
    costs = engine.Costs(tuple(p.F for p in prices), tuple(p.B for p in prices), tuple(p.W for p in prices))
    ties = model.ties(config.model)
    laid = _ranks(config, parts, schedule, ties, replicas, threads, real)
    timeline = engine.replay(schedule, costs)
    return Plan(config, replicas, micros, parts, schedule, laid, timeline, ties)


def _check_evaluation(config: Config, replicas: int) -> None:
    if config.eval.every and config.eval.microbatches % replicas:
        raise UserError(
            f"eval.microbatches = {config.eval.microbatches} cannot be shared by {replicas} replicas; "
            f"use a multiple of {replicas}"
        )


def _chain(config: Config) -> Any:
    train = config.train
    return model.chain(
        config.model, train.microbatch, train.length, scale=1 / (train.batch * train.length), recompute=train.recompute
    )


def _stages(config: Config, chain: Any, stages: int, device: Device) -> tuple[StagePlan, ...]:
    shape = (config.train.microbatch * config.train.length, config.model.width)
    names = list(chain.children)
    priced: dict[str, float] = {}
    for i, name in enumerate(names):  # layers cost the same: one stands for all
        kind = "layer" if name.startswith("layer.") else name
        if kind not in priced:
            slot = model.cut(chain, (0, i, i + 1, len(names)) if 0 < i < len(names) - 1 else _edge(i, len(names)))
            priced[kind] = price(record(slot[1 if i > 0 else 0], shape if i else None), device).total
    costs = [priced["layer" if name.startswith("layer.") else name] for name in names]
    edges = bounds(config.pipeline.cut, costs, stages)
    parts = []
    for i, layer in enumerate(model.cut(chain, edges)):
        recording = record(layer, shape if i else None)
        parts.append(StagePlan(tuple(names[edges[i] : edges[i + 1]]), layer, recording, price(recording, device)))
    return tuple(parts)


def _edge(i: int, n: int) -> tuple[int, ...]:
    return (0, 1, n) if i == 0 else (0, n - 1, n)


def _ranks(
    config: Config,
    parts: tuple[StagePlan, ...],
    schedule: Schedule,
    ties: Mapping[str, str],
    replicas: int,
    threads: int,
    real: int,
) -> tuple[RankPlan, ...]:
    held = [tuple(s for s, r in enumerate(schedule.placement) if r == rank) for rank in range(len(schedule.rows))]
    params = [arena.parameters({s: parts[s].layer for s in mine}, ties, replicas) for mine in held]
    inputs = [arena.input_offsets([parts[s].recording for s in mine]) for mine in held]
    layouts: dict[int, Layout] = {}
    for rank, mine in enumerate(held):
        offsets = {name: at for name, (at, _) in inputs[rank][0].items()}
        layouts |= {s: arena.layout(parts[s].recording, params[rank], offsets, real) for s in mine}
    lifetimes: list[Lifetimes] = [layouts[s].lifetimes for s in range(len(parts))]
    programs = program.lower(schedule, lifetimes)
    check(programs)
    evaluations: tuple[Program | None, ...] = (None,) * len(programs)
    eval_micros = config.eval.microbatches // replicas
    if config.eval.every:
        evaluations = program.lower(
            policies.forward_only(schedule.placement, eval_micros), lifetimes, forward_only=True
        )
        check(evaluations)
    found = []
    for rank, mine in enumerate(held):
        own = {s: layouts[s] for s in mine}
        both = [p.counts for p in (programs[rank], evaluations[rank]) if p is not None]
        counts = {(s, pool): max(c.get((s, pool), 0) for c in both) for s in mine for pool in POOLS}
        micros = max(schedule.micros, eval_micros if config.eval.every else 0)
        scratch = arena.scratch_elements(params[rank], replicas)
        memory = arena.arrange(own, counts, params[rank], inputs[rank], micros, scratch, threads, real)
        found.append(RankPlan(mine, params[rank], own, memory, programs[rank], evaluations[rank]))
    return tuple(found)
