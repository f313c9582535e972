"""Lowering: from a schedule to what each rank executes, with every slot, peer and tag fixed before step 0.

In: a schedule and, per stage, how long its boundary tensors live. Out: one ``Program`` per rank, instructions over
numbered slots. Nothing here knows a size; ``memory`` folds sizes over the counts. ``check`` proves the result.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from hpcpipe.schedule.engine import validate
from hpcpipe.schedule.op import KINDS, Kind, Op, Schedule, ScheduleError
from hpcpipe.schedule.slots import Place, Span, colour, in_order, overlap
from hpcpipe.schedule.timeline import Timeline

# Per stage and microbatch: activation in and out, gradient in and out, what B needs from F, W from F, and W from B.
POOLS = ("X", "Y", "DY", "DX", "SAVED", "KEPT", "OWED")
FIRST: dict[str, Kind] = {"X": "F", "Y": "F", "DY": "B", "DX": "B", "SAVED": "F", "KEPT": "F", "OWED": "B"}
RECEIVED = {"F": "X", "B": "DY"}
SENT = {"F": "Y", "B": "DX"}
MAX_TAG = 16000  # MPI guarantees 32767: room for a second program's tags and for the link's own

Do = Literal["F", "B", "W", "POST", "SEND", "WAIT", "REDUCE"]


class Lifetimes(NamedTuple):
    """The last pass of the owning stage that touches each boundary tensor; an absent tensor's entry is ignored."""

    x: Kind
    y: Kind
    dy: Kind
    dx: Kind


class Slot(NamedTuple):
    """Room for one microbatch's tensors: one of the numbered slots of a stage's pool."""

    stage: int
    pool: str
    number: int


class Instruction(NamedTuple):
    """One thing to do. F, B, W have the live ``slots`` in the order of POOLS; POST, SEND and WAIT have their ``slot``.

    REDUCE (a stage's weight gradients are complete: sum them over replicas) has neither, and microbatch -1.
    """

    kind: Do
    stage: int
    micro: int
    slots: tuple[Slot | None, ...] = ()
    slot: Slot | None = None


class Edge(NamedTuple):
    """A channel that the rank will use: its slot, the other rank, the tag."""

    slot: Slot
    peer: int
    tag: int
    direction: Literal["send", "recv"]


@dataclass(frozen=True)
class Program:
    """What one rank executes in a step; ``counts[stage, pool]`` slots are all the memory it needs for it."""

    rank: int
    instructions: tuple[Instruction, ...]
    counts: dict[tuple[int, str], int]
    edges: tuple[Edge, ...]

    @cached_property
    def channel(self) -> dict[Slot, Edge]:
        """The edge that a slot sends or receives through."""
        return {edge.slot: edge for edge in self.edges}

    def standing(self, at: int) -> str:
        """The op that the rank is at or before, for reports: ``B3.5``, or ``the end of the step``."""
        ops = (Op(i.kind, i.stage, i.micro) for i in self.instructions[at:] if i.kind in ("F", "B", "W"))
        return str(next(ops, "the end of the step"))

    def waiting(self, at: int) -> str:
        """What the WAIT at index ``at`` waits for, in words: ``F4.7 from rank 2``."""
        _, stage, micro, _, slot = self.instructions[at]
        if slot is None:
            return "nothing"
        peer = self.channel[slot].peer
        if slot.pool in ("X", "DY"):
            return f"{Op('F', stage - 1, micro) if slot.pool == 'X' else Op('B', stage + 1, micro)} from rank {peer}"
        return f"rank {peer} to take {Op('F' if slot.pool == 'Y' else 'B', stage, micro)}"


def memory(program: Program, bytes_of: Callable[[int, str], int]) -> int:
    """Bytes of all slots of a rank, where one slot of (stage, pool) has ``bytes_of(stage, pool)``."""
    return sum(count * bytes_of(stage, pool) for (stage, pool), count in program.counts.items())


def lower(schedule: Schedule, lifetimes: Sequence[Lifetimes], forward_only: bool = False) -> tuple[Program, ...]:
    """The program of every rank. ``forward_only`` keeps the forwards alone, with everything dead after its F.

    Raises ScheduleError for a schedule that ``validate`` refuses or that needs more tags than MPI has.
    """
    if 2 * schedule.stages > MAX_TAG:
        raise ScheduleError(
            f"{schedule.stages} stages need more message tags than the {MAX_TAG} there are; use fewer stages"
        )
    schedule = schedule.only("F") if forward_only else schedule
    timeline = validate(schedule, KINDS[:1] if forward_only else KINDS)
    tenancy = _Tenancy(schedule, timeline, lifetimes, forward_only)
    return tuple(_program(tenancy, rank) for rank in range(schedule.ranks))


class _Lease(NamedTuple):
    """A slot held from one op of the row to another; ``since`` is the op after which it was free."""

    slot: Slot
    start: int
    end: int
    since: int


class _Tenancy:
    """Which slot every tensor of every stage and microbatch has, and until when."""

    def __init__(
        self, schedule: Schedule, timeline: Timeline, lifetimes: Sequence[Lifetimes], forward_only: bool
    ) -> None:
        self.schedule, self.lifetimes, self.forward_only = schedule, lifetimes, forward_only
        self.at = {op: i for row in schedule.rows for i, op in enumerate(row)}
        # One order of all ops of all ranks in which each comes after what it needs.
        self.turn = {event.op: i for i, event in enumerate(timeline.events)}
        self.leases: dict[tuple[str, int, int], _Lease] = {}
        self.counts: dict[tuple[int, str], int] = {}
        self.edges: list[list[Edge]] = [[] for _ in schedule.rows]
        self._assign()

    def _assign(self) -> None:
        stages, micros = self.schedule.stages, self.schedule.micros
        for stage in range(stages):
            for pool in ("SAVED", "KEPT") if self.forward_only else ("SAVED", "KEPT", "OWED"):
                order = self._order(pool, stage)
                spans = [self._span(pool, stage, micro) for micro in order]
                self._enter(pool, stage, order, spans, overlap(spans), oldest=False)
            if stage + 1 < stages:
                self._cross("Y", stage, "X", stage + 1)
                if not self.forward_only:
                    self._cross("DX", stage + 1, "DY", stage)
        # Losses are read after the step.
        self.counts[stages - 1, "Y"] = micros
        end = len(self.schedule.rows[self.schedule.placement[-1]])
        for micro in range(micros):
            start = self.at[Op("F", stages - 1, micro)]
            self.leases["Y", stages - 1, micro] = _Lease(Slot(stages - 1, "Y", micro), start, end, -1)

    def _cross(self, out: str, source: int, into: str, target: int) -> None:
        """Slots for what stage ``source`` gives to its neighbour ``target``."""
        placement, micros = self.schedule.placement, self.schedule.micros
        order = self._order(out, source)
        given = [self._span(out, source, micro) for micro in order]
        taken = [self._span(into, target, micro) for micro in order]
        # On one rank the two tensors are one, from its first writing to its last reading.
        if placement[source] == placement[target]:
            spans = [Span(a.start, max(a.end, b.end)) for a, b in zip(given, taken, strict=True)]
            self._enter(into, target, order, spans, overlap(spans), oldest=False)
            self.leases |= {(out, source, micro): self.leases[into, target, micro] for micro in order}
            return
        sends = self._enter(out, source, order, given, min(overlap(given) + 1, micros), oldest=True)
        reserved = in_order(taken)
        count = max(min(overlap(reserved) + 1, micros), self._rendezvous(out, source, order, sends, target, taken))
        self._enter(into, target, order, reserved, count, oldest=True)
        self._connect(out, source, into, target)

    def _rendezvous(
        self, out: str, source: int, order: Sequence[int], sends: Sequence[Place], target: int, taken: Sequence[Span]
    ) -> int:
        """Receive slots without which a sender could wait for ever for a receive to be posted.

        When the k-th op of ``source`` reuses the slot of an earlier message j, j must have been posted: at least j+1
        slots, less those freed by then. Asking this in one valid order of all ops makes that order free of deadlock.
        """
        row = self.schedule.rows[self.schedule.placement[target]]
        freed = sorted(self.turn[row[span.end]] for span in taken)
        before: dict[int, int] = {}
        need = 1
        for k, (micro, place) in enumerate(zip(order, sends, strict=True)):
            if place.number in before:
                now = self.turn[Op(FIRST[out], source, micro)]
                need = max(need, before[place.number] + 1 - bisect_left(freed, now))
            before[place.number] = k
        return need

    def _connect(self, out: str, source: int, into: str, target: int) -> None:
        """The edges of a crossing: tag 2s for activations over boundary s | s+1, 2s + 1 for gradients."""
        here, there = self.schedule.placement[source], self.schedule.placement[target]
        tag = 2 * min(source, target) + (out == "DX")
        for number in range(self.counts[source, out]):
            self.edges[here].append(Edge(Slot(source, out, number), there, tag, "send"))
        for number in range(self.counts[target, into]):
            self.edges[there].append(Edge(Slot(target, into, number), here, tag, "recv"))

    def _order(self, pool: str, stage: int) -> list[int]:
        """The microbatches in the order in which the stage first touches them in this pool."""
        return sorted(range(self.schedule.micros), key=lambda micro: self.at[Op(FIRST[pool], stage, micro)])

    def _span(self, pool: str, stage: int, micro: int) -> Span:
        """From the first to the last pass of the stage that touches the tensor."""
        life = self.lifetimes[stage]
        last: dict[str, Kind] = {"X": life.x, "Y": life.y, "DY": life.dy, "DX": life.dx, "SAVED": "B"}
        kind: Kind = "F" if self.forward_only else last.get(pool, "W")
        start = self.at[Op(FIRST[pool], stage, micro)]
        return Span(start, max(start, self.at[Op(kind, stage, micro)]))

    def _enter(
        self, pool: str, stage: int, order: Sequence[int], spans: Sequence[Span], count: int, oldest: bool
    ) -> list[Place]:
        """Colours the spans and notes a lease for each."""
        places = colour(spans, count, oldest)
        self.counts[stage, pool] = count
        for micro, span, place in zip(order, spans, places, strict=True):
            self.leases[pool, stage, micro] = _Lease(Slot(stage, pool, place.number), *span, place.since)
        return places

    def slots(self, op: Op) -> tuple[Slot | None, ...]:
        """The slots of the op's microbatch that are live at the op, in the order of POOLS."""
        at = self.at[op]
        leases = (self.leases.get((pool, op.stage, op.micro)) for pool in POOLS)
        return tuple(a.slot if a is not None and a.start <= at <= a.end else None for a in leases)

    def posts(self, rank: int) -> dict[int, list[Instruction]]:
        """The POSTs of a rank by the op after which they are made (-1: before the first)."""
        found: dict[int, list[Instruction]] = {}
        slots = {edge.slot for edge in self.edges[rank] if edge.direction == "recv"}
        for stage, pool in dict.fromkeys((slot.stage, slot.pool) for slot in sorted(slots)):
            sender, out = (stage - 1, "Y") if pool == "X" else (stage + 1, "DX")
            for micro in self._order(out, sender):
                lease = self.leases[pool, stage, micro]
                found.setdefault(lease.since, []).append(Instruction("POST", stage, micro, slot=lease.slot))
        return found


def _program(tenancy: _Tenancy, rank: int) -> Program:
    """One rank's instructions: waits right before the op that needs them, sends and posts right after."""
    row, edges = tenancy.schedule.rows[rank], tenancy.edges[rank]
    remote = {(edge.slot.stage, edge.slot.pool) for edge in edges}
    last_w = {op.stage: i for i, op in enumerate(row) if op.kind == "W"}
    posts = tenancy.posts(rank)
    done, sending = list(posts.get(-1, [])), dict[Slot, Instruction]()
    for i, op in enumerate(row):
        kind, stage, micro = op
        slots = tenancy.slots(op)
        into, out = (slots[POOLS.index(way[kind])] if kind in way else None for way in (RECEIVED, SENT))
        if into is not None and (stage, into.pool) in remote and into.stage == stage:
            done.append(Instruction("WAIT", stage, micro, slot=into))
        if out is not None and out in sending:
            done.append(sending.pop(out)._replace(kind="WAIT"))
        done.append(Instruction(kind, stage, micro, slots))
        if out is not None and (stage, out.pool) in remote and out.stage == stage:
            sending[out] = Instruction("SEND", stage, micro, slot=out)
            done.append(sending[out])
        done += posts.get(i, [])
        if last_w.get(stage) == i:
            done.append(Instruction("REDUCE", stage, -1))
    done += [send._replace(kind="WAIT") for send in sending.values()]
    counts = {key: n for key, n in sorted(tenancy.counts.items()) if tenancy.schedule.placement[key[0]] == rank}
    return Program(rank, tuple(done), counts, tuple(sorted(edges)))
