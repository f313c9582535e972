"""The executor: walks a rank's program over its arena. It knows no layer type, no schedule and no transport.

In: the rank's memory map, its stages' recordings, a backend, a link. Everything that can be decided is decided in
``bind``: an instruction becomes one prepared call, so a step is a walk over a tuple. Out: losses and a timeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from hpcpipe.backends.null import PASSES, Recording
from hpcpipe.comm.link import Channel, Link
from hpcpipe.runtime.arena import INDEX, REGIONS, RESIDENT, Layout, Memory
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.program import POOLS, Instruction, Program, Slot
from hpcpipe.schedule.timeline import Event


@dataclass(frozen=True)
class Stage:
    """What the executor runs for one stage: the recorded passes and the places of their tensors."""

    recording: Recording
    layout: Layout


class Executor:
    """Owns a rank's arena and the compiled passes of its stages."""

    def __init__(self, memory: Memory, stages: Mapping[int, Stage], backend: Any, link: Link) -> None:
        self.memory, self.stages, self.backend, self.link = memory, stages, backend, link
        self.arena = backend.allocate(memory.total)
        self.passes = {
            (index, name): backend.compile(stage.recording.passes[name], lambda t, s=stage: s.layout.where[t.id])
            for index, stage in stages.items()
            for name in PASSES
        }

    def array(self, region: str, offset: int, shape: tuple[int, ...], type: str = "r") -> Any:
        """A view of a resident region; ``offset`` in bytes."""
        return self.backend.array(self.arena, self.memory.resident[region][0] + offset, shape, type)

    def input(self, name: str, micro: int) -> Any | None:
        """The view that the loader fills for one microbatch, or None where no stage of this rank asks for it."""
        if name not in self.memory.inputs:
            return None
        offset, tensor = self.memory.inputs[name]
        return self.array("INPUT", self.memory.stride * micro + offset, tensor.shape, tensor.type)

    def bases(self, instruction: Instruction | None = None) -> np.ndarray:
        """The base of every region, in bytes, for one compute instruction (int64)."""
        table = np.zeros(len(REGIONS), np.int64)
        for name in RESIDENT:
            table[INDEX[name]] = self.memory.resident[name][0]
        if instruction is not None:
            table[INDEX["INPUT"]] += self.memory.stride * instruction.micro
            for pool, slot in zip(POOLS, instruction.slots, strict=True):
                if slot is not None and (slot.stage, slot.pool) in self.memory.pools:
                    table[INDEX[pool]] = self.memory.base(*slot)
        return table

    def bind(self, program: Program, reduce: Callable[[int], None] | None = None, tags: int = 0) -> Bound:
        """Prepares a program: channels made, bases computed. ``tags`` keeps two programs' messages apart."""
        channels = {edge.slot: self._channel(edge, tags) for edge in program.edges}
        calls = [self._prepare(i, channels, reduce) for i in program.instructions]
        losses = [self._loss(i) for i in program.instructions if i.kind == "F" and self._ends_in_loss(i.stage)]
        return Bound(program, tuple(calls), losses)

    def _channel(self, edge: Any, tags: int) -> Channel:
        _, size, _ = self.memory.pools[edge.slot.stage, edge.slot.pool]
        buffer = self.backend.array(self.arena, self.memory.base(*edge.slot), (size // 8,), "d")
        make = self.link.sender if edge.direction == "send" else self.link.receiver
        return make(edge.peer, edge.tag + tags, buffer)

    def _prepare(
        self, instruction: Instruction, channels: Mapping[Slot, Channel], reduce: Callable[[int], None] | None
    ) -> Callable[[], None]:
        kind, stage = instruction.kind, instruction.stage
        if kind in PASSES:
            handle, bases, run = self.passes[stage, kind], self.bases(instruction), self.backend.run
            arena, work = self.arena, self.memory.work
            return lambda: run(handle, arena, bases, work)
        if kind == "REDUCE":
            return (lambda: reduce(stage)) if reduce else (lambda: None)
        channel = channels[instruction.slot]  # type: ignore[index]
        return channel.wait if kind == "WAIT" else channel.start

    def _ends_in_loss(self, stage: int) -> bool:
        return self.stages[stage].recording.y.type == "d"

    def _loss(self, instruction: Instruction) -> Any:
        slot = instruction.slots[POOLS.index("Y")]
        assert slot is not None
        return self.backend.array(self.arena, self.memory.base(*slot), (1,), "d")


class Bound:
    """A program ready to run, with the clock readings of its last run.

    ``at`` is the instruction being executed (-1 between runs), ``runs`` counts the runs: what a watch looks at.
    """

    def __init__(self, program: Program, calls: tuple[Callable[[], None], ...], losses: list[Any]) -> None:
        self.program, self.instructions, self.calls, self.losses = program, program.instructions, calls, losses
        self.clock = np.zeros(len(calls) + 1)
        self.compute = np.array([i.kind in PASSES for i in self.instructions], bool)
        self.at, self.runs = -1, 0

    def run(self) -> None:
        """One step: every instruction in order."""
        clock = self.clock
        self.runs += 1
        clock[0] = perf_counter()
        for i, call in enumerate(self.calls):
            self.at = i
            call()
            clock[i + 1] = perf_counter()
        self.at = -1

    @property
    def loss(self) -> float:
        """Sum of the microbatch losses in microbatch order; 0.0 on ranks without the loss."""
        return float(sum(float(view[0]) for view in self.losses))

    @property
    def busy(self) -> float:
        """Seconds the last run spent in F, B and W."""
        return float(np.diff(self.clock)[self.compute].sum())

    def events(self, origin: float = 0.0) -> list[Event]:
        """The last run's compute, in seconds since ``origin``."""
        return [
            Event(self.program.rank, Op(i.kind, i.stage, i.micro), float(t0) - origin, float(t1) - origin)
            for i, t0, t1 in zip(self.instructions, self.clock[:-1], self.clock[1:], strict=True)
            if i.kind == "F" or i.kind == "B" or i.kind == "W"
        ]
