"""Where the chain of slots (embed, layers, head) is cut into stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from hpcpipe.config import UserError


def bounds(cut: str | Sequence[int], costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Slot boundaries (0, …, slots) of a cut.

    "auto" balances ``costs``, "even" counts slots, a list gives slots per stage.
    """
    slots = len(costs)
    if stages > slots:
        raise UserError(
            f"pipeline: {stages} stages for a model of {slots} slots (embedding, {slots - 2} layers, head); "
            f"use pipeline.stages <= {slots} or more layers"
        )
    if not isinstance(cut, str):
        return _listed(cut, slots, stages)
    return balanced([1.0] * slots if cut == "even" else costs, stages)


def _listed(cut: Sequence[int], slots: int, stages: int) -> tuple[int, ...]:
    if len(cut) != stages or sum(cut) != slots or min(cut) < 1:
        raise UserError(
            f"pipeline.cut = {list(cut)} must list {stages} numbers >= 1 that sum to {slots} slots "
            f"(embedding, {slots - 2} layers, head); it lists {len(cut)} that sum to {sum(cut)}"
        )
    return (0, *accumulate(cut))


def balanced(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Contiguous parts whose most expensive one is as cheap as possible; exact, by dynamic programming.

    Among equally good cuts, the one whose last stage starts first: a late stage holds fewer microbatches in flight.
    """
    n = len(costs)
    prefix = [0.0, *accumulate(costs)]
    # worst[k][j]: the smallest possible maximum over k parts of the first j slots, and where the last part starts
    worst: list[list[tuple[float, int]]] = [[(0.0 if j == 0 else float("inf"), 0) for j in range(n + 1)]]
    for k in range(1, stages + 1):
        row: list[tuple[float, int]] = [(float("inf"), 0)] * (n + 1)
        for j in range(k, n + 1):
            row[j] = min((max(worst[k - 1][i][0], prefix[j] - prefix[i]), i) for i in range(k - 1, j))
        worst.append(row)
    ends = [n]
    for k in range(stages, 0, -1):
        ends.append(worst[k][ends[-1]][1])
    return tuple(reversed(ends))
