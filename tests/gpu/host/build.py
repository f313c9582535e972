"""Kernels without a GPU: native/cuda/NAME.cu compiled by g++ into build/cuda-on-host/NAME-DIGEST.so, and called.

In: a .cu file. Out: a ``Library`` whose kernels run on host memory in an order of threads that the caller chooses
(cuda_on_host.h and block.cpp do it), or ``images`` of the whole folder as ``HostDriver.load`` takes them. One library
per source, kept by a digest of all that goes into it, so that a broken source stops nobody else.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "native" / "cuda"
BUILT = ROOT / "build" / "cuda-on-host"
INCLUDES = (ROOT / "native" / "include", SOURCES)
FLAGS = (
    "-std=c++17", "-O2", "-fPIC", "-w", "-ffp-contract=fast", "-fno-strict-aliasing", "-fvisibility=hidden",
    "-fno-gnu-unique",
)  # fmt: skip
MAGIC = b"cuda-on-host:"  # an image is this and the library's path
FORWARD, BACKWARD = 0, 1  # orders of threads and blocks; any larger number is the seed of a shuffled one

_ENTRY = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\s*\((?P<bounds>(?:[^()]|\([^()]*\))*)\)\s*)?(?P<name>\w+)\s*\("
)


class CompileError(Exception):
    """What the compiler said."""


class KernelError(RuntimeError):
    """A kernel did what it may not: names kernel, block and thread."""


class Kernel(NamedTuple):
    """An entry: one letter per argument (p an address, l an int64_t, f a float) and its largest block."""

    number: int
    letters: str
    bound: int


@cache
def compiler() -> str | None:
    """The path of g++ (or what CXX names), None where there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


@cache
def machine_flags() -> tuple[str, ...]:
    """Fused multiply-add in one instruction where this processor has it."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return ()
    return ("-mavx2", "-mfma") if {"avx2", "fma"} <= words else ()


def _run(*words: str | Path, text: str | None = None) -> str:
    done = subprocess.run([*map(str, words)], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(done.stderr[:6000])
    return done.stdout


def _command(*words: str | Path) -> list[str | Path]:
    path = compiler()
    if path is None:
        raise CompileError("there is no g++ on the PATH (set CXX to another C++17 compiler)")
    return [path, *FLAGS, *machine_flags(), *(f"-I{folder}" for folder in (*INCLUDES, HERE)), *words]


def _registry(source: Path) -> str:
    """C++ that includes a source and lists its entries."""
    program = f'#include "cuda_on_host.h"\n#include "{source}"\n'
    listing = _run(*_command("-DHP_HOST_LISTING", "-E", "-P", "-x", "c++", "-"), text=program)
    rows = []
    for match in _ENTRY.finditer(listing):
        bound = re.split(r",(?![^(]*\))", match["bounds"] or "1024")[0]
        name = match["name"]
        rows.append(f'{{"{name}", hp_host_entry<&{name}>::letters, (int)({bound}), hp_host_entry<&{name}>::run}},')
    if not rows:
        raise CompileError(f'{source.name} has no entry (extern "C" __global__ void ...)')
    spaces = "namespace hp_single {} namespace hp_halved {} using namespace hp_single; using namespace hp_halved;"
    table = "\n  ".join([*rows, "{nullptr, nullptr, 0, nullptr}"])
    return f"{program}{spaces}\nconst hp_host_kernel hp_host_kernels[] = {{\n  {table}\n}};\n"


def _digest(source: Path) -> str:
    parts = [*HERE.glob("*.h"), *HERE.glob("*.cpp"), Path(__file__)]
    parts += [f for folder in INCLUDES for f in folder.iterdir() if f.suffix in (".h", ".cuh")]
    text = b"\0".join(f.read_bytes() for f in [source, *sorted(set(parts))])
    tool = _run(*_command("--version")) + " ".join(map(str, _command()))
    return hashlib.blake2b(text + tool.encode(), digest_size=8).hexdigest()


def _made(source: Path, suffix: str, *words: str | Path, text: str | None = None) -> Path:
    """What the compiler makes of a source, if it is not there yet; older ones go."""
    target = BUILT / f"{source.stem}-{_digest(source)}{suffix}"
    if target.exists():
        return target
    BUILT.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.part")
    _run(*_command(*words, "-o", partial), text=text)
    for old in BUILT.glob(f"{source.stem}-" + "[0-9a-f]" * 16 + suffix):
        old.unlink(missing_ok=True)
    partial.rename(target)
    return target


def build(source: Path) -> Path:
    """The library of a source, compiled if it is not there yet; CompileError with what the compiler said."""
    target = BUILT / f"{source.stem}-{_digest(source)}.so"
    if target.exists():
        return target
    block = HERE / "block.cpp"
    scheduler = _made(block, ".o", "-c", block)
    return _made(source, ".so", "-shared", "-Wl,-Bsymbolic", scheduler, "-x", "c++", "-", text=_registry(source))


class _Row(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("letters", ctypes.c_char_p), ("bound", ctypes.c_int), ("run", ctypes.c_void_p)
    ]  # fmt: skip


class Library:
    """A compiled source. Python's lock is held while a kernel runs: one at a time, whatever threads there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        library = ctypes.PyDLL(str(path))
        self._launch = library.hp_host_launch
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_int]
        self.kernels: dict[str, Kernel] = {}
        rows = (_Row * 10000).in_dll(library, "hp_host_kernels")
        for index, row in enumerate(rows):
            if row.name is None:
                break
            self.kernels[row.name.decode()] = Kernel(index, row.letters.decode(), row.bound)

    def words(self, name: str, args: Sequence[int | float]) -> ctypes.Array[ctypes.c_uint64]:
        """Arguments as 8-byte slots; TypeError where their number or kinds are not the entry's."""
        letters = self.kernels[name].letters
        kinds = "".join("f" if isinstance(arg, float | np.floating) else "i" for arg in args)
        if kinds != letters.replace("p", "i").replace("l", "i"):
            raise TypeError(f"{name} takes the arguments {letters}, it was given {kinds} (i: an int)")
        slots = (ctypes.c_uint64 * max(1, len(args)))()
        for i, arg in enumerate(args):
            at = ctypes.addressof(slots) + 8 * i
            if isinstance(arg, float | np.floating):
                ctypes.c_float.from_address(at).value = float(arg)
            else:
                ctypes.c_int64.from_address(at).value = int(arg)
        return slots

    def run(
        self,
        name: str,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[int | float],
        shared: int = 0,
        order: int = FORWARD,
    ) -> None:
        """Runs a kernel on host addresses, now; KernelError where it did something that a kernel may not."""
        slots = self.words(name, args)
        sizes = (ctypes.c_uint32 * 6)(*grid, *block)
        at = ctypes.addressof(sizes)
        said = self._launch(self.kernels[name].number, slots, at, at + 12, shared, order)
        if said is not None:
            raise KernelError(said.decode())


@cache
def library(path: Path) -> Library:
    """The loaded library at a path."""
    return Library(path)


def images(sources: Path = SOURCES) -> dict[str, tuple[bytes, list[str]]]:
    """Every source that compiles, by stem: an image for ``HostDriver.load`` and its entries; warns of the others."""
    found = {}
    for source in sorted(sources.glob("*.cu")):
        try:
            path = build(source)
        except CompileError as said:
            warnings.warn(f"{source.name} does not compile on the host: {said}", stacklevel=2)
            continue
        found[source.stem] = (MAGIC + str(path).encode(), list(library(path).kernels))
    return found


if __name__ == "__main__":
    for stem, (image, entries) in images().items():
        sys.stdout.write(f"{stem}: {image.removeprefix(MAGIC).decode()}\n  {' '.join(entries)}\n")
