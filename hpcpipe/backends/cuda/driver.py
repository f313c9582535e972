"""A GPU in a dozen verbs: what the CUDA backend and the device links ask of it, and nothing more.

Device memory is an address, a stream and an event are handles. ``CupyDriver`` (cupy_driver.py) speaks to a real one;
the tests have another that poses in host memory, so that the order of everything on every stream is tested where there
is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Stream = Any  # an opaque handle
Event = Any
Graph = Any
Function = Any


class Properties(NamedTuple):
    """What a device says of itself. Sizes in bytes."""

    name: str
    capability: tuple[int, int]  # (9, 0) for Hopper
    multiprocessors: int
    memory: int  # in all
    free: int  # when the device was opened
    shared: int  # that one block may have, dynamic, at most
    driver: int  # the CUDA version that it knows, 13000 for 13.0
    bus: str  # PCI address, "0000:19:00.0"

    @property
    def arch(self) -> str:
        """The name of what compilers make for it: sm_90a; with what only this architecture has, where there is such."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


class Driver(Protocol):
    """One device, and the calling thread is at it. Every verb that takes a stream returns before the work is done."""

    properties: Properties

    def allocate(self, nbytes: int) -> int:
        """Address of zeroed device memory, aligned to 512 bytes; UserError with the numbers where there is too little.

        Plain device memory, never managed.
        """

    def release(self, address: int) -> None:
        """Gives memory back."""

    def room(self) -> int:
        """Bytes that are free now."""

    def pinned(self, nbytes: int) -> Bytes:
        """Zeroed page-locked host memory, uint8 [nbytes]: what copies run beside computation from and to."""

    def stream(self, urgent: bool = False) -> Stream:
        """A stream that waits for no other; an ``urgent`` one goes before others where both have work."""

    def event(self, timing: bool = False) -> Event:
        """An event, done until it is recorded; only one with ``timing`` can be asked for times."""

    def record(self, event: Event, stream: Stream) -> None:
        """The event is done when all that was given to the stream so far is done."""

    def wait(self, stream: Stream, event: Event) -> None:
        """What is given to the stream from now on starts after the event, as it was recorded last."""

    def done(self, event: Event) -> bool:
        """Whether an event is done; does not wait."""

    def synchronize(self, what: Stream | Event) -> None:
        """The host waits for a stream or an event; UserError if the device has failed."""

    def seconds(self, first: Event, second: Event) -> float:
        """Seconds between two events, both done and made with ``timing``."""

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copies between any two places, device or pinned host memory (``array.ctypes.data``)."""

    def fill(self, to: int, byte: int, nbytes: int, stream: Stream) -> None:
        """Sets bytes."""

    def load(self, image: bytes, entries: Sequence[str]) -> dict[str, Function]:
        """The functions of a compiled module (cubin) by name."""

    def launch(
        self,
        function: Function,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[int | float],
        shared: int,
        stream: Stream,
    ) -> None:
        """Launches a kernel: an int is an address or an int64_t, a float a float. ``shared`` is dynamic, in bytes."""

    def begin_capture(self, stream: Stream) -> None:
        """What is given to the stream from now on is kept and not done."""

    def end_capture(self, stream: Stream) -> Graph:
        """What was kept, ready to be launched as one thing."""

    def launch_graph(self, graph: Graph, stream: Stream) -> None:
        """Does it all."""

    def push_range(self, name: str) -> None:
        """Opens a named range for profilers (NVTX)."""

    def pop_range(self) -> None:
        """Closes the last one."""
