"""Many candidates for a schedule run side by side, which is what makes a search fast.

A candidate says when each op is due; running it with "the most urgent first" gives rows and times. All candidates of
one placement advance together, wave by wave: in a wave, every rank decides whose turn comes before anything unknown to
it can be over. Rows of numpy columns are ranks of candidates, so a wave costs about the same for one or for a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import KINDS, Op, Schedule, needs

Array = npt.NDArray[Any]

SLACK = 1 + 1e-9  # sums of bytes and of times are rounded
OFTEN = 8  # waves from one look at what can be given up to the next


class Candidate(NamedTuple):
    """When each op is due [passes, micros], and how it is taken."""

    due: Array
    patience: float
    strict: bool


class Shape:
    """A placement as columns. A pass is ``kind * stages + stage``.

    ``passes`` [ranks, columns] are each rank's: F of its stages, B, then W; ``never`` where it has fewer than others.
    """

    def __init__(
        self, placement: tuple[int, ...], micros: int, costs: Costs, hold: Sequence[float], limit: Sequence[float]
    ) -> None:
        self.placement, self.micros, self.costs = placement, micros, costs
        self.stages, self.ranks = len(placement), max(placement) + 1
        mine = [[s for s, where in enumerate(placement) if where == rank] for rank in range(self.ranks)]
        self.each = max(map(len, mine))
        never = 3 * self.stages
        self.passes = np.full((self.ranks, 3 * self.each), never)
        self.hold = np.zeros((self.ranks, self.each))
        for rank, stages in enumerate(mine):
            for i, stage in enumerate(stages):
                self.passes[rank, i :: self.each] = [k * self.stages + stage for k in range(3)]
                self.hold[rank, i] = hold[stage]
        self.mine = [row[row < never] for row in self.passes]
        self.deepest = np.array([len(stages) - 1 for stages in mine])
        self.limit = np.array(limit, float) * SLACK
        self.limited = bool(np.isfinite(self.limit).any())
        self._needs(never)
        self.cost = np.append(np.array([costs.F, costs.B, costs.W], float).ravel(), [0.0, 0.0])
        self.mean = sum(self.cost.tolist()) / never or 1.0
        self.work = [micros * sum(self.cost[each].tolist()) for each in self.mine]
        # No op that has not begun is over within the shortest op; very short ones are not waited for.
        self.window = max(min(self.cost[:never].tolist()), self.mean / 4) * (1 - 1e-9)

    def _needs(self, never: int) -> None:
        """[2, passes]: what each pass needs of the same microbatch, and how much later than its end it arrives.

        Two passes are of no stage: one that is never done, and one that always was, for what needs less than two.
        """
        always = never + 1
        self.need, self.delay = np.full((2, never + 2), always), np.zeros((2, never + 2))
        self.need[0, never] = never
        for k, kind in enumerate(KINDS):
            for s in range(self.stages):
                for i, op in enumerate(needs(Op(kind, s, 0), self.stages)):
                    here = k * self.stages + s
                    self.need[i, here] = KINDS.index(op.kind) * self.stages + op.stage
                    self.delay[i, here] = self.costs.message * (self.placement[s] != self.placement[op.stage])

    def schedule(self, name: str, turn: Array) -> Schedule:
        """The rows of a candidate, from the ``turn`` of its ops."""
        rows = []
        for mine in self.mine:
            which, micro = np.divmod(np.argsort(turn[mine].ravel(), kind="stable"), self.micros)
            kind, stage = np.divmod(mine[which], self.stages)
            ops = zip(kind.tolist(), stage.tolist(), micro.tolist(), strict=True)
            rows.append(tuple(Op(KINDS[k], s, m) for k, s, m in ops))
        return Schedule(name, tuple(rows), self.placement, self.micros)


class Crowd:
    """Candidates of one shape run side by side: ``end`` and ``turn`` [candidates, passes, micros] of every op.

    A rank takes the most urgent op that is ready within its ``patience``. A ``strict`` candidate takes F and B in the
    order in which they are due, and W only while it waits for the next of them, be it for an input or for memory.
    One that cannot end within ``cutoff`` (from a rank's first op on if ``closely``, else from the start) is given up:
    its last ends are infinite.
    """

    def __init__(self, shape: Shape, candidates: Sequence[Candidate], cutoff: float, closely: bool) -> None:
        self.shape, self.cutoff, self.closely = shape, cutoff, closely
        due, patience, strict = (np.array(column) for column in zip(*candidates, strict=True))
        count, passes, micros, ranks = len(candidates), 3 * shape.stages, shape.micros, shape.ranks
        room = (count, passes + 2, micros + 1)
        self.end, self.due, self.turn = np.full(room, np.inf), np.full(room, np.inf), np.zeros(room, np.int32)
        self.end[:, -1, :micros] = 0.0  # what always was; a microbatch too many is never there
        self.due[:, :passes, :micros] = due
        self.each = shape.each
        first = (np.arange(count) * (passes + 2) * (micros + 1))[:, None, None]
        step = np.concatenate([shape.hold, 0 * shape.hold, -shape.hold], axis=1)
        # Of every rank of every candidate that still runs, one row; [rows, columns]: of each pass.
        self.row: dict[str, Array] = {
            "at": (first + shape.passes * (micros + 1)).reshape(count * ranks, -1),
            "need0": (first + shape.need[0, shape.passes] * (micros + 1)).reshape(count * ranks, -1),
            "need1": (first + shape.need[1, shape.passes] * (micros + 1)).reshape(count * ranks, -1),
            "next": np.zeros((count * ranks, shape.passes.shape[1]), np.int64),
            "delay0": np.tile(shape.delay[0, shape.passes], (count, 1)),
            "delay1": np.tile(shape.delay[1, shape.passes], (count, 1)),
            "cost": np.tile(shape.cost[shape.passes], (count, 1)),
            "hold": np.tile(step, (count, 1)),
            "free": np.tile(shape.limit, count),
            "spare": np.tile(shape.limit - shape.hold.sum(1), count),
            "deepest": np.tile(shape.deepest, count),
            "now": np.zeros(count * ranks),
            "first": np.full(count * ranks, np.inf),
            "rest": np.tile(np.array(shape.work), count),
            "left": np.tile(micros * 3 * (shape.deepest + 1), count),
            "patience": np.repeat(patience, ranks),
            "strict": np.repeat(strict, ranks),
            "loose": np.repeat(~strict, ranks),  # for the moment: a strict one that is stuck takes what there is
        }
        self._run()
        self.end, self.turn = self.end[:, :passes, :micros], self.turn[:, :passes, :micros]

    def _run(self) -> None:
        wave = 0
        while len(self.row["left"]):
            wave += 1
            row = self.row
            left = row["left"] > 0
            begin = np.where(left, row["now"], np.inf).reshape(-1, self.shape.ranks).min(1)
            horizon = np.repeat(begin + self.shape.window, self.shape.ranks)
            ready = self._ready()
            room = self._room() if self.shape.limited else None
            if room is not None:
                ready[:, : self.each][~room] = np.inf
            choice = self._choice(ready, room)
            asked = left & (row["now"] < horizon)
            self._begin(np.flatnonzero(asked & (choice >= 0)), choice, ready, wave)
            self._wait(np.flatnonzero(asked & (choice < 0)), ready, horizon)
            if wave % OFTEN == 0:
                self._give_up()

    def _give_up(self) -> None:
        """Drops candidates that are through or cannot be fast enough."""
        row, ranks = self.row, self.shape.ranks
        over = row["now"] + row["rest"]
        if self.closely:
            over = over - np.minimum(row["first"], row["now"])
        late = over.reshape(-1, ranks).max(1) > self.cutoff
        going = (row["left"].reshape(-1, ranks) > 0).any(1) & ~late
        if going.sum() <= 0.8 * len(going):
            keep = np.repeat(going, ranks)
            self.row = {name: column[keep] for name, column in row.items()}

    def _ready(self) -> Array:
        """When the next op of each pass has what it needs; inf where that is not known yet."""
        row = self.row
        first, second = self.end.take(row["need0"]), self.end.take(row["need1"])
        if self.shape.costs.message:
            first += row["delay0"]
            second += row["delay1"]
        return np.asarray(np.maximum(first, second))

    def _room(self) -> Array:
        """Whether the next F of each stage may be held, so that the oldest microbatch can still pass all stages.

        A microbatch is freed only after its F on the rank's deepest stage. What younger ones hold until then must leave
        room for all that the next one there takes: then microbatches can always end one after the other.
        """
        row = self.row
        hold, begun = row["hold"][:, : self.each], row["next"][:, : self.each]
        room = hold <= row["free"][:, None]
        if self.each > 1:
            ahead = begun - begun[np.arange(len(begun)), row["deepest"]][:, None]
            spare = row["spare"] - np.einsum("rc,rc->r", np.maximum(ahead - 1, 0), hold)
            room &= (ahead < 1) | (hold <= spare[:, None])
        return room

    def _choice(self, ready: Array, room: Array | None) -> Array:
        """The column of what each rank does next, -1 for nothing."""
        row = self.row
        rows, loose, now = np.arange(len(ready)), row["loose"], row["now"]
        due, till = self.due.take(row["at"]), now + row["patience"]
        choice = np.full(len(due), -1)
        if loose.any():
            urgent = np.where(ready <= till[:, None], due, np.inf)
            best = urgent.argmin(1)
            choice = np.where(urgent[rows, best] < np.inf, best, -1)
        if loose.all():
            return choice
        split = 2 * self.each
        target = due[:, :split].argmin(1)
        owed = np.where(ready[:, split:] <= now[:, None], due[:, split:], np.inf)
        w = owed.argmin(1)
        strict = np.where(owed[rows, w] < np.inf, w + split, -1)
        if room is not None:
            held_up = np.flatnonzero((target < self.each) & (strict < 0))
            held_up = held_up[~room[held_up, target[held_up]]]
            other = np.where(np.isfinite(ready[held_up, :split]), due[held_up, :split], np.inf).argmin(1)
            strict[held_up] = np.where(ready[held_up, other] <= till[held_up], other, -1)
        strict = np.where(ready[rows, target] <= till, target, strict)
        return np.where(loose, choice, strict)

    def _begin(self, who: Array, choice: Array, ready: Array, wave: int) -> None:
        row, what = self.row, choice[who]
        at, cost = row["at"][who, what], row["cost"][who, what]
        begin = np.maximum(row["now"][who], ready[who, what])
        self.end.put(at, begin + cost)
        self.turn.put(at, wave)
        row["now"][who] = begin + cost
        row["first"][who] = np.minimum(row["first"][who], begin)
        row["rest"][who] -= cost
        row["free"][who] -= row["hold"][who, what]
        row["left"][who] -= 1
        for name in ("next", "at", "need0", "need1"):
            row[name][who, what] += 1

    def _wait(self, who: Array, ready: Array, horizon: Array) -> None:
        """Until something is known to be ready, or could be. Where a whole candidate waits for nothing, it is stuck."""
        row = self.row
        row["loose"] = ~row["strict"]
        if not who.size:
            return
        now = row["now"][who]
        known = np.where(ready[who] > now[:, None], ready[who], np.inf).min(1)
        lost = row["left"] == 0
        lost[who] = np.isinf(known)
        row["loose"] |= np.repeat(lost.reshape(-1, self.shape.ranks).all(1), self.shape.ranks)
        row["now"][who] = np.maximum(now, np.minimum(known, horizon[who]))
