"""Opens a GPU: the driver, the compiled kernels, the libraries that take some calls, and what its products reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.backends.cuda import (
    fused_attention,
    launches_elementwise,
    launches_products,
    modules,
    peaks,
    products_cublaslt,
)
from hpcpipe.backends.cuda.array import TYPES
from hpcpipe.backends.cuda.backend import CudaBackend, Library
from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.fused_attention import FusedAttention
from hpcpipe.backends.cuda.launch import Launcher, Site
from hpcpipe.backends.cuda.products import Products
from hpcpipe.backends.null import Call, Tensor

SIDE = 8192  # of the product that measures an unknown device


class Missing(NamedTuple):
    """A library that is not there, for the list of what was chosen."""

    reason: str

    def take(self, sites: Sequence[Site]) -> None:
        return None

    def chosen(self) -> Sequence[str]:
        return (self.reason,)


def connect(index: int) -> Driver:
    """The driver of a device by CUDA's index; UserError where there is no CuPy, no driver, or no such device."""
    from hpcpipe.backends.cuda.cupy_driver import CupyDriver

    return CupyDriver(index)


def launchers() -> dict[str, Launcher]:
    """Our kernels by row of the table."""
    return {**launches_elementwise.LAUNCHERS, **launches_products.LAUNCHERS}


def open_cuda(index: int, compute: str) -> CudaBackend:
    """The backend of a device; ``compute`` is float32 or bfloat16."""
    return assemble(connect(index), compute)


def assemble(
    driver: Driver,
    compute: str,
    libraries: Callable[[Driver, dict[str, Launcher], CudaBackend], Iterable[Library]] | None = None,
) -> CudaBackend:
    """A backend on a driver. ``libraries`` makes those that are asked first, by default all that are installed."""
    functions: dict[str, Any] = {}
    for image in modules.images(driver.properties.arch).values():
        functions |= driver.load(image.cubin, image.entries)
    found = launchers()
    backend = CudaBackend(driver, functions, found, lambda seconds: _peak(backend, compute, seconds))
    for library in (libraries or _installed)(driver, found, backend):
        backend.ask(library)
    return backend


def _installed(driver: Driver, found: dict[str, Launcher], backend: CudaBackend) -> Iterator[Library]:
    """cuBLASLt and cuDNN, each if its bindings are installed; what is not says so."""
    lt = products_cublaslt.bindings()
    if lt is None:
        yield Missing("products: by our own kernels; nvmath-python, and with it cuBLASLt, is not installed")
    else:
        room = products_cublaslt.default_workspace(driver.properties)
        yield Products(driver, lt, found, room, temporary=backend.passes_on)
    yield FusedAttention(driver, *fused_attention.load())


def _peak(backend: CudaBackend, compute: str, seconds: float) -> float:
    """What is published for this model of device, for dense products; for another one, what a large product reaches."""
    known = peaks.peak(backend.driver.properties.name, compute)
    if known:
        return known
    side, type = SIDE, "h" if compute == "bfloat16" else "r"
    while 12 * side**2 > backend.driver.properties.free // 4:
        side //= 2
    size = side * side * TYPES[type].itemsize
    y, x, w = (Tensor(i, (side, side), type) for i in range(3))
    call = Call("linear_fwd", (y, x, w, None, None), (side, side, side), ())
    memory = backend.allocate(3 * size)
    run = backend.bound(backend.compile([call], lambda t: (0, size * t.id)), memory, np.zeros(1, np.int64), 3 * size)
    best, spent = float("inf"), 0.0
    begin, end = backend.event(), backend.event()
    while spent < seconds:
        backend.record(begin)
        run()
        backend.record(end)
        backend.settle()
        each = backend.driver.seconds(begin, end)
        best, spent = min(best, each), spent + each
    backend.forget(memory)
    return 2.0 * side**3 / best
