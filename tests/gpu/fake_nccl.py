"""NCCL that poses in host memory, for ranks that are threads of one process, each with a ``HostDriver``.

It is as strict as the real one may be: a send and its receive end together, matched by order on a communicator; without
a group each call is a kernel of its own, and a stream does one at a time; making a communicator, and its first message
in each direction, block the host until the peer does the same.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpcpipe.comm.local import LocalWorld
from tests.gpu.host_driver import HostDriver


def view(address: int, nbytes: int) -> np.ndarray:
    """The bytes at an address."""
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8) if nbytes else np.zeros(0, np.uint8)


class DeviceArray:
    """Bytes of a device, as links see them; ``view`` is for work that is being done, not for the host."""

    def __init__(self, driver: Any, nbytes: int, compute: Any, address: int = 0) -> None:
        self.driver, self.nbytes, self.compute = driver, nbytes, compute
        self.address = address or driver.allocate(max(nbytes, 1))

    @property
    def view(self) -> np.ndarray:
        return view(self.address, self.nbytes)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3}


class NcclError(RuntimeError):
    """As cupy's."""


@dataclass(eq=False)
class Transfer:
    """One side of a message: who, from or to where; ``other`` is set when both kernels run."""

    source: int
    target: int
    sends: bool
    address: int
    nbytes: int
    other: Transfer | None = None
    moved: bool = False

    def move(self) -> None:
        if self.other is not None and not self.moved:
            send, recv = (self, self.other) if self.sends else (self.other, self)
            if send.address != recv.address:
                ctypes.memmove(recv.address, send.address, send.nbytes)
            send.moved = recv.moved = True


@dataclass
class Meeting:
    """What the members of a communicator share."""

    members: set[int] = field(default_factory=set)
    posted: dict[tuple[int, int, bool], deque[Transfer]] = field(default_factory=dict)
    greeted: set[tuple[int, int, bool]] = field(default_factory=set)

    lock: threading.Lock = field(default_factory=threading.Lock)

    def post(self, mine: Transfer) -> None:
        """A kernel runs; its transfer meets the first one of the peer that has none yet."""
        others = self.posted.setdefault((mine.source, mine.target, not mine.sends), deque())
        if not others:
            self.posted.setdefault((mine.source, mine.target, mine.sends), deque()).append(mine)
            return
        mine.other = others.popleft()
        mine.other.other = mine
        if mine.nbytes != mine.other.nbytes:
            raise AssertionError(f"a send and its receive have {mine.nbytes} and {mine.other.nbytes} bytes")


class Net:
    """All communicators of a world. ``made`` lists (rank, members) in the order in which they were made."""

    def __init__(self, world: LocalWorld) -> None:
        self.world = world
        self.meetings: dict[bytes, Meeting] = {}
        self.ids = 0
        self.made: list[tuple[int, int]] = []


class Library:
    """One rank's cupy.cuda.nccl."""

    NCCL_CHAR, NcclError = 0, NcclError

    def __init__(self, net: Net, rank: int, driver: HostDriver) -> None:
        self.net, self.rank, self.driver = net, rank, driver
        self.fails: dict[str, str] = {}  # call -> what it says
        self.communicators: list[Communicator] = []
        self._group: list[tuple[Communicator, Any, Transfer]] | None = None

    def get_version(self) -> int:
        return 23203

    def get_unique_id(self) -> bytes:
        self.speak("get_unique_id")
        with self.net.world.changed:
            self.net.ids += 1
            return self.net.ids.to_bytes(128, "little")

    def NcclCommunicator(self, size: int, id: bytes, rank: int) -> Communicator:
        self.speak("init")
        world, number = self.net.world, int.from_bytes(id, "little")
        with world.changed:
            meeting = self.net.meetings.setdefault(id, Meeting())
            meeting.members.add(rank)
            self.net.made.append((self.rank, size))
            world.changed.notify_all()
            world.until(self.rank, f"communicator {number} of {size}", lambda: len(meeting.members) == size)
        self.communicators.append(Communicator(self, meeting, size, rank))
        return self.communicators[-1]

    def groupStart(self) -> None:
        assert self._group is None
        self._group = []

    def groupEnd(self) -> None:
        assert self._group is not None
        calls, self._group = self._group, None
        self._launch(calls)

    def speak(self, call: str) -> None:
        """Fails where a test wants it."""
        if call in self.fails:
            raise NcclError(self.fails[call])

    def add(self, communicator: Communicator, stream: Any, transfer: Transfer) -> None:
        if self._group is not None:
            self._group.append((communicator, stream, transfer))
            return
        self._launch([(communicator, stream, transfer)])

    def _launch(self, calls: Sequence[tuple[Communicator, Any, Transfer]]) -> None:
        """The first message each way blocks the host until the peer is at its own; then a kernel per communicator."""
        world = self.net.world
        greetings = [(c.meeting, (t.source, t.target), t.sends) for c, _, t in calls]
        with world.changed:
            for meeting, way, sends in greetings:
                meeting.greeted.add((*way, sends))
            world.changed.notify_all()
            for meeting, way, sends in greetings:
                what = f"the way {way[0]} -> {way[1]} of a communicator"
                world.until(self.rank, what, lambda m=meeting, w=way, s=sends: (*w, not s) in m.greeted)
        kernels: dict[int, tuple[Communicator, Any, list[Transfer]]] = {}
        for communicator, stream, transfer in calls:
            kernels.setdefault(id(communicator), (communicator, stream, []))[2].append(transfer)
        for communicator, stream, transfers in kernels.values():
            communicator.launch(stream, transfers)


class Communicator:
    """One rank's end. All of its calls must be on one stream, as links have it."""

    def __init__(self, library: Library, meeting: Meeting, size: int, rank: int) -> None:
        self.library, self.meeting, self.size, self.rank = library, meeting, size, rank
        self.stream: Any | None = None
        self.ended, self.under_way = "", 0

    def launch(self, stream: Any, transfers: Sequence[Transfer]) -> None:
        assert self.stream in (None, stream), "one communicator on two streams"
        assert not self.ended
        self.stream = stream
        words = ", ".join(f"{'send' if t.sends else 'receive'} {t.source} -> {t.target}" for t in transfers)

        def begin() -> None:
            with self.meeting.lock:
                for transfer in transfers:
                    self.meeting.post(transfer)

        def end() -> bool:
            with self.meeting.lock:
                if any(t.other is None for t in transfers):
                    return False
                for transfer in transfers:
                    transfer.move()
                self.under_way -= 1
                return True

        self.under_way += 1
        self.library.driver.call(begin, stream, words)
        self.library.driver.call(end, stream, words)

    def send(self, buffer: int, count: int, datatype: int, peer: int, stream: Any) -> None:
        self.library.speak("send")
        self.library.add(self, stream, Transfer(self.rank, peer, True, buffer, count))

    def recv(self, buffer: int, count: int, datatype: int, peer: int, stream: Any) -> None:
        self.library.speak("recv")
        self.library.add(self, stream, Transfer(peer, self.rank, False, buffer, count))

    def allGather(self, send: int, recv: int, count: int, datatype: int, stream: Any) -> None:
        self.library.speak("allGather")
        self.library.groupStart()
        for rank in range(self.size):
            self.send(send, count, datatype, rank, stream)
            self.recv(recv + rank * count, count, datatype, rank, stream)
        self.library.groupEnd()

    def check_async_error(self) -> None:
        self.library.speak("async")

    def destroy(self) -> None:
        assert not self.under_way
        self.ended = "destroyed"

    def abort(self) -> None:
        self.ended = "aborted"
