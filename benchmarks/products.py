"""Matrix products of the shapes that a transformer multiplies: our kernels beside the libraries that can be installed.

    python -m benchmarks.products [--quick] [--json FILE] [--shape SHAPE…] [--rounds N] [--in FOLDER…]

OpenBLAS comes with the tests, MKL and oneDNN with ``make bench``; BLIS and libxsmm are Debian's libblis4-openmp and
libxsmm-dev. Each library has a process of its own with all cores of the affinity mask, and they take turns at every
product: y = x wᵀ (fwd), dx = dy w (dx), dw += dyᵀ x (dw). Results are compared with numpy's before anything is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.contest import vendor_shim
from benchmarks.peak import openblas_settings
from benchmarks.peer_hpcpipe import microbatch_of
from benchmarks.shape import Shape, arguments, parse
from benchmarks.step import PEERS, machine
from benchmarks.worker import die_with_parent, private_stdout, send
from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.null import Call, Tensor

SHAPES = ("4,4,128,64,12,65", "8,8,512,256,8,8192", "8,8,512,1024,2,32000,2")
SECONDS = 0.06  # of a turn
ROW, PLAIN, TURNED = 101, 111, 112
Array = np.ndarray
Multiply = tuple[Callable[[], object], Array]  # a product without arguments, and where its result lies


class Product(NamedTuple):
    """dims of y[n,o] = x[n,c] w[o,c]ᵀ, and which of the three passes."""

    n: int
    o: int
    c: int
    which: str

    @property
    def flops(self) -> float:
        return 2.0 * self.n * self.o * self.c

    def operands(self) -> tuple[Array, Array, Array, Array]:
        """(result, a, b, what the result must be); dw is added to ones."""
        rng = np.random.default_rng(1)
        x, w, dy = (rng.standard_normal(s, np.float32) for s in ((self.n, self.c), (self.o, self.c), (self.n, self.o)))
        if self.which == "fwd":
            return np.empty_like(dy), x, w, x @ w.T
        if self.which == "dx":
            return np.empty_like(x), dy, w, dy @ w
        return np.ones_like(w), dy, x, 1 + dy.T @ x


def products(shape: Shape) -> Iterator[Product]:
    """Those of a model, each once."""
    n, width = microbatch_of(shape) * shape.length, shape.width
    first = 2 * shape.ffn if shape.kv_heads else shape.ffn
    pairs = ((shape.qkv, width), (width, width), (first, width), (width, shape.ffn), (shape.vocabulary, width))
    return (Product(n, o, c, which) for o, c in dict.fromkeys(pairs) for which in ("fwd", "dx", "dw"))


# --- the libraries: name -> a way to make a product a call without arguments


def _gemm(call: Callable[..., Any], p: Product, c: Array, a: Array, b: Array) -> Multiply:
    """``call(transpose a, transpose b, m, n, k, a, lda, b, ldb, beta, c, ldc)``, row-major."""
    turned = (p.which == "dw", p.which == "fwd")
    m, n = c.shape
    k = {"fwd": p.c, "dx": p.o, "dw": p.n}[p.which]
    pa, pb, pc = (x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, c))
    beta = float(p.which == "dw")
    return lambda: call(*turned, m, n, k, pa, a.shape[1], pb, b.shape[1], beta, pc, n), c


def _cblas(function: Any) -> Callable[..., Any]:
    i, f = ctypes.c_int, ctypes.c_float
    return lambda ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc: function(
        ROW, TURNED if ta else PLAIN, TURNED if tb else PLAIN, i(m), i(n), i(k), f(1), a, i(lda), b, i(ldb), f(beta), c,
        i(ldc),
    )  # fmt: skip


def _dnnl(function: Any) -> Callable[..., Any]:
    i, f, t = ctypes.c_int64, ctypes.c_float, (ctypes.c_char(b"N"), ctypes.c_char(b"T"))
    return lambda ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc: function(
        t[ta], t[tb], i(m), i(n), i(k), f(1), a, i(lda), b, i(ldb), f(beta), c, i(ldc)
    )


def _fortran(function: Any) -> Callable[..., Any]:
    """Column-major: the other way round."""
    letters = (ctypes.c_char(b"N"), ctypes.c_char(b"T"))

    def call(ta: bool, tb: bool, m: int, n: int, k: int, a: Any, lda: int, b: Any, ldb: int, beta: float, c: Any,
             ldc: int) -> None:  # fmt: skip
        i, f, by = ctypes.c_int, ctypes.c_float, ctypes.byref
        function(by(letters[tb]), by(letters[ta]), by(i(n)), by(i(m)), by(i(k)), by(f(1)), b, by(i(ldb)), a, by(i(lda)),
                 by(f(beta)), c, by(i(ldc)))  # fmt: skip

    return call


def _ours(p: Product, c: Array, a: Array, b: Array) -> Multiply:
    backend = CpuBackend(len(os.sched_getaffinity(0)))
    buffers = (c, a, b, None, None) if p.which == "fwd" else (c, None, a, b) if p.which == "dw" else (c, a, b)
    places, tensors, top = {}, [], 0
    for i, x in enumerate(buffers):
        tensors.append(None if x is None else Tensor(i, x.shape))
        if x is not None:
            places[i], top = top, top + -(-x.nbytes // 64) * 64
    handle = backend.compile([Call(f"linear_{p.which}", tuple(tensors), p[:3], ())], lambda t: (0, places[t.id]))
    memory = backend.allocate(top + backend.threads * handle.work)
    views = [backend.array(memory, places[i], x.shape) for i, x in enumerate(buffers) if x is not None]
    for view, x in zip(views, (x for x in buffers if x is not None), strict=True):
        view[...] = x
    return backend.bound(handle, memory, np.zeros(1, np.int64), top), views[0]


LIBRARIES: dict[str, tuple[tuple[str, ...], Any, str]] = {  # name -> files, wrapper, function
    "openblas": (("libscipy_openblas.so",), _cblas, "scipy_cblas_sgemm"),
    "mkl": (("libmkl_rt.so.3", "libmkl_rt.so.2"), _cblas, "cblas_sgemm"),
    "onednn": (("libdnnl.so.3", "libdnnl.so.3.2", "libdnnl.so.2"), _dnnl, "dnnl_sgemm"),
    "blis": (("libblis.so.4",), _cblas, "cblas_sgemm"),
    "libxsmm": (("libxsmmext.a",), _fortran, "libxsmm_sgemm_omp_"),
}


def found(name: str, folders: Sequence[Path]) -> Path | None:
    """Where a library lies."""
    import scipy_openblas32

    places = [*folders, Path(scipy_openblas32.get_lib_dir()), PEERS.parent.parent / "lib"]
    places += [
        Path("/usr/lib"),
        *Path("/usr/lib").glob("*-linux-gnu"),
        *Path("/usr/lib").glob("*-linux-gnu/blis-openmp"),
    ]
    return next((place / file for file in LIBRARIES[name][0] for place in places if (place / file).exists()), None)


def opened(path: Path) -> ctypes.CDLL:
    """A library; Debian's libxsmm is an archive, which is linked first."""
    if path.suffix != ".a":
        return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "libxsmm.so"
        parts = [str(path.with_name(f"libxsmm{part}.a")) for part in ("ext", "", "noblas")]
        subprocess.run(
            ["cc", "-shared", "-fopenmp", "-o", shared, "-Wl,--whole-archive", *parts[:2], "-Wl,--no-whole-archive",
             parts[2], "-ldl", "-lm", "-lpthread"], check=True, capture_output=True,
        )  # fmt: skip
        return ctypes.CDLL(str(shared))


def worker(name: str, path: str) -> None:
    """Prepares a product for each line of standard input, or times it again: ``[n, o, c, which]`` -> seconds."""
    die_with_parent()
    out = private_stdout()
    if name != "hpcpipe":
        wrapper, function = LIBRARIES[name][1:]
        library = opened(Path(path))
        if name == "openblas":
            library.scipy_openblas_set_num_threads(len(os.sched_getaffinity(0)))
        call = wrapper(getattr(library, function))
    now: tuple[Product, Callable[[], object]] | None = None
    for line in sys.stdin:
        p = Product(*json.loads(line))
        if now is None or now[0] != p:
            c, a, b, want = p.operands()
            multiply, result = _ours(p, c, a, b) if name == "hpcpipe" else _gemm(call, p, c, a, b)
            multiply()
            error = np.abs(result - want).max() / np.abs(want).max()
            if error > 1e-4:
                send(out, {"error": f"{name} is wrong by {error:.1e} at {p}"})
                return
            now = p, multiply
        send(out, {"seconds": _seconds(now[1])})


def _seconds(multiply: Callable[[], object]) -> float:
    """The median time of one product, over a turn of about SECONDS."""
    times, end = [], time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        begin = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - begin)
    return median(times)


# --- the driver


class Library:
    """One library in its process."""

    def __init__(self, name: str, path: Path | None, shim: str) -> None:
        threads = str(len(os.sched_getaffinity(0)))
        env = (
            os.environ
            | openblas_settings()
            | {"OMP_NUM_THREADS": threads, "BLIS_NUM_THREADS": threads, "MKL_THREADING_LAYER": "GNU"}
        )
        if name == "mkl" and shim:
            env["LD_PRELOAD"] = shim
        if path is not None:  # what the library itself needs lies beside it
            env["LD_LIBRARY_PATH"] = f"{path.parent}:{env.get('LD_LIBRARY_PATH', '')}"
        words = [sys.executable, "-m", "benchmarks.products", "--worker", name, str(path)]
        self.name = name
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def seconds(self, p: Product) -> float:
        """One turn; the process is stopped before and after, for its threads may go on waiting busily."""
        assert self.process.stdin and self.process.stdout
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps(p) + "\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline() or '{"error": "it ended"}')
        self.process.send_signal(signal.SIGSTOP)
        if "error" in told:
            raise RuntimeError(f"{self.name}: {told['error']}")
        return float(told["seconds"])


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where nothing is there to compare with."""
    parser = arguments("benchmarks.products", __doc__, quick="the first two shapes, three rounds", rounds="5")
    parser.add_argument("--in", dest="folders", type=Path, nargs="*", default=[], help="look for libraries here, too")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(*args.worker)
        return 0
    shapes = args.shape or [parse(text) for text in (SHAPES[:2] if args.quick else SHAPES)]
    paths = {name: found(name, args.folders) for name in LIBRARIES}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        shim = vendor_shim(Path(folder))
        there = [Library("hpcpipe", None, ""), *(Library(n, path, shim) for n, path in paths.items() if path)]
        measured = [_contest(shape, there, args.rounds or (3 if args.quick else 5)) for shape in shapes]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "shapes": measured}, indent=1))
    return 0 if len(there) > 1 else 2


def _contest(shape: Shape, libraries: Sequence[Library], rounds: int) -> dict[str, Any]:
    """All products of a shape; prints the table."""
    names = [one.name for one in libraries]
    print(f"\n{machine()}, {len(os.sched_getaffinity(0))} threads, GFLOP/s, {rounds} rounds; {shape}")
    print(f"{'n x o x c':>20} pass" + "".join(f"{name:>10}" for name in names) + "  of the best other")
    rates: dict[str, dict[str, list[float]]] = {}
    shares: dict[str, list[float]] = {name: [] for name in names}
    for p in products(shape):
        turns = [[p.flops / one.seconds(p) / 1e9 for one in libraries] for _ in range(rounds + 1)][1:]
        rates[f"{p.n},{p.o},{p.c},{p.which}"] = {n: [turn[i] for turn in turns] for i, n in enumerate(names)}
        for i, name in enumerate(names):
            shares[name].append(median(turn[i] / turn[0] for turn in turns))
        best = median(turn[0] / max(turn[1:], default=turn[0]) for turn in turns)
        middle = "".join(f"{median(turn[i] for turn in turns):10.1f}" for i in range(len(names)))
        print(f"{p.n:>8} x{p.o:>5} x{p.c:>4} {p.which:>4}{middle}{best:10.2f}")
    means = {name: geometric_mean(shares[name]) for name in names}
    print(f"{'beside ours, mean':>25}" + "".join(f"{means[name]:10.2f}" for name in names))
    return {"shape": str(shape), "rates": rates, "beside_ours": means}


if __name__ == "__main__":
    sys.exit(main())
