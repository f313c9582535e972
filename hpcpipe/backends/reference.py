"""The reference backend: recordings executed by the definitions, in float32 or float64. Nothing here is fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.definitions import FUNCTIONS, TYPES, halve, widen
from hpcpipe.backends.kernels import Arg
from hpcpipe.backends.null import Call, Tensor

Array = npt.NDArray[Any]


class Place(NamedTuple):
    """One buffer of a compiled call: where it lies and what it is; ``rounded``: numbers to compute on, in halves."""

    region: int
    offset: int
    shape: tuple[int, ...]
    type: str
    rounded: bool


class Step(NamedTuple):
    """One compiled call: a function, its buffers (None for an absent optional), then its integers and reals."""

    function: Callable[..., None]
    places: tuple[Place | None, ...]
    scalars: tuple[float, ...]


class ReferenceBackend:
    """Runs recordings with the functions above on host memory. ``dtype`` is the real type: float32 or float64."""

    name, level, threads, on_device = "reference", "numpy", 1, False

    def __init__(self, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"reference backend: dtype is {dtype!r}, choose float32 or float64")
        self.types: dict[str, np.dtype[Any]] = {**TYPES, "r": np.dtype(dtype)}
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

    def mirror(self, memory: Array, offset: int, nbytes: int) -> tuple[Array, Callable[[], None]]:
        """Host bytes that stand for a part of the arena, here that part, and what sends them there."""
        return memory[offset : offset + nbytes], lambda: None

    def host(self, array: Array) -> Array:
        """The values on the host: the array."""
        return array

    def load(self, array: Array, read: Callable[[Array], Any]) -> None:
        """Fills an array with what ``read`` writes into the host array that it is given."""
        read(array)

    def compile(
        self,
        calls: Sequence[Call],
        where: Callable[[Tensor], tuple[int, int]],
        brief: Collection[int] = (),
        whole: Collection[int] = (),
    ) -> tuple[Step, ...]:
        """Resolves each tensor of a pass to (region, offset)."""

        def place(t: Tensor | None, arg: Arg) -> Place | None:
            return None if t is None else Place(*where(t), t.shape, t.type, (arg.type, t.type) == ("a", "h"))

        return tuple(
            Step(
                FUNCTIONS[c.kernel],
                tuple(map(place, c.buffers, c.row.buffers)),
                (*c.ints[len(c.row.dims) :], *c.reals),
            )
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
            whole = [
                self._widened(view) if p and view is not None and p.rounded else view
                for p, view in zip(step.places, views, strict=True)
            ]
            step.function(*whole, *step.scalars)
            for view, result in zip(views, whole, strict=True):
                if view is not result and view is not None and result is not None:
                    halve(view, result)  # an input that was not written comes back as it was

    def _widened(self, half: Array) -> Array:
        whole = np.empty(half.shape, self.types["r"])
        widen(whole, half)
        return whole

    def matmul_peak(self, seconds: float = 0.2) -> float:
        """FLOP/s of float32 matrix products with numpy's own library, measured now."""
        a, side = np.ones((512, 512), dtype=np.float32), 512
        out, start, count = np.empty_like(a), time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < seconds or count == 0:
            np.matmul(a, a, out=out)
            count += 1
        return 2.0 * side**3 * count / elapsed
