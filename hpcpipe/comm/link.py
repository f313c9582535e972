"""What a rank may ask of the others: the protocol that MPI, threads in one process and later NCCL implement.

In: buffers, which are anything that exposes its memory (an array, a view into the arena), and small Python objects.
Messages between stages are ``Channel``s: peer, tag and buffer are fixed once, then the same message is started and
waited for at every step with nothing allocated. Everything else here is collective: all ranks of the link call it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, Protocol, TypeVar

from hpcpipe.config import UserError

T = TypeVar("T")

SHOWN = 4  # distinct messages that one JobError repeats


class JobError(UserError):
    """An error that every rank raised together, having agreed on it: all may end in peace and one of them tells."""

    everywhere = True


class Channel(Protocol):
    """One message, one way, from or to one peer, always the same buffer; the k-th send meets the k-th receive."""

    def start(self) -> None:
        """Posts it; the buffer is the link's until it is done. Only when the one before is done."""

    def wait(self) -> None:
        """Returns when it is done: the receiver has the bytes, the sender may write again. At once if not started."""

    def done(self) -> bool:
        """Whether ``wait`` would return at once; asking moves the message along."""


class DeviceChannel(Channel, Protocol):
    """A message in a device's memory. Nothing of it waits on the host that a stream can wait for.

    ``start`` of a sender lets it leave once its buffer is ``ready``, that of a receiver once all that the compute
    stream was given so far is done; after ``wait`` what that stream is given comes after the message. ``stamp`` is a
    float64 [1] on the host that travels with it, where the transport carries one: by then the sender's ``clock``, if it
    has been given one, has written there when the message left; read after ``wait`` (0 where nothing came).
    """

    stamp: Any
    clock: Any

    def ready(self) -> None:
        """The buffer holds what is to be sent, once what the compute stream was given so far is done."""


class Sum(Protocol):
    """A sum under way."""

    def wait(self) -> None:
        """Returns when the array holds the sum."""


class Link(Protocol):
    """The ranks of a job, or of a group of it, numbered from 0."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def hostname(self) -> str: ...

    def sender(self, peer: int, tag: int, buffer: Any) -> Channel:
        """A message of all the buffer's bytes to ``peer``; local, nothing is sent yet."""

    def receiver(self, peer: int, tag: int, buffer: Any) -> Channel:
        """The other end of ``peer``'s sender with the same tag and the same number of bytes."""

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        """Swaps buffers of equal size with ``peer``, which calls it too."""

    def progress(self) -> None:
        """Moves messages along that are under way: some transports do it only while somebody asks."""

    def allreduce(self, array: Any) -> None:
        """Sums a float64 array over the ranks, in place.

        The order of the additions is the transport's. A sum that must have the same bits on every layout takes one
        element per term, zero on all ranks but one, and is added up afterwards.
        """

    def start_allreduce(self, array: Any) -> Sum:
        """``allreduce`` without waiting: the array is the link's until the sum is waited for. One at a time."""

    def alltoall(self, send: Any, recv: Any) -> None:
        """Chunk j of my ``send`` becomes chunk i of rank j's ``recv``, i my rank; ``size`` equal chunks."""

    def allgather(self, send: Any, recv: Any) -> None:
        """Rank i's ``send`` becomes chunk i of everybody's ``recv``; with None it lies there already."""

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        """Everybody's value in rank order on ``root``, None elsewhere."""

    def bcast(self, value: T, root: int = 0) -> T:
        """Root's value on every rank."""

    def barrier(self) -> None:
        """Returns when every rank has called it."""

    def group(self, ranks: Sequence[int]) -> Link | None:
        """A link of these ranks in this order; None on a rank that is not among them, which need not call."""

    def agree(self, error: str | None) -> None:
        """Raises ``JobError`` on every rank if any rank brings an error, with the messages and who brought them."""

    def abort(self, message: str) -> NoReturn:
        """Prints ``rank 3: message`` and ends the whole job, exit status 1, whatever other ranks are at."""

    def node_ranks(self) -> tuple[int, int]:
        """(my place, how many) among this link's ranks on my node."""

    def close(self) -> None:
        """Ends the use of the link on all ranks; its channels are dead from then on."""


def raise_agreed(errors: Sequence[str | None]) -> None:
    """The verdict on everybody's error, indexed by rank; the same on every rank."""
    ranks: dict[str, list[int]] = {}
    for rank, error in enumerate(errors):
        if error is not None:
            ranks.setdefault(error, []).append(rank)
    if not ranks:
        return
    if len(ranks) == 1 and None not in errors:
        raise JobError(next(iter(ranks)))
    told = [f"{_who(those)}: {message}" for message, those in list(ranks.items())[:SHOWN]]
    if len(ranks) > SHOWN:
        told.append(f"and {len(ranks) - SHOWN} more errors on other ranks")
    raise JobError("; ".join(told))


def _who(ranks: list[int]) -> str:
    """``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' if len(ranks) > 1 else ''} " + ", ".join("-".join(map(str, run)) for run in runs)
