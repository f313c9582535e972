"""What every link must do, once for all of them: tests call it on threads, and mpirun starts it as a program.

    mpirun -n 4 python -m tests.mpi.link_checks

Each check is called by all ranks with their link; rank 0 of the program prints the names of those that passed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hpcpipe.comm import clock
from hpcpipe.comm.link import Channel, JobError, Link

SIZES = (0, 1, 1000, 40_000, 300_000)  # float64s: nothing, eager, rendezvous


def pattern(n: int, *seed: int) -> np.ndarray:
    """Numbers that only this message has."""
    return np.random.default_rng(seed).standard_normal(n)


def messages_travel_down_and_up_a_chain(link: Link) -> None:
    for n in SIZES:
        buffers = {key: np.empty(n) for key in ("down in", "down out", "up in", "up out")}
        channels: dict[str, Channel] = {}
        if link.rank > 0:
            channels["down in"] = link.receiver(link.rank - 1, 1, buffers["down in"])
            channels["up out"] = link.sender(link.rank - 1, 2, buffers["up out"])
        if link.rank < link.size - 1:
            channels["down out"] = link.sender(link.rank + 1, 1, buffers["down out"])
            channels["up in"] = link.receiver(link.rank + 1, 2, buffers["up in"])
        for step in range(4):  # the same channels every step
            for key in channels:
                if key.endswith("in"):
                    buffers[key].fill(np.nan)
                    channels[key].start()
            for key in ("down", "up"):
                if key + " in" in channels:
                    channels[key + " in"].wait()
                    source = link.rank - 1 if key == "down" else link.rank + 1
                    assert np.array_equal(buffers[key + " in"], pattern(n, source, step, key == "up"))
                if key + " out" in channels:
                    buffers[key + " out"][:] = pattern(n, link.rank, step, key == "up")
                    channels[key + " out"].start()
            for channel in channels.values():
                channel.wait()


def tags_are_told_apart_and_one_tag_keeps_its_order(link: Link) -> None:
    peer = link.rank ^ 1
    if peer >= link.size:
        return
    sent = [np.full(5000, 10.0 * link.rank + i) for i in range(4)]
    got = [np.zeros(5000) for _ in range(4)]
    tags = (7, 7, 3, 9)
    receives = [link.receiver(peer, tag, buffer) for tag, buffer in zip(tags, got, strict=True)]
    sends = [link.sender(peer, tag, buffer) for tag, buffer in zip(tags, sent, strict=True)]
    for i in (3, 0, 1, 2):
        receives[i].start()
    for i in (0, 2, 1, 3):
        sends[i].start()
    for channel in receives + sends:
        channel.wait()
    for i in range(4):
        assert (got[i] == 10.0 * peer + i).all()


def asking_moves_messages_along(link: Link) -> None:
    peer = link.rank ^ 1
    if peer >= link.size:
        return
    send, receive = np.full(200_000, link.rank + 0.5), np.zeros(200_000)
    channels = [link.sender(peer, 4, send), link.receiver(peer, 4, receive)]
    for channel in channels:
        channel.wait()  # not started: at once
        assert channel.done()
    for channel in channels:
        channel.start()
    deadline = time.monotonic() + 30
    while not all(channel.done() for channel in channels):
        assert time.monotonic() < deadline
    assert (receive == peer + 0.5).all()


def a_receive_is_not_done_before_its_message_is_sent(link: Link) -> None:
    if link.size > 1 and link.rank == 0:
        receive = link.receiver(1, 5, np.zeros(10))
        receive.start()
        early = receive.done()
        link.barrier()
        receive.wait()
        assert not early
    elif link.rank == 1:
        link.barrier()
        send = link.sender(0, 5, np.ones(10))
        send.start()
        send.wait()
    else:
        link.barrier()


def views_of_one_arena_are_messages(link: Link) -> None:
    arena = np.zeros(4096, np.uint8)
    right, left = (link.rank + 1) % link.size, (link.rank - 1) % link.size
    arena[64:128] = link.rank + 1
    receive = link.receiver(left, 6, arena[1024:1088].view(np.float32))
    send = link.sender(right, 6, arena[64:128].view(np.float64))
    receive.start()
    send.start()
    receive.wait()
    send.wait()
    assert (arena[1024:1088] == left + 1).all() and not arena[1088:].any() and not arena[128:1024].any()


def nothing_is_allocated_per_use(link: Link) -> None:
    right, left = (link.rank + 1) % link.size, (link.rank - 1) % link.size
    channels = [link.receiver(left, 8, np.zeros(2000)), link.sender(right, 8, np.zeros(2000))]

    def use(times: int) -> None:
        for _ in range(times):
            for channel in channels:
                channel.start()
            for channel in channels:
                channel.wait()

    use(20)
    link.barrier()
    before = sys.getallocatedblocks()
    use(200)
    after = sys.getallocatedblocks()
    link.barrier()
    assert after - before < 100 * (1 if link.size == 1 else link.size)  # threads share the count


def neighbours_swap(link: Link) -> None:
    for peer in range(link.size):
        if peer != link.rank and (peer ^ link.rank) == 1:
            for n in SIZES[1:]:
                received = np.zeros(n)
                link.sendrecv(pattern(n, link.rank), received, peer)
                assert np.array_equal(received, pattern(n, peer))


def sums_are_sums(link: Link) -> None:
    for n in (1, 7, 5000):
        array = np.arange(n, dtype=np.float64) * (link.rank + 1)
        link.allreduce(array)
        assert np.array_equal(array, np.arange(n) * (link.size * (link.size + 1) / 2))
    terms = np.zeros(link.size)
    terms[link.rank] = pattern(1, link.rank)[0]  # one element per term: exact in any order
    link.allreduce(terms)
    assert np.array_equal(terms, [pattern(1, rank)[0] for rank in range(link.size)])


def sums_under_way_are_sums(link: Link) -> None:
    """Several in a row, each started before anybody waits, with messages between start and wait."""
    peer, got = link.rank ^ 1, np.zeros(3000)
    for round in range(4):
        for n in (1, 7, 5000):
            array = np.arange(n, dtype=np.float64) * (link.rank + 1) + round
            total = link.start_allreduce(array)
            if peer < link.size:
                link.sendrecv(pattern(3000, link.rank, round, n), got, peer)
                assert np.array_equal(got, pattern(3000, peer, round, n))
            total.wait()
            assert np.array_equal(array, np.arange(n) * (link.size * (link.size + 1) / 2) + round * link.size)


def a_sum_under_way_waits_for_the_last(link: Link) -> None:
    """A rank that comes late holds up who waits, not who starts: the others are at a barrier by then."""
    array = np.full(10, 2.0**link.rank)
    if link.rank == link.size - 1 and link.size > 1:
        link.barrier()  # all others have started theirs
    total = link.start_allreduce(array)
    if link.rank < link.size - 1:
        link.barrier()
    terms = np.zeros(link.size)
    terms[link.rank] = pattern(1, link.rank)[0]
    total.wait()
    assert (array == 2.0**link.size - 1).all()
    again = link.start_allreduce(terms)
    again.wait()
    assert np.array_equal(terms, [pattern(1, rank)[0] for rank in range(link.size)])


def one_host_has_one_clock(link: Link) -> None:
    if len(set(link.bcast(link.gather(link.hostname)))) == 1:
        assert clock.shift(link) == 0.0


def hosts_learn_how_far_their_clocks_are_apart(link: Link) -> None:
    """As if each rank were a host: on one machine the clock is the same, and the asking must find that."""
    link.barrier()
    told = link.gather(clock.shift(Apart(link)))
    if told is not None:
        assert told[0] == 0.0
        assert max(map(abs, told)) < 0.5  # half of an answer's way; a busy machine answers late
        assert link.size == 1 or any(told)  # it has asked


class Apart:
    """A link whose ranks say that they are on a host each."""

    def __init__(self, link: Link) -> None:
        self.link, self.hostname = link, f"host{link.rank}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.link, name)


def chunks_go_where_they_belong(link: Link) -> None:
    for n in (1, 1000, 20_000):
        send = np.concatenate([pattern(n, link.rank, to) for to in range(link.size)])
        received = np.zeros(n * link.size)
        link.alltoall(send, received)
        expected = [pattern(n, source, link.rank) for source in range(link.size)]
        assert np.array_equal(received, np.concatenate(expected))
        everything = np.concatenate([pattern(n, rank) for rank in range(link.size)])
        received[:] = 0
        link.allgather(pattern(n, link.rank), received)
        assert np.array_equal(received, everything)
        received[:] = 0
        received[n * link.rank : n * (link.rank + 1)] = pattern(n, link.rank)
        link.allgather(None, received)
        assert np.array_equal(received, everything)


def objects_arrive_as_copies(link: Link) -> None:
    mine = {"rank": link.rank, "list": [1.5, None]}
    for root in range(link.size):
        gathered = link.gather(mine, root)
        if link.rank == root:
            assert gathered == [{"rank": rank, "list": [1.5, None]} for rank in range(link.size)]
            gathered[0]["list"].append("mine")
        else:
            assert gathered is None
        received = link.bcast(("from", root) if link.rank == root else ("not", "me"), root)
        assert received == ("from", root)
    assert mine == {"rank": link.rank, "list": [1.5, None]}


def groups_are_links_of_their_members(link: Link) -> None:
    parts = [tuple(r for r in range(link.size) if r % 2 == odd) for odd in (0, 1)]
    for members in [part for part in parts if link.rank in part]:  # the others do not call
        group = link.group(members)
        assert group is not None and (group.rank, group.size) == (members.index(link.rank), len(members))
        assert group.gather(link.rank, 0) == (list(members) if group.rank == 0 else None)
        group.barrier()
    assert (link.group((0,)) is None) == (link.rank != 0)
    back = link.group(tuple(reversed(range(link.size))))
    assert back is not None and back.rank == link.size - 1 - link.rank
    total = np.array([2.0**link.rank])
    back.allreduce(total)
    assert total[0] == 2**link.size - 1
    if link.size > 1:
        _same_tag_in_two_links(link, back)
        inner = back.group((0, 1))  # ranks of the group, not of the world
        assert (inner is None) == (link.rank < link.size - 2)
        if inner is not None:
            assert inner.bcast(link.rank) == link.size - 1


def _same_tag_in_two_links(link: Link, back: Link) -> None:
    """Between ranks 0 and 1 of the world, which are the last two of ``back``."""
    if link.rank > 1:
        return
    got, there = [np.zeros(100), np.zeros(100)], (1 - link.rank, link.size - 2 + link.rank)
    receives = [inside.receiver(there[i], 11, got[i]) for i, inside in enumerate((link, back))]
    sends = [inside.sender(there[i], 11, np.full(100, i + 1.0)) for i, inside in enumerate((link, back))]
    for channel in (*receives, *reversed(sends)):
        channel.start()
    for channel in receives + sends:
        channel.wait()
    assert (got[0] == 1).all() and (got[1] == 2).all()


def errors_are_agreed_on(link: Link) -> None:
    link.agree(None)
    with pytest.raises(JobError) as all_alike:
        link.agree("the file is empty")
    assert str(all_alike.value) == "the file is empty"
    last = link.size - 1
    with pytest.raises(JobError) as one:
        link.agree("no room" if link.rank == last else None)
    assert str(one.value) == ("no room" if last == 0 else f"rank {last}: no room") and one.value.everywhere
    if link.size == 4:
        with pytest.raises(JobError) as several:
            link.agree((None, "a", "b", "a")[link.rank])
        assert str(several.value) == "ranks 1, 3: a; rank 2: b"
        with pytest.raises(JobError) as several:
            link.agree(None if link.rank == 3 else "a")
        assert str(several.value) == "ranks 0-2: a"
    link.agree(None)


def ranks_know_their_node(link: Link) -> None:
    told = link.gather((link.size, link.hostname, *link.node_ranks()), 0)
    if told is not None:
        hosts = [host for _, host, _, _ in told]
        assert told == [(link.size, h, hosts[:rank].count(h), hosts.count(h)) for rank, h in enumerate(hosts)]


CHECKS: tuple[Callable[[Link], None], ...] = (
    messages_travel_down_and_up_a_chain,
    tags_are_told_apart_and_one_tag_keeps_its_order,
    asking_moves_messages_along,
    a_receive_is_not_done_before_its_message_is_sent,
    views_of_one_arena_are_messages,
    nothing_is_allocated_per_use,
    neighbours_swap,
    sums_are_sums,
    sums_under_way_are_sums,
    a_sum_under_way_waits_for_the_last,
    one_host_has_one_clock,
    hosts_learn_how_far_their_clocks_are_apart,
    chunks_go_where_they_belong,
    objects_arrive_as_copies,
    groups_are_links_of_their_members,
    errors_are_agreed_on,
    ranks_know_their_node,
)


def main() -> None:
    from hpcpipe.comm import mpi

    link = mpi.connect()
    for check in CHECKS:
        check(link)
        link.barrier()
        if link.rank == 0:
            print(check.__name__, link.size, flush=True)
    link.close()


if __name__ == "__main__":
    main()
