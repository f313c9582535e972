"""What NCCL's messages run on: lanes, their communicators and streams, and the messages themselves.

A lane is one direction of one tag between two ranks: a communicator of these two and a stream. Receives on it match
sends by their order alone. All communicators of a rank are known in one place, so that a failed job can end them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.comm.over import STAMP, DeviceArray, Driver
from hpcpipe.config import UserError


class Lane(NamedTuple):
    """One direction of one tag, or of those that never are in use at one time."""

    source: int
    target: int
    tag: int

    @property
    def turn(self) -> tuple[int, ...]:
        """The order in which all ranks make their communicators.

        One order for all, so that no two ranks wait for each other; along a chain of ranks every other pair is made at
        the same time, so the last pair does not wait for all before it.
        """
        low, high = sorted(self[:2])
        return (low % 2, low, high, *self)


class Wire:
    """A communicator and the stream that all it does is on."""

    def __init__(self, communicator: Any, stream: Any) -> None:
        self.communicator, self.stream = communicator, stream
        self.handle = getattr(stream, "ptr", stream)  # NCCL takes a stream's address


class Wires:
    """What a link and its groups have in common: the device, the stream for sums, and all communicators."""

    def __init__(self, driver: Driver, library: Any) -> None:
        self.driver, self.library = driver, library
        self.sums = driver.stream(urgent=True)
        self._before, self._after = driver.event(), driver.event()
        self._wires: list[Wire] = []
        self._next = 0

    def wire(self, size: int, id: Any, place: int, what: str, stream: Any) -> Wire:
        """A communicator, made together with its other ranks."""
        with self.speaking(f"connecting {what}"):
            self._wires.append(Wire(self.library.NcclCommunicator(size, id, place), stream))
        return self._wires[-1]

    def greet(self, wire: Wire, channel: NcclChannel) -> None:
        """The first message of a lane, of the bytes that are no part of one.

        NCCL sets the way between two ranks up at its first use and blocks meanwhile. In a step that could be for ever:
        two ranks each at the first message of another lane. Here all ranks take the lanes in one order.
        """
        communicator, array = wire.communicator, channel.array
        with self.speaking(f"setting up {channel}"):
            call = communicator.send if channel.sends else communicator.recv
            at = array.address + array.nbytes - STAMP
            call(at, STAMP, self.library.NCCL_CHAR, int(channel.sends), wire.handle)
        self.driver.synchronize(wire.stream)

    def quiet(self) -> bool:
        """Whether all sums are done."""
        return self.driver.done(self._after)

    @contextlib.contextmanager
    def beside(self, array: DeviceArray) -> Iterator[Any]:
        """The stream for sums, with the array's own stream waiting before and after."""
        stream = array.compute
        self.driver.record(self._before, stream)
        self.driver.wait(self.sums, self._before)
        yield getattr(self.sums, "ptr", self.sums)
        self.driver.record(self._after, self.sums)
        self.driver.wait(stream, self._after)

    @contextlib.contextmanager
    def speaking(self, doing: str) -> Iterator[None]:
        """NCCL's errors in a sentence."""
        try:
            yield
        except self.library.NcclError as error:
            raise self.failed(doing, error) from None

    def failed(self, doing: str, error: Exception) -> UserError:
        return UserError(
            f"NCCL failed while {doing} ({error}): set NCCL_DEBUG=WARN to hear why, or use "
            'device.transport = "staged", which does without NCCL'
        )

    def check(self) -> None:
        """Asks one communicator after the other, one at each call, whether it has failed meanwhile."""
        if self._wires:
            self._next = (self._next + 1) % len(self._wires)
            try:
                self._wires[self._next].communicator.check_async_error()
            except self.library.NcclError as error:
                raise self.failed("carrying messages", error) from None

    def end(self, wire: Wire, quiet: bool) -> None:
        """Gives a communicator back; one with messages that will never come is aborted, for else it would wait."""
        if wire in self._wires:
            self._wires.remove(wire)
            with self.speaking("closing its communicators"):
                (wire.communicator.destroy if quiet else wire.communicator.abort)()

    def abort(self) -> None:
        for wire in self._wires:
            with contextlib.suppress(Exception):  # the job is lost already
                wire.communicator.abort()


class NcclChannel:
    """A message of a lane. NCCL carries no stamp."""

    sends: bool

    def __init__(self, shared: Wires, lane: Lane, tag: int, array: DeviceArray) -> None:
        if array.nbytes < STAMP:
            raise ValueError(f"a message of {array.nbytes} bytes has no room for its stamp of {STAMP}")
        self.shared, self.lane, self.tag, self.array = shared, lane, tag, array
        self.wire: Wire | None = None  # from ``connect`` on
        self.stamp, self.clock = np.zeros(1), None
        self._free, self._over = shared.driver.event(), shared.driver.event()
        self._started = False

    def ready(self) -> None:
        """Of a receiver, nothing."""

    def _launch(self, call: Callable[..., None], peer: int, wire: Wire) -> None:
        driver, array = self.shared.driver, self.array
        driver.wait(wire.stream, self._free)
        try:
            call(array.address, array.nbytes, self.shared.library.NCCL_CHAR, peer, wire.handle)
        except self.shared.library.NcclError as error:
            raise self.shared.failed(f"starting {self}", error) from None
        driver.record(self._over, wire.stream)
        self._started = True

    def wait(self) -> None:
        """The array's stream waits, the host does not."""
        if self._started:
            self.shared.driver.wait(self.array.compute, self._over)
            self._started = False

    def done(self) -> bool:
        return self.shared.driver.done(self._over)

    def _connected(self) -> Wire:
        if self.wire is None:
            raise RuntimeError(f"{self} was started before the link was connected")
        return self.wire

    def __repr__(self) -> str:
        what = "send" if self.sends else "receive"
        return f"{what} {self.lane.source} -> {self.lane.target} (tag {self.tag}, {self.array.nbytes} bytes)"


class NcclSender(NcclChannel):
    """Leaves when the array is made, whatever its stream has been given since."""

    sends = True
    _asked = False

    def ready(self) -> None:
        self.shared.driver.record(self._free, self.array.compute)
        self._asked = True

    def start(self) -> None:
        if not self._asked:
            self.ready()
        self._asked = False
        wire = self._connected()
        self._launch(wire.communicator.send, 1, wire)


class NcclReceiver(NcclChannel):
    """Writes into the array once its stream has done what it was given before ``start``."""

    sends = False

    def start(self) -> None:
        wire = self._connected()
        self.shared.driver.record(self._free, self.array.compute)
        self._launch(wire.communicator.recv, 0, wire)
