"""Messages between devices through pinned host memory, over any link for the host: the transport that always works.

A message leaves in two steps, device to pinned buffer as soon as it is made, and from there over the link below; it
arrives the same way. Copies have streams of their own, one each way, so they run beside computation and beside each
other, and a checkpoint's copies do not hold them up. Collectives go through two halves of bounded pinned memory:
while the link below exchanges one piece, the next is on its way to the host and the last on its way back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpcpipe.comm.link import Channel, Link
from hpcpipe.comm.over import (
    STAMP,
    Bytes,
    DeviceArray,
    Driver,
    Held,
    OverLink,
    Passing,
    Pending,
    Stamp,
    chunk,
    on_device,
)

PIECE = 4 << 20  # bytes of one half of the pinned memory for collectives, one way
ALIGN = 64


class StagedLink(OverLink):
    """A link for arrays of one device; it may be shared with other ranks."""

    def __init__(self, inner: Link, driver: Driver, piece: int = PIECE, room: _Room | None = None) -> None:
        """``piece``: bytes per step of a collective; the same on every rank."""
        super().__init__(inner)
        self.driver, self._piece = driver, piece
        self._room = room or _Room(driver, piece)

    def sender(self, peer: int, tag: int, buffer: Any) -> Channel:
        if not on_device(buffer):
            return Passing(self._room.pending, self.inner.sender(peer, tag, buffer))
        return StagedSender(self._room, buffer, lambda pinned: self.inner.sender(peer, tag, pinned))

    def receiver(self, peer: int, tag: int, buffer: Any) -> Channel:
        if not on_device(buffer):
            return Passing(self._room.pending, self.inner.receiver(peer, tag, buffer))
        return StagedReceiver(self._room, buffer, lambda pinned: self.inner.receiver(peer, tag, pinned))

    def progress(self) -> None:
        self._room.pending.look()
        self.inner.progress()

    def before_waiting(self) -> None:
        self._room.pending.drain()

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        self.before_waiting()
        if not on_device(recv):
            return self.inner.sendrecv(send, recv, peer)
        if send.nbytes != recv.nbytes:
            raise ValueError(f"a swap of {send.nbytes} for {recv.nbytes} bytes")
        self._room.exchange(
            recv, [send.address], [recv.address], recv.nbytes, lambda out, into: self.inner.sendrecv(out, into, peer)
        )

    def alltoall(self, send: Any, recv: Any) -> None:
        self.before_waiting()
        if not on_device(recv):
            return self.inner.alltoall(send, recv)
        n = chunk(send, recv, self.size)
        self._room.exchange(recv, _bases(send, self.size, n), _bases(recv, self.size, n), n, self.inner.alltoall)

    def allgather(self, send: Any, recv: Any) -> None:
        self.before_waiting()
        if not on_device(recv):
            return self.inner.allgather(send, recv)
        n = chunk(send, recv, self.size)
        mine = recv.address + self.rank * n if send is None else send.address
        self._room.exchange(recv, [mine], _bases(recv, self.size, n), n, self.inner.allgather)

    def group(self, ranks: Sequence[int]) -> Link | None:
        inner = self.inner.group(ranks)
        return inner and StagedLink(inner, self.driver, self._piece, self._room)


def _bases(array: DeviceArray, size: int, n: int) -> list[int]:
    return [array.address + rank * n for rank in range(size)]


class _Room:
    """The two streams, and the pinned memory that collectives of this rank go through, one at a time."""

    def __init__(self, driver: Driver, piece: int) -> None:
        self.driver, self._size, self.pending = driver, piece, Pending(driver)
        self.out, self.into = driver.stream(urgent=True), driver.stream(urgent=True)
        self._halves: list[_Half] = []
        self._before = driver.event()

    def exchange(
        self,
        array: DeviceArray,
        send: Sequence[int],
        recv: Sequence[int],
        n: int,
        swap: Callable[[Bytes, Bytes], None],
    ) -> None:
        """Chunks of ``n`` bytes at the addresses ``send`` go out, others come to ``recv``, by ``swap`` piece by piece.

        After what the array's stream was given so far; what it is given afterwards sees the bytes.
        """
        if not n:
            return
        if not self._halves:
            self._halves = [_Half(self.driver, self._size) for _ in range(2)]
        most = max(len(send), len(recv))
        width = min(n, max(self._size // most // ALIGN * ALIGN, 1))
        if width * most > self._size:
            raise ValueError(f"{self._size} bytes are too few to stage pieces for {most} ranks")
        self.driver.record(self._before, array.compute)
        for stream in (self.out, self.into):
            self.driver.wait(stream, self._before)
        pieces = [(at, min(width, n - at)) for at in range(0, n, width)]
        self._fetch(0, pieces[0], send)
        for k, (at, w) in enumerate(pieces):
            if k + 1 < len(pieces):
                self._fetch(k + 1, pieces[k + 1], send)
            half = self._halves[k % 2]
            self.driver.synchronize(half.fetched)
            self.driver.synchronize(half.stored)  # what came two pieces ago has left the buffer
            swap(half.out[: len(send) * w], half.into[: len(recv) * w])
            for j, address in enumerate(recv):
                self.driver.copy(address + at, half.into.ctypes.data + j * w, w, self.into)
            self.driver.record(half.stored, self.into)
        self.driver.wait(array.compute, half.stored)

    def _fetch(self, k: int, piece: tuple[int, int], send: Sequence[int]) -> None:
        """The k-th piece to the host: its half of the buffer was last read by an exchange that has returned."""
        half, (at, w) = self._halves[k % 2], piece
        for j, address in enumerate(send):
            self.driver.copy(half.out.ctypes.data + j * w, address + at, w, self.out)
        self.driver.record(half.fetched, self.out)


class _Half:
    """Pinned memory for a piece each way, and when its copies are done."""

    def __init__(self, driver: Driver, size: int) -> None:
        self.out, self.into = driver.pinned(size), driver.pinned(size)
        self.fetched, self.stored = driver.event(), driver.event()


def _pinned(driver: Driver, array: DeviceArray) -> tuple[Bytes, Stamp]:
    """Host memory of a message and the stamp at its end."""
    if array.nbytes < STAMP:
        raise ValueError(f"a message of {array.nbytes} bytes has no room for its stamp of {STAMP}")
    pinned = driver.pinned(array.nbytes)[: array.nbytes]
    return pinned, pinned[-STAMP:].view(np.float64)


class StagedSender:
    """The copy to the host is asked for when the message is made, so the device may be at the next op by then."""

    def __init__(self, room: _Room, array: DeviceArray, make: Callable[[Bytes], Channel]) -> None:
        self._room, self._driver, self._array = room, room.driver, array
        self._pinned, self.stamp = _pinned(room.driver, array)
        self.clock: Callable[[], float] | None = None
        self._message = Held(room.pending, make(self._pinned), True)
        self._message.leaving = self._leaving
        self._made, self._copied = room.driver.event(), room.driver.event()
        self._asked = False

    def ready(self) -> None:
        driver, out = self._driver, self._room.out
        driver.record(self._made, self._array.compute)
        driver.wait(out, self._made)
        driver.copy(self._pinned.ctypes.data, self._array.address, self._array.nbytes - STAMP, out)
        driver.record(self._copied, out)
        self._asked = True

    def _leaving(self) -> None:
        if self.clock is not None:
            self.stamp[0] = self.clock()

    def start(self) -> None:
        """Leaves when the copy is there; the host does not wait for it."""
        if not self._asked:
            self.ready()
        self._asked = False
        self._message.start(self._copied)

    def wait(self) -> None:
        """Array and pinned memory are free."""
        self._message.wait()

    def done(self) -> bool:
        return self._message.done()


class StagedReceiver:
    """The array is touched only after the message has come, and after what its stream was given before ``start``."""

    def __init__(self, room: _Room, array: DeviceArray, make: Callable[[Bytes], Channel]) -> None:
        self._room, self._driver, self._array = room, room.driver, array
        self._pinned, self.stamp = _pinned(room.driver, array)
        self._message = Held(room.pending, make(self._pinned), False)
        self._free, self._copied = room.driver.event(), room.driver.event()
        self._started = False

    def ready(self) -> None:
        """Nothing: nobody makes this message here."""

    def start(self) -> None:
        self._driver.record(self._free, self._array.compute)
        self._message.start(self._copied)  # when the message before has left the pinned memory
        self._started = True

    def wait(self) -> None:
        if not self._started:
            return
        self._message.wait()
        self._started = False
        driver, into = self._driver, self._room.into
        driver.wait(into, self._free)
        driver.copy(self._array.address, self._pinned.ctypes.data, self._array.nbytes - STAMP, into)
        driver.record(self._copied, into)
        driver.wait(self._array.compute, self._copied)

    def done(self) -> bool:
        return self._message.done()
