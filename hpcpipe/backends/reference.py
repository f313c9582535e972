"""The reference backend: recordings executed by the definitions, in float32 or float64. Nothing here is fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.definitions import FUNCTIONS
from hpcpipe.backends.null import Call, Tensor

Array = npt.NDArray[Any]


FIXED: dict[str, np.dtype[Any]] = {
    "h": np.dtype("uint16"),
    "i": np.dtype("int32"),
    "l": np.dtype("int64"),
    "d": np.dtype("float64"),
}


class Place(NamedTuple):
    """One buffer of a compiled call: where it lies and what it is."""

    region: int
    offset: int
    shape: tuple[int, ...]
    type: str


class Step(NamedTuple):
    """One compiled call: a function, its buffers (None for an absent optional), then its integers and reals."""

    function: Callable[..., None]
    places: tuple[Place | None, ...]
    scalars: tuple[float, ...]


class ReferenceBackend:
    """Runs recordings with the functions above on host memory. ``dtype`` is the real type: float32 or float64."""

    name, level, threads = "reference", "numpy", 1

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"reference backend: dtype is {dtype!r}, choose float32 or float64")
        self.types: dict[str, np.dtype[Any]] = {**FIXED, "r": np.dtype(dtype)}
        self.real = self.types["r"].itemsize

    def allocate(self, nbytes: int) -> Array:
        """Zeroed bytes, uint8 [nbytes], that start on a cache line of 64 bytes."""
        memory = np.zeros(nbytes + 64, dtype=np.uint8)
        start = -memory.ctypes.data % 64
        return memory[start : start + nbytes]

    def array(self, memory: Array, offset: int, shape: tuple[int, ...], type: str = "r") -> Array:
        """A view of ``memory`` from byte ``offset``; IndexError where it would reach over the end."""
        dtype = self.types[type]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + size > memory.size:
            raise IndexError(f"reference backend: bytes {offset}..{offset + size} of an arena of {memory.size}")
        return memory[offset : offset + size].view(dtype).reshape(shape)

    def compile(self, calls: Sequence[Call], where: Callable[[Tensor], tuple[int, int]]) -> tuple[Step, ...]:
        """Resolves each tensor of a pass to (region, offset)."""

        def place(t: Tensor | None) -> Place | None:
            return None if t is None else Place(*where(t), t.shape, t.type)

        return tuple(
            Step(FUNCTIONS[c.kernel], tuple(map(place, c.buffers)), (*c.ints[len(c.row.dims) :], *c.reals))
            for c in calls
        )

    def bound(self, handle: tuple[Step, ...], memory: Array, bases: Array, work: int = -1) -> Callable[[], None]:
        """``run``, prepared."""
        return lambda: self.run(handle, memory, bases, work)

    def run(self, handle: tuple[Step, ...], memory: Array, bases: Array, work: int = -1) -> None:
        """Executes a compiled pass; a buffer lies at ``bases[region] + offset``. Needs no work space."""
        for step in handle:
            views = [
                None if p is None else self.array(memory, int(bases[p.region]) + p.offset, p.shape, p.type)
                for p in step.places
            ]
            step.function(*views, *step.scalars)

    def matmul_peak(self, seconds: float = 0.2) -> float:
        """FLOP/s of float32 matrix products with numpy's own library, measured now."""
        a, side = np.ones((512, 512), dtype=np.float32), 512
        out, start, count = np.empty_like(a), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds or count == 0:
            np.matmul(a, a, out=out)
            count += 1
        return 2.0 * side**3 * count / elapsed
