"""Gradient sums between ranks, in an order that is ours: over copies of the model, and between the two ends of a tie.

MPI may add in any order; here each copy's share of a bucket is gathered and added by our own kernel in the order of
the copies 0, 1, …, so the sum is the same bits on every run and under every MPI. Tied ends are two terms only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hpcpipe.backends.null import Call, Tensor
from hpcpipe.comm.link import Link
from hpcpipe.runtime.arena import BUCKET, INDEX, Parameters, align
from hpcpipe.runtime.executor import Executor


def buckets(start: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """(offset, elements) of consecutive buckets of at most ``size`` elements."""
    for at in range(start, end, size):
        yield at, min(size, end - at)


class Reducer:
    """Sums gradients in place. ``copies[stage]`` joins the ranks that hold a stage's copies, in the order of these."""

    def __init__(self, executor: Executor, params: Parameters, copies: Mapping[int, Link]) -> None:
        self.executor, self.params, self.copies = executor, params, copies
        self._bases = executor.bases()
        self._prepared: dict[tuple[Any, ...], Callable[[], None]] = {}

    def stage(self, index: int) -> None:
        """Sums one stage's gradients over the copies of the model."""
        if index in self.copies:
            start, _, end = self.params.stage[index]
            with self.executor.beside():
                self._over_copies(self.copies[index], start, end)

    def tied(self, name: str, index: int) -> None:
        """Sums, over the copies of the model, a tied gradient that lies beside its owner's, behind the stages' own."""
        if index in self.copies and self.params.grad[name] >= self.params.size:
            start, unit = self.params.grad[name], 16 * self.copies[index].size
            size = align(align(math.prod(self.params.shapes[name]), 16), unit)
            self._over_copies(self.copies[index], start, start + size)

    def tie(self, copy: str, peer: int) -> None:
        """Adds the other copy's gradient to ours; ``peer`` is its rank, our own rank where both copies are here."""
        owner = self.params.ties[copy]
        name = owner if owner in self.params.grad else copy
        size = math.prod(self.params.shapes[name])
        if peer == self.executor.link.rank:
            self._accumulate(("GRAD", self.params.grad[name]), ("GRAD", self.params.grad[copy]), size)
            self._view("GRAD", self.params.grad[copy], size).fill(0)
            return
        start = self.params.grad[name]
        for at, n in buckets(start, start + size, BUCKET):
            self.executor.link.sendrecv(self._view("GRAD", at, n), self._view("SCRATCH", 0, n), peer)
            self._accumulate(("GRAD", at), ("SCRATCH", 0), n)

    def spread(self, index: int) -> None:
        """Every copy of a stage has updated its share of the parameters; now all of them have all of these."""
        if index in self.copies:
            start, _, end = self.params.stage[index]
            self.copies[index].allgather(None, self._view("PARAM", start, end - start))

    def _over_copies(self, link: Link, start: int, end: int) -> None:
        """Everybody sends each other its share of a bucket, adds up its own, and the sums go back to all."""
        unit = 16 * link.size  # a stage's share of the flat buffer is a multiple of this
        for at, n in buckets(start, end, max(BUCKET // unit, 1) * unit):
            share = n // link.size
            gradients = self._view("GRAD", at, n)
            link.alltoall(gradients, self._view("SCRATCH", 0, n))
            self._accumulate(("SCRATCH", 0), ("SCRATCH", share), share, link.size - 1)
            link.allgather(self._view("SCRATCH", 0, share), gradients)

    def _accumulate(self, into: tuple[str, int], source: tuple[str, int], n: int, terms: int = 1) -> None:
        """into += source[0:n], then += source[n:2n], … ``terms`` times, in this order; offsets in elements."""
        key = (into, source, n, terms)
        backend, real = self.executor.backend, self.executor.backend.real
        if key not in self._prepared:
            where = {0: (INDEX[into[0]], real * into[1])}
            where |= {i: (INDEX[source[0]], real * (source[1] + n * (i - 1))) for i in range(1, terms + 1)}
            calls = [Call("accumulate", (Tensor(0, (n,)), Tensor(i, (n,))), (n,), ()) for i in range(1, terms + 1)]
            handle = backend.compile(calls, lambda t: where[t.id])
            arena, work = self.executor.arena, self.executor.memory.work
            self._prepared[key] = backend.bound(handle, arena, self._bases, work)
        self._prepared[key]()

    def _view(self, region: str, at: int, n: int) -> Any:
        return self.executor.array(region, self.executor.backend.real * at, (n,))
