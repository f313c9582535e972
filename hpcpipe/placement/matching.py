"""Rows to columns, so that nobody would rather swap: ranks to GPUs, GPUs to network cards.

In: how much each row minds each column, in any order that compares. Out: a column for each row. Pure and small: a node
has tens of each, and the cheapest assignment (not a greedy one, which steals) costs nothing there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def match(costs: Sequence[Sequence[Any]], capacity: int = 1) -> list[int] | None:
    """A column for each row, each column at most ``capacity`` times; None where there is none. A cost of None forbids.

    Most rows at the lowest cost, among those most at the next, and so on (rank-maximal, Irving et al. 2006). As a cost
    means the same to row and column, no row and column would both rather have each other: the matching is stable.
    Equals are matched in order.
    """
    rows, columns = len(costs), len(costs[0])
    slots = columns * capacity
    if slots < rows:
        return None
    levels = {c: k for k, c in enumerate(sorted({c for row in costs for c in row if c is not None}))}
    aligned = rows * slots * slots + 1
    unit = rows * slots * aligned + aligned  # more than all of order together
    never = unit * (rows + 1) ** (len(levels) + 1)

    def weight(i: int, slot: int) -> int:
        cost = costs[i][slot % columns]
        if cost is None:
            return never
        return slot * aligned + (i - slot) ** 2 - unit * (rows + 1) ** (len(levels) - 1 - levels[cost])

    chosen = _assignment([[weight(i, slot) for slot in range(slots)] for i in range(rows)])
    found = [slot % columns for slot in chosen]
    return None if any(costs[i][column] is None for i, column in enumerate(found)) else found


def _assignment(cost: Sequence[Sequence[int]]) -> list[int]:
    """The column of each row in the cheapest assignment, rows <= columns (Kuhn 1955; shortest augmenting paths)."""
    n, m = len(cost), len(cost[0])
    u, v, owner, way = [0] * (n + 1), [0] * (m + 1), [0] * (m + 1), [0] * (m + 1)
    for row in range(1, n + 1):
        owner[0], j = row, 0
        least: list[int | None] = [None] * (m + 1)
        used = [False] * (m + 1)
        while owner[j]:
            used[j] = True
            free = [k for k in range(1, m + 1) if not used[k]]
            for k in free:
                new, old = cost[owner[j] - 1][k - 1] - u[owner[j]] - v[k], least[k]
                if old is None or new < old:
                    least[k], way[k] = new, j
            delta, following = min((least[k] or 0, k) for k in free)
            for k in range(m + 1):
                if used[k]:
                    u[owner[k]] += delta
                    v[k] -= delta
                else:
                    least[k] = (least[k] or 0) - delta
            j = following
        while j:
            owner[j], j = owner[way[j]], way[j]
    column = {owner[k]: k - 1 for k in range(1, m + 1) if owner[k]}
    return [column[row] for row in range(1, n + 1)]
