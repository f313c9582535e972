"""The GPU code, compiled for the device that is there: native/cuda/*.cu become cubins, once per machine and version.

In: the name of an architecture (sm_90a). Out: each file's cubin and the names of its kernels. A cubin that was built
ahead is taken if it was made from these sources; otherwise nvcc compiles, or NVRTC where there is none, and a folder of
the user's keeps the result. At the top it imports the standard library only: setup.py loads this file by its path.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parents[2]
# No --use_fast_math: quotients and roots stay exact. Subnormals are flushed, as in every thread of the CPU team.
FLAGS = ("-std=c++17", "-ftz=true", "-lineinfo")
NVCC_FLAGS = ("-O3", "-cubin")  # NVRTC makes nothing but optimised cubins
PROBE = 'extern "C" __global__ void hp_probe() {}\n'
SEAL = hashlib.sha256().digest_size
SYMBOLS, FUNCTION, KERNEL = 2, 2, 0x10  # ELF: a section of symbols, a symbol that is code, one that can be launched


class CompileError(Exception):
    """Sources that do not become a cubin; the message says which, by what, and the compiler's first complaint."""


class Image(NamedTuple):
    """What the driver loads: a cubin and the kernels in it."""

    cubin: bytes
    entries: tuple[str, ...]


class Sources(NamedTuple):
    """The folders of the GPU code: ``cuda`` with *.cu and *.cuh, ``include`` with what it shares with the CPU."""

    cuda: Path
    include: Path

    @property
    def files(self) -> list[Path]:
        return sorted(self.cuda.glob("*.cu"))

    def digest(self, file: Path, arch: str) -> str:
        """Names everything but the compiler that a file's cubin is made from."""
        h = hashlib.sha256(repr((FLAGS, NVCC_FLAGS, arch)).encode())
        for path in (file, *sorted(self.cuda.glob("*.cuh")), *sorted(self.include.glob("*.h"))):
            text = path.read_bytes()
            h.update(f"{path.name} {len(text)} ".encode() + text)
        return h.hexdigest()


class Compiler(NamedTuple):
    """``name`` with the version; ``compile`` makes a cubin of a file for an architecture, or raises CompileError."""

    name: str
    compile: Callable[[Sources, Path, str], bytes]


def images(arch: str, sources: Sources | None = None) -> dict[str, Image]:
    """File stem -> its cubin for ``arch`` and the kernels in it; UserError in one sentence if they cannot be made."""
    from hpcpipe.config import UserError  # not at the top: setup.py's Python may lack what it reads TOML with

    try:
        sources = sources or find_sources()
        digests = {file: sources.digest(file, arch) for file in sources.files}
        ahead = {f: _unsealed(_ahead(arch, f), d) for f, d in digests.items()}
        missing = {f: d for f, d in digests.items() if ahead[f] is None}
        made = {**ahead, **(_made(missing, sources, arch) if missing else {})}
    except CompileError as error:
        raise UserError(f'device.backend = "cuda": {error}') from None
    except OSError as error:
        where = f"{error.filename or 'compiling'}: {error.strerror}"
        raise UserError(f'device.backend = "cuda": {where}; is TMPDIR full, or the GPU code not readable?') from None
    return {file.stem: Image(cubin, kernels(cubin)) for file, cubin in made.items() if cubin is not None}


def find_sources() -> Sources:
    """Beside the package's native libraries when it is installed, in native/ of a checkout."""
    for native in (PACKAGE / "native", PACKAGE.parent / "native"):
        found = Sources(native / "cuda", native / "include")
        if found.files and found.include.is_dir():
            return found
    raise CompileError(f"the GPU sources (*.cu) are not in {PACKAGE / 'native' / 'cuda'}; install hpcpipe again")


def build(arch: str, folder: Path, sources: Sources) -> list[Path]:
    """Builds ahead with nvcc: the files that ``images`` then finds if ``folder`` is the package's native/cuda."""
    compiler = nvcc()
    if compiler is None:
        raise CompileError("nvcc is neither in CUDA_HOME nor on the PATH")
    targets = {file: folder / arch / f"{file.stem}.cubin" for file in sources.files}
    stale = [f for f, target in targets.items() if _unsealed(target, sources.digest(f, arch)) is None]
    for file, cubin in _compiled(compiler, stale, sources, arch).items():
        _keep(targets[file], sources.digest(file, arch), cubin)
    return list(targets.values())


def kernels(cubin: bytes) -> tuple[str, ...]:
    """The names of the functions in a cubin that can be launched, from the symbols of its ELF file."""
    if cubin[:4] != b"\x7fELF":
        raise CompileError("the compiler's output is no cubin; install another CUDA toolkit")
    (start,), (size, count) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, start + i * size) for i in range(count)]
    names = []
    for _, kind, _, _, offset, length, strings, *_ in sections:
        if kind != SYMBOLS:
            continue
        for at in range(offset, offset + length, 24):
            name, info, other, *_ = struct.unpack_from("<IBBHQQ", cubin, at)
            if info & 15 == FUNCTION and other & KERNEL:
                first = sections[strings][4] + name
                names.append(cubin[first : cubin.index(b"\0", first)].decode())
    return tuple(sorted(names))


# --- what has been compiled before


def _ahead(arch: str, file: Path) -> Path:
    return PACKAGE / "native" / "cuda" / arch / f"{file.stem}.cubin"


def cache() -> Path | None:
    """The user's folder of compiled files; None where there is no such place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    except RuntimeError:  # a user without a home
        return None
    return folder / "hpcpipe" / "cuda" if folder.is_absolute() else None


def _seal(key: str, cubin: bytes) -> bytes:
    return hashlib.sha256(key.encode() + cubin).digest()


def _unsealed(path: Path | None, key: str) -> bytes | None:
    """The cubin in a file; None if there is none, it is broken, or it was made from something else.

    A file is the cubin and then a digest of key and cubin: other tools read it, too, and nothing is taken on trust.
    """
    if path is None:
        return None
    try:
        data = path.read_bytes()
    except OSError:
        return None
    cubin = data[:-SEAL]
    return cubin if data[-SEAL:] == _seal(key, cubin) else None


def _keep(path: Path, key: str, cubin: bytes) -> None:
    """Writes under a name of its own, then renames: ranks that do the same at the same time do not meet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(prefix=f"{path.stem}-", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(cubin + _seal(key, cubin))
        Path(part).chmod(0o644)  # mkstemp's own is for one user; what setup.py builds is for all
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


# --- compiling


def _made(digests: Mapping[Path, str], sources: Sources, arch: str) -> dict[Path, bytes]:
    """Cubins from the cache, or compiled by the first compiler that can."""
    candidates, folder = [c for c in (nvcc(), nvrtc()) if c is not None], cache()

    def place(compiler: Compiler, file: Path) -> tuple[Path | None, str]:
        key = hashlib.sha256(f"{compiler.name} {digests[file]}".encode()).hexdigest()
        return (folder / f"{file.stem}-{arch}-{key[:24]}.cubin" if folder else None), key

    kept = {c.name: {f: _unsealed(*place(c, f)) for f in digests} for c in candidates}
    for found in kept.values():
        if None not in found.values():
            return {f: cubin for f, cubin in found.items() if cubin is not None}
    compiler = _able(candidates, arch)
    ready = {f: cubin for f, cubin in kept[compiler.name].items() if cubin is not None}
    fresh = _compiled(compiler, [f for f in digests if f not in ready], sources, arch)
    for file, cubin in fresh.items():
        path, key = place(compiler, file)
        with contextlib.suppress(OSError):  # a full disk, a home that cannot be written: compiled again next time
            if path is not None:
                _keep(path, key, cubin)
    return {**ready, **fresh}


def _able(candidates: Iterable[Compiler], arch: str) -> Compiler:
    """The first compiler that makes something of an empty kernel: it knows the device and has what it needs itself."""
    why = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "probe.cu"
        probe.write_text(PROBE)
        for compiler in candidates:
            try:
                compiler.compile(Sources(Path(folder), Path(folder)), probe, arch)
                return compiler
            except CompileError as error:
                why.append(str(error))
    found = "; ".join(why) or "nvcc is neither in CUDA_HOME nor on the PATH, and CuPy finds no NVRTC"
    raise CompileError(
        f"no compiler for {arch} ({found}); load your site's CUDA module, set CUDA_HOME, or install NVRTC with "
        'pip install "cupy-cuda13x[ctk]" (or cupy-cuda12x, as the driver is)'
    )


def _compiled(compiler: Compiler, files: list[Path], sources: Sources, arch: str) -> dict[Path, bytes]:
    """All files at once, as many as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        try:
            return dict(zip(files, pool.map(lambda file: compiler.compile(sources, file, arch), files), strict=True))
        except CompileError as error:
            raise CompileError(f"{error}; use another CUDA toolkit (CUDA_HOME), or report this sentence") from None


def find_nvcc() -> str | None:
    """The program: of CUDA_HOME, else of the PATH."""
    home = os.environ.get("CUDA_HOME", "")
    return (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None) or shutil.which("nvcc")


def nvcc() -> Compiler | None:
    """The toolkit's compiler."""
    program = find_nvcc()
    if program is None:
        return None
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace").stdout
    except OSError:
        return None
    version = re.search(r"V(\d[\d.]*)", said)
    return Compiler(f"nvcc {version[1]}", partial(_by_nvcc, program)) if version else None


def nvcc_command(program: str, sources: Sources, file: Path, arch: str, target: Path) -> list[str]:
    """Compiles one file; to be run in the folder ``sources.cuda``, whose files profilers then show by their names."""
    name = file.name if file.parent == sources.cuda else str(file)
    include = os.path.relpath(sources.include, sources.cuda)
    return [program, *NVCC_FLAGS, *FLAGS, f"-arch={arch}", "-I.", f"-I{include}", name, "-o", str(target)]


def _by_nvcc(program: str, sources: Sources, file: Path, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"{file.stem}.cubin"
        command = nvcc_command(program, sources, file, arch, target)
        done = subprocess.run(command, cwd=sources.cuda, capture_output=True, text=True, errors="replace")
        if done.returncode or not target.exists():
            raise CompileError(_complaint(f"nvcc ({program})", file, arch, done.stderr + done.stdout))
        return target.read_bytes()


def nvrtc() -> Compiler | None:
    """The compiler that is a library, by way of CuPy; its calls need no device."""
    try:
        from cupy.cuda import nvrtc as library

        major, minor = library.getVersion()
    except (ImportError, OSError, RuntimeError):  # no CuPy, or a CuPy that does not find the library
        return None
    return Compiler(f"NVRTC {major}.{minor}", partial(_by_nvrtc, library))


def nvrtc_options(sources: Sources, arch: str) -> list[str]:
    """What NVRTC is told."""
    return [*FLAGS, f"-arch={arch}", f"-I{sources.cuda}", f"-I{sources.include}"]


def _by_nvrtc(library: Any, sources: Sources, file: Path, arch: str) -> bytes:
    program = library.createProgram(file.read_text(encoding="utf-8"), file.name, (), ())
    try:
        library.compileProgram(program, tuple(nvrtc_options(sources, arch)))
        return bytes(library.getCUBIN(program))
    except library.NVRTCError as error:
        said = library.getProgramLog(program) or str(error)
        raise CompileError(_complaint("NVRTC", file, arch, said)) from None
    finally:
        library.destroyProgram(program)


def _complaint(compiler: str, file: Path, arch: str, said: str) -> str:
    lines = [" ".join(line.split()) for line in said.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), "it said nothing more")
    return f"{compiler} does not compile {file.name} for {arch}: {first}"
