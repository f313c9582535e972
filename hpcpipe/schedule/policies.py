"""Policies: what a free rank does next, in a few lines each.

A policy is told which passes are ready on a free rank, each with its lowest microbatch, and picks one, or None to wait.
All but ``follow`` take any placement: one stage per rank, consecutive stages on one rank, or stages strewn over the
ranks. Where they let W follow its B at once, a stage owes one microbatch at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from hpcpipe.schedule.engine import Choose, Pass, Ready, State
from hpcpipe.schedule.op import Op, boundaries


def gpipe(placement: Sequence[int], micros: int) -> Choose:
    """All forwards of the rank, then all backwards (Huang et al., arXiv:1811.06965)."""
    mine = [sum(r == rank for r in placement) * micros for rank in range(max(placement) + 1)]

    def choose(rank: int, ready: Ready, state: State) -> Op | None:
        return _first(ready, "F" if state.tally[rank]["F"] < mine[rank] else "WB")

    return choose


def one_f_one_b(placement: Sequence[int], micros: int) -> Choose:
    """Backward as soon as one is ready; forward while few enough microbatches are in flight.

    The limit for a stage is 1 + the messages between it and the end. For one stage per rank that is a warm-up of P-s-1
    forwards, then one forward, one backward (PipeDream-flush; Narayanan et al., arXiv:2104.04473, section 2.2).
    """
    crossings = boundaries(placement)
    limit = [1 + sum(b >= stage for b in crossings) for stage in range(len(placement))]

    def choose(rank: int, ready: Ready, state: State) -> Op | None:
        # A microbatch that has entered a run of stages on this rank goes through all of it.
        if state.rows[rank] and (last := state.rows[rank][-1]).kind == "F":
            onward = Op("F", last.stage + 1, last.micro)
            if ready.get(("F", onward.stage)) == onward.micro:
                return onward
        full = {key for key in ready if key[0] == "F" and state.in_flight(key[1]) >= limit[key[1]]}
        return _first({key: micro for key, micro in ready.items() if key not in full}, "WBF")

    return choose


def follow(rows: Sequence[Sequence[Pass]], room: Sequence[int]) -> Choose:
    """F and B in the order of the rows; W in the holes, the lowest microbatch first.

    A hole is where the next pass of the row is not ready, or is an F that would leave the rank holding more than
    ``room`` microbatches between their F and their W, counted once for each of its stages.
    """

    def choose(rank: int, ready: Ready, state: State) -> Op | None:
        f, b, w = state.tally[rank].values()
        key = rows[rank][f + b] if f + b < len(rows[rank]) else None
        if key is not None and key in ready and (key[0] == "B" or f - w < room[rank] or b == w):
            return Op(*key, ready[key])
        return _first(ready, "W")

    return choose


def forward(rank: int, ready: Ready, state: State) -> Op | None:
    """Forward only, for evaluation: the lowest microbatch that is ready."""
    return _first(ready, "F")


def _first(ready: Ready, kinds: str) -> Op | None:
    """The ready op of the first of ``kinds`` that has one: lowest microbatch, then deepest stage."""
    for kind in kinds:
        found = [(micro, -key[1], key) for key, micro in ready.items() if key[0] == kind]
        if found:
            micro, _, key = min(found)
            return Op(*key, micro)
    return None
