"""Ranks as threads: the checks of every link, and how strict they are where MPI may be lenient."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcpipe.comm.link import Link
from hpcpipe.comm.local import Deadlock, LocalWorld
from tests.mpi.link_checks import CHECKS


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_every_check(check, ranks):
    LocalWorld(ranks).run(check)


def test_results_come_in_rank_order():
    assert LocalWorld(4).run(lambda link: (link.rank, link.size)) == [(rank, 4) for rank in range(4)]


def test_a_rank_alone_stays_on_the_callers_thread():
    assert LocalWorld(1).run(lambda link: threading.current_thread()) == [threading.current_thread()]


def test_a_send_waits_for_its_receive_even_if_it_is_tiny():
    def rank(link: Link) -> bool | None:
        buffer = np.zeros(1)
        if link.rank:
            link.barrier()
            link.receiver(0, 0, buffer).start()
            return None
        send = link.sender(1, 0, buffer)
        send.start()
        early = send.done()
        link.barrier()
        send.wait()
        return early

    assert LocalWorld(2).run(rank) == [False, None]


def test_a_receiver_sees_what_was_sent_and_not_what_was_written_later():
    def rank(link: Link) -> list[float]:
        buffer, seen = np.zeros(1000), []
        channel = link.receiver(0, 0, buffer) if link.rank else link.sender(1, 0, buffer)
        for step in range(50):
            if link.rank == 0:
                buffer[:] = step
            channel.start()
            channel.wait()
            seen.append(float(buffer.min()))
            buffer[:] = -1
        return seen

    assert LocalWorld(2).run(rank)[1] == list(range(50))


@pytest.mark.parametrize("where", ["receive", "barrier", "group"])
def test_the_first_failure_is_the_jobs_and_releases_everybody(where):
    def rank(link: Link) -> None:
        group = link.group((0, 1))
        if link.rank == 2:
            raise KeyError("lost")
        if where == "receive":
            channel = link.receiver(2, 0, np.zeros(1))
            channel.start()
            channel.wait()
        elif where == "barrier":
            link.barrier()
        elif group is not None and group.rank == 0:
            group.barrier()
        else:
            link.barrier()

    with pytest.raises(KeyError, match="lost"):
        LocalWorld(3).run(rank)


def test_a_failure_reaches_a_rank_that_only_asks():
    def rank(link: Link) -> None:
        if link.rank:
            raise KeyError("lost")
        channel = link.receiver(1, 0, np.zeros(1))
        channel.start()
        while not channel.done():
            pass

    with pytest.raises(KeyError, match="lost"):
        LocalWorld(2).run(rank)


def test_two_ranks_that_both_send_first_are_told_what_they_wait_for():
    def rank(link: Link) -> None:
        send = link.sender(1 - link.rank, 3, np.zeros(1))
        receive = link.receiver(1 - link.rank, 3, np.zeros(1))
        for channel in (send, receive):
            channel.start()
            channel.wait()

    with pytest.raises(Deadlock) as error:
        LocalWorld(2).run(rank)
    assert "rank 0 waits for send 0 -> 1 (tag 3); rank 1 waits for send 1 -> 0 (tag 3)" in str(error.value)


def test_waiting_for_a_rank_that_has_finished_is_a_deadlock():
    def rank(link: Link) -> None:
        if link.rank != 2:
            link.barrier()

    with pytest.raises(Deadlock, match=r"rank 0 waits for collective 0 of 3 ranks; rank 1 waits"):
        LocalWorld(3).run(rank)


def test_a_message_must_have_the_length_that_is_expected():
    def rank(link: Link) -> None:
        channel = link.receiver(0, 5, np.zeros(3)) if link.rank else link.sender(1, 5, np.zeros(2))
        channel.start()
        channel.wait()

    with pytest.raises(ValueError, match=r"send 0 -> 1 \(tag 5\) has 16 bytes, receive 0 -> 1 \(tag 5\) expects 24"):
        LocalWorld(2).run(rank)


def test_a_channel_is_one_message_at_a_time():
    def rank(link: Link) -> None:
        channel = link.receiver(1, 0, np.zeros(1))
        channel.start()
        channel.start()

    with pytest.raises(RuntimeError, match=r"receive 1 -> 0 \(tag 0\) was started again"):
        LocalWorld(2).run(lambda link: rank(link) if link.rank == 0 else None)


def test_a_peer_must_exist():
    with pytest.raises(ValueError, match="rank 2 does not exist: there are 2"):
        LocalWorld(2).run(lambda link: link.sender(2, 0, np.zeros(1)))


def test_unequal_chunks_are_refused():
    with pytest.raises(ValueError, match="40 and 40 bytes are not 3 equal chunks"):
        LocalWorld(3).run(lambda link: link.alltoall(np.zeros(5), np.zeros(5)))


def test_abort_prints_and_ends_everybody(capsys):
    def rank(link: Link) -> None:
        if link.rank == 1:
            link.abort("the disk is full")
        link.barrier()

    with pytest.raises(SystemExit) as ended:
        LocalWorld(3).run(rank)
    assert ended.value.code == 1 and capsys.readouterr().err == "rank 1: the disk is full\n"


def test_sums_are_added_in_rank_order():
    terms = [0.1, 1e16, -1e16, 0.3]
    expected = ((terms[0] + terms[1]) + terms[2]) + terms[3]
    assert expected != ((terms[3] + terms[2]) + terms[1]) + terms[0]

    def rank(link: Link) -> float:
        array = np.array([terms[link.rank]])
        link.allreduce(array)
        return float(array[0])

    assert LocalWorld(4).run(rank) == [expected] * 4
