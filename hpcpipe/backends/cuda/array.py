"""Arrays in a GPU's memory, as the rest of the house sees them: a place in an arena, written and read as a whole.

Copies go through pinned memory in pieces. A write is given to the current stream and so comes after what was given to
it before; a read waits for the same. What a link needs to know of an array (address, bytes, streams) is public.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.definitions import TYPES

Array = npt.NDArray[Any]
PIECE = 16 << 20  # bytes of pinned memory that one copy between host and device goes through


class Streams:
    """The streams of a rank. ``current`` is the one that work is given to: computing, except inside a reduction."""

    def __init__(self, driver: Driver) -> None:
        self.compute, self.reducing = driver.stream(urgent=True), driver.stream()
        self.current = self.compute


class Bridge:
    """Pinned memory between host and device; one copy at a time crosses it."""

    def __init__(self, driver: Driver, size: int = PIECE) -> None:
        self.driver, self._lock = driver, threading.Lock()
        self._pinned = driver.pinned(size)

    def write(self, address: int, values: Array, stream: Any) -> None:
        """Host values to the device; on return they may change."""
        source = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        with self._lock:
            for at in range(0, source.size, self._pinned.size):
                piece = source[at : at + self._pinned.size]
                self._pinned[: piece.size] = piece
                self.driver.copy(address + at, self._pinned.ctypes.data, piece.size, stream)
                self.driver.synchronize(stream)

    def read(self, address: int, values: Array, stream: Any) -> None:
        """Device to host, into a contiguous array."""
        target = values.reshape(-1).view(np.uint8)
        with self._lock:
            for at in range(0, target.size, self._pinned.size):
                piece = target[at : at + self._pinned.size]
                self.driver.copy(self._pinned.ctypes.data, address + at, piece.size, stream)
                self.driver.synchronize(stream)
                piece[...] = self._pinned[: piece.size]


class Memory:
    """One allocation on the device, a rank's arena."""

    def __init__(self, driver: Driver, streams: Streams, bridge: Bridge, nbytes: int) -> None:
        self.driver, self.streams, self.bridge, self.nbytes = driver, streams, bridge, nbytes
        self.address = driver.allocate(max(nbytes, 1))

    def array(self, offset: int, shape: tuple[int, ...], type: str) -> DeviceArray:
        """A view from a byte offset; IndexError where it would reach over the end."""
        found = DeviceArray(self, self.address + offset, shape, TYPES[type])
        if offset < 0 or offset + found.nbytes > self.nbytes:
            raise IndexError(f"cuda backend: bytes {offset}..{offset + found.nbytes} of an arena of {self.nbytes}")
        return found


class DeviceArray:
    """Elements of an arena. ``array[...] = values`` writes, ``np.asarray(array)`` and ``array[index]`` read."""

    def __init__(self, memory: Memory, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.memory, self.address, self.shape, self.dtype = memory, address, shape, dtype
        self.size = int(np.prod(shape, dtype=np.int64))
        self.nbytes, self.ndim = self.size * dtype.itemsize, len(shape)

    @property
    def driver(self) -> Driver:
        return self.memory.driver

    @property
    def compute(self) -> Any:
        """The stream that its readers and writers are on now."""
        return self.memory.streams.current

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}

    def __setitem__(self, key: Any, values: Any) -> None:
        """``[...]`` or ``[:]`` = an array on the host or the device, or a number."""
        if key is not Ellipsis and key != slice(None):
            raise IndexError("an array on a device is written as a whole: array[...] = values")
        if isinstance(values, DeviceArray):
            if values.nbytes != self.nbytes:
                raise ValueError(f"{values.nbytes} bytes do not fit into {self.nbytes}")
            self.driver.copy(self.address, values.address, self.nbytes, self.compute)
        elif np.isscalar(values) and not values:
            self.driver.fill(self.address, 0, self.nbytes, self.compute)
        else:
            whole = np.broadcast_to(np.asarray(values, self.dtype), self.shape)
            self.memory.bridge.write(self.address, whole, self.compute)

    def fill(self, value: float) -> None:
        """Sets all elements."""
        self[...] = value

    def numpy(self) -> Array:
        """A copy on the host, after what the current stream was given so far."""
        found = np.empty(self.shape, self.dtype)
        self.read(found)
        return found

    def read(self, into: Array) -> None:
        """Reads all elements into a contiguous host array, after what the current stream was given so far."""
        self.memory.bridge.read(self.address, into, self.compute)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return self.numpy() if dtype is None else self.numpy().astype(dtype)

    def __getitem__(self, key: Any) -> Any:
        return self.numpy()[key]
