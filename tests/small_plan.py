"""Plans and executors of the small models, without data and without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import Config, loads
from hpcpipe.planner.plan import Plan, plan, resolve
from hpcpipe.runtime.executor import Executor, Stage
from small_run import VOCAB, run_toml


def configured(model: str = "llama", **settings: object) -> Config:
    """The resolved config of a small run; ``settings`` are section__key=value."""
    return resolve(loads(run_toml(Path("data"), Path("run"), model, **settings)), VOCAB)


def planned(model: str = "llama", ranks: int = 1, threads: int = 1, real: int = 4, **settings: object) -> Plan:
    """Its plan on ``ranks`` ranks."""
    return plan(configured(model, **settings), ranks, threads, real)


def executor_of(p: Plan, rank: int, backend: Any, link: Link | None = None) -> Executor:
    """What one pipeline rank of a plan executes with; alone unless it gets a link."""
    mine = p.ranks[rank]
    stages = {s: Stage(p.stages[s % len(p.stages)].recording, mine.layouts[s]) for s in mine.stages}
    return Executor(mine.memory, stages, backend, link or LocalWorld(1).links[0])
