"""The single-precision matrix-product peak of the cores at hand, in a process of its own, measured between the runs.

Speaks the line protocol of ``worker.py`` with ``{"seconds": s}`` -> ``{"flops": FLOP/s, "library": name}``.
The peak is the best time of a large product in the better of two libraries: hpcpipe's own backend, and OpenBLAS called
directly, so that the yardstick does not depend on the code under test. Alone: ``python -m benchmarks.peak``.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.worker import die_with_parent, private_stdout, send

SIZE = 2048
ROW_MAJOR, NO_TRANSPOSE = 101, 111
AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd"}
Measure = Callable[[float], float]  # seconds to spend -> FLOP/s


def choose_kernels() -> None:
    """Has OpenBLAS use its AVX-512 kernels on every CPU that can; it names only some models by itself."""
    info = Path("/proc/cpuinfo")
    flags = next((set(r.split()) for r in info.read_text().splitlines() if r.startswith("flags")), set[str]())
    if flags >= AVX512:
        os.environ.setdefault("OPENBLAS_CORETYPE", "SkylakeX")


def openblas(threads: int) -> Measure:
    """A product of two 2048 x 2048 matrices in scipy-openblas32."""
    import scipy_openblas32

    folder = Path(scipy_openblas32.get_lib_dir())
    library = ctypes.CDLL(str(folder / scipy_openblas32.get_library(fullname=True)))
    library.scipy_openblas_set_num_threads(threads)
    a, b, c = (np.random.default_rng(i).random((SIZE, SIZE), np.float32) for i in range(3))
    size, one, zero = ctypes.c_int(SIZE), ctypes.c_float(1), ctypes.c_float(0)
    pa, pb, pc = (m.ctypes.data_as(ctypes.c_void_p) for m in (a, b, c))  # each keeps its array alive

    def product() -> None:
        library.scipy_cblas_sgemm(
            ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, size, size, size, one, pa, size, pb, size, zero, pc, size
        )  # fmt: skip

    def measure(seconds: float) -> float:
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            product()
            best = min(best, time.perf_counter() - begin)
        return 2.0 * SIZE**3 / best

    product()
    if not np.allclose(c[:2], a[:2] @ b, rtol=1e-4):
        raise ArithmeticError("OpenBLAS returned a wrong product; the peak cannot be trusted")
    return measure


def backend(threads: int) -> Measure:
    """The product hpcpipe itself trains with."""
    from hpcpipe.backends.cpu import CpuBackend

    return CpuBackend(threads=threads).matmul_peak


def libraries(threads: int) -> dict[str, Measure]:
    """Those that can be loaded here; raises ImportError when none can."""
    choose_kernels()
    found: dict[str, Measure] = {}
    for name, load in {"openblas": openblas, "hpcpipe": backend}.items():
        try:
            found[name] = load(threads)
        except (ImportError, OSError, AttributeError) as error:
            print(f"peak: {name} is left out: {error}", file=sys.stderr)
    if not found:
        raise ImportError("no BLAS to measure the matrix-product peak with; pip install scipy-openblas32")
    return found


def best_of(found: dict[str, Measure], seconds: float) -> dict[str, object]:
    """The faster library and its FLOP/s, each measured for its share of the seconds."""
    rates = {name: measure(seconds / len(found)) for name, measure in found.items()}
    name = max(rates, key=rates.__getitem__)
    return {"flops": rates[name], "library": name, "rates": rates}


def main() -> None:
    """One measurement, or one for each line of standard input with ``--serve``."""
    threads = len(os.sched_getaffinity(0))
    if "--serve" not in sys.argv:
        answer = best_of(libraries(threads), 2.0)
        print(f"{float(str(answer['flops'])) / 1e9:.0f} GFLOP/s on {threads} threads ({answer['library']})")
        return
    die_with_parent()
    out = private_stdout()
    found = libraries(threads)
    send(out, {"ready": True})
    for line in sys.stdin:
        send(out, best_of(found, float(json.loads(line)["seconds"])))


if __name__ == "__main__":
    main()
