"""The cut is the best one: against every cut there is where they can be counted, against bounds where they cannot."""

from __future__ import annotations

from itertools import combinations, pairwise
from math import inf
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.config import UserError
from hpcpipe.planner.cut import balanced, bounds


def parts(costs: list[int], edges: tuple[int, ...]) -> list[int]:
    return [sum(costs[a:b]) for a, b in pairwise(edges)]


def every(slots: int, stages: int) -> list[tuple[int, ...]]:
    return [(0, *inner, slots) for inner in combinations(range(1, slots), stages - 1)]


def per_rank(values: list[float], placement: tuple[int, ...]) -> list[float]:
    return [sum(v for v, r in zip(values, placement, strict=True) if r == rank) for rank in sorted(set(placement))]


# --- as it is asked for


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.data())
def test_auto_is_the_best_cut(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    found = bounds("auto", costs, stages)
    cuts = every(len(costs), stages)
    best = min(max(parts(costs, edges)) for edges in cuts)
    assert found in cuts
    assert max(parts(costs, found)) == best
    # Of equals, the one whose last stage starts first: a late stage holds fewer microbatches, so it may hold more.
    assert found[-2] == min(edges[-2] for edges in cuts if max(parts(costs, edges)) == best)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=9), st.data())
def test_what_stands_before_the_last_stage_is_cut_best_too(costs: list[int], data: st.DataObject) -> None:
    """A head that alone is the slowest stage is no reason to leave the layers unbalanced."""
    stages = data.draw(st.integers(2, len(costs)))
    found = balanced(costs, stages)
    assert found[:-1] == balanced(costs[: found[-2]], stages - 1)


@given(st.integers(1, 30), st.data())
def test_even_counts_slots(slots: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, slots))
    costs = data.draw(st.lists(st.floats(0, 1e6), min_size=slots, max_size=slots))
    sizes = [b - a for a, b in pairwise(bounds("even", costs, stages))]
    assert sum(sizes) == slots and len(sizes) == stages
    assert min(sizes) >= 1 and max(sizes) == -(-slots // stages)


def test_a_listed_cut_is_taken_as_it_is() -> None:
    assert bounds([1, 3, 2], [5.0] * 6, 3) == (0, 1, 4, 6)
    assert bounds((6,), [5.0] * 6, 1) == (0, 6)


def test_one_expensive_slot_stands_alone() -> None:
    assert balanced([1.0, 1.0, 9.0, 1.0], 3) == (0, 2, 3, 4)


def test_more_stages_than_slots_is_a_sentence() -> None:
    with pytest.raises(
        UserError, match=r"^pipeline: 5 stages for a model of 4 slots \(embedding, 2 layers, head\); use pipel"
    ):
        bounds("auto", [1.0] * 4, 5)


@pytest.mark.parametrize(
    ("cut", "stages", "told"),
    [
        ([1, 2], 2, r"\[1, 2\] must list 2 numbers >= 1 that sum to 4 slots .*; it lists 2 that sum to 3"),
        ([1, 1, 2], 2, r"must list 2 numbers .*; it lists 3 that sum to 4"),
        ([4, 0], 2, r"\[4, 0\] must list 2 numbers >= 1"),
        ([5, -1], 2, r"\[5, -1\] must list 2 numbers >= 1"),
    ],
)
def test_a_listed_cut_that_does_not_fit_is_a_sentence(cut: list[int], stages: int, told: str) -> None:
    with pytest.raises(UserError, match=rf"^pipeline\.cut = .*{told}"):
        bounds(cut, [1.0] * 4, stages)


# --- within memory


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], tuple[int, ...], list[int], list[int], int]:
    """(costs, placement, bytes of a slot, microbatches in flight of a stage, limit); stages anywhere."""
    slots = draw(st.integers(1, 9))
    stages = draw(st.integers(1, min(slots, 6)))
    ranks = draw(st.integers(1, stages))
    rest = [draw(st.integers(0, ranks - 1)) for _ in range(stages - ranks)]
    placement = draw(st.permutations([*range(ranks), *rest]))
    numbers = st.integers(0, 9)
    costs, weights = (draw(st.lists(numbers, min_size=slots, max_size=slots)) for _ in range(2))
    flights = draw(st.lists(st.integers(0, 4), min_size=stages, max_size=stages))
    return costs, tuple(placement), weights, flights, draw(st.integers(0, 120))


@given(shapes())
@settings(max_examples=600)
def test_the_slowest_rank_then_the_slowest_stage_among_those_that_fit(case) -> None:
    costs, placement, weights, flights, limit = case
    stages = len(placement)

    def needed(stage: int, first: int, last: int) -> float:
        return sum(weights[first:last]) + flights[stage] * (last - first)

    def needs(edges: tuple[int, ...]) -> float:
        return max(per_rank([needed(s, a, b) for s, (a, b) in enumerate(pairwise(edges))], placement))

    fitting = [edges for edges in every(len(costs), stages) if needs(edges) <= limit]
    if not fitting:
        least = min(map(needs, every(len(costs), stages)))
        with pytest.raises(UserError, match=r"^pipeline: stages? [\d, ]+ (of a rank )?needs? .* MiB in the cut") as e:
            balanced(costs, stages, placement=placement, bytes_of=needed, limit=limit)
        if len(set(placement)) == stages:
            assert f"{least / 2**20:,.1f} MiB in" in str(e.value)
        return
    found = balanced(costs, stages, placement=placement, bytes_of=needed, limit=limit)
    assert found in fitting

    def burden(edges: tuple[int, ...]) -> tuple[float, float]:
        alone = parts(costs, edges)
        return max(per_rank(alone, placement)), max(alone)

    assert burden(found) == min(map(burden, fitting))


@given(shapes())
@settings(max_examples=300)
def test_without_a_limit_too(case) -> None:
    costs, placement, *_ = case

    def burden(edges: tuple[int, ...]) -> tuple[float, float]:
        alone = parts(costs, edges)
        return max(per_rank(alone, placement)), max(alone)

    found = balanced(costs, len(placement), placement=placement)
    assert burden(found) == min(map(burden, every(len(costs), len(placement))))


def test_a_limit_moves_slots_to_later_stages() -> None:
    """Stage 0 holds 4 microbatches of each of its slots, stage 3 holds 1."""
    costs = [1.0] * 16
    assert balanced(costs, 4) == (0, 4, 8, 12, 16)
    found = balanced(costs, 4, bytes_of=lambda s, a, b: (b - a) * (4 - s), limit=12)
    assert found == (0, 3, 7, 11, 16) and bounds("auto", costs, 4) == (0, 4, 8, 12, 16)


def test_what_does_not_fit_is_a_sentence() -> None:
    with pytest.raises(UserError) as error:
        balanced([1.0] * 8, 4, bytes_of=lambda s, a, b: (b - a) * (4 - s) * 2**20, limit=3.5 * 2**20)
    assert str(error.value) == (
        "pipeline: stage 0 needs 4.0 MiB in the cut that asks least of the fullest rank, and a rank has 3.5 MiB; "
        "use more stages, a smaller train.microbatch or another pipeline.schedule"
    )


# --- several stages per rank


def test_ranks_are_balanced_where_stages_cannot_be() -> None:
    """An embedding worth nothing and a head worth three layers, in a V: rank 0 has both and so one layer less."""
    costs = [0.0, *[1.0] * 13, 3.0]
    found = balanced(costs, 8, placement=(0, 1, 2, 3, 3, 2, 1, 0))
    loads = per_rank(parts(costs, found), (0, 1, 2, 3, 3, 2, 1, 0))
    assert max(loads) == 4.0
    strewn = balanced(costs, 8, placement=(0, 1, 2, 3, 0, 1, 2, 3))
    assert max(per_rank(parts(costs, strewn), (0, 1, 2, 3, 0, 1, 2, 3))) == 4.0


def real(layers: int, embed: float, head: float) -> list[float]:
    """Layers that cost alike between an embedding and a head."""
    return [embed, *[1.0] * layers, head]


@pytest.mark.parametrize(
    ("layers", "ranks", "rounds", "fold"),
    [
        (30, 4, 2, False),
        (30, 4, 2, True),
        (126, 8, 8, False),
        (126, 16, 4, False),
        (62, 8, 2, True),
        (398, 32, 2, True),
    ],
)
@pytest.mark.parametrize(("embed", "head"), [(0.0, 1.0), (0.1, 2.5), (1.0, 1.0)])
def test_a_model_of_equal_layers_is_spread_as_evenly_as_can_be(layers, ranks, rounds, fold, embed, head) -> None:
    """Whole layers, beside an embedding and a head of any price: nobody has more than the least possible bound."""
    costs = real(layers, embed, head)
    down = list(range(ranks))
    placement = tuple(r for n in range(rounds) for r in (reversed(down) if fold and n % 2 else down))
    loads = per_rank(parts(costs, balanced(costs, len(placement), placement=placement)), placement)
    # Every rank's load is a number of layers, plus the embedding or the head where it has them.
    ends = {placement[0], placement[-1]}
    possible = sorted({n + extra for n in range(layers + 1) for extra in (0, embed, head, embed + head)})
    least = next(
        bound
        for bound in possible
        if sum(int(bound) for r in range(ranks) if r not in ends) + _room(bound, embed, head, placement) >= layers
    )
    assert max(loads) == pytest.approx(least)


def _room(bound: float, embed: float, head: float, placement: tuple[int, ...]) -> float:
    """Whole layers that fit beside the embedding and the head under a bound; none if those alone are over it."""
    first, last = placement[0], placement[-1]
    rest = [bound - embed - head] if first == last else [bound - embed, bound - head]
    return -inf if min(rest) < 0 else sum(int(r + 1e-9) for r in rest)


# --- fast enough


@pytest.mark.parametrize("placement", [None, tuple(s // 2 for s in range(64)), (*range(32), *reversed(range(32)))])
@pytest.mark.parametrize("limit", [inf, 9.0])
def test_400_slots_are_cut_into_64_stages_in_a_moment(placement, limit) -> None:
    costs = [(i * 7919 % 101) / 50 for i in range(400)]
    begin = process_time()
    balanced(costs, 64, placement=placement, bytes_of=lambda s, a, b: (b - a) * (1 - s / 128), limit=2 * limit)
    assert process_time() - begin < 3  # about 0.3 s on an idle core
