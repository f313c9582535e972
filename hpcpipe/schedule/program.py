"""Lowering: from a schedule to what each rank executes, with every slot, peer and tag fixed before step 0.

In: a schedule and, per stage, how long its boundary tensors live. Out: one ``Program`` per rank, instructions over
numbered slots. Nothing here knows a size; ``memory`` folds sizes over the counts. ``check`` proves the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.op import KINDS, Kind, Op, Schedule, ScheduleError
from hpcpipe.schedule.replay import Walk, validate
from hpcpipe.schedule.slots import colour, in_order, overlap

Array = npt.NDArray[Any]
Key = tuple[int, str]  # a stage and one of its pools

# Per stage and microbatch: activation in and out, gradient in and out, what B needs from F, W from F, and W from B.
POOLS = ("X", "Y", "DY", "DX", "SAVED", "KEPT", "OWED")
FIRST: dict[str, Kind] = {"X": "F", "Y": "F", "DY": "B", "DX": "B", "SAVED": "F", "KEPT": "F", "OWED": "B"}
RECEIVED = {"F": "X", "B": "DY"}
SENT = {"F": "Y", "B": "DX"}
MAX_TAG = 16000  # MPI guarantees 32767: room for a second program's tags and for the link's own

Do = Literal["F", "B", "W", "POST", "SEND", "WAIT", "REDUCE"]
DO: tuple[Do, ...] = ("F", "B", "W", "POST", "SEND", "WAIT", "REDUCE")
# Columns of a program's table: what to do, stage, microbatch, a slot per pool, the slot of a message. -1: none.
COLUMNS = 3 + len(POOLS) + 1
# Where an instruction stands around the op of its row.
RECEIVE, RELEASE, COMPUTE, HAND_OVER, POST, REDUCE = range(6)


class Lifetimes(NamedTuple):
    """The last pass of the owning stage that touches each boundary tensor; an absent tensor's entry is ignored."""

    x: Kind
    y: Kind
    dy: Kind
    dx: Kind

    def last(self, pool: str) -> Kind:
        """The last pass that touches what is in a pool."""
        ends: dict[str, Kind] = {"X": self.x, "Y": self.y, "DY": self.dy, "DX": self.dx, "SAVED": "B"}
        return ends.get(pool, "W")


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
    """A stage's pool whose tensors are messages: the other rank, the tag. Its slots are the buffers."""

    stage: int
    pool: str
    peer: int
    tag: int
    direction: Literal["send", "recv"]


@dataclass(frozen=True)
class Program:
    """What one rank executes in a step; ``counts[stage, pool]`` slots are all the memory it needs for it.

    ``table`` holds the instructions as numbers [instructions, COLUMNS]: slots are counted through in the order of
    ``counts``. ``instructions`` is the same for reading.
    """

    rank: int
    table: Array = field(compare=False, repr=False)
    counts: dict[Key, int]
    edges: tuple[Edge, ...]

    @classmethod
    def of(
        cls, rank: int, instructions: Iterable[Instruction], counts: dict[Key, int], edges: tuple[Edge, ...]
    ) -> Program:
        """A program from its instructions; a slot that ``counts`` does not have raises ScheduleError."""
        empty = cls(rank, np.zeros((0, COLUMNS), np.int32), counts, edges)

        def number(slot: Slot | None) -> int:
            if slot is None:
                return -1
            if not 0 <= slot.number < counts.get(slot[:2], 0):
                raise ScheduleError(f"rank {rank} uses {words(slot)}, which it does not have")
            return empty.first[slot[:2]] + slot.number

        none = (None,) * len(POOLS)
        rows = [[DO.index(i.kind), i.stage, i.micro, *map(number, i.slots or none), number(i.slot)]
                for i in instructions]  # fmt: skip
        return cls(rank, np.array(rows, np.int32).reshape(-1, COLUMNS), counts, edges)

    @cached_property
    def first(self) -> dict[Key, int]:
        """The number of each pool's first slot."""
        ends = np.cumsum([0, *self.counts.values()])
        return dict(zip(self.counts, ends.tolist(), strict=False))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """All slots by their numbers."""
        return tuple(Slot(*key, number) for key, count in self.counts.items() for number in range(count))

    @cached_property
    def instructions(self) -> tuple[Instruction, ...]:
        """The table in words."""
        slots = (*self.slots, None)  # -1: none
        return tuple(
            Instruction(
                DO[kind], stage, micro, tuple(slots[i] for i in row[:-1]) if kind < len(KINDS) else (), slots[row[-1]]
            )
            for kind, stage, micro, *row in self.table.tolist()
        )

    @cached_property
    def channel(self) -> Mapping[Key, Edge]:
        """The edge that a pool sends or receives through."""
        return {(edge.stage, edge.pool): edge for edge in self.edges}

    def standing(self, at: int) -> str:
        """The op that the rank is at or before, for reports: ``B3.5``, or ``the end of the step``."""
        rest = self.table[max(at, 0) :]
        ops = rest[rest[:, 0] < len(KINDS)]
        return str(Op(KINDS[int(ops[0, 0])], int(ops[0, 1]), int(ops[0, 2]))) if len(ops) else "the end of the step"

    def waiting(self, at: int) -> str:
        """What the WAIT at index ``at`` waits for, in words: ``F4.7 from rank 2``."""
        op, peer, arrives = self.awaited(at)
        return f"{op} from rank {peer}" if arrives else f"rank {peer} to take {op}"

    def awaited(self, at: int) -> tuple[Op, int, bool]:
        """Of the WAIT at index ``at``: the op whose result it is about, the other rank, whether it comes or goes."""
        stage, micro, slot = (int(self.table[at, i]) for i in (1, 2, -1))
        pool, peer = self.slots[slot].pool, self.channel[self.slots[slot][:2]].peer
        op = {"X": Op("F", stage - 1, micro), "DY": Op("B", stage + 1, micro), "Y": Op("F", stage, micro)}
        return op.get(pool, Op("B", stage, micro)), peer, pool in ("X", "DY")


def words(slot: Slot) -> str:
    """A slot, for messages."""
    return f"slot {slot.number} of {slot.pool} of stage {slot.stage}"


def memory(program: Program, bytes_of: Callable[[int, str], int]) -> int:
    """Bytes of all slots of a rank, where one slot of (stage, pool) has ``bytes_of(stage, pool)``."""
    return sum(count * bytes_of(stage, pool) for (stage, pool), count in program.counts.items())


def lower(schedule: Schedule, lifetimes: Sequence[Lifetimes], forward_only: bool = False) -> tuple[Program, ...]:
    """The program of every rank. ``forward_only`` keeps the forwards alone, with everything dead after its F.

    ``lifetimes`` are per stage. Raises ScheduleError for a schedule that ``validate`` refuses or that needs more tags
    than MPI has.
    """
    if 2 * schedule.stages > MAX_TAG:
        raise ScheduleError(
            f"{schedule.stages} stages need more message tags than the {MAX_TAG} there are; use fewer stages"
        )
    schedule = schedule.only("F") if forward_only else schedule
    walk = validate(schedule, KINDS[:1] if forward_only else KINDS)
    return _Lowering(schedule, walk, lifetimes, forward_only).programs()


class _Lease(NamedTuple):
    """Who holds which slots of a pool when: columns over the microbatches in the order of their first touch."""

    key: Key
    micro: Array
    start: Array
    end: Array
    slot: Array
    before: Array


class _Lowering:
    """Which slot every tensor of every stage and microbatch has and until when; then the instructions around it."""

    def __init__(self, schedule: Schedule, walk: Walk, lifetimes: Sequence[Lifetimes], forward_only: bool) -> None:
        self.schedule, self.lifetimes, self.forward_only = schedule, lifetimes, forward_only
        # at[kind, stage, micro]: index in the row. turn: place in one order of all ops in which each has what it needs.
        self.at, self.turn = walk.table.at, walk.turn
        self.turns = [walk.turn.ravel()[row] for row in walk.table.rows]
        self.leases: dict[Key, _Lease] = {}  # by the pool that a stage knows the tensor under
        self.counts: list[dict[Key, int]] = [{} for _ in schedule.rows]
        self.edges: list[list[Edge]] = [[] for _ in schedule.rows]
        self.parts: list[list[Array]] = [[] for _ in schedule.rows]  # rows of [index, phase, tie, *table columns]
        for stage in range(schedule.stages):
            self._assign(stage)

    def _assign(self, stage: int) -> None:
        """Slots of what a stage keeps for itself and of what it hands to the next."""
        for pool in ("SAVED", "KEPT") if self.forward_only else ("SAVED", "KEPT", "OWED"):
            micro, start, end = self._spans(pool, stage, stage)
            self._enter((stage, pool), micro, start, end, overlap(start, end))
        if (stage + 1) % self.schedule.depth:
            self._cross("Y", stage, "X", stage + 1)
            if not self.forward_only:
                self._cross("DX", stage + 1, "DY", stage)
        else:  # losses are read after the step
            micro, start, _ = self._spans("Y", stage, stage)
            end = np.full(len(micro), len(self.schedule.rows[self.schedule.placement[stage]]))
            order = np.argsort(micro)  # slot m holds the loss of microbatch m
            self._note(_Lease((stage, "Y"), micro[order], start[order], end, micro[order], micro * 0 - 1), len(micro))

    def _spans(self, pool: str, stage: int, source: int) -> tuple[Array, Array, Array]:
        """(microbatch, first, last op of the stage that touches it), in the order in which ``source`` makes them."""
        made = KINDS.index(FIRST[pool])
        micro = np.argsort(self.at[made, source])
        start = self.at[made, stage, micro]
        kind: Kind = "F" if self.forward_only else self.lifetimes[stage].last(pool)
        return micro, start, np.maximum(start, self.at[KINDS.index(kind), stage, micro])

    def _cross(self, out: str, source: int, into: str, target: int) -> None:
        """Slots for what stage ``source`` gives to its neighbour ``target``."""
        placement, micros = self.schedule.placement, self.schedule.micros
        micro, start, end = self._spans(out, source, source)
        _, begin, last = self._spans(into, target, source)
        # On one rank the two tensors are one, from its first writing to its last reading.
        if placement[source] == placement[target]:
            end = np.maximum(end, last)
            lease = self._enter((target, into), micro, start, end, overlap(start, end))
            self.leases[source, out] = lease
            return
        sent = self._enter((source, out), micro, start, end, min(overlap(start, end) + 1, micros))
        reserved = in_order(begin)
        need = self._rendezvous(sent, KINDS.index(FIRST[out]), source, last, placement[target])
        self._enter((target, into), micro, reserved, last, max(min(overlap(reserved, last) + 1, micros), need))
        # Tag 2s for activations over boundary s | s+1, 2s + 1 for gradients.
        tag = 2 * min(source, target) + (out == "DX")
        self.edges[placement[source]].append(Edge(source, out, placement[target], tag, "send"))
        self.edges[placement[target]].append(Edge(target, into, placement[source], tag, "recv"))

    def _rendezvous(self, sent: _Lease, kind: int, source: int, last: Array, target: int) -> int:
        """Receive slots without which a sender could wait for ever for a receive to be posted.

        When an op of ``source`` reuses the slot of an earlier message j, j must have been posted: at least j+1 slots,
        less those freed by then. Asking this in one valid order of all ops makes that order free of deadlock.
        """
        freed = np.sort(self.turns[target][last])
        again = sent.before >= 0
        now = self.turn[kind, source, sent.micro[again]]
        return int((sent.before[again] + 1 - np.searchsorted(freed, now)).max(initial=1))

    def _enter(self, key: Key, micro: Array, start: Array, end: Array, count: int) -> _Lease:
        lease = _Lease(key, micro, start, end, *colour(start, end, count))
        self._note(lease, count)
        return lease

    def _note(self, lease: _Lease, count: int) -> None:
        self.leases[lease.key] = lease
        self.counts[self.schedule.placement[lease.key[0]]][lease.key] = count

    # --- instructions

    def programs(self) -> tuple[Program, ...]:
        """Every rank's instructions in their order: waits right before the op that needs them, sends right after it."""
        self.counts = [dict(sorted(counts.items())) for counts in self.counts]
        for stage in range(self.schedule.stages):
            self._compute(stage)
        for rank, edges in enumerate(self.edges):
            for edge in edges:
                (self._sends if edge.direction == "send" else self._receives)(rank, edge)
            if not self.forward_only:
                self._reductions(rank)
        return tuple(self._program(rank) for rank in range(self.schedule.ranks))

    def _program(self, rank: int) -> Program:
        parts = np.concatenate(self.parts[rank])
        order = np.lexsort((parts[:, 2], (parts[:, 0] + 1) * (REDUCE + 1) + parts[:, 1]))
        table = parts[:, 3:].astype(np.int32)[order]
        return Program(rank, table, self.counts[rank], tuple(sorted(self.edges[rank])))

    @cached_property
    def _firsts(self) -> list[dict[Key, int]]:
        none = np.zeros((0, COLUMNS), np.int32)
        return [Program(rank, none, counts, ()).first for rank, counts in enumerate(self.counts)]

    def _rows(self, index: Array, phase: int, tie: Array | int, do: Do, stage: int, micro: Array) -> Array:
        rows = np.full((len(micro), 3 + COLUMNS), -1, np.int64)
        for column, value in enumerate((index, phase, tie, DO.index(do), stage, micro)):
            rows[:, column] = value
        return rows

    def _compute(self, stage: int) -> None:
        """The ops of a stage, each with the slots that are live at it."""
        rank, micro = self.schedule.placement[stage], np.arange(self.schedule.micros)
        for k, kind in enumerate(KINDS[:1] if self.forward_only else KINDS):
            rows = self._rows(self.at[k, stage], COMPUTE, 0, kind, stage, micro)
            for column, pool in enumerate(POOLS, 6):
                if (lease := self.leases.get((stage, pool))) is not None:
                    at = self.at[k, stage, lease.micro]
                    live = (lease.start <= at) & (at <= lease.end)
                    rows[lease.micro, column] = np.where(live, self._firsts[rank][lease.key] + lease.slot, -1)
            self.parts[rank].append(rows)

    def _sends(self, rank: int, edge: Edge) -> None:
        """SEND right after the op; WAIT before the op that writes the slot again, or at the end of the step."""
        lease, first = self.leases[edge.stage, edge.pool], self._firsts[rank][edge.stage, edge.pool]
        tie = 2 * edge.stage + (edge.pool == "DX")
        send = self._rows(lease.start, HAND_OVER, 0, "SEND", edge.stage, lease.micro)
        again = np.flatnonzero(lease.before >= 0)
        before = lease.before[again]
        wait = self._rows(lease.start[again], RELEASE, 0, "WAIT", edge.stage, lease.micro[before])
        waited = np.zeros(len(lease.micro), bool)
        waited[before] = True
        left = np.flatnonzero(~waited)
        ends = np.full(len(left), len(self.schedule.rows[rank]))
        last = self._rows(ends, RELEASE, lease.start[left] * 2 * MAX_TAG + tie, "WAIT", edge.stage, lease.micro[left])
        for rows, slots in ((send, lease.slot), (wait, lease.slot[before]), (last, lease.slot[left])):
            rows[:, -1] = first + slots
            self.parts[rank].append(rows)

    def _receives(self, rank: int, edge: Edge) -> None:
        """POST right after the op that frees the slot; WAIT right before the op that reads it."""
        lease, first = self.leases[edge.stage, edge.pool], self._firsts[rank][edge.stage, edge.pool]
        since = np.where(lease.before >= 0, lease.end[lease.before], -1)
        tie = (2 * edge.stage + (edge.pool == "DY")) * self.schedule.micros + np.arange(len(lease.micro))
        post = self._rows(since, POST, tie, "POST", edge.stage, lease.micro)
        read = self.at[KINDS.index(FIRST[edge.pool]), edge.stage, lease.micro]
        wait = self._rows(read, RECEIVE, 0, "WAIT", edge.stage, lease.micro)
        for rows in (post, wait):
            rows[:, -1] = first + lease.slot
            self.parts[rank].append(rows)

    def _reductions(self, rank: int) -> None:
        """After the last W of each stage; between copies of one model in one order, when their rank is done."""
        stages = [s for s, r in enumerate(self.schedule.placement) if r == rank]
        for stage in stages:
            last = int(self.at[KINDS.index("W"), stage].max())
            if self.schedule.chains > 1:
                last = len(self.schedule.rows[rank]) - 1
            tie = stage % self.schedule.depth
            self.parts[rank].append(self._rows(np.array([last]), REDUCE, tie, "REDUCE", stage, np.array([-1])))
