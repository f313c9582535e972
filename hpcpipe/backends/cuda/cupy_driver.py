"""The driver of a real GPU, over CuPy's bindings of the CUDA runtime: each verb is one or two calls of it.

In: the index of a device among those that this process sees. Out: a ``Driver``. CuPy's memory pools and arrays are not
used. CUDA's errors that a user can do something about become sentences; after one that CUDA calls sticky nothing works
any more on this device, so every verb that meets it says so.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.backends.cuda.driver import Bytes, Event, Graph, Properties, Stream
from hpcpipe.config import UserError

# Numbers of cudaError_t.
OUT_OF_MEMORY, DRIVER_TOO_OLD, NO_DEVICE, WRONG_DEVICE, NOT_READY = 2, 35, 100, 101, 600
# After these the context is lost: unavailable, ECC, NVLink, bad address, timeout, assertion, hardware stack, illegal
# instruction, misaligned address, address space, program counter, launch failure, contained, tensor memory, unknown.
STICKY = frozenset({46, 214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999})
FREE_SHARED = 48 << 10  # dynamic shared memory that a kernel may have without asking for more
MOST_URGENT = -1000  # CUDA clamps a priority to what the device has
GIB = 1 << 30
LINUX_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}  # the first of each major version, for data centres


def failure(bus: str, what: str) -> str:
    """The sentence for a device that is lost to this process."""
    return f"the GPU {bus} failed: {what}; look into `dmesg` for Xid messages and start again, perhaps without it"


def out_of_memory(nbytes: int, free: int, properties: Properties) -> str:
    """The sentence for an allocation that does not fit."""
    return (
        f"GPU {properties.bus} ({properties.name}) has {free / GIB:.1f} of {properties.memory / GIB:.1f} GiB free, "
        f"{nbytes / GIB:.1f} GiB are needed; try a smaller train.microbatch, train.recompute or more pipeline stages"
    )


def no_driver(runtime: int, driver: int) -> str:
    """The sentence for a machine without a usable driver; CUDA versions as 13020 for 13.2, ``driver`` 0 for none."""
    needed = f'device.backend = "cuda" needs an NVIDIA driver that knows CUDA {runtime // 1000}'
    first = LINUX_DRIVERS.get(runtime // 1000)
    needed += f" (on Linux {first} or newer)" if first else ""
    if not driver:
        return f'{needed}, and here is none; run on a node with a GPU or set device.backend = "cpu"'
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    return f"{needed}, the one here knows CUDA {known}; update it or install CuPy for CUDA {driver // 1000}"


def no_device(index: int, count: int) -> str:
    """The sentence for a device that is not there."""
    return (
        f'device.backend = "cuda" wants GPU {index}, but this process sees {count}; look at CUDA_VISIBLE_DEVICES and '
        'at how many GPUs the job asked for, or set device.backend = "cpu"'
    )


class Kernel(NamedTuple):
    """A function and, in one element, the dynamic shared memory that it may have so far."""

    function: Any
    allowed: list[int]


class Guard:
    """Around each verb: the calling thread is at the device, and CUDA's errors leave as sentences."""

    def __init__(self, cuda: Any, index: int) -> None:
        self.cuda, self.index, self.bus = cuda, index, f"number {index}"
        self._thread = threading.local()

    def __enter__(self) -> None:
        if not hasattr(self._thread, "at"):
            self.cuda.runtime.setDevice(self.index)
            self._thread.at = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        status = getattr(error, "status", None)
        if status in STICKY:
            raise UserError(failure(self.bus, str(error))) from error
        if status == OUT_OF_MEMORY:
            raise UserError(f"GPU {self.bus}: CUDA got no memory for itself or for pinned buffers ({error})") from error


class CupyDriver:
    """See ``Driver``. Streams and events are CuPy's, with their handle in ``ptr``."""

    def __init__(self, index: int = 0) -> None:
        try:
            from cupy import cuda
            from cupy.cuda import driver as cuda_driver
        except ImportError as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f'device.backend = "cuda" needs CuPy: install cupy-cuda13x or cupy-cuda12x, by your driver ({said[0]})'
            ) from error
        self._cuda, self._runtime, self._low = cuda, cuda.runtime, cuda_driver
        self._find(index)
        self._guard = Guard(cuda, index)
        with self._guard:
            self.properties = self._ask(index)
            self._guard.bus = self.properties.bus
            self._own = cuda.Stream(non_blocking=True)

    def _find(self, index: int) -> None:
        """UserError unless the device is there."""
        runtime = self._runtime
        try:
            count = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            if error.status == DRIVER_TOO_OLD:
                raise UserError(no_driver(runtime.runtimeGetVersion(), runtime.driverGetVersion())) from error
            if error.status != NO_DEVICE:
                raise UserError(
                    f'device.backend = "cuda": CUDA does not start here ({error}); look at nvidia-smi and, on machines '
                    "with NVSwitch, whether the fabric manager runs"
                ) from error
            count = 0
        if not 0 <= index < count:
            raise UserError(no_device(index, count))

    def _ask(self, index: int) -> Properties:
        runtime = self._runtime
        told = runtime.getDeviceProperties(index)
        free, memory = runtime.memGetInfo()
        return Properties(
            name=told["name"].decode(),
            capability=(told["major"], told["minor"]),
            multiprocessors=told["multiProcessorCount"],
            memory=memory,
            free=free,
            shared=runtime.deviceGetAttribute(runtime.cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
            driver=runtime.driverGetVersion(),
            bus=runtime.deviceGetPCIBusId(index).lower(),
        )

    # ---- memory

    def allocate(self, nbytes: int) -> int:
        with self._guard:
            try:
                address: int = self._runtime.malloc(max(nbytes, 1))
            except self._runtime.CUDARuntimeError as error:
                if error.status != OUT_OF_MEMORY:
                    raise
                raise UserError(out_of_memory(nbytes, self._runtime.memGetInfo()[0], self.properties)) from error
            # A plain memset may still run when it returns, and no stream of ours would wait for it.
            self._runtime.memsetAsync(address, 0, nbytes, self._own.ptr)
            self._own.synchronize()
            return address

    def release(self, address: int) -> None:
        with suppress(UserError), self._guard:  # a device that has failed has lost it already
            self._runtime.free(address)

    def room(self) -> int:
        with self._guard:
            free: int = self._runtime.memGetInfo()[0]
            return free

    def pinned(self, nbytes: int) -> Bytes:
        with self._guard:
            # Not CuPy's pool, which rounds up to a power of two.
            memory = self._cuda.PinnedMemory(max(nbytes, 1))
            found: Bytes = np.frombuffer(self._cuda.PinnedMemoryPointer(memory, 0), np.uint8, nbytes)
            found[:] = 0
            return found

    # ---- streams and events

    def stream(self, urgent: bool = False) -> Stream:
        with self._guard:
            return self._cuda.Stream(non_blocking=True, priority=MOST_URGENT if urgent else 0)

    def event(self, timing: bool = False) -> Event:
        with self._guard:
            return self._cuda.Event(disable_timing=not timing)

    def record(self, event: Event, stream: Stream) -> None:
        with self._guard:
            self._runtime.eventRecord(event.ptr, stream.ptr)

    def wait(self, stream: Stream, event: Event) -> None:
        with self._guard:
            self._runtime.streamWaitEvent(stream.ptr, event.ptr)

    def done(self, event: Event) -> bool:
        with self._guard:
            status = self._runtime.eventQuery(event.ptr)
            if status not in (0, NOT_READY):
                raise self._runtime.CUDARuntimeError(status)
            return bool(status == 0)

    def synchronize(self, what: Stream | Event) -> None:
        with self._guard:
            what.synchronize()

    def seconds(self, first: Event, second: Event) -> float:
        with self._guard:
            return float(self._runtime.eventElapsedTime(first.ptr, second.ptr)) * 1e-3

    # ---- work

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        with self._guard:
            self._runtime.memcpyAsync(to, source, nbytes, self._runtime.memcpyDefault, stream.ptr)

    def fill(self, to: int, byte: int, nbytes: int, stream: Stream) -> None:
        with self._guard:
            self._runtime.memsetAsync(to, byte, nbytes, stream.ptr)

    def load(self, image: bytes, entries: Sequence[str]) -> dict[str, Kernel]:
        with self._guard:
            module = self._cuda.function.Module()
            module.load(image)
            return {entry: Kernel(module.get_function(entry), [FREE_SHARED]) for entry in entries}

    def launch(
        self,
        function: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Sequence[int | float],
        shared: int,
        stream: Stream,
    ) -> None:
        with self._guard:
            kernel, allowed = function
            if shared > allowed[0]:
                most = self._low.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                self._low.funcSetAttribute(kernel.ptr, most, shared)
                allowed[0] = shared
            packed = tuple(np.float32(arg) if isinstance(arg, float) else np.int64(arg) for arg in args)
            kernel(grid, block, packed, shared, stream)

    def begin_capture(self, stream: Stream) -> None:
        with self._guard:
            # What other threads do meanwhile, a saver that asks an event for one, does not end the capture.
            stream.begin_capture(self._runtime.streamCaptureModeThreadLocal)

    def end_capture(self, stream: Stream) -> Graph:
        with self._guard:
            graph = stream.end_capture()
            graph.upload(stream)  # so that the first launch is like the others
            return graph

    def launch_graph(self, graph: Graph, stream: Stream) -> None:
        with self._guard:
            graph.launch(stream)

    # ---- profilers

    def push_range(self, name: str) -> None:
        self._cuda.nvtx.RangePush(name)

    def pop_range(self) -> None:
        self._cuda.nvtx.RangePop()
