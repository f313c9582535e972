"""Builds the native library: native/cpu/*.c once per instruction set, as plain C libraries that Python only loads.

Goes with pyproject.toml, which says everything else. Works for `pip install .`, `pip install -e .` and
`python setup.py build_ext --inplace`. Each library carries the digest of what it was made from (sources, flags,
compiler, kernel table), and is left alone as long as that holds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted((ROOT / "native" / "cpu").glob("*.c"))
HEADERS = sorted((ROOT / "native").rglob("*.h"))
GPU = sorted([*(ROOT / "native" / "cuda").glob("*.cu"), *(ROOT / "native" / "cuda").glob("*.cuh")])
# No -ffast-math: sums keep their order. What is relaxed is errno, traps, and a * b + c in two roundings.
FLAGS = ["-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
FLAGS += ["-fopenmp", "-fPIC", "-Wall", "-Wextra"]
LINK = ["-shared", "-fopenmp", "-Wl,-Bsymbolic", "-Wl,--no-undefined"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
X86_LEVELS = {"portable": [], "x86-64-v3": AVX2, "x86-64-v4": AVX2 + AVX512}
PLAIN = "#include <math.h>\n#include <stdint.h>\nint main(void) { return 0; }\n"
OPENMP = "#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n"


def levels() -> dict[str, list[str]]:
    """Instruction sets to build for, with their compiler flags; backends/cpu.py picks one at run time."""
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"portable": []}


def compiler() -> list[str]:
    """The C compiler: CC if set, else cc, gcc or clang; ends the build with one sentence if none can compile OpenMP."""
    chosen = shlex.split(os.environ.get("CC", ""))
    found = chosen or next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), [])
    if not found or not shutil.which(found[0]):
        named = f"the C compiler that CC names, {chosen[0]}," if chosen else "a C compiler"
        packages = "(Debian: apt install gcc libc6-dev; RHEL: dnf install gcc)"
        sys.exit(f"hpcpipe: {named} is not on the PATH: install one {packages}")
    if not accepts(found, PLAIN, []):
        headers = "(Debian: apt install libc6-dev; RHEL: dnf install glibc-devel)"
        sys.exit(f"hpcpipe: {found[0]} cannot build a C program: install the headers of the C library {headers}")
    if not accepts(found, OPENMP, ["-fopenmp"]):
        runtime = "(clang: apt install libomp-dev; gcc on RHEL: dnf install libgomp)"
        sys.exit(f"hpcpipe: {found[0]} has no OpenMP: install its runtime {runtime} or set CC=gcc")
    return found


def accepts(cc: list[str], program: str, flags: list[str]) -> bool:
    """Whether a program of one file compiles and links."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.c"
        source.write_text(program)
        return subprocess.run([*cc, *flags, str(source), "-o", f"{folder}/probe"], capture_output=True).returncode == 0


def dispatch() -> str:
    """C source generated from the kernel table, which is loaded by its path: the package is not installed yet."""
    return str(module("kernel_table", ROOT / "hpcpipe" / "backends" / "kernels.py").dispatch_source())


def module(name: str, path: Path) -> ModuleType:
    """A file of the package that knows only the standard library, loaded before the package is installed."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def stamp(cc: list[str], flags: list[str], generated: str) -> str:
    """Names everything a library is made from."""
    version = subprocess.run([*cc, "--version"], capture_output=True, text=True).stdout
    h = hashlib.sha256(repr((cc, version, FLAGS, flags, LINK, generated)).encode())
    for path in SOURCES + HEADERS:
        h.update(path.name.encode() + path.read_bytes())
    return f"hpcpipe-build:{h.hexdigest()[:32]}"


def compile_level(cc: list[str], flags: list[str], generated: str, mark: str, target: Path) -> None:
    """One library, written under another name and then moved into place, so that a running program keeps its own."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        extra = Path(folder) / "dispatch.c"
        extra.write_text(f'{generated}\nconst char hp_build[] = "{mark}";\n')
        include = [f"-I{ROOT / 'native' / 'include'}", f"-I{ROOT / 'native' / 'cpu'}"]
        jobs = [(s, Path(folder) / f"{s.stem}.o") for s in [*SOURCES, extra]]
        commands = [[*cc, *FLAGS, *flags, *include, "-c", str(s), "-o", str(o)] for s, o in jobs]
        list(pool.map(run, commands))
        part = target.with_suffix(".part")
        run([*cc, *LINK, *(str(o) for _, o in jobs), "-o", str(part), "-lm"])
        part.replace(target)


def run(command: list[str]) -> None:
    """Runs the compiler; its own words are the explanation when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        print(done.stderr, file=sys.stderr)
    if done.returncode:
        sys.exit(f"hpcpipe: the compiler failed on {shlex.join(command)}.")


def build_cuda(native: Path, in_place: bool) -> None:
    """Ships the GPU code; HPCPIPE_CUDA_ARCHS="sm_90a sm_103a" also compiles it ahead, otherwise the first run does."""
    for path in [] if in_place else [*GPU, *(ROOT / "native" / "include").glob("*.h")]:
        (native / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, native / path.parent.name)
    archs = os.environ.get("HPCPIPE_CUDA_ARCHS", "").replace(",", " ").split()
    modules = module("gpu_modules", ROOT / "hpcpipe" / "backends" / "cuda" / "modules.py") if archs else None
    for arch in archs:
        try:
            modules.build(arch, native / "cuda", modules.Sources(ROOT / "native" / "cuda", ROOT / "native" / "include"))
        except modules.CompileError as error:
            sys.exit(f"hpcpipe: HPCPIPE_CUDA_ARCHS: {error}")


class BuildNative(build_ext):
    """`build_ext` for libraries that know no Python: they are not extension modules, nothing of the original runs."""

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib).resolve()) / "hpcpipe" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        cc, generated = compiler(), dispatch()
        for level, flags in levels().items():
            target, mark = folder / f"libhpcpipe-{level}.so", stamp(cc, flags, generated)
            if target.exists() and mark.encode() in target.read_bytes():
                print(f"{target.name} is up to date")
                continue
            print(f"building {target.name}")
            compile_level(cc, flags, generated, mark, target)
        build_cuda(folder, in_place)

    def get_outputs(self) -> list[str]:
        return [str(Path(self.build_lib) / "hpcpipe" / "native" / f"libhpcpipe-{level}.so") for level in levels()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def relative(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


setup(
    # Named so that a source distribution contains the files and a wheel knows that it is for one kind of machine.
    ext_modules=[Extension("hpcpipe.native.library", relative(SOURCES), depends=relative(HEADERS + GPU))],
    cmdclass={"build_ext": BuildNative},
)
