"""What is proven of all ranks' programs together before anything is launched.

Messages have rendezvous semantics: a send is over only when its receive has been posted, and a WAIT blocks until its
message is over. Four proofs, each over the tables as a whole: every op is there once, weight gradients are summed in
the order of the microbatches and reduced when all are in; every slot holds what is read, and is at rest when it is
written; every channel carries the same tensors in the same order on both sides; and the waits have an order, so that
nobody waits for ever. The first offence is told in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.op import KINDS, Kind, Op, ScheduleError
from hpcpipe.schedule.program import COLUMNS, DO, POOLS, Edge, Program, Slot, words

Array = npt.NDArray[Any]

SEND, POST, WAIT, REDUCE = (DO.index(do) for do in ("SEND", "POST", "WAIT", "REDUCE"))
WRITES = {"F": ("Y", "SAVED", "KEPT"), "B": ("DX", "OWED"), "W": ()}
WRITTEN = np.array([[pool in WRITES[kind] for pool in POOLS] for kind in KINDS])
NOTHING = -1
# What a pool adds to the number of a tensor: a stage's X is the Y of the one before, its DY the DX of the one after.
MEANT = np.array(
    [
        len(POOLS) * (1 + {"X": -1, "DY": 1}.get(pool, 0)) + POOLS.index({"X": "Y", "DY": "DX"}.get(pool, pool))
        for pool in POOLS
    ],
    np.int32,
)


def check(programs: Sequence[Program]) -> None:
    """Raises ScheduleError, in words, unless all ops are there, slots hold what is read and all come to their end."""
    proof = _Proof(programs)
    proof.ops()
    proof.slots()
    proof.channels()
    proof.order()
    proof.end()


class _Proof:
    """All programs as one table, rank by rank; slots are counted through over all ranks."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = programs
        named = [int(p.table[:, 1].max(initial=0)) for p in programs]
        self.stages = 1 + max([*named, *(stage for p in programs for stage, _ in p.counts)], default=0)
        lengths = [len(p.table) for p in programs]
        most = 1 + max((int(p.table[:, 2].max(initial=-1)) for p in programs), default=0)
        # Of tensors' numbers, from one microbatch to the next; of four bytes where all numbers fit into them.
        self.unit = np.min_scalar_type(-len(POOLS) * (self.stages + 2) * most * 2).type(self.stages + 2)
        self.table = np.concatenate([*(p.table for p in programs), np.zeros((0, COLUMNS), np.int32)])
        self.rank = np.repeat(np.arange(len(programs)), lengths)
        self.first = np.cumsum([0, *lengths])
        sizes = [sum(p.counts.values()) for p in programs]
        shift = np.cumsum([0, *sizes]).astype(np.int32)[self.rank][:, None]
        self.slot = np.where(
            self.table[:, 3:] >= 0, self.table[:, 3:] + shift, np.int32(NOTHING)
        )  # a column per pool, then one
        # Columns over slots: pool, stage, and of its channel the direction (0: none, 1: send, 2: recv), peer and tag.
        keys = [
            (POOLS.index(pool), stage, *_channel(p.channel.get((stage, pool))))
            for p in programs
            for stage, pool in p.counts
        ]
        counts = [count for p in programs for count in p.counts.values()]
        columns = np.repeat(np.array(keys, np.int32).reshape(-1, 5), counts, axis=0)
        self.pool, self.owner, self.direction, self.peer, self.tag = np.ascontiguousarray(columns.T)
        self.number = np.arange(len(columns)) - np.repeat(np.cumsum([0, *counts])[:-1], counts)

    # --- tensors: what a stage means by its pool, as a number; an X is the Y it came from, a DY the DX

    def tensor(self, pool: Array, stage: Array, micro: Array) -> Array:
        return np.asarray((micro * self.unit + stage) * len(POOLS) + MEANT[pool])

    def place(self, slot: int) -> str:
        """A slot in words."""
        return words(Slot(int(self.owner[slot]), POOLS[self.pool[slot]], int(self.number[slot])))

    def named(self, tensor: int) -> str:
        """A tensor in words."""
        rest, pool = divmod(int(tensor), len(POOLS))
        micro, owner = divmod(rest, self.stages + 2)
        return f"{POOLS[pool]} of stage {owner - 1}, microbatch {micro}"

    # --- ops

    def ops(self) -> None:
        """Every stage, at home on one rank, has each op once, its Ws in order, then its REDUCE; or forwards alone."""
        do, stage, micro = self.table[:, :3].T.astype(np.int64)
        trains = bool((((do > 0) & (do < len(KINDS))) | (do == REDUCE)).any())
        rows = np.flatnonzero(do < len(KINDS))
        shape = len(KINDS) if trains else 1, self.stages, int(micro[rows].max(initial=-1)) + 1
        key = np.ravel_multi_index((do[rows], stage[rows], micro[rows]), shape)
        self._once(key, rows, shape, lambda i: str(_op(np.unravel_index(i, shape))))
        home = np.zeros(self.stages, np.int64)
        home[stage[rows]] = self.rank[rows]
        for row in rows[home[stage[rows]] != self.rank[rows]][:1]:
            raise self.error(row, f"does {_op(self.table[row])}, but stage {stage[row]} is on rank {home[stage[row]]}")
        if not trains:
            return
        weights = self._by_stage("W")
        # A last stage's F has the gradients of the head at hand and sums them too.
        for sums in (weights, self._by_stage("F")[self._last_stages()]):
            for row in sums[:, 1:][np.diff(micro[sums]) < 0][:1]:
                raise self.error(row, f"sums {_op(self.table[row])} after a later microbatch")
        sums = np.flatnonzero(do == REDUCE)
        self._once(stage[sums], sums, (self.stages,), lambda i: f"the REDUCE of stage {i}")
        for row in sums[(sums < weights[stage[sums], -1]) | (home[stage[sums]] != self.rank[sums])][:1]:
            raise self.error(row, f"has the REDUCE of stage {stage[row]} before the last of its Ws, or without them")

    def _by_stage(self, kind: Kind) -> Array:
        """The rows of the ops of a kind [stages, microbatches], in their order."""
        found = np.flatnonzero(self.table[:, 0] == KINDS.index(kind))
        return found[np.argsort(self.table[found, 1], kind="stable")].reshape(self.stages, -1)

    def _once(self, key: Array, rows: Array, shape: tuple[int, ...], name: Callable[[int], str]) -> None:
        """Every key is there once."""
        times = np.bincount(key, minlength=math.prod(shape))
        for i in np.flatnonzero(times > 1)[:1].tolist():
            raise self.error(rows[np.flatnonzero(key == i)[1]], f"has {name(i)} once more")
        for i in np.flatnonzero(times == 0)[:1].tolist():
            raise ScheduleError(f"no rank has {name(i)}")

    # --- slots

    @cached_property
    def messages(self) -> Array:
        """Rows that are POST, SEND or WAIT."""
        rows = np.flatnonzero((self.table[:, 0] >= POST) & (self.table[:, 0] <= WAIT))
        for row in rows[(self.slot[rows, -1] < 0) | (self.direction[self.slot[rows, -1]] == 0)][:1]:
            raise self.error(row, f"has a {DO[self.table[row, 0]]} without an edge")
        return rows

    def slots(self) -> None:
        """Reads find what was written last; what is on its way is left alone; waits are for something."""
        _ = self.messages  # all have a slot
        used = np.flatnonzero(self.slot >= 0)  # row by row; messages have the last column, ops the others
        order = np.argsort(self.slot.ravel()[used], kind="stable")
        used, width = used[order], len(POOLS) + 1
        rows, at = used // width, self.slot.ravel()[used]
        what = (used - width * rows).astype(np.int32)
        do, stage, micro = (column[rows] for column in np.ascontiguousarray(self.table[:, :3].T))
        mine = what < len(POOLS)
        writes = mine & WRITTEN[np.minimum(do, len(KINDS) - 1), np.minimum(what, len(POOLS) - 1)]
        tensor = self.tensor(np.where(mine, what, self.pool[at]), stage, micro)
        fresh = np.append(True, at[1:] != at[:-1])
        group = np.maximum.accumulate(np.where(fresh, np.arange(len(at)), 0))

        # Whether a message of the slot is under way before each event, and which instruction started it.
        starts, ends = (do == SEND) | (do == POST), do == WAIT
        last = _before(starts | ends, group)
        busy = (last >= 0) & starts[last]
        # What the slot holds before each event; a receive brings what its WAIT names, which ``channels`` proves.
        changes = writes | (do == POST) | (ends & (self.direction[at] == 2))
        filled = _before(changes, group)
        holds = np.where((filled >= 0) & (do[filled] != POST), tensor[filled], NOTHING)

        recv = self.direction[at] == 2
        wrong = np.where(
            mine,
            np.where(busy & (writes | recv), 1, np.where(~writes & (holds != tensor), 2, 0)),
            np.where(
                do == WAIT,
                np.where(busy, 0, 3),
                np.where(busy | ((do == SEND) == recv), 4, np.where((do == SEND) & (holds != tensor), 5, 0)),
            ),
        )
        if wrong.any():
            i = min(np.flatnonzero(wrong), key=lambda i: (rows[i] - self.first[self.rank[rows[i]]], self.rank[rows[i]]))
            raise self.error(rows[i], self._offence(int(wrong[i]), rows[i], int(at[i]), int(tensor[i]), int(holds[i])))
        self._wrong_wait(rows, ends, tensor, last)
        self.started = np.full(len(self.table), NOTHING, np.int64)  # of a WAIT: the row that started its message
        self.started[rows[ends]] = rows[last[ends]]
        self.events = rows, at, do, tensor, writes

    def _wrong_wait(self, rows: Array, ends: Array, tensor: Array, last: Array) -> None:
        """A WAIT names the message that its slot's SEND or POST started."""
        for i in np.flatnonzero(ends & (tensor != tensor[last]))[:1]:
            raise self.error(rows[i], f"waits for {self.named(tensor[i])}, but started {self.named(tensor[last[i]])}")

    def _offence(self, wrong: int, row: int, at: int, tensor: int, holds: int) -> str:
        do, stage, micro = (int(x) for x in self.table[row, :3])
        op, slot, held = f"{DO[do]}{stage}.{micro}", self.place(at), "nothing"
        if holds != NOTHING:
            held = self.named(holds)
        return {
            1: f"touches {slot} in {op} while its message is under way",
            2: f"needs {self.named(tensor)} for {op}, but {slot} holds {held}",
            3: f"waits for {slot}, which has no message under way",
            4: f"cannot {DO[do]} {self.named(tensor)} in {slot}: it is busy or of the other direction",
            5: f"sends {self.named(tensor)}, but {slot} holds {held}",
        }[wrong]

    def end(self) -> None:
        """When the step ends, nothing may be on its way, and the last stages must still hold every loss."""
        rows, at, do, tensor, writes = self.events
        last = np.zeros(len(self.pool), np.int64)
        state = np.full(len(self.pool), NOTHING, np.int64)
        message = do >= len(KINDS)
        state[at[message]] = np.flatnonzero(message)  # ascending: the last one stays
        for slot in np.flatnonzero((state >= 0) & (do[state] != WAIT))[:1]:
            row = rows[state[slot]]
            raise self.error(row, f"ends the step with a message under way in {self.place(slot)}")
        last[at[writes]] = tensor[writes]
        is_loss = np.isin(self.table[:, 1], self._last_stages())
        forward = np.flatnonzero((self.table[:, 0] == 0) & is_loss & (self.slot[:, POOLS.index("Y")] >= 0))
        y = np.full(len(forward), POOLS.index("Y"))
        made = self.tensor(y, self.table[forward, 1], self.table[forward, 2])
        slot = self.slot[forward, POOLS.index("Y")]
        for i in np.flatnonzero(last[slot] != made)[:1]:
            held = self.named(last[slot[i]])
            where = self.place(slot[i])
            raise self.error(forward[i], f"ends the step without {self.named(made[i])}: {where} holds {held}")

    def _last_stages(self) -> Array:
        """Stages whose output no other takes: it is neither sent nor does it lie in the next stage's X."""
        return np.setdiff1d(np.arange(self.stages), self.owner[self.pool == POOLS.index("X")] - 1)

    # --- messages

    def channels(self) -> None:
        """The k-th SEND of a channel and the k-th POST are of one tensor; there are as many of one as of the other."""
        rows = self.messages[self.table[self.messages, 0] != WAIT]
        slot = self.slot[rows, -1]
        peer, tag = self.peer[slot], self.tag[slot]
        sends, here = self.table[rows, 0] == SEND, self.rank[rows]
        source, target = np.where(sends, here, peer), np.where(sends, peer, here)
        channel = (source * len(self.programs) + target) * (tag.max(initial=0) + 1) + tag
        order = np.lexsort((rows, channel))
        s, p = order[sends[order]], order[~sends[order]]
        tensor = self.tensor(self.pool[slot], self.table[rows, 1], self.table[rows, 2])
        names, sent = np.unique(channel[s], return_counts=True)
        others, posted = np.unique(channel[p], return_counts=True)
        if len(s) != len(p) or not np.array_equal(names, others) or (sent != posted).any():
            one = next(c for c in np.union1d(names, others) if (channel[s] == c).sum() != (channel[p] == c).sum())
            i = int(np.flatnonzero(channel == one)[0])
            raise ScheduleError(
                f"rank {source[i]} sends {(channel[s] == one).sum()} messages to rank {target[i]} (tag {tag[i]}), "
                f"which posts {(channel[p] == one).sum()}"
            )
        for i in np.flatnonzero(tensor[s] != tensor[p])[:1]:
            what = f"SENDs {self.named(tensor[s[i]])}, but rank {target[s[i]]} means {self.named(tensor[p[i]])}"
            raise self.error(rows[s[i]], what)
        self.partner = np.full(len(self.table), NOTHING, np.int64)  # of a SEND its POST, of a POST its SEND
        self.partner[rows[s]], self.partner[rows[p]] = rows[p], rows[s]

    # --- order

    def order(self) -> None:
        """A rank runs until a WAIT whose other half has not been started; when no rank moves, none ever will."""
        waits = [np.flatnonzero(p.table[:, 0] == WAIT) for p in self.programs]
        width = max(map(len, waits)) + 1
        at = np.zeros((len(self.programs), width), np.int64)  # where each rank's next WAIT stands; its end behind them
        other = np.zeros((len(self.programs), width), np.int64)  # the row of the other half
        for rank, found in enumerate(waits):
            at[rank, : len(found)], at[rank, len(found) :] = found, len(self.programs[rank].table)
            other[rank, : len(found)] = self.partner[self.started[self.first[rank] + found]]
        who, offset = self.rank[other], other - self.first[self.rank[other]]
        every, here = np.arange(len(self.programs)), np.zeros(len(self.programs), np.int64)
        more = np.array([len(found) for found in waits])
        while True:
            now = at[every, here]
            go = (here < more) & (now[who[every, here]] > offset[every, here])
            if not go.any():
                break
            here += go
        if (here < more).any():
            lines = [f"  {self._report(rank, at[every, here])}" for rank in np.flatnonzero(here < more).tolist()]
            raise ScheduleError("\n".join(["deadlock: no rank can go on", *lines]))

    def _report(self, rank: int, now: Array) -> str:
        """``rank 3 waits for F4.7 from rank 2 (rank 2 is at B3.5)``."""
        at = int(now[rank])
        _, peer, _ = self.programs[rank].awaited(at)
        where = self.programs[peer].standing(int(now[peer]))
        return f"rank {rank} waits for {self.programs[rank].waiting(at)} (rank {peer} is at {where})"

    def error(self, row: int, what: str) -> ScheduleError:
        rank = int(self.rank[row])
        return ScheduleError(f"rank {rank} {what}, at instruction {int(row) - self.first[rank]}")


def _channel(edge: Edge | None) -> tuple[int, int, int]:
    return (0, NOTHING, NOTHING) if edge is None else (1 if edge.direction == "send" else 2, edge.peer, edge.tag)


def _op(row: Sequence[Any]) -> Op:
    """An op from the first three numbers of its row."""
    return Op(KINDS[int(row[0])], int(row[1]), int(row[2]))


def _before(marked: Array, group: Array) -> Array:
    """Of each event: the last marked one before it in its group (a run that starts at ``group``), -1 for none."""
    last = np.maximum.accumulate(np.where(marked, np.arange(len(marked)), -1))
    earlier = np.append(-1, last[:-1])
    return np.where(earlier >= group, earlier, -1)
