"""Host memory that poses as a device's: each allocation between two pages that nobody may touch, lockable as a whole.

A kernel that runs over the end by more than the alignment (512 bytes) faults, so does one that uses memory that was
given back; while it is locked, the host faults, too.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE, ALIGNED = mmap.PAGESIZE, 512
NONE, READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


class Region:
    """Zeroed memory [address, address + nbytes), its end within 512 bytes of a forbidden page."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self._libc = nbytes, _libc()
        self._room = _up(max(nbytes, 1), PAGE)
        whole = self._room + 2 * PAGE
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        base = self._libc.mmap(None, whole, NONE, kind, -1, 0)
        if base in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"the host has no {nbytes} bytes to pose as a device's")
        self._first = base + PAGE
        self.address = self._first + self._room - _up(max(nbytes, 1), ALIGNED)
        self.give = weakref.finalize(self, self._libc.munmap, base, whole)
        self.protect(READ_WRITE)

    def protect(self, rights: int) -> None:
        if self._libc.mprotect(self._first, self._room, rights):
            raise OSError(ctypes.get_errno(), "mprotect")


class Memory:
    """All of a device's allocations, and the pinned buffers that its copies may touch."""

    def __init__(self, limit: int, locked: bool) -> None:
        self.limit, self.locked = limit, locked
        self.used = 0
        self._regions: dict[int, Region] = {}
        self._given: list[Region] = []  # back, but work that was asked for before may still use them
        self._pinned: list[tuple[int, int, weakref.ref[Bytes]]] = []
        self._depth = 0

    def allocate(self, nbytes: int) -> int:
        region = Region(nbytes)
        self.used += nbytes
        self._regions[region.address] = region
        if self.locked and not self._depth:
            region.protect(NONE)
        return region.address

    def release(self, address: int) -> None:
        if address not in self._regions:
            raise RuntimeError(f"device memory at {address:#x} is released, but was not allocated")
        region = self._regions.pop(address)
        self.used -= region.nbytes
        self._given.append(region)

    def reap(self) -> None:
        """Nothing is left to be done on the device: what was given back is gone."""
        while self._given:
            self._given.pop().give()

    def pinned(self, nbytes: int) -> Bytes:
        owner = np.zeros(nbytes + PAGE, np.uint8)
        skip = -owner.ctypes.data % PAGE
        array = owner[skip : skip + nbytes]
        self._pinned = [entry for entry in self._pinned if entry[2]() is not None]
        self._pinned.append((array.ctypes.data, nbytes, weakref.ref(owner)))
        return array

    def check(self, address: int, nbytes: int) -> None:
        """RuntimeError unless all these bytes belong to one allocation or pinned buffer that is still there."""
        places = [(r.address, r.nbytes) for r in (*self._regions.values(), *self._given)]
        places += [(start, size) for start, size, owner in self._pinned if owner() is not None]
        if not any(start <= address and address + nbytes <= start + size for start, size in places):
            raise RuntimeError(
                f"a copy or fill of {nbytes} bytes at {address:#x} is not inside one allocation or pinned buffer "
                "that is still there"
            )

    @contextmanager
    def open(self) -> Iterator[None]:
        """The device is at work."""
        self._rights(READ_WRITE, 1)
        try:
            yield
        finally:
            self._rights(NONE, -1)

    def _rights(self, rights: int, step: int) -> None:
        outermost = self._depth == (0 if step > 0 else 1)
        self._depth += step
        if self.locked and outermost:
            for region in (*self._regions.values(), *self._given):
                region.protect(rights)
