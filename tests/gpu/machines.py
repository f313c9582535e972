"""A real GPU and one that poses in host memory, behind one set of verbs, so that a test runs on both.

``World`` opens drivers and backends and does whole runs; ``OnDevice`` is a machine for the calls of kernel_calls.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from hpcpipe.backends import cpu
from hpcpipe.backends.cuda import opening
from hpcpipe.backends.cuda.backend import CudaBackend
from hpcpipe.backends.cuda.launch import Site
from tests.gpu.host_run import gpus
from tests.small_run import Result, run

Array = np.ndarray


class World:
    """``real``: this machine's GPUs, otherwise the emulator's."""

    def __init__(self, real: bool) -> None:
        self.real = real

    def devices(self, count: int, seed: int = 0) -> AbstractContextManager[Any]:
        """Inside, ranks sit at ``count`` devices: of the real ones, all or the first."""
        if not self.real:
            return gpus(count, seed)
        return nullcontext() if count > 1 else only_the_first()

    def backend(self, compute: str, libraries: bool = False) -> CudaBackend:
        """The first device with our own kernels, or with what is installed beside them."""
        with self.devices(1):
            driver = opening.connect(0)
            if libraries:
                return opening.assemble(driver, compute)
            return opening.assemble(driver, compute, lambda *_: ()) if self.real else opening.assemble(driver, compute)

    def run(self, data: Path, out: Path, ranks: int = 1, model: str = "llama", *, devices: int = 1,
            seed: int = 0, **settings: object) -> Result:  # fmt: skip
        """``small_run.run`` on ``devices`` GPUs."""
        with self.devices(devices, seed):
            return run(data, out, ranks, model, device__backend="cuda", **settings)


@contextmanager
def only_the_first() -> Iterator[None]:
    """All ranks of this process sit at the first GPU that it may use."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": first}):
        yield


def without_a_device() -> str:
    """The backend that float32 runs are held against: the CPU's library where it is built, else the definitions."""
    return "cpu" if cpu.runnable() and any(cpu.FOLDER.glob("libhpcpipe-*.so")) else "reference"


class OnDevice:
    """A call as a pass does it: by a library if one takes it, in a graph unless ``captured`` is False."""

    def __init__(self, backend: CudaBackend, captured: bool = True, replays: int = 0) -> None:
        self.backend, self.captured, self.replays = backend, captured, replays
        self.taken = 0  # calls that a library did

    def run(self, image: Array, site_at: Callable[[int], Site]) -> None:
        """Does the call in a copy of the bytes in the device's memory; replays begin from the same bytes again."""
        driver, stream = self.backend.driver, self.backend.streams.compute
        address, host = driver.allocate(image.nbytes), driver.pinned(image.nbytes)
        steps = self._steps(site_at(address)._replace(device=driver.properties))
        graph = None
        if self.captured:
            driver.begin_capture(stream)
            self._give(steps)
            graph = driver.end_capture(stream)
        for _ in range(1 + self.replays):
            host[:] = image
            driver.copy(address, host.ctypes.data, image.nbytes, stream)
            if graph is None:
                self._give(steps)
            else:
                driver.launch_graph(graph, stream)
            driver.synchronize(stream)
        driver.copy(host.ctypes.data, address, image.nbytes, stream)
        driver.synchronize(stream)
        image[:] = host
        driver.release(address)

    def _steps(self, site: Site) -> Any:
        self.taken += any(library.take([site]) is not None for library in self.backend.libraries)
        return self.backend._steps([site])

    def _give(self, steps: Any) -> None:
        for step in steps:
            step.enqueue(self.backend.streams.compute)
