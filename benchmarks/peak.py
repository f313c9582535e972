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
from typing import NamedTuple

import numpy as np

from benchmarks.worker import die_with_parent, private_stdout, send
from hpcpipe.backends.cpu import CpuBackend, cpu_flags

SIZE = 2048
ROW_MAJOR, NO_TRANSPOSE = 101, 111


class Peak(NamedTuple):
    """The better library, its FLOP/s, and the FLOP/s of each."""

    library: str
    flops: float
    rates: dict[str, float]


def openblas_settings() -> dict[str, str]:
    """The environment OpenBLAS is loaded in: it may take a new processor that has AVX-512 for a Haswell."""
    wide = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= cpu_flags()
    return {"OPENBLAS_NUM_THREADS": "1"} | ({"OPENBLAS_CORETYPE": "SkylakeX"} if wide else {})


def openblas(threads: int) -> Callable[[float], float]:
    """A product of two 2048 x 2048 matrices by scipy-openblas32's own threads: seconds to spend -> FLOP/s."""
    os.environ.update(openblas_settings() | os.environ)
    import scipy_openblas32

    blas = ctypes.CDLL(str(Path(scipy_openblas32.get_lib_dir()) / "libscipy_openblas.so"))
    a, b, c = (np.random.default_rng(i).random((SIZE, SIZE), np.float32) for i in range(3))
    size, one, zero = ctypes.c_int(SIZE), ctypes.c_float(1), ctypes.c_float(0)
    pa, pb, pc = (m.ctypes.data_as(ctypes.c_void_p) for m in (a, b, c))  # each keeps its array alive

    def seconds_of_one() -> float:
        begin = time.perf_counter()
        blas.scipy_cblas_sgemm(
            ROW_MAJOR, NO_TRANSPOSE, NO_TRANSPOSE, size, size, size, one, pa, size, pb, size, zero, pc, size
        )  # fmt: skip
        return time.perf_counter() - begin

    def measure(seconds: float) -> float:
        blas.scipy_openblas_set_num_threads(threads)
        best, end = seconds_of_one(), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, seconds_of_one())
        return 2.0 * SIZE**3 / best

    measure(0.0)
    if not np.allclose(c[:2], a[:2] @ b, rtol=1e-4):
        raise ArithmeticError("OpenBLAS returned a wrong product; the peak cannot be trusted")
    return measure


class Peaks:
    """Both libraries on all cores of the affinity mask."""

    def __init__(self) -> None:
        self.threads = len(os.sched_getaffinity(0))
        self.libraries = {"openblas": openblas(self.threads), "hpcpipe": CpuBackend(self.threads).matmul_peak}

    def measure(self, seconds: float) -> Peak:
        """Shares the seconds between the libraries."""
        rates = {name: measure(seconds / len(self.libraries)) for name, measure in self.libraries.items()}
        best = max(rates, key=rates.__getitem__)
        return Peak(best, rates[best], rates)


def main() -> None:
    """One measurement, or one for each line of standard input with ``--serve``."""
    if "--serve" not in sys.argv:
        peaks = Peaks()
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks.measure(2.0).rates.items())
        print(f"matrix products in float32 on {peaks.threads} threads, GFLOP/s: {rates}")
        return
    die_with_parent()
    out = private_stdout()
    peaks = Peaks()
    send(out, {"ready": True})
    for line in sys.stdin:
        send(out, peaks.measure(float(json.loads(line)["seconds"]))._asdict())


if __name__ == "__main__":
    main()
