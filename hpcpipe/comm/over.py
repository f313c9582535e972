"""What links for device memory have in common: how they see a device and its arrays, and that they stand on another.

A link for device memory stands on a link for host memory. Buffers on the host, objects, errors and the end of the job
are left to the one below; only what lies on a device is the upper one's. A device array is known by what it offers, not
by its class: the room of backends is not known here.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from hpcpipe.comm.link import Channel, Link, Sum

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]
Stamp = npt.NDArray[np.float64]

NAP = 20e-6  # seconds between two looks at a device while the host waits
STAMP = 8  # bytes at the end of a message, the sender's clock; what a device has there is no part of the message


class Properties(Protocol):
    """What a link asks of a device."""

    @property
    def multiprocessors(self) -> int: ...


class Driver(Protocol):
    """The verbs of a device that links use; streams and events are opaque handles."""

    @property
    def properties(self) -> Properties: ...

    def pinned(self, nbytes: int) -> Bytes: ...

    def stream(self, urgent: bool = False) -> Any: ...

    def event(self, timing: bool = False) -> Any: ...

    def record(self, event: Any, stream: Any) -> None: ...

    def wait(self, stream: Any, event: Any) -> None: ...

    def done(self, event: Any) -> bool: ...

    def synchronize(self, what: Any) -> None: ...

    def copy(self, to: int, source: int, nbytes: int, stream: Any) -> None: ...


class DeviceArray(Protocol):
    """Bytes on a device, and the stream that their readers and writers are on at the moment."""

    address: int
    nbytes: int

    @property
    def compute(self) -> Any: ...

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...


def on_device(buffer: Any) -> bool:
    """Whether a buffer is device memory."""
    return hasattr(buffer, "__cuda_array_interface__")


def chunk(send: DeviceArray | None, recv: DeviceArray, size: int) -> int:
    """Bytes per rank of a buffer that all ``size`` ranks fill; ValueError where they are not equal chunks."""
    if recv.nbytes % size or (send is not None and send.nbytes not in (recv.nbytes, recv.nbytes // size)):
        sent = recv.nbytes if send is None else send.nbytes
        raise ValueError(f"buffers of {sent} and {recv.nbytes} bytes are not {size} equal chunks")
    return recv.nbytes // size


class OverLink:
    """All of a link that is not about device memory, done by the link below."""

    def __init__(self, inner: Link) -> None:
        self.inner = inner
        self.rank, self.size, self.hostname = inner.rank, inner.size, inner.hostname

    def connect(self) -> None:
        """Prepares the channels made so far, before the first of them starts. Collective."""

    def before_waiting(self) -> None:
        """Whatever others may wait for before they come to where this rank is about to wait for them."""

    def progress(self) -> None:
        self.inner.progress()

    def allreduce(self, array: Any) -> None:
        self.before_waiting()
        self.inner.allreduce(array)

    def start_allreduce(self, array: Any) -> Sum:
        return _OverSum(self, self.inner.start_allreduce(array))

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        self.before_waiting()
        return self.inner.gather(value, root)

    def bcast(self, value: T, root: int = 0) -> T:
        self.before_waiting()
        return self.inner.bcast(value, root)

    def barrier(self) -> None:
        self.before_waiting()
        self.inner.barrier()

    def agree(self, error: str | None) -> None:
        self.before_waiting()
        self.inner.agree(error)

    def abort(self, message: str) -> NoReturn:
        self.inner.abort(message)

    def node_ranks(self) -> tuple[int, int]:
        return self.inner.node_ranks()

    def close(self) -> None:
        self.inner.close()

    def everybody(self, value: T) -> Sequence[T]:
        """Everybody's value in rank order, on every rank. Collective."""
        return self.bcast(self.gather(value) or [])


class _OverSum:
    """A sum under way in the link below."""

    def __init__(self, link: OverLink, inner: Sum) -> None:
        self._link, self._inner = link, inner

    def wait(self) -> None:
        self._link.before_waiting()
        self._inner.wait()


class Pending:
    """Messages of this rank that wait for its device, sends and receives each in their order.

    The host goes on instead of waiting for the device. Whoever comes by here next starts what the device has come to,
    and whoever waits here goes on doing so: a message is started as soon as the device is there, whatever the host
    waits for. The device gets there without any other rank's help, so what is free of deadlock with messages started at
    once is so with these.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self._queues: tuple[deque[Held], deque[Held]] = deque(), deque()

    def add(self, message: Held, sends: bool) -> None:
        self._queues[sends].append(message)
        self.look()

    def look(self) -> bool:
        """Starts those that can be; whether there are others left."""
        for queue in self._queues:
            while queue and self.driver.done(queue[0].event):
                queue.popleft().go()
        return any(self._queues)

    def until(self, done: Callable[[], bool], wait: Callable[[], object]) -> None:
        """Waits for something; with nothing left to start, in the way that is usual for it."""
        while not done():
            if not self.look():
                wait()
                return
            time.sleep(NAP)

    def drain(self) -> None:
        """Starts them all."""
        while self.look():
            for queue in self._queues:
                if queue:
                    self.driver.synchronize(queue[0].event)


class Held:
    """A message of the link below, started when the device has come to an event."""

    def __init__(self, pending: Pending, channel: Channel, sends: bool) -> None:
        self._pending, self._channel, self._sends = pending, channel, sends
        self.event: Any = None
        self.leaving: Callable[[], None] = lambda: None  # called when it is started
        self._held = False

    def start(self, event: Any) -> None:
        self.event, self._held = event, True
        self._pending.add(self, self._sends)

    def go(self) -> None:
        """The device is there."""
        self._held = False
        self.leaving()
        self._channel.start()

    def wait(self) -> None:
        while self._held:
            if self._pending.look():
                time.sleep(NAP)
        self._pending.until(self._channel.done, self._channel.wait)

    def done(self) -> bool:
        self._pending.look()
        return not self._held and self._channel.done()


class Passing:
    """A message in host memory, whose waiting must not keep those that wait for the device from being started."""

    def __init__(self, pending: Pending, channel: Channel) -> None:
        self._pending, self._channel = pending, channel
        self.start: Callable[[], None] = channel.start
        self.done: Callable[[], bool] = channel.done

    def wait(self) -> None:
        self._pending.until(self._channel.done, self._channel.wait)
