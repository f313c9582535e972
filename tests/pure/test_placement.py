"""Cores for ranks: disjoint and even where they share a mask, the launcher's choice where it made one."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.placement import cores

EIGHT = tuple(range(8))


def shares(*masks: tuple[str, tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [cores.share(masks, rank) for rank in range(len(masks))]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (1, [EIGHT]),
        (2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (3, [(0, 1), (2, 3), (4, 5)]),  # as many for each: the slowest stage sets the pace
        (8, [(i,) for i in range(8)]),
    ],
)
def test_equal_masks_are_split(ranks: int, expected: list[tuple[int, ...]]) -> None:
    assert shares(*[("a", EIGHT)] * ranks) == expected


def test_what_the_launcher_bound_stays() -> None:
    assert shares(("a", (0, 1)), ("a", (2, 3)), ("a", (4, 5, 6))) == [(0, 1), (2, 3), (4, 5, 6)]
    assert shares(("a", (5,)), ("a", (1,))) == [(5,), (1,)]


def test_cores_need_not_be_numbered_from_zero() -> None:
    assert shares(("a", (3, 9, 17, 40)), ("a", (3, 9, 17, 40))) == [(3, 9), (17, 40)]


def test_more_ranks_than_cores_take_turns() -> None:
    assert shares(*[("a", (4, 6))] * 5) == [(4,), (6,), (4,), (6,), (4,)]


def test_hosts_do_not_share() -> None:
    masks = [("a", EIGHT), ("b", EIGHT), ("a", EIGHT), ("b", EIGHT), ("c", (0, 1))]
    assert shares(*masks) == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5, 6, 7), (4, 5, 6, 7), (0, 1)]


def test_groups_of_a_host_split_their_own_mask() -> None:
    """Two ranks per socket, bound to the socket."""
    low, high = (0, 1, 2, 3), (4, 5, 6, 7)
    assert shares(*[("a", mask) for mask in (low, high, low, high)]) == [(0, 1), (4, 5), (2, 3), (6, 7)]


MASKS = st.sampled_from([(0,), (1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11, 12, 13, 14)])


@given(st.lists(st.tuples(st.sampled_from("ab"), MASKS), min_size=1, max_size=12))
def test_shares_are_allowed_even_and_disjoint(masks: list[tuple[str, tuple[int, ...]]]) -> None:
    """Over masks that are equal or disjoint, which is what launchers make."""
    found = shares(*masks)
    for group in set(masks):
        members = [found[r] for r, mask in enumerate(masks) if mask == group]
        assert all(one and set(one) <= set(group[1]) for one in members)
        assert len({len(one) for one in members}) == 1
        if len(members) <= len(group[1]):
            assert len({core for one in members for core in one}) == sum(map(len, members))
        else:  # every core has its turn before one has another
            uses = [members.count((core,)) for core in group[1]]
            assert sum(uses) == len(members) and max(uses) - min(uses) <= 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes")
def test_binding_is_seen_and_undone() -> None:
    before = cores.allowed()
    try:
        cores.bind(before[:1])
        assert cores.allowed() == before[:1]
    finally:
        cores.bind(before)
    assert cores.allowed() == before == tuple(sorted(before))
