"""Messages between devices by an MPI that takes device addresses (CUDA-aware), and how to know that it does.

MPI knows no streams: a buffer must be made before MPI sends it, and free before it is posted. The host waits for
neither: a message that the device has not come to yet is held back and started by whatever comes by here next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.comm.link import Channel, Link
from hpcpipe.comm.over import DeviceArray, Driver, Held, OverLink, Passing, Pending, on_device

YES = ("1", "true", "yes", "on", "enabled", "t", "y")


class Support(NamedTuple):
    """Whether an MPI takes device memory, and what says so."""

    yes: bool
    reason: str


def support(library: str, kinds: str, environment: Mapping[str, str]) -> Support:
    """By what an MPI says of itself; what says nothing is taken as a no.

    ``library`` is MPI_Get_library_version, "" without MPI; ``kinds`` is the info key mpi_memory_alloc_kinds (MPI 4.1).
    """
    name = " ".join(library.strip("\0 \n").split("\n")[0].split()).split(",")[0]
    if not name:
        return Support(False, "the ranks are not joined by MPI")
    if any(kind.split(":")[0] == "cuda" for kind in kinds.lower().replace(" ", "").split(",")):
        return Support(True, f"{name} has cuda among its memory kinds")
    said = {
        "Open MPI": ("OMPI_MCA_opal_cuda_support",),
        "MVAPICH": ("MV2_USE_CUDA", "MVP_USE_CUDA"),
        "CRAY": ("MPICH_GPU_SUPPORT_ENABLED",),
    }
    for maker, variables in said.items():
        for variable in variables if maker.lower() in library.lower() else ():
            if environment.get(variable, "").lower() in YES:
                return Support(True, f"{name} with {variable}={environment[variable]}")
    if "mpich" in library.lower() and "--with-cuda" in library:
        if environment.get("MPIR_CVAR_ENABLE_GPU", "1").lower() in YES:
            return Support(True, f"{name} was configured with CUDA")
        return Support(False, f"MPIR_CVAR_ENABLE_GPU={environment['MPIR_CVAR_ENABLE_GPU']} turns it off in {name}")
    return Support(False, f"{name} does not say that it takes device memory")


def supported(link: Link, environment: Mapping[str, str]) -> Support:
    """Of the MPI under a link, which tells ``library()``: its version and its memory kinds."""
    told: Callable[[], tuple[str, str]] = getattr(link, "library", lambda: ("", ""))
    return support(*told(), environment)


class AwareLink(OverLink):
    """A link for arrays of one device over an MPI that reads and writes them where they are."""

    def __init__(self, inner: Link, driver: Driver, pending: Pending | None = None) -> None:
        super().__init__(inner)
        self._pending, self._given = pending or Pending(driver), driver.event()

    def sender(self, peer: int, tag: int, buffer: Any) -> Channel:
        channel = self.inner.sender(peer, tag, buffer)
        return AwareSender(self._pending, buffer, channel) if on_device(buffer) else Passing(self._pending, channel)

    def receiver(self, peer: int, tag: int, buffer: Any) -> Channel:
        channel = self.inner.receiver(peer, tag, buffer)
        return AwareReceiver(self._pending, buffer, channel) if on_device(buffer) else Passing(self._pending, channel)

    def progress(self) -> None:
        self._pending.look()
        self.inner.progress()

    def before_waiting(self) -> None:
        self._pending.drain()

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        self._settle(recv)
        self.inner.sendrecv(send, recv, peer)

    def alltoall(self, send: Any, recv: Any) -> None:
        self._settle(recv)
        self.inner.alltoall(send, recv)

    def allgather(self, send: Any, recv: Any) -> None:
        self._settle(recv)
        self.inner.allgather(send, recv)

    def _settle(self, array: Any) -> None:
        """What the array's stream was given so far is done, and no message is held back."""
        if on_device(array):
            self._pending.driver.record(self._given, array.compute)
            self._pending.driver.synchronize(self._given)
        self._pending.drain()

    def group(self, ranks: Sequence[int]) -> Link | None:
        inner = self.inner.group(ranks)
        return inner and AwareLink(inner, self._pending.driver, self._pending)


class AwareSender:
    """MPI reads the array once it is made. No stamp travels."""

    def __init__(self, pending: Pending, array: DeviceArray, channel: Channel) -> None:
        self._driver, self._array, self._message = pending.driver, array, Held(pending, channel, True)
        self.stamp, self.clock = np.zeros(1), None
        self._made, self._asked = pending.driver.event(), False

    def ready(self) -> None:
        self._driver.record(self._made, self._array.compute)
        self._asked = True

    def start(self) -> None:
        if not self._asked:
            self.ready()
        self._asked = False
        self._message.start(self._made)

    def wait(self) -> None:
        self._message.wait()

    def done(self) -> bool:
        return self._message.done()


class AwareReceiver:
    """MPI writes the array once it is free; what its stream is given after ``wait`` finds the message there."""

    def __init__(self, pending: Pending, array: DeviceArray, channel: Channel) -> None:
        self._driver, self._array, self._message = pending.driver, array, Held(pending, channel, False)
        self.stamp, self.clock = np.zeros(1), None
        self._free = pending.driver.event()

    def ready(self) -> None:
        """Nothing: nobody makes this message here."""

    def start(self) -> None:
        self._driver.record(self._free, self._array.compute)
        self._message.start(self._free)

    def wait(self) -> None:
        self._message.wait()

    def done(self) -> bool:
        return self._message.done()
