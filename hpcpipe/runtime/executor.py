"""The executor: walks a rank's program over its arena. It knows no layer type, no schedule and no transport.

In: the rank's memory map, its stages' recordings, a backend, a link. Everything that can be decided is decided in
``bind``: an instruction becomes one prepared call, so a step is a walk over a tuple. Out: losses and a timeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np

from hpcpipe.backends.null import PASSES, Call, Recording
from hpcpipe.comm.link import Channel, Link
from hpcpipe.runtime.account import Account
from hpcpipe.runtime.arena import INDEX, REGIONS, RESIDENT, Layout, Memory
from hpcpipe.runtime.marks import Marks
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.program import POOLS, Edge, Instruction, Program, Slot
from hpcpipe.schedule.timeline import Event

LOADED: dict[str, np.dtype[Any]] = {"i": np.dtype("int32"), "l": np.dtype("int64")}  # types of what the loader provides
MADE = {"F": "Y", "B": "DX"}  # what a pass makes for another rank
PORTION = 1e8  # FLOPs between two looks after messages: a millisecond or two of a core


@dataclass(frozen=True)
class Stage:
    """What the executor runs for one stage: the recorded passes and the places of their tensors."""

    recording: Recording
    layout: Layout
    whole: frozenset[str] = frozenset()  # parameters whose products are not narrowed below the compute type


class Executor:
    """Owns a rank's arena and the compiled passes of its stages."""

    def __init__(
        self, memory: Memory, stages: Mapping[int, Stage], backend: Any, link: Link, shift: float = 0.0
    ) -> None:
        """``shift`` makes this rank's clock that of rank 0."""
        self.memory, self.stages, self.backend, self.link, self.shift = memory, stages, backend, link, shift
        self.arena = backend.allocate(memory.total)
        # What the loader fills is host memory; ``upload`` sends all of it to where the kernels read it.
        self._inputs, self.upload = backend.mirror(self.arena, *memory.resident["INPUT"])
        self.passes = {
            (index, name): self._compiled(stage, stage.recording.passes[name])
            for index, stage in stages.items()
            for name in PASSES
        }

    def _compiled(self, stage: Stage, calls: Sequence[Call]) -> Any:
        where, recording = stage.layout.where, stage.recording
        groups = (recording.params, recording.halves, recording.grads)
        whole = {tensor.id for group in groups for name, tensor in group.items() if name in stage.whole}
        brief = {number for number, (region, _) in where.items() if region == INDEX["TEMP"]}
        return self.backend.compile(calls, lambda t: where[t.id], brief, whole)

    @cached_property
    def pieces(self) -> dict[tuple[int, str], list[Any]]:
        """The passes in pieces, with a look after messages in between: TCP moves nothing unless somebody enters MPI."""
        return {
            (index, name): [self._compiled(stage, calls) for calls in _portions(stage.recording.passes[name])]
            for index, stage in self.stages.items()
            for name in PASSES
        }

    @cached_property
    def accumulating(self) -> set[tuple[str, int]]:
        """(pass, stage) of the passes that touch a gradient of a parameter."""
        grads = {(s, t.id) for s, stage in self.stages.items() for t in stage.recording.grads.values()}
        return {
            (name, s)
            for s, stage in self.stages.items()
            for name in PASSES
            if any(t is not None and (s, t.id) in grads for c in stage.recording.passes[name] for t in c.buffers)
        }

    def array(self, region: str, offset: int, shape: tuple[int, ...], type: str = "r") -> Any:
        """A view of a resident region; ``offset`` in bytes."""
        return self.backend.array(self.arena, self.memory.resident[region][0] + offset, shape, type)

    def clear(self, region: str) -> None:
        """Sets a resident region to zeros."""
        self.array(region, 0, (self.memory.resident[region][1] // 4,), "i")[...] = 0

    def input(self, name: str, micro: int, copy: int = 0) -> Any | None:
        """The view that the loader fills for one microbatch, or None where no stage of this rank asks for it."""
        if (copy, name) not in self.memory.inputs:
            return None
        offset, tensor = self.memory.inputs[copy, name]
        start, dtype = self.memory.stride * micro + offset, LOADED[tensor.type]
        return self._inputs[start : start + math.prod(tensor.shape) * dtype.itemsize].view(dtype).reshape(tensor.shape)

    def settle(self) -> None:
        """On a device, waits for what was handed out."""
        if self.backend.on_device:
            self.backend.settle()

    def beside(self) -> AbstractContextManager[None]:
        """On a device, what is done inside runs beside what the program goes on with."""
        beside: AbstractContextManager[None] = self.backend.beside() if self.backend.on_device else nullcontext()
        return beside

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
        channels = {
            slot: self._channel(edge, slot, tags)
            for edge in program.edges
            for slot in (Slot(edge.stage, edge.pool, i) for i in range(program.counts[edge.stage, edge.pool]))
        }
        bound = Bound(program, self.accumulating, self.upload)
        if self.backend.on_device:
            bound.marks = Marks(self.backend, bound.account.receives.tolist(), self.link.progress)
        bound.calls = tuple(self._prepare(at, i, channels, reduce, bound) for at, i in enumerate(bound.instructions))
        rows = {s: self._loss_pool(s, bound) for s in self.stages if self._ends_in_loss(s)}
        losses = [i for i in bound.instructions if i.kind == "F" and i.stage in rows]
        bound.losses = [(i.stage, rows[i.stage][_slot(i, "Y").number]) for i in losses]
        return bound

    def _loss_pool(self, stage: int, bound: Bound) -> Any:
        """The losses of a stage by slot, float64 on the host; from a device they come all at once after a run."""
        base, size, count = self.memory.pools[stage, "Y"]
        pool = self.backend.array(self.arena, base, (count, size // 8), "d")
        if not bound.marks:
            return pool
        here = np.zeros(pool.shape)
        bound.collect.append(partial(pool.read, here))
        return here

    def _channel(self, edge: Edge, slot: Slot, tags: int) -> Channel:
        _, size, _ = self.memory.pools[slot.stage, slot.pool]
        buffer = self.backend.array(self.arena, self.memory.base(*slot), (size // 8,), "d")
        make = self.link.sender if edge.direction == "send" else self.link.receiver
        return make(edge.peer, edge.tag + tags, buffer)

    def _stamp(self, slot: Slot) -> Any:
        """Behind the tensor of a message: when its sender let go of it, on the sender's clock."""
        _, size, _ = self.memory.pools[slot.stage, slot.pool]
        return self.backend.array(self.arena, self.memory.base(*slot) + size - 8, (1,), "d")

    def _prepare(
        self,
        at: int,
        instruction: Instruction,
        channels: Mapping[Slot, Any],
        reduce: Callable[[int], None] | None,
        bound: Bound,
    ) -> Callable[[], None]:
        kind, stage, slot = instruction.kind, instruction.stage, instruction.slot
        if kind in PASSES and not self.stages[stage].recording.passes[kind]:  # what it would do, B has done
            return lambda: None
        if kind in PASSES:
            if bound.marks:
                made = [s for s in instruction.slots if s in channels and s is not None and s.pool == MADE.get(kind)]
                ready = [channels[s].ready for s in made]
                name = str(Op(kind, stage, instruction.micro))
                return bound.marks.around(at, self._on_device(instruction), ready, name)
            bases, arena, work = self.bases(instruction), self.arena, self.memory.work
            parts = self.pieces[stage, kind] if channels else [self.passes[stage, kind]]
            first, *rest = (self.backend.bound(part, arena, bases, work) for part in parts)
            return _in_pieces((first, *rest), self.link.progress) if rest else first
        if kind == "REDUCE":
            if reduce is None:
                return lambda: None
            return bound.marks.beside(at, partial(reduce, stage)) if bound.marks else partial(reduce, stage)
        assert slot is not None
        channel = channels[slot]
        if kind == "SEND" and not bound.marks:
            return _sending(channel.start, self._stamp(slot), self.shift)
        if kind == "SEND":
            channel.clock = lambda: perf_counter() + self.shift
        if kind == "WAIT" and slot.pool in ("X", "DY"):
            number = int(np.searchsorted(bound.account.receives, at))
            stamp = channel.stamp if bound.marks else self._stamp(slot)
            return _receiving(channel.wait, stamp, self.shift, bound.released, number)
        return channel.wait if kind == "WAIT" else channel.start

    def _on_device(self, instruction: Instruction) -> Callable[[], None]:
        """A pass on a device, the same graph for every microbatch that comes to the same slots: inputs are copied to
        one place before it, a loss from one place after it.
        """
        kind, stage, bases = instruction.kind, instruction.stage, self.bases(instruction)
        assert kind == "F" or kind == "B" or kind == "W"
        recording, stride = self.stages[stage].recording, self.memory.stride
        current, _ = self.memory.resident["CURRENT"]
        work: list[Callable[[], None]] = []
        inputs = {tensor.id for tensor in recording.inputs.values()}
        if any(t is not None and t.id in inputs for call in recording.passes[kind] for t in call.buffers):
            work.append(self.backend.copier(self.arena, current, int(bases[INDEX["INPUT"]]), stride))
            bases[INDEX["INPUT"]] = current
        loss = int(bases[INDEX["Y"]]) if kind == "F" and self._ends_in_loss(stage) else None
        if loss is not None:
            bases[INDEX["Y"]] = current + stride
        work.append(self.backend.bound(self.passes[stage, kind], self.arena, bases, self.memory.work))
        if loss is not None:
            work.append(self.backend.copier(self.arena, loss, current + stride, 8))
        return work[0] if len(work) == 1 else _in_order(work)

    def _ends_in_loss(self, stage: int) -> bool:
        return self.stages[stage].recording.y.type == "d"


def _portions(calls: Sequence[Call]) -> list[Sequence[Call]]:
    """Consecutive calls of about PORTION each."""
    ends, done = [0], 0.0
    for i, call in enumerate(calls, 1):
        done += call.flops
        if done >= PORTION and i < len(calls):
            ends.append(i)
            done = 0.0
    return [calls[a:b] for a, b in pairwise([*ends, len(calls)])]


def _slot(instruction: Instruction, pool: str) -> Slot:
    slot = instruction.slots[POOLS.index(pool)]
    assert slot is not None
    return slot


def _in_order(work: Sequence[Callable[[], None]]) -> Callable[[], None]:
    def compute() -> None:
        for each in work:
            each()

    return compute


def _in_pieces(pieces: Sequence[Callable[[], None]], between: Callable[[], None]) -> Callable[[], None]:
    def compute() -> None:
        for piece in pieces:
            piece()
            between()

    return compute


def _sending(start: Callable[[], None], stamp: Any, shift: float) -> Callable[[], None]:
    def send() -> None:
        stamp[0] = perf_counter() + shift
        start()

    return send


def _receiving(
    wait: Callable[[], None], stamp: Any, shift: float, released: np.ndarray, number: int
) -> Callable[[], None]:
    def receive() -> None:
        wait()
        # Without a stamp nobody knows when the sender let go of it: waiting for it is idleness.
        released[number] = stamp[0] - shift if stamp[0] else np.inf

    return receive


class Bound:
    """A program ready to run, with the clock readings of its last run.

    ``at`` is the instruction being executed (-1 between runs), ``runs`` counts the runs: what a watch looks at.
    ``released`` holds when the sender of each received message let go of it.
    """

    def __init__(
        self, program: Program, accumulating: set[tuple[str, int]], upload: Callable[[], None] = lambda: None
    ) -> None:
        """``accumulating`` are the (pass, stage) that touch a gradient of a parameter; ``upload`` begins a run."""
        self.program, self.instructions, self.account = program, program.instructions, Account(program)
        self.calls: tuple[Callable[[], None], ...] = ()
        self.losses: list[tuple[int, Any]] = []  # (stage, view)
        self.marks: Marks | None = None  # on a device, which works while the host goes on
        self.collect: list[Callable[[], None]] = []  # on a device: what brings results of a run to the host
        self._upload = upload
        self.clock = np.zeros(len(self.instructions) + 1)
        self.released = np.zeros(len(self.account.receives))
        touching = (i for i, instruction in enumerate(self.instructions) if instruction[:2] in accumulating)
        self.turning = next(touching, len(self.instructions))  # gradients change from here on
        self.at, self.runs = -1, 0
        self.asking = 0.0  # seconds of the last run before the instruction that is the first to change them

    def run(self, check: Callable[[], bool] | None = None) -> bool:
        """One step: every instruction in order.

        ``check`` is asked before a gradient changes; when it denies, the step is void: only its messages are still
        exchanged, so that all ranks come to its end, and False is returned. All ranks must be given the same answer.
        """
        self.runs += 1
        self.clock[0] = perf_counter()
        self._upload()
        self._walk(range(self.turning))
        valid = check is None or check()
        self.asking = perf_counter() - float(self.clock[self.turning]) if check else 0.0
        rest = range(self.turning, len(self.calls))
        self._walk(rest if valid else [i for i in rest if self.instructions[i].slot is not None])
        if self.marks:
            self._finish(self.marks, valid)
        self.at = -1
        return valid

    def _finish(self, marks: Marks, valid: bool) -> None:
        """Waits for the device, and puts its time in place of the host's."""

        def at(number: int) -> None:
            self.at = number

        marks.drain(range(len(self.calls)), at)
        self.asking = 0.0  # the device went on meanwhile
        if valid:
            marks.read(self.clock)
            for bring in self.collect:
                bring()

    def _walk(self, numbers: Iterable[int]) -> None:
        clock, calls = self.clock, self.calls
        for i in numbers:
            self.at = i
            calls[i]()
            clock[i + 1] = perf_counter()

    def loss(self, stages: range) -> float:
        """Sum of the losses of one copy of the model, in microbatch order; 0.0 where its loss is not here."""
        return float(sum(float(view[0]) for stage, view in self.losses if stage in stages))

    def parts(self) -> np.ndarray:
        """Where the seconds of the last run went, without ``asking``: the first five of PARTS."""
        found = self.account.parts(self.clock, self.released)
        if self.turning < len(self.calls):
            found[0] -= self.asking
        return found

    def starts(self) -> np.ndarray:
        """When each instruction of the last run began; ``clock`` without its first reading is when they ended."""
        starts = self.clock[:-1].copy()
        starts[self.turning : self.turning + 1] += self.asking
        return starts

    def events(self, origin: float = 0.0) -> list[Event]:
        """The last run's compute, in seconds since ``origin`` of this rank's clock."""
        return [
            Event(self.program.rank, Op(i.kind, i.stage, i.micro), float(t0) - origin, float(t1) - origin)
            for i, t0, t1 in zip(self.instructions, self.starts(), self.clock[1:], strict=True)
            if i.kind == "F" or i.kind == "B" or i.kind == "W"
        ]
