"""Compiles the GPU code for every architecture and says what each kernel needs there: registers, shared memory, spills.

    python .ci/cuda_check.py [--json FILE]

Needs nvcc but no GPU; without nvcc it says that it checked nothing. Standard library only, and the flags are those of
hpcpipe/backends/cuda/modules.py. Fails on what does not compile, on a kernel that spills registers to memory, and on
wgmma products that the compiler had to serialise. Where NVRTC's library is installed every file must compile with it,
too. Results are kept in build/cuda-check by the digest of sources, flags and compiler.
"""

import argparse
import ctypes
import ctypes.util
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hpcpipe.backends.cuda import modules  # noqa: E402  (found by the line above)

ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_103a")
NVRTC_ARCH = "sm_90a"
# Kernels that may spill, each with the reason why nobody waits for it. One that does not spill must not stand here.
COLD: dict[str, str] = {}

# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory of a multiprocessor.
# All four have 65,536 registers, 64 warps, 32 blocks; registers go to a warp by 256, shared memory to a block by 128
# bytes, and a block has 1 KiB that is the system's.
SHARED = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100a": 228 << 10, "sm_103a": 228 << 10}
REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 64, 32, 1024
MAX_THREADS, LONG_VALUE = 5, 4  # in a cubin's .nv.info: the attribute of __launch_bounds__, a value with a size


class Use(NamedTuple):
    """What a kernel takes on one architecture; bytes, ``threads`` of __launch_bounds__ (0: it has none)."""

    registers: int = 0
    shared: int = 0  # static
    stack: int = 0
    spills: int = 0  # stores and loads
    threads: int = 0

    def occupancy(self, arch: str) -> float:
        """Share of a multiprocessor's warps that can be resident: by registers and static shared memory."""
        warps = -(-self.threads // 32)
        if not warps or not self.registers:
            return 0.0
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // per_warp // 4 * 4 // warps  # a quarter of the registers per scheduler
        by_shared = SHARED[arch] // (-(-self.shared // 128) * 128 + RESERVED)
        return min(by_registers, by_shared, BLOCKS, WARPS // warps) * warps / WARPS


class Result(NamedTuple):
    """One file for one architecture: an error, or the kernels' uses and the compiler's warnings."""

    error: str
    uses: dict[str, Use]
    warnings: list[str]


def parse(said: str, threads: dict[str, int]) -> dict[str, Use]:
    """Reads what `ptxas -v` prints. A device function that is not inlined counts for the kernel before it."""
    uses: dict[str, Use] = {}
    kernel = ""
    for line in said.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)'", line):
            kernel = found[1]
            uses[kernel] = Use(threads=threads.get(kernel, 0))
        elif kernel and (found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", line)):
            use, (stack, stores, loads) = uses[kernel], map(int, found.groups())
            uses[kernel] = use._replace(stack=use.stack + stack, spills=use.spills + stores + loads)
        elif kernel and (found := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            uses[kernel] = uses[kernel]._replace(registers=int(found[1]), shared=int(shared[1]) if shared else 0)
    return uses


def bounds(cubin: bytes) -> dict[str, int]:
    """Threads of a block by __launch_bounds__, per kernel that says so: from the sections .nv.info.NAME."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, at, length in sections:
        first = sections[names][4] + name
        title = cubin[first : cubin.index(b"\0", first)].decode()
        end = at + length
        while title.startswith(".nv.info.") and at + 4 <= end:
            form, attribute, nbytes = struct.unpack_from("<BBH", cubin, at)
            if form == LONG_VALUE and attribute == MAX_THREADS:
                x, y, z = struct.unpack_from("<III", cubin, at + 4)
                found[title.removeprefix(".nv.info.")] = x * y * z
            at += 4 + (nbytes if form == LONG_VALUE else 0)
    return found


def compiled(program: str, sources: modules.Sources, file: Path, arch: str) -> Result:
    """One file through nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "out.cubin"
        command = [*modules.nvcc_command(program, sources, file, arch, target), "--ptxas-options=-v"]
        done = subprocess.run(command, cwd=sources.cuda, capture_output=True, text=True, errors="replace")
        said = done.stdout + done.stderr
        if done.returncode or not target.exists():
            return Result(said.strip() or f"nvcc ended with {done.returncode}", {}, [])
        warnings = [line for line in said.splitlines() if re.search(r"\bwarning\b|Performance Loss", line)]
        return Result("", parse(said, bounds(target.read_bytes())), warnings)


def kept(folder: Path, key: str, make: Callable[[], Result]) -> Result:
    """The result of an earlier run, or a new one; only what compiled is kept."""
    own = Path(__file__).read_bytes()
    place = folder / f"{hashlib.sha256(own + key.encode()).hexdigest()[:32]}.json"
    if place.exists():
        error, uses, warnings = json.loads(place.read_text())
        return Result(error, {kernel: Use(*use) for kernel, use in uses.items()}, warnings)
    result = make()
    if not result.error:
        folder.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(result))
        part.replace(place)
    return result


class Nvrtc:
    """NVRTC by its C interface, as CuPy calls it at run time."""

    def __init__(self, path: str) -> None:
        self.lib = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.lib.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.name = f"NVRTC {major.value}.{minor.value}"

    def compile(self, sources: modules.Sources, file: Path) -> Result:
        """One file; there is no C library to include from."""
        lib, program, size = self.lib, ctypes.c_void_p(), ctypes.c_size_t()
        text, name = file.read_bytes(), file.name.encode()
        lib.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
        options = [o.encode() for o in modules.nvrtc_options(sources, NVRTC_ARCH)]
        failed = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value + 1)
        lib.nvrtcGetProgramLog(program, log)
        said = log.value.decode(errors="replace").strip()
        if not failed:
            lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
            failed = not size.value
        lib.nvrtcDestroyProgram(ctypes.byref(program))
        return Result(said or "it said nothing" if failed else "", {}, [])


def find_nvrtc() -> str:
    """The library of the package nvidia-cuda-nvrtc, or the system's; empty where there is none."""
    for folder in filter(None, sys.path):
        for found in sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")):
            return str(found)
    return ctypes.util.find_library("nvrtc") or ""


def problems(results: dict[tuple[str, str], Result]) -> list[str]:
    """What must not be, a sentence each; results by file and architecture."""
    found, spilling = [], set()
    for (file, arch), result in results.items():
        if result.error:
            lines = result.error.splitlines()
            first = next((s for s in lines if re.search(r"\b(error|fatal)\b", s)), lines[0])
            found.append(f"{file} does not compile for {arch}: {' '.join(first.split())}")
        found += [f"{file} for {arch}: {w.strip()}" for w in result.warnings if "wgmma" in w and "serialized" in w]
        for kernel, use in result.uses.items():
            if use.spills:
                spilling.add(kernel)
                if kernel not in COLD:
                    found.append(f"{kernel} spills {use.spills} bytes for {arch}: give it fewer values or registers")
    if not any(result.error for result in results.values()):
        found += [f"{kernel} does not spill: take it out of COLD" for kernel in COLD if kernel not in spilling]
    return found


def table(results: dict[tuple[str, str], Result]) -> str:
    """Kernels down, architectures across."""
    uses: dict[str, dict[str, Use]] = {}
    for (_, arch), result in results.items():
        for kernel, use in result.uses.items():
            uses.setdefault(kernel, {})[arch] = use
    wide = max((len(kernel) for kernel in uses), default=0) + 2
    titles = f"{'regs':>4} {'shared':>6} {'stack':>5} {'spill':>5} {'occ':>4}"
    lines = [
        " " * wide + f"{'':>5}" + "".join(f" | {arch:<{len(titles)}}" for arch in ARCHS),
        f"{'kernel':<{wide}}{'block':>5}" + f" | {titles}" * len(ARCHS),
    ]
    for kernel in sorted(uses):
        threads = max(use.threads for use in uses[kernel].values())
        cells = (_cell(uses[kernel].get(arch), arch).ljust(len(titles)) for arch in ARCHS)
        lines.append(f"{kernel:<{wide}}{threads or '-':>5}" + "".join(f" | {cell}" for cell in cells))
    return "\n".join(line.rstrip() for line in lines)


def _cell(use: Use | None, arch: str) -> str:
    if use is None:
        return ""
    share = f"{use.occupancy(arch):4.0%}" if use.threads else "   -"
    return f"{use.registers:>4} {use.shared:>6} {use.stack:>5} {use.spills:>5} {share}"


def check(sources: modules.Sources, compiler: modules.Compiler, nvrtc: str) -> dict[tuple[str, str], Result]:
    """Everything, as many at once as there are processors: by file and architecture, NVRTC's under its own name."""
    folder, program = ROOT / "build" / "cuda-check", modules.find_nvcc() or ""
    library = Nvrtc(nvrtc) if nvrtc else None
    results: dict[tuple[str, str], Any] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file in sources.files:
            for arch in ARCHS:
                key = f"{compiler.name} {sources.digest(file, arch)}"
                make = partial(compiled, program, sources, file, arch)
                results[file.name, arch] = pool.submit(kept, folder, key, make)
            if library is not None:
                key = f"{library.name} {sources.digest(file, NVRTC_ARCH)}"
                make = partial(library.compile, sources, file)
                results[file.name, f"{NVRTC_ARCH} with {library.name}"] = pool.submit(kept, folder, key, make)
        return {which: future.result() for which, future in results.items()}


def report(results: dict[tuple[str, str], Result], wrong: list[str], compiler: str, nvrtc: str) -> None:
    """What was found, for people."""
    print(f"cuda-check: {compiler}; bytes of shared memory (static), stack and spills per block or thread;")
    print("occ = warps resident by registers and static shared memory, at the block of __launch_bounds__\n")
    print(table(results))
    for (file, arch), result in results.items():
        for warning in result.warnings:
            print(f"{file} for {arch}: {warning.strip()}")
    if not nvrtc:
        print("\nNVRTC: SKIPPED, its library is not installed here (pip install nvidia-cuda-nvrtc)")
    for (file, arch), result in results.items():
        if result.error:
            print(f"\n--- {file} for {arch}\n{result.error[:4000]}")
    for sentence in wrong:
        print(f"cuda-check: {sentence}", file=sys.stderr)
    print(f"cuda-check: {len(wrong)} problems in {len({file for file, _ in results})} files")


def save(path: Path, results: dict[tuple[str, str], Result], wrong: list[str], compiler: str) -> None:
    """What was found, for programs."""
    rows = [
        {"file": file, "arch": arch, "kernel": kernel, **use._asdict(), "occupancy": use.occupancy(arch)}
        for (file, arch), result in results.items()
        for kernel, use in result.uses.items()
    ]
    path.write_text(json.dumps({"compiler": compiler, "kernels": rows, "problems": wrong}, indent=1) + "\n")


def main(argv: list[str]) -> int:
    arguments = argparse.ArgumentParser(prog="cuda_check", description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--json", default="", metavar="FILE", help="write all numbers there")
    arguments.add_argument("--sources", default="", metavar="DIR", help="a folder with cuda/ and include/ to check")
    arguments.add_argument("--nvrtc", default=find_nvrtc(), metavar="FILE", help="the library to try, empty for none")
    args = arguments.parse_args(argv)
    native = Path(args.sources).resolve() if args.sources else ROOT / "native"
    sources, compiler = modules.Sources(native / "cuda", native / "include"), modules.nvcc()
    if compiler is None:
        print("cuda-check: SKIPPED, nothing compiled: nvcc is neither in CUDA_HOME nor on the PATH", file=sys.stderr)
        return 0
    if not sources.files:
        print(f"cuda-check: there is no *.cu in {sources.cuda}", file=sys.stderr)
        return 1
    results = check(sources, compiler, args.nvrtc)
    wrong = problems(results)
    report(results, wrong, compiler.name, args.nvrtc)
    if args.json:
        save(Path(args.json), results, wrong, compiler.name)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
