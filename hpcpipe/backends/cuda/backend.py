"""The CUDA backend: recordings become CUDA graphs, one for each pass and microbatch slot, captured before step 0.

In: recorded calls and where their tensors lie. A call becomes a few launches of native/cuda, or one of cuBLASLt or
cuDNN where these are there and take it; what a rank does in a step is launches of whole graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.cuda.array import Bridge, DeviceArray, Memory, Streams
from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.launch import Launch, Launcher, Site
from hpcpipe.backends.null import Call, Tensor

Array = npt.NDArray[Any]


class Pass(NamedTuple):
    """A compiled pass: its calls, (region, offset) of each of their buffers (None: absent), and bytes of scratch."""

    calls: tuple[Call, ...]
    places: tuple[tuple[tuple[int, int] | None, ...], ...]
    work: int
    passing: frozenset[Tensor]  # what one call makes and only the next one reads
    whole: frozenset[int]  # tensors whose products are not narrowed


class Step(Protocol):
    """Something that a stream can be given, in a capture too."""

    def enqueue(self, stream: Any) -> None: ...


class Library(Protocol):
    """What does some calls of a pass better than our own kernels: cuBLASLt, cuDNN."""

    def take(self, sites: Sequence[Site]) -> tuple[int, Sequence[Launch | Step]] | None:
        """For the calls from the first on: how many it does, and how; None where it does not do the first."""

    def chosen(self) -> Sequence[str]:
        """Lines about what was chosen."""


class CudaBackend:
    """Runs recordings on one GPU. ``launchers`` are our kernels, by row of the table."""

    name, real, threads, on_device = "cuda", 4, 1, True

    def __init__(
        self,
        driver: Driver,
        functions: Mapping[str, Any],
        launchers: Mapping[str, Launcher],
        peak: Callable[[float], float] = lambda seconds: 0.0,
    ) -> None:
        """``functions`` are the entries of native/cuda, loaded; ``peak`` measures or knows FLOP/s of products."""
        self.driver, self.functions, self.launchers = driver, functions, launchers
        self.libraries: list[Any] = []  # asked before our own kernels, in this order
        self.level = f"{driver.properties.name}, {driver.properties.arch}"
        self.streams, self._peak = Streams(driver), peak
        self.bridge, self._aside = Bridge(driver), Bridge(driver)  # the second one for a thread of its own
        self._reading, self._begun, self._ended = driver.stream(), driver.event(), driver.event()
        self._graphs: dict[tuple[Any, ...], _Graph] = {}
        self._passing: frozenset[Tensor] = frozenset()
        self._whole: frozenset[int] = frozenset()

    def allocate(self, nbytes: int) -> Memory:
        """Zeroed device memory; UserError, with the numbers, where there is too little."""
        return Memory(self.driver, self.streams, self.bridge, nbytes)

    def array(self, memory: Memory, offset: int, shape: tuple[int, ...], type: str = "r") -> DeviceArray:
        """A view of ``memory`` from byte ``offset``; IndexError where it would reach over the end."""
        return memory.array(offset, shape, type)

    def mirror(self, memory: Memory, offset: int, nbytes: int) -> tuple[Array, Callable[[], None]]:
        """Pinned host bytes that stand for a part of the arena, and what sends them there."""
        host, to = self.driver.pinned(max(nbytes, 1))[:nbytes], memory.address + offset
        source = host.ctypes.data
        return host, lambda: self.driver.copy(to, source, nbytes, self.streams.current) if nbytes else None

    def host(self, array: DeviceArray) -> Array:
        """A copy on the host of what does not change now, for a thread beside the steps: waits for none of them."""
        found = np.empty(array.shape, array.dtype)
        self._aside.read(array.address, found, self._reading)
        return found

    def load(self, array: DeviceArray, read: Callable[[Array], Any]) -> None:
        """Fills an array with what ``read`` writes into the host array that it is given."""
        values = np.empty(array.shape, array.dtype)
        read(values)
        array[...] = values

    def compile(
        self,
        calls: Sequence[Call],
        where: Callable[[Tensor], tuple[int, int]],
        brief: Collection[int] = (),
        whole: Collection[int] = (),
    ) -> Pass:
        """Resolves each tensor of a pass to (region, offset); nobody needs the tensors ``brief`` (ids) after it, and
        what touches one of ``whole`` is not multiplied in less than the compute type.
        """
        places = tuple(tuple(None if t is None else where(t) for t in call.buffers) for call in calls)
        work = max((call.scratch(True) for call in calls), default=0)
        return Pass(tuple(calls), places, work, _passing(calls, brief), frozenset(whole))

    def bound(self, handle: Pass, memory: Memory, bases: Array, work: int = -1) -> Callable[[], None]:
        """A pass prepared for one place in memory, to be captured; the same place gives the same graph again."""
        if work < 0 < handle.work:
            raise ValueError(f"cuda backend: this pass needs {handle.work} bytes of scratch, none was given")
        if not handle.calls:
            return lambda: None
        key = (handle, memory.address, bases.tobytes(), work)
        if key not in self._graphs:
            self._graphs[key] = _Graph(self.driver, self.streams, self._prepared(handle, memory, bases, work))
        return self._graphs[key].launch

    def run(self, handle: Pass, memory: Memory, bases: Array, work: int = -1) -> None:
        """Executes a compiled pass, call by call, and waits for its end."""
        for step in self._prepared(handle, memory, bases, work):
            step.enqueue(self.streams.current)
        self.driver.synchronize(self.streams.current)

    def copier(self, memory: Memory, to: int, source: int, nbytes: int) -> Callable[[], None]:
        """What copies bytes from one offset of the arena to another."""
        a, b, copy, streams = memory.address + to, memory.address + source, self.driver.copy, self.streams
        return lambda: copy(a, b, nbytes, streams.current)

    def matmul_peak(self, seconds: float) -> float:
        """FLOP/s of this device's products in the type that this run computes in: known by its name, or measured."""
        return self._peak(seconds)

    def ask(self, library: Library) -> None:
        """Lets a library take calls before our own kernels do."""
        self.libraries.append(library)

    def chosen(self) -> list[str]:
        """What was chosen for this device, in lines."""
        return [line for library in self.libraries for line in library.chosen()]

    def passes_on(self, tensor: Tensor) -> bool:
        """Of the pass that is being prepared: whether only the call after its maker reads a tensor."""
        return tensor in self._passing

    def stays(self, site: Site) -> bool:
        """Of the pass that is being prepared: whether a call touches a tensor whose products are not narrowed."""
        return any(t is not None and t.id in self._whole for t in site.call.buffers)

    def table(self) -> dict[str, Any]:
        """The algorithms that libraries have chosen, for other ranks: the same product must give the same bits."""
        tables = (library.table() for library in self.libraries if hasattr(library, "table"))
        return {key: value for table in tables for key, value in table.items()}

    def adopt(self, table: Mapping[str, Any]) -> None:
        """Takes the ranks' common choices; before anything is captured."""
        for library in self.libraries:
            if hasattr(library, "adopt"):
                library.adopt(table)

    def capture(self, memory: Memory) -> None:
        """Captures all that was prepared: from here on, what runs is launches of graphs. ``memory`` is zeroed.

        Everything runs once before, for CUDA loads a kernel at its first launch and may not do so within a capture.
        """
        for graph in self._graphs.values():
            graph.run()
        self.driver.synchronize(self.streams.compute)
        for graph in self._graphs.values():
            graph.capture()
        self.driver.fill(memory.address, 0, memory.nbytes, self.streams.compute)
        self.driver.synchronize(self.streams.compute)

    def forget(self, memory: Memory) -> None:
        """Gives an allocation back, with the passes that were prepared for it."""
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[1] != memory.address}
        self.driver.release(memory.address)

    # --- what the executor asks of a device

    def event(self) -> Any:
        """A mark on the current stream's time, to be recorded."""
        return self.driver.event(timing=True)

    def record(self, event: Any) -> None:
        """The mark is where the current stream is now."""
        self.driver.record(event, self.streams.current)

    def settle(self) -> None:
        """Waits until all that was given to the compute stream is done."""
        self.driver.synchronize(self.streams.compute)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Work inside goes to the stream of reductions, after what the compute stream has now."""
        self.driver.record(self._begun, self.streams.compute)
        self.driver.wait(self.streams.reducing, self._begun)
        self.streams.current = self.streams.reducing
        try:
            yield
        finally:
            self.streams.current = self.streams.compute

    def join(self) -> None:
        """What the compute stream is given from now on comes after the reductions so far."""
        self.driver.record(self._ended, self.streams.reducing)
        self.driver.wait(self.streams.compute, self._ended)

    # --- graphs

    def _prepared(self, handle: Pass, memory: Memory, bases: Array, work: int) -> list[Step]:
        self._passing, self._whole = handle.passing, handle.whole
        return self._steps(self._sites(handle, memory, bases, work))

    def _sites(self, handle: Pass, memory: Memory, bases: Array, work: int) -> list[Site]:
        found = []
        for call, places in zip(handle.calls, handle.places, strict=True):
            at = {
                arg.name: 0 if place is None else memory.address + int(bases[place[0]]) + place[1]
                for arg, place in zip(call.row.buffers, places, strict=True)
            }
            half = any(
                t is not None and (arg.type, t.type) == ("a", "h")
                for arg, t in zip(call.row.buffers, call.buffers, strict=True)
            )
            found.append(Site(call, at, half, memory.address + max(work, 0), self.driver.properties))
        return found

    def _steps(self, sites: Sequence[Site]) -> list[Step]:
        """What the calls become, in their order."""
        steps: list[Step] = []
        at = 0
        while at < len(sites):
            taken = next((t for library in self.libraries if (t := library.take(sites[at:]))), None)
            count, parts = taken or (1, self.launchers[sites[at].call.kernel](sites[at]))
            steps += [self._launched(part) if isinstance(part, Launch) else part for part in parts]
            at += count
        return steps

    def _launched(self, launch: Launch) -> Step:
        return _Kernel(self.driver, self.functions[launch.entry], launch)


def _passing(calls: Sequence[Call], brief: Collection[int]) -> frozenset[Tensor]:
    """Tensors that one call makes and only the next one reads."""
    seen: dict[Tensor, list[int]] = {}
    for i, call in enumerate(calls):
        for tensor in {t for t in call.buffers if t is not None and t.id in brief}:
            seen.setdefault(tensor, []).append(i)
    return frozenset(t for t, at in seen.items() if len(at) == 2 and at[1] == at[0] + 1)


class _Graph:
    """Steps, captured at the latest when they are launched first."""

    def __init__(self, driver: Driver, streams: Streams, steps: Sequence[Step]) -> None:
        self.driver, self.streams, self.steps = driver, streams, steps
        self._graph: Any = None

    def run(self) -> None:
        """Does the steps one by one."""
        for step in self.steps:
            step.enqueue(self.streams.compute)

    def capture(self) -> None:
        if self._graph is None:
            self.driver.begin_capture(self.streams.compute)
            self.run()
            self._graph = self.driver.end_capture(self.streams.compute)

    def launch(self) -> None:
        if self._graph is None:
            self.capture()
        self.driver.launch_graph(self._graph, self.streams.current)


class _Kernel:
    """One launch of ours."""

    def __init__(self, driver: Driver, function: Any, launch: Launch) -> None:
        self.driver, self.function, self.launch = driver, function, launch

    def enqueue(self, stream: Any) -> None:
        _, grid, block, args, shared = self.launch
        self.driver.launch(self.function, grid, block, args, shared, stream)
