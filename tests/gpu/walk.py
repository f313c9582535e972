"""Walks lowered programs over a link as the executor does, with hashes in place of layers, and keeps every result.

``walk`` runs on a device, ``expected`` is the same on host memory over the host's own link: each op mixes every byte
that it may read into every byte that it makes, so two walks agree only if all messages were the same bytes. What may
be overwritten is overwritten with garbage at once, and what is made is garbage first.

    mpirun -n 2 python -m tests.gpu.walk
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from hpcpipe.comm.aware import AwareLink
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.comm.staged import StagedLink
from hpcpipe.schedule.check import WRITES, check
from hpcpipe.schedule.families import SCHEDULES, build, forward_only
from hpcpipe.schedule.op import KINDS
from hpcpipe.schedule.program import MAX_TAG, POOLS, Instruction, Lifetimes, Program, Slot, lower
from tests.gpu.fake_nccl import DeviceArray
from tests.gpu.host_driver import HostDriver

WORDS = 5  # of a tensor, before the stamp
GARBAGE = 0xA5
PERIOD = MAX_TAG + 1  # the tags of a second program
Log = list[tuple[str, int, int, int]]


class Host:
    """Memory that is there when it is asked for, and work that is done when it is given."""

    def array(self, nbytes: int) -> Any:
        return np.zeros(nbytes, np.uint8)

    def bytes(self, array: Any) -> np.ndarray:
        return array

    def call(self, function: Callable[[], None]) -> None:
        function()

    def settle(self) -> None:
        """All is done already."""


class Device:
    """Memory and a compute stream of a device."""

    def __init__(self, driver: Any) -> None:
        self.driver, self.compute = driver, driver.stream()

    def array(self, nbytes: int) -> DeviceArray:
        return DeviceArray(self.driver, nbytes, self.compute)

    def bytes(self, array: DeviceArray) -> np.ndarray:
        return array.view

    def call(self, function: Callable[[], None]) -> None:
        self.driver.call(function, self.compute)

    def settle(self) -> None:
        self.driver.synchronize(self.compute)


class Walk:
    """One rank's program over a link. ``late``: a SEND is done after the next op was given to the device."""

    def __init__(self, program: Program, link: Link, ground: Any, tags: int, late: bool, stamped: bool) -> None:
        self.program, self.ground, self.late, self.stamped = program, ground, late, stamped
        self.memory = {slot: ground.array(8 * WORDS + 8) for slot in program.slots}
        self.channels: dict[Slot, Any] = {}
        for edge in program.edges:
            make = link.sender if edge.direction == "send" else link.receiver
            for slot in (Slot(edge.stage, edge.pool, i) for i in range(program.counts[edge.stage, edge.pool])):
                self.channels[slot] = make(edge.peer, edge.tag + tags, self.memory[slot])
        self.log: Log = []
        self._unsent: list[tuple[Any, int, int]] = []

    def run(self, step: int) -> None:
        for i in self.program.instructions:
            if i.kind in KINDS:
                self._compute(i, step)
            elif i.slot is not None:
                self._message(i, i.slot, self.channels[i.slot])
        self._send()
        self.ground.settle()

    def _compute(self, i: Instruction, step: int) -> None:
        live = {pool: slot for pool, slot in zip(POOLS, i.slots, strict=True) if slot is not None}
        made = [live[pool] for pool in WRITES[i.kind] if pool in live]
        into = [self._words(s) for s in made]
        read = [self._words(s) for s in live.values() if s not in made]
        key = np.uint64((step + 1) * 1_000_003 + i.stage * 1009 + i.micro * 17 + KINDS.index(i.kind))

        def garble() -> None:
            for words in into:
                words.view(np.uint8)[:] = GARBAGE

        def mix() -> None:
            value = key * np.ones(WORDS, np.uint64)
            for words in read:
                value = (value + words) * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            for number, words in enumerate(into):
                words[:] = value + np.uint64(number)
            self.log.append((i.kind, i.stage, i.micro, int(value.sum())))

        self.ground.call(garble)
        self.ground.call(mix)
        for slot in made:
            if slot in self.channels and hasattr(self.channels[slot], "ready"):
                self.channels[slot].ready()
        self._send()

    def _message(self, i: Instruction, slot: Slot, channel: Any) -> None:
        if i.kind == "SEND":
            self._unsent.append((channel, i.stage, i.micro))
            if not self.late:
                self._send()
            return
        if i.kind == "POST":
            self.ground.call(lambda: self.ground.bytes(self.memory[slot])[:].fill(GARBAGE))
            channel.start()
            return
        self._send()
        channel.wait()
        if slot.pool in ("Y", "DX"):
            words = self._words(slot)
            self.ground.call(lambda: words.view(np.uint8)[:].fill(GARBAGE))
        elif hasattr(channel, "stamp"):
            sent = 1000.0 * (i.stage + (1 if slot.pool == "DY" else -1)) + i.micro
            assert channel.stamp[0] == (sent if self.stamped else 0)

    def _send(self) -> None:
        for channel, stage, micro in self._unsent:
            if hasattr(channel, "stamp"):
                channel.stamp[0] = 1000.0 * stage + micro
            channel.start()
        self._unsent.clear()

    def _words(self, slot: Slot) -> np.ndarray:
        return self.ground.bytes(self.memory[slot])[: 8 * WORDS].view(np.uint64)


def walk(
    link: Link, ground: Any, programs: Sequence[Program], evaluations: Sequence[Program], late: bool, stamped: bool
) -> Log:
    """Two steps of training with an evaluation in between; everything that this rank computed."""
    train = Walk(programs[link.rank], link, ground, 0, late, stamped)
    evaluate = Walk(evaluations[link.rank], link, ground, PERIOD, late, stamped)
    if hasattr(link, "connect"):
        link.connect()
    train.run(0)
    evaluate.run(1)
    train.run(2)
    return train.log + evaluate.log


def expected(programs: Sequence[Program], evaluations: Sequence[Program]) -> list[Log]:
    """What every rank computes, over host memory."""
    ranks = LocalWorld(len(programs))
    return ranks.run(lambda link: walk(link, Host(), programs, evaluations, False, False))


def drawn(seed: int, ranks: int = 0) -> tuple[list[Program], list[Program]]:
    """The programs of some schedule of some shape, and its evaluation's."""
    rng = Random(seed)
    names = sorted(SCHEDULES)
    while True:
        name, p = rng.choice(names), ranks or rng.choice((2, 2, 3, 4))
        family = SCHEDULES[name]
        if family.chains == 2 and p % 2:
            continue
        stages = 0 if family.per_rank else p * rng.choice((1, 2, 3))
        schedule = build(name, stages, p, p * rng.choice((1, 2)))
        lifetimes = [Lifetimes(*(rng.choice(w) for w in ("FBW", "FB", "BW", "B"))) for _ in range(schedule.stages)]
        programs = lower(schedule, lifetimes)
        check(programs)
        forward = forward_only(schedule.placement, 3, schedule.chains)
        return list(programs), list(lower(forward, lifetimes, forward_only=True))


def main() -> None:
    """Every transport that MPI can carry, between processes."""
    from hpcpipe.comm import mpi

    link = mpi.connect()
    for seed in range(4):
        programs, evaluations = drawn(seed, link.size)
        wanted = expected(programs, evaluations)[link.rank]
        for kind in (StagedLink, AwareLink):
            driver = HostDriver(seed=seed)
            over = kind(link.group(range(link.size)), driver)
            got = walk(over, Device(driver), programs, evaluations, bool(seed % 2), kind is StagedLink)
            assert got == wanted, (seed, kind)
            link.barrier()
            if link.rank == 0:
                print("agrees", kind.__name__, seed, flush=True)
    link.close()


if __name__ == "__main__":
    main()
