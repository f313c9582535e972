"""Sums between ranks: the bits of an addition in the order of the copies, in buckets of any size."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.planner.plan import Plan
from hpcpipe.runtime import arena, reduce
from hpcpipe.runtime.reduce import Reducer
from small_plan import executor_of, planned

BUCKETS = [1 << 20, 4096, 100]


@pytest.fixture(params=BUCKETS)
def bucket(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (arena, reduce):
        monkeypatch.setattr(module, "BUCKET", request.param)
    return int(request.param)


def gradients(size: int, seed: int) -> np.ndarray:
    """Numbers of very different size, so that another order of additions has other bits."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(size) * 10.0 ** rng.integers(-4, 5, size)).astype(np.float32)


def in_order(terms: list[np.ndarray]) -> np.ndarray:
    return functools.reduce(lambda a, b: a + b, terms)


def rank_of(p: Plan, place: int, link: Link, copies: Link | None, backend: Any = None) -> tuple[Reducer, np.ndarray]:
    """A rank's reducer and its whole gradient buffer; ``copies`` joins those of every stage that it holds."""
    params = p.ranks[place].params
    executor = executor_of(p, place, backend or CpuBackend(1), link)
    joined = {stage: copies for stage in p.ranks[place].stages if copies is not None}
    return Reducer(executor, params, joined), executor.array("GRAD", 0, (params.grad_size,))


def test_buckets_cover_a_span() -> None:
    assert list(reduce.buckets(5, 16, 4)) == [(5, 4), (9, 4), (13, 3)]
    assert list(reduce.buckets(5, 5, 4)) == []


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("replicas", [2, 3, 4])
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_replicas_are_added_in_order(bucket: int, model: str, replicas: int, reference: bool) -> None:
    p = planned(model, replicas, pipeline__replicas=replicas, train__batch=24)
    params = p.ranks[0].params
    terms = [gradients(params.grad_size, seed) for seed in range(replicas)]

    def rank(link: Link) -> np.ndarray:
        backend = ReferenceBackend("float32") if reference else CpuBackend(1)
        reducer, grad = rank_of(p, 0, link, link, backend)
        grad[:] = terms[link.rank]
        reducer.stage(0)
        assert (grad[params.size :] == terms[link.rank][params.size :]).all()  # the tied copy's turn is later
        if params.tied:
            reducer.tied("head.weight", 0)
        return grad.copy()

    sums = LocalWorld(replicas).run(rank)
    expected = in_order(terms)
    assert [found.tobytes() for found in sums] == [expected.tobytes()] * replicas
    if replicas > 2:
        assert in_order(terms[::-1]).tobytes() != expected.tobytes()  # the order is what is tested
    assert (params.grad_size > params.size) == (model == "llama")


def test_a_stage_is_added_alone(bucket: int) -> None:
    """A rank with several stages: each sum touches its own span only."""
    p = planned("gpt2", 6, pipeline__replicas=2, pipeline__ranks=3)
    place = 1
    start, _, end = p.ranks[place].params.stage[1]
    size = p.ranks[place].params.grad_size
    assert (start, end) == (0, size)  # one stage per rank here, so the span is cut by hand
    cut = end // 64 * 32
    terms = [gradients(size, seed) for seed in (1, 2)]

    def rank(link: Link) -> np.ndarray:
        reducer, grad = rank_of(p, place, link, link)
        grad[:] = terms[link.rank]
        reducer.params.stage[1] = (cut, cut, end)
        reducer.stage(1)
        return grad.copy()

    for found, own in zip(LocalWorld(2).run(rank), terms, strict=True):
        assert found[:cut].tobytes() == own[:cut].tobytes()
        assert found[cut:].tobytes() == in_order(terms)[cut:].tobytes()


def test_repeated_sums_compile_once() -> None:
    p = planned("gpt2", 2, pipeline__replicas=2)

    def rank(link: Link) -> list[int]:
        reducer, grad = rank_of(p, 0, link, link)
        counts = []
        for _ in range(3):
            grad[:] = 1.0
            reducer.stage(0)
            assert (grad[: p.ranks[0].params.size] == 2.0).all()
            counts.append(len(reducer._prepared))
        return counts

    assert LocalWorld(2).run(rank) == [[1, 1, 1]] * 2


def test_without_replicas_there_is_nothing_to_add() -> None:
    p = planned("llama", 1)
    reducer, grad = rank_of(p, 0, LocalWorld(1).links[0], None)
    grad[:] = expected = gradients(len(grad), 3)
    reducer.stage(0)
    reducer.tied("head.weight", 0)
    assert grad.tobytes() == expected.tobytes()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_tie_between_ranks_gives_both_the_same_bits(bucket: int, ranks: int) -> None:
    p = planned("llama", ranks)
    ends = (0, ranks - 1)

    def rank(link: Link) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        if link.rank not in ends:
            return None
        reducer, grad = rank_of(p, link.rank, link, None)
        grad[:] = before = gradients(len(grad), link.rank)
        reducer.tie("head.weight", ends[1] if link.rank == ends[0] else ends[0])
        at = reducer.params.grad["embed.weight" if link.rank == 0 else "head.weight"]
        tied = slice(at, at + math.prod(reducer.params.shapes["embed.weight" if link.rank == 0 else "head.weight"]))
        untouched = np.delete(grad, np.r_[tied]).tobytes() == np.delete(before, np.r_[tied]).tobytes()
        assert untouched
        return before[tied], grad[tied].copy(), grad

    found = LocalWorld(ranks).run(rank)
    (owner, owners, _), (copy, copies, _) = (found[end] for end in ends)
    assert owners.tobytes() == copies.tobytes() == (owner + copy).tobytes()


def test_a_tie_on_one_rank_is_added_to_the_owner(bucket: int) -> None:
    p = planned("gpt2", 1)
    link = LocalWorld(1).links[0]
    reducer, grad = rank_of(p, 0, link, None)
    params = reducer.params
    grad[:] = before = gradients(len(grad), 8)
    reducer.tie("head.weight", link.rank)
    n = math.prod(params.shapes["embed.weight"])
    owner, copy = (slice(params.grad[name], params.grad[name] + n) for name in ("embed.weight", "head.weight"))
    assert grad[owner].tobytes() == (before[owner] + before[copy]).tobytes()
    assert not grad[copy].any()  # cleared here, because the update clears only what it updates
    rest = np.r_[owner, copy]
    assert np.delete(grad, rest).tobytes() == np.delete(before, rest).tobytes()


def test_two_layouts_of_a_tie_have_the_same_bits() -> None:
    """Owner + copy on one rank, and on two that swap, over two replicas each: the sums a run's bits rest on."""
    n = 61 * 24
    owners, copies = ([gradients(n, 10 * k + r) for r in range(2)] for k in (1, 2))
    expected = (in_order(owners) + in_order(copies)).tobytes()

    def alone(link: Link) -> bytes:
        p = planned("llama", 2, pipeline__replicas=2)
        reducer, grad = rank_of(p, 0, LocalWorld(1).links[0], link)
        places = [reducer.params.grad[name] for name in ("embed.weight", "head.weight")]
        for at, values in zip(places, (owners, copies), strict=True):
            grad[at : at + n] = values[link.rank]
        reducer.stage(0)
        reducer.tied("head.weight", 0)
        reducer.tie("head.weight", 0)
        return grad[places[0] : places[0] + n].tobytes()

    def apart(link: Link) -> bytes:
        p = planned("llama", 4, pipeline__replicas=2)
        replica, place = divmod(link.rank, 2)
        pipeline = link.group(range(2 * replica, 2 * replica + 2))
        peers = link.group(range(place, 4, 2))
        assert pipeline is not None
        reducer, grad = rank_of(p, place, pipeline, peers)
        at = reducer.params.grad["head.weight" if place else "embed.weight"]
        grad[at : at + n] = (copies if place else owners)[replica]
        reducer.stage(place)
        if place:
            reducer.tied("head.weight", 1)  # not beside its owner: nothing is left to sum
        reducer.tie("head.weight", 1 - place)
        return grad[at : at + n].tobytes()

    assert LocalWorld(2).run(alone) == [expected] * 2
    assert LocalWorld(4).run(apart) == [expected] * 4


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b"])
def test_copies_that_share_ranks_are_added_in_their_order(bucket: int, schedule: str) -> None:
    """Two copies from both ends: a stage of the second copy lies behind one of the first, and meets its other half."""
    p = planned("llama", 4 if schedule == "1f1b" else 2, pipeline__schedule=schedule,
                pipeline__replicas=2 if schedule == "1f1b" else 1, pipeline__ranks=2)  # fmt: skip
    depth = p.schedule.depth
    sizes = [p.ranks[s].params.stage[s] for s in range(depth)]
    terms = {
        (copy, s): gradients(end - start, 10 * copy + s) for copy in (0, 1) for s, (start, _, end) in enumerate(sizes)
    }

    def rank(link: Link) -> dict[int, bytes]:
        place, replica = link.rank % 2, link.rank // 2
        found, grads = {}, {}
        pipeline = link.group(range(2 * replica, 2 * replica + 2)) if link.size > 2 else link
        assert pipeline is not None
        copies: dict[int, Link] = {}
        for s in sorted(p.ranks[place].stages, key=lambda s: s % depth):
            members = (s, s + 2) if link.size > 2 else (s % depth, 1 - s % depth)
            copies[s] = link.group(members)  # type: ignore[assignment]
        executor = executor_of(p, place, CpuBackend(1), pipeline)
        params = p.ranks[place].params
        reducer = Reducer(executor, params, copies)
        grad = executor.array("GRAD", 0, (params.grad_size,))
        for s in copies:
            start, _, end = params.stage[s]
            grads[s] = grad[start:end]
            grads[s][:] = terms[replica + s // depth, s % depth]
        for s in sorted(copies, key=lambda s: s % depth):
            reducer.stage(s)
            found[s] = grads[s].tobytes()
        return found

    for found in LocalWorld(2 if schedule == "dualpipe" else 4).run(rank):
        for s, sums in found.items():
            assert sums == in_order([terms[copy, s % depth] for copy in (0, 1)]).tobytes()
