"""Opens a GPU: the driver, the compiled kernels, the libraries that take some calls, and what its products reach."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from hpcpipe.backends.cuda.backend import CudaBackend, Library
from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.fused_attention import FusedAttention
from hpcpipe.backends.cuda.launch import Launcher, Site
from hpcpipe.backends.cuda.products import Products
from hpcpipe.backends.cuda.products_narrow import NarrowProducts
from hpcpipe.backends.cuda.recipes import recipe_for
from hpcpipe.backends.definitions import TYPES
from hpcpipe.backends.null import Call, Tensor
from hpcpipe.config import UserError

WHOLE = ("float32", "bfloat16")  # compute types; others are recipes within bfloat16
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
    """The backend of a device; ``compute`` is float32, bfloat16 or the name of a recipe."""
    return assemble(connect(index), compute)


def assemble(
    driver: Driver,
    compute: str,
    libraries: Callable[[Driver, dict[str, Launcher], CudaBackend, str], Iterable[Library]] | None = None,
) -> CudaBackend:
    """A backend on a driver. ``libraries`` makes those that are asked first, by default all that are installed."""
    functions: dict[str, Any] = {}
    for image in modules.images(driver.properties.arch).values():
        functions |= driver.load(image.cubin, image.entries)
    found = launchers()
    backend = CudaBackend(driver, functions, found, lambda seconds: _peak(backend, compute, seconds))
    for library in (libraries or _installed)(driver, found, backend, compute):
        backend.ask(library)
    if compute not in WHOLE and not any(isinstance(library, Products) for library in backend.libraries):
        raise UserError(
            f"train.compute = {compute} needs cuBLASLt: install hpcpipe[cuda12] or [cuda13], or take bfloat16"
        )
    return backend


def _installed(driver: Driver, found: dict[str, Launcher], backend: CudaBackend, compute: str) -> Iterator[Library]:
    """cuBLASLt and cuDNN, each if its bindings are installed; what is not says so."""
    lt = products_cublaslt.bindings()
    if lt is None:
        yield Missing("products: by our own kernels; cuBLASLt, through nvmath-python, cannot be loaded")
    else:
        yield products(driver, lt, found, backend, compute)
    yield FusedAttention(driver, *fused_attention.load())


def products(
    driver: Driver,
    lt: Any,
    found: dict[str, Launcher],
    backend: CudaBackend,
    compute: str,
    environment: Mapping[str, str] | None = None,
    workspace: int = 0,
) -> Products:
    """cuBLASLt for a backend, with the recipe of narrow products that ``compute`` names, if it names one."""
    room, narrow = workspace or products_cublaslt.default_workspace(driver.properties), None
    if compute not in WHOLE:
        narrow = NarrowProducts(driver, recipe_for(compute, driver.properties.capability), backend.stays)
    return Products(driver, lt, found, room, temporary=backend.passes_on, narrow=narrow, environment=environment)


def _peak(backend: CudaBackend, compute: str, seconds: float) -> float:
    """What is published for this model of device, for dense products; for another one, what a large product reaches."""
    known = peaks.peak(backend.driver.properties.name, compute if compute in WHOLE else "fp8")
    if known:
        return known
    side, type = SIDE, "r" if compute == "float32" else "h"
    while 12 * side**2 > backend.driver.room() // 4 and side > 1:
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
