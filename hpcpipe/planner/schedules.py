"""Which schedule a run has: by name, from a file, or searched for, and the shape that it asks of the model's cut.

The shape (stages, their ranks, copies of the model) is known first, because the cut needs it; the schedule itself may
need the costs of the stages that were cut.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from hpcpipe.config import PipelineConfig, UserError
from hpcpipe.schedule import families, interchange
from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import Schedule, ScheduleError
from hpcpipe.schedule.replay import validate
from hpcpipe.schedule.search import search

FILE, SEARCH = "file:", "search"
STARTS = ("1f1b", *(name for name, family in families.SCHEDULES.items() if family.chains == 1 and name != "1f1b"))


class Shape(NamedTuple):
    """Stages of one copy of the model, where all stages are, and how many copies share the ranks.

    ``given`` is a schedule from a file.
    """

    ranks: int
    depth: int
    placement: tuple[int, ...]
    chains: int = 1
    given: Schedule | None = None


def shapes(pipeline: PipelineConfig, ranks: int, slots: int) -> list[Shape]:
    """What the configured schedule may ask for on that many ranks; UserError where it cannot be.

    One, but for a search that may choose: one stage per rank, or two where the model has the slots.
    """
    found = _shape(pipeline, ranks)
    free = pipeline.schedule == SEARCH and not pipeline.stages and isinstance(pipeline.cut, str)
    if free and 1 < ranks <= slots // 2:
        return [found, Shape(ranks, 2 * ranks, families.folded(2 * ranks, ranks))]
    return [found]


def _shape(pipeline: PipelineConfig, ranks: int) -> Shape:
    name = pipeline.schedule
    listed = len(pipeline.cut) if isinstance(pipeline.cut, tuple) else 0
    if pipeline.group and (name == SEARCH or name.startswith(FILE)):
        raise UserError(f"pipeline.group = {pipeline.group} is for interleaved only; leave it out with {name}")
    if name == FILE:
        raise UserError("pipeline.schedule is file: without a path; write file:PATH")
    if name.startswith(FILE):
        return _from_file(name.removeprefix(FILE), pipeline.stages or listed, ranks)
    if name == SEARCH:
        stages = pipeline.stages or listed or ranks
        if stages < ranks:
            raise UserError(
                f"pipeline.schedule: {stages} stage{'s' * (stages > 1)} cannot occupy {ranks} ranks; "
                f"use at most {stages} rank{'s' * (stages > 1)}"
            )
        return Shape(ranks, stages, families.consecutive(stages, ranks))
    if name not in families.SCHEDULES:
        near = difflib.get_close_matches(name.lower(), [*families.SCHEDULES, SEARCH], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        known = ", ".join(families.SCHEDULES)
        raise UserError(f"pipeline.schedule is {name}, expected {known}, search or file:PATH{hint}")
    stages = pipeline.stages or listed or families.default_stages(name, ranks)
    found = draft(pipeline, Shape(ranks, stages, ()), 1)
    return Shape(ranks, stages, found.placement, found.chains)


def _from_file(path: str, stages: int, ranks: int) -> Shape:
    try:
        found = interchange.load(path)
        validate(found)
    except ScheduleError as error:
        raise UserError(f"pipeline.schedule: {error}") from None
    if found.ranks != ranks or (stages and found.depth != stages):
        raise UserError(
            f"pipeline.schedule: {path} is for {found.ranks} ranks and {found.depth} stages, the run has {ranks} ranks"
            + (f" and {stages} stages" if stages else "")
            + "; start as many, or make the file for them"
        )
    return Shape(ranks, found.depth, found.placement, found.chains, found)


def draft(pipeline: PipelineConfig, shape: Shape, micros: int) -> Schedule:
    """The schedule as it is without knowing any cost; for a search, one that it starts from. Not proven."""
    if shape.given is not None:
        return shape.given
    name = STARTS[0] if pipeline.schedule == SEARCH else pipeline.schedule
    try:
        return families.draft(name, shape.depth, shape.ranks, micros, group=pipeline.group)
    except ScheduleError as error:
        raise UserError(f"pipeline.schedule: {error}") from None


def build(
    pipeline: PipelineConfig,
    shape: Shape,
    micros: int,
    costs: Costs,
    held: Sequence[float],
    limit: Sequence[float],
    closely: bool,
) -> Schedule:
    """The schedule, proven; UserError where this shape or number of microbatches cannot be.

    A search heeds the bytes that one microbatch holds on each stage from its F to its W, and how many each rank has;
    ``closely``: steps follow each other without a stop.
    """
    if shape.given is not None and shape.given.micros != micros:
        raise UserError(
            f"{pipeline.schedule} has {shape.given.micros} microbatches, the run has {micros} per replica; "
            "change train.batch or train.microbatch, or make the file for them"
        )
    try:
        if pipeline.schedule == SEARCH:
            found = search(
                _placements(shape), micros, costs, held, limit, list(_starts(shape, micros)), closely=closely
            )
        else:
            found = draft(pipeline, shape, micros)
        validate(found)
    except ScheduleError as error:
        raise UserError(f"pipeline.schedule: {error}") from None
    return found


def _placements(shape: Shape) -> list[tuple[int, ...]]:
    """Where a search may put the stages: together, round the ranks, down and up."""
    places = (families.consecutive, families.in_turn, families.folded)
    fitting = places if shape.depth == 2 * shape.ranks else places[:2]
    return [place(shape.depth, shape.ranks) for place in fitting]


def _starts(shape: Shape, micros: int) -> Iterator[Schedule]:
    """The named schedules that these stages can have: a search is never worse than the best of them that fits."""
    for name in STARTS:
        with suppress(ScheduleError):
            yield families.build(name, shape.depth, shape.ranks, micros)
