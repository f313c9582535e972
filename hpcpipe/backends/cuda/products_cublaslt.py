"""One matrix product as cuBLASLt sees it: a description that a key can be made of, a plan, and a step for a stream.

In: shapes, element types, epilogue and alignments of a product (``Product``), later its addresses (``Pointers``). Out:
a ``Plan``, whose descriptors are made once, and ``MatmulStep``s, each of which is one cublasLtMatmul, in a capture too.
nvmath-python's bindings are imported here and nowhere else; they are the C functions under their own names.

cuBLASLt's matrices are column-major. A row-major matrix [r, s] is a column-major one of s rows and r columns whose
leading dimension is s, so D = op(A) op(B) always computes the transposed result, and the operands change places.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.cuda.driver import Driver, Properties, Stream
from hpcpipe.config import UserError

# cudaDataType_t, cublasComputeType_t and cublasOperation_t of the headers; a test holds them against the bindings.
TYPES = {"r": 0, "h": 14, "e4m3": 28, "e5m2": 29, "e2m1": 33}
BITS = {"r": 32, "h": 16, "e4m3": 8, "e5m2": 8, "e2m1": 4}
COMPUTE_32F, COMPUTE_32F_FAST_TF32 = 68, 77
OPERATIONS = {"n": 0, "t": 1}
NOT_SUPPORTED = (7, 15)  # CUBLAS_STATUS_INVALID_VALUE and _NOT_SUPPORTED: what a product that it does not do gives

# Attributes of a product by the names of the bindings, and the type that the library reads each as.
ATTRIBUTES = {
    "TRANSA": "int32", "TRANSB": "int32", "POINTER_MODE": "int32", "EPILOGUE": "uint32", "BIAS_POINTER": "int64",
    "BIAS_DATA_TYPE": "int32", "EPILOGUE_AUX_POINTER": "int64", "EPILOGUE_AUX_LD": "int64", "FAST_ACCUM": "int8",
    "A_SCALE_POINTER": "int64", "B_SCALE_POINTER": "int64", "A_SCALE_MODE": "int32", "B_SCALE_MODE": "int32",
}  # fmt: skip
PREFERENCES = {
    "MAX_WORKSPACE_BYTES": "uint64", "REDUCTION_SCHEME_MASK": "uint32", "MIN_ALIGNMENT_A_BYTES": "uint32",
    "MIN_ALIGNMENT_B_BYTES": "uint32", "MIN_ALIGNMENT_C_BYTES": "uint32", "MIN_ALIGNMENT_D_BYTES": "uint32",
}  # fmt: skip

ALGORITHM = np.dtype((np.uint64, 8))  # cublasLtMatmulAlgo_t, opaque
RESULT = np.dtype(
    [("algo", ALGORITHM), ("workspace_size", "<u8"), ("state", "<i4"), ("waves_count", "<f4"), ("reserved", "<i4", 4)]
)


class Product(NamedTuple):
    """D[m, n] = epilogue(op(A)[m, k] op(B)[k, n] + beta C), column-major, C and D of one type and place or shape.

    All that the choice of an algorithm may depend on, and no address. ``ld`` are the leading dimensions of A, B and D;
    ``align`` the bytes, at most 16, that all addresses of A, B, C and D, bias and aux are multiples of; ``scales`` the
    names of cublasLtMatmulMatrixScale_t for A and B, empty for operands that need none.
    """

    ops: str  # "tn": A transposed, B not
    m: int
    n: int
    k: int
    ld: tuple[int, int, int]
    types: tuple[str, str, str]
    beta: int = 0
    epilogue: str = "DEFAULT"
    align: tuple[int, ...] = (16, 16, 16)
    scales: tuple[str, str] = ("", "")
    tf32: bool = False
    device_alpha: bool = False

    @property
    def key(self) -> str:
        """Its name in tables and files: the same on every rank and machine."""
        size, ld, align = (",".join(map(str, v)) for v in ((self.m, self.n, self.k), self.ld, self.align))
        a, b, d = self.types
        marks = (*self.scales, "tf32" if self.tf32 else "", "alpha" if self.device_alpha else "")
        kinds = (f"{a}*{b}={d}", f"beta {self.beta}", self.epilogue)
        parts = (self.ops, size, f"ld {ld}", *kinds, f"align {align}", *marks)
        return " ".join(part for part in parts if part)

    @property
    def stored(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """(rows, columns) of A, B and D as they lie in memory."""
        a = (self.k, self.m) if self.ops[0] == "t" else (self.m, self.k)
        b = (self.n, self.k) if self.ops[1] == "t" else (self.k, self.n)
        return a, b, (self.m, self.n)


class Pointers(NamedTuple):
    """Addresses of one product; ``c`` of 0 is D itself. Scales and alpha are addresses in device memory."""

    a: int
    b: int
    d: int
    c: int = 0
    bias: int = 0
    aux: int = 0
    a_scale: int = 0
    b_scale: int = 0
    alpha: int = 0

    @property
    def alignment(self) -> tuple[int, ...]:
        """What ``Product.align`` says of these."""
        return tuple(min(aligned(p) for p in group) for group in ((self.a,), (self.b,), (self.d, self.c))) + tuple(
            aligned(p) for p in (self.bias, self.aux) if p
        )


def aligned(address: int) -> int:
    """The power of two, at most 16, that an address is a multiple of."""
    return min(16, address & -address) if address else 16


class Choice(NamedTuple):
    """An algorithm of cuBLASLt, 64 opaque bytes, and the workspace that it takes."""

    algorithm: bytes
    workspace: int


class Plan:
    """A product with its descriptors; ``choice`` is set by whoever chooses, None where the library does not do it."""

    def __init__(self, product: Product, descriptor: int, layouts: Sequence[int]) -> None:
        self.product, self.descriptor, self.layouts = product, descriptor, tuple(layouts)
        self.choice: Choice | None = None


def bindings() -> ModuleType | None:
    """nvmath.bindings.cublasLt, or None where the package or the library is not installed."""
    try:
        from nvmath.bindings import cublasLt  # type: ignore[import-not-found,unused-ignore]

        cublasLt.get_version()
    except (ImportError, RuntimeError, OSError):
        return None
    return cublasLt  # type: ignore[no-any-return,unused-ignore]


def default_workspace(properties: Properties) -> int:
    """Bytes of workspace that NVIDIA recommends: 32 MiB from Hopper on, 4 MiB before (cuBLAS documentation)."""
    return (32 if properties.capability >= (9, 0) else 4) << 20


class CublasLt:
    """The library on one device: makes plans, asks for algorithms, runs. ``lt`` are its bindings."""

    def __init__(self, driver: Driver, lt: Any, workspace: int) -> None:
        self.driver, self.lt, self.size = driver, lt, workspace
        self.handle = lt.create()
        self.workspace = driver.allocate(workspace) if workspace else 0
        self.version = int(lt.get_version())
        # cuBLASLt reads alpha and beta when it is called, so that these may be shared; a device beta needs its own.
        self._numbers = np.array([0, 1], np.float32)
        self._device_numbers = 0

    def plan(self, product: Product, at: Pointers) -> Plan:
        """Descriptors of a product. ``at`` are addresses that it will have, or others that are aligned alike."""
        lt = self.lt
        descriptor = lt.matmul_desc_create(COMPUTE_32F_FAST_TF32 if product.tf32 else COMPUTE_32F, TYPES["r"])
        values = {"TRANSA": OPERATIONS[product.ops[0]], "TRANSB": OPERATIONS[product.ops[1]]}
        values["EPILOGUE"] = int(getattr(lt.Epilogue, product.epilogue))
        if "AUX" in product.epilogue or product.epilogue.startswith("DGELU"):
            values["EPILOGUE_AUX_LD"] = product.ld[2]
        if "BIAS" in product.epilogue and BITS[product.types[0]] < 16:
            values["BIAS_DATA_TYPE"] = TYPES["h"]
        if product.device_alpha:
            values["POINTER_MODE"] = int(lt.PointerMode.DEVICE)
            self._device_beta()
        for name, mode in zip(("A_SCALE_MODE", "B_SCALE_MODE"), product.scales, strict=True):
            if mode and mode != "SCALAR_32F":  # the default, which older libraries have no name for
                known = getattr(getattr(lt, "MatmulMatrixScale", None), mode, None)
                if known is None:
                    raise UserError(
                        f"this cuBLASLt knows no scales {mode}: install a newer nvmath-python and cuBLAS (12.9 or "
                        "later), or take train.compute = fp8 or bfloat16"
                    )
                values[name] = int(known)
        for name, value in values.items():
            self._set(descriptor, name, value)
        layouts = [
            lt.matrix_layout_create(TYPES[type], *shape, ld)
            for type, shape, ld in zip(product.types, product.stored, product.ld, strict=True)
        ]
        found = Plan(product, descriptor, layouts)
        self._point(found, at)
        return found

    def candidates(self, plan: Plan, count: int) -> list[Choice]:
        """Up to ``count`` algorithms, the most promising first, whose results are the same bits every time."""
        lt, product = self.lt, plan.product
        preference = lt.matmul_preference_create()
        values = {"MAX_WORKSPACE_BYTES": self.size, "REDUCTION_SCHEME_MASK": int(lt.ReductionScheme.COMPUTE_TYPE)}
        for name, bytes_ in zip("ABCD", (*product.align[:3], product.align[2]), strict=True):
            values[f"MIN_ALIGNMENT_{name}_BYTES"] = bytes_
        for name, value in values.items():
            buffer = np.array([value], PREFERENCES[name])
            attribute = int(getattr(lt.MatmulPreferenceAttribute, name))
            lt.matmul_preference_set_attribute(preference, attribute, buffer.ctypes.data, buffer.nbytes)
        results, found = np.zeros(count, RESULT), np.zeros(1, np.int32)
        a, b, d = plan.layouts
        try:
            lt.matmul_algo_get_heuristic(
                self.handle, plan.descriptor, a, b, d, d, preference, count, results.ctypes.data, found.ctypes.data
            )
        except lt.cuBLASLtError as error:
            if error.status not in NOT_SUPPORTED:
                raise
            return []
        finally:
            lt.matmul_preference_destroy(preference)
        choices = [Choice(r["algo"].tobytes(), int(r["workspace_size"])) for r in results[: found[0]] if not r["state"]]
        return [c for c in choices if c.workspace <= self.size and self._deterministic(c)]

    def fits(self, plan: Plan, choice: Choice) -> bool:
        """Whether an algorithm that was chosen elsewhere does this product here."""
        if len(choice.algorithm) != ALGORITHM.itemsize or not 0 <= choice.workspace <= self.size:
            return False
        algorithm, result = np.frombuffer(choice.algorithm, np.uint64).copy(), np.zeros(1, RESULT)
        a, b, d = plan.layouts
        try:
            self.lt.matmul_algo_check(
                self.handle, plan.descriptor, a, b, d, d, algorithm.ctypes.data, result.ctypes.data
            )
        except self.lt.cuBLASLtError:
            return False
        return int(result["workspace_size"][0]) <= choice.workspace and self._deterministic(choice)

    def run(
        self, plan: Plan, at: Pointers, stream: Stream, choice: Choice | None = None, workspace: int | None = None
    ) -> None:
        """One cublasLtMatmul: given to the stream, no memory asked for, nothing waited for.

        Products of one stream share a workspace; ``workspace`` is another one, of the same size, for another stream.
        """
        product, chosen = plan.product, choice or plan.choice
        if chosen is None:
            raise ValueError(f"cuBLASLt: no algorithm was chosen for {product.key}")
        self._point(plan, at)
        algorithm = np.frombuffer(chosen.algorithm, np.uint64)
        one, beta = (self._numbers[i : i + 1].ctypes.data for i in (1, product.beta))
        if product.device_alpha:
            one, beta = at.alpha, self._device_numbers + 4 * product.beta
        a, b, d = plan.layouts
        room = self.workspace if workspace is None else workspace
        self.lt.matmul(
            self.handle, plan.descriptor, one, at.a, a, at.b, b, beta, at.c or at.d, d, at.d, d,
            algorithm.ctypes.data, room, self.size, getattr(stream, "ptr", stream),
        )  # fmt: skip

    def close(self, plans: Sequence[Plan]) -> None:
        """Gives everything back."""
        for plan in plans:
            self.lt.matmul_desc_destroy(plan.descriptor)
            for layout in plan.layouts:
                self.lt.matrix_layout_destroy(layout)
        self.lt.destroy(self.handle)
        for address in (self.workspace, self._device_numbers):
            if address:
                self.driver.release(address)

    def _set(self, descriptor: int, name: str, value: int) -> None:
        buffer = np.array([value], ATTRIBUTES[name])
        attribute = int(getattr(self.lt.MatmulDescAttribute, name))
        self.lt.matmul_desc_set_attribute(descriptor, attribute, buffer.ctypes.data, buffer.nbytes)

    def _point(self, plan: Plan, at: Pointers) -> None:
        """The addresses that live in the descriptor: the library reads them when it is called, not later."""
        epilogue, scales = plan.product.epilogue, plan.product.scales
        if "BIAS" in epilogue:
            self._set(plan.descriptor, "BIAS_POINTER", at.bias)
        if "AUX" in epilogue or epilogue.startswith("DGELU"):
            self._set(plan.descriptor, "EPILOGUE_AUX_POINTER", at.aux)
        for name, mode, address in zip("AB", scales, (at.a_scale, at.b_scale), strict=True):
            if mode:
                self._set(plan.descriptor, f"{name}_SCALE_POINTER", address)

    def _deterministic(self, choice: Choice) -> bool:
        """Sums in one piece, or in pieces that are kept apart in float32 and added in a step of their own.

        Pieces that are added in the result itself come in the order in which they are ready, or are rounded first.
        """
        lt = self.lt
        algorithm, values = np.frombuffer(choice.algorithm, np.uint64).copy(), np.zeros(2, np.int32)
        written = np.zeros(1, np.uint64)
        for i, name in enumerate(("SPLITK_NUM", "REDUCTION_SCHEME")):
            lt.matmul_algo_config_get_attribute(
                algorithm.ctypes.data,
                int(getattr(lt.MatmulAlgoConfigAttribute, name)),
                values[i : i + 1].ctypes.data,
                4,
                written.ctypes.data,
            )
        schemes = lt.ReductionScheme
        return bool(values[0] == 1 or values[1] in (int(schemes.NONE), int(schemes.COMPUTE_TYPE)))

    def _device_beta(self) -> None:
        if self._device_numbers:
            return
        self._device_numbers = self.driver.allocate(8)
        host: npt.NDArray[np.uint8] = self.driver.pinned(8)
        host[:] = self._numbers.view(np.uint8)
        stream = self.driver.stream()
        self.driver.copy(self._device_numbers, host.ctypes.data, 8, stream)
        self.driver.synchronize(stream)


class MatmulStep:
    """A product at its place: ``enqueue`` is one cublasLtMatmul."""

    def __init__(self, library: CublasLt, plan: Plan, at: Pointers) -> None:
        if at.alignment != plan.product.align:
            raise ValueError(f"cuBLASLt: addresses {at} are not aligned as {plan.product.key} says")
        self.library, self.plan, self.at = library, plan, at

    def enqueue(self, stream: Any) -> None:
        try:
            self.library.run(self.plan, self.at, stream)
        except self.library.lt.cuBLASLtError as error:
            raise UserError(
                f"cuBLASLt {self.library.version} refused the product {self.plan.product.key} that it had said it does "
                f"({error}); set HPCPIPE_TUNE=off, or remove the cache file of tuned products"
            ) from error
