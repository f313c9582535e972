"""The CPU backend: recordings walked by a C library (native/cpu), one OpenMP team per rank, without Python's lock.

In: recorded calls and where their tensors lie. Out: numpy views of one arena. The library exists once per instruction
set; the best one that this processor runs is loaded. This file is the only one that knows C, through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.definitions import TYPES
from hpcpipe.backends.kernels import TABLE, digest
from hpcpipe.backends.null import Call, Tensor

Array = npt.NDArray[Any]

FOLDER = Path(__file__).resolve().parent.parent / "native"
# What a processor must have to run a library, best first; the names are those of /proc/cpuinfo.
LEVELS = {
    "x86-64-v4": "avx512f avx512bw avx512cd avx512dq avx512vl avx2 fma f16c bmi1 bmi2 abm movbe",
    "x86-64-v3": "avx2 fma f16c bmi1 bmi2 abm movbe",
    "portable": "",
}
INDEX = {kernel.name: i for i, kernel in enumerate(TABLE)}
MAX_ARGS = 16  # HP_MAX_ARGS
ABSENT, SCALAR = -1, -2  # the region of an absent optional buffer, and of a number
HUGE_PAGE = 2 << 20


class Compiled(NamedTuple):
    """A pass as the library reads it: ``words`` int64 [calls, 1 + 2 * MAX_ARGS] is an array of hp_call."""

    words: Array
    work: int  # bytes of scratch that its hungriest call needs per thread


def cpu_flags() -> set[str]:
    """The processor's feature names; empty where the system does not tell (then the portable library is used)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found and platform.machine().lower() in ("x86_64", "amd64") else set()


def runnable() -> list[str]:
    """The built levels that this processor can run, best first."""
    flags = cpu_flags()
    return [name for name, needed in LEVELS.items() if set(needed.split()) <= flags and library(name).exists()]


def library(level: str) -> Path:
    """Where the library of a level lies."""
    return FOLDER / f"libhpcpipe-{level}.so"


def prepare_environment() -> None:
    """Settings that OpenMP reads when it is loaded.

    A thread that waits for its team's next loop spins for about 100 microseconds, not for milliseconds: with more ranks
    than cores it would hold up the others.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def load(level: str) -> ctypes.CDLL:
    """The library of a level, with its functions declared; RuntimeError in one sentence if it does not fit."""
    path = library(level)
    if not path.exists():
        raise RuntimeError(f"the native library {path.name} is not in {FOLDER}: run make build")
    prepare_environment()
    lib = ctypes.CDLL(str(path))
    lib.hp_table_digest.restype = ctypes.c_char_p
    if lib.hp_table_digest().decode() != digest():
        raise RuntimeError(f"the native library {path.name} was built from another kernel table: run make build")
    address = ctypes.c_void_p
    lib.hp_init.argtypes, lib.hp_init.restype = [ctypes.c_int], None
    lib.hp_run.argtypes = [address, ctypes.c_int64, address, address, ctypes.c_int64, ctypes.c_int]
    lib.hp_run.restype = None
    lib.hp_matmul_peak.argtypes, lib.hp_matmul_peak.restype = [ctypes.c_double], ctypes.c_double
    return lib


class CpuBackend:
    """Runs recordings in C. ``threads`` is the team's size, 0 for one per core that this process may use."""

    name = "cpu"
    real = TYPES["r"].itemsize
    on_device = False

    def __init__(self, threads: int = 0, level: str = "") -> None:
        """``level`` names a library of ``LEVELS``; by default it is the best one that this processor runs."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.threads = threads or cores
        built = runnable()
        if not built and not level:
            raise RuntimeError(f"no native library is in {FOLDER}: run make build")
        self.level = level or built[0]
        self._lib = load(self.level)
        self._lib.hp_init(self.threads)

    def allocate(self, nbytes: int) -> Array:
        """Zeroed bytes, uint8 [nbytes], on huge pages where the system has them: products run up to twice as fast."""
        # private: shared anonymous memory is a file to Linux, and has huge pages only where those of files are on
        block = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them: ordinary pages are right, only slower
                block.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(block, dtype=np.uint8)
        start = -memory.ctypes.data % HUGE_PAGE
        return memory[start : start + nbytes]

    def array(self, memory: Array, offset: int, shape: tuple[int, ...], type: str = "r") -> Array:
        """A view of ``memory`` from byte ``offset``; IndexError where it would reach over the end."""
        dtype = TYPES[type]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if offset < 0 or offset + size > memory.size:
            raise IndexError(f"cpu backend: bytes {offset}..{offset + size} of an arena of {memory.size}")
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
    ) -> Compiled:
        """Resolves each tensor of a pass to (region, offset) and packs the calls."""
        words = np.zeros((len(calls), 1 + 2 * MAX_ARGS), dtype=np.int64)
        for packed, call in zip(words, calls, strict=True):
            packed[0] = INDEX[call.kernel]
            regions, values = packed[1::2], packed[2::2]
            count, reals_at = len(call.buffers), len(call.buffers) + len(call.ints)
            for i, tensor in enumerate(call.buffers):
                regions[i], values[i] = (ABSENT, 0) if tensor is None else where(tensor)
            regions[count:] = SCALAR
            values[count:reals_at] = call.ints
            reals = np.array(call.reals, dtype=np.float64)
            values[reals_at : reals_at + len(reals)] = reals.view(np.int64)
        return Compiled(words, max((c.scratch() for c in calls), default=0))

    def run(self, handle: Compiled, memory: Array, bases: Array, work: int = -1) -> None:
        """Executes a compiled pass; a tensor lies at memory + bases[region] + offset, scratch at ``work``."""
        self.bound(handle, memory, bases, work)()

    def bound(self, handle: Compiled, memory: Array, bases: Array, work: int = -1) -> Callable[[], None]:
        """What ``run`` would do, with nothing left to Python but the call."""
        if work < 0 < handle.work:
            raise ValueError(f"cpu backend: this pass needs {handle.work} bytes of scratch per thread, none was given")
        arrays = handle.words, memory, np.ascontiguousarray(bases, dtype=np.int64)
        words, arena, table = (array.ctypes.data_as(ctypes.c_void_p) for array in arrays)  # which keep their arrays
        return partial(self._lib.hp_run, words, len(handle.words), arena, table, work, self.threads)

    def matmul_peak(self, seconds: float = 0.2) -> float:
        """FLOP/s of float32 matrix products on this team, measured now."""
        if self._lib.hp_threads() != self.threads:
            self._lib.hp_init(self.threads)
        return float(self._lib.hp_matmul_peak(seconds))
