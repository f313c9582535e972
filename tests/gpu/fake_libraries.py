"""cuBLASLt and cuDNN posing in host memory: the names and the strictness of the real ones, the arithmetic of numpy.

A call reads its descriptors when it is made and its matrices when the stream gets there, as the real ones do. What the
documentation of the real ones refuses is refused here: types that do not go together, epilogues, leading dimensions,
alignment, FP8 operands that are not K-major. ``FakeCublasLt`` stands for the module ``nvmath.bindings.cublasLt``,
``FakeCudnn`` for the module ``cudnn``.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray

R_32F, R_16BF, E4M3, E5M2 = 0, 14, 28, 29
DTYPES = {
    R_32F: np.dtype(np.float32),
    R_16BF: np.dtype(ml_dtypes.bfloat16),
    E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    E5M2: np.dtype(ml_dtypes.float8_e5m2),
}
# A, B -> the types of C and D that the documentation's table of cublasLtMatmul lists for CUBLAS_COMPUTE_32F.
TOGETHER = {
    (R_32F, R_32F): {R_32F},
    (R_16BF, R_16BF): {R_16BF, R_32F},
    (E4M3, E4M3): {R_16BF, R_32F},
    (E4M3, E5M2): {R_16BF, R_32F},
    (E5M2, E4M3): {R_16BF, R_32F},
}
NARROW = (E4M3, E5M2)
SUCCESS, INVALID_VALUE, UNSUPPORTED = 0, 7, 15


def memory(address: int, count: int, dtype: Any) -> Array:
    """Host memory at an address as an array."""
    dtype = np.dtype(dtype)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype)


def columns(address: int, layout: dict[str, Any]) -> Array:
    """A column-major matrix as a writable view [rows, cols]."""
    dtype = DTYPES[layout["type"]]
    raw = memory(address, layout["ld"] * (layout["cols"] - 1) + layout["rows"], dtype).view(np.uint8)
    strides = (dtype.itemsize, dtype.itemsize * layout["ld"])
    return np.ndarray((layout["rows"], layout["cols"]), dtype, raw, strides=strides)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))


def gelu_slope(x: Array) -> Array:
    h = np.tanh(0.7978845608028654 * (x + 0.044715 * x**3))
    return 0.5 * (1 + h) + 0.5 * x * (1 - h * h) * 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)


class CuBLASLtError(Exception):
    def __init__(self, status: int) -> None:
        self.status = status
        super().__init__(f"CUBLAS_STATUS {status}")


class FakeCublasLt:
    """The module. ``algorithms`` are (splits, reduction scheme, workspace, seconds) of what the heuristics propose."""

    class MatmulDescAttribute(IntEnum):
        TRANSA, TRANSB, POINTER_MODE, EPILOGUE, BIAS_POINTER = 3, 4, 2, 7, 8
        EPILOGUE_AUX_POINTER, EPILOGUE_AUX_LD, FAST_ACCUM, BIAS_DATA_TYPE = 11, 12, 25, 26
        A_SCALE_POINTER, B_SCALE_POINTER, A_SCALE_MODE, B_SCALE_MODE = 17, 18, 31, 32

    class MatmulPreferenceAttribute(IntEnum):
        MAX_WORKSPACE_BYTES, REDUCTION_SCHEME_MASK = 1, 3
        MIN_ALIGNMENT_A_BYTES, MIN_ALIGNMENT_B_BYTES, MIN_ALIGNMENT_C_BYTES, MIN_ALIGNMENT_D_BYTES = 5, 6, 7, 8

    class Epilogue(IntEnum):
        DEFAULT, BIAS, GELU_AUX, GELU_AUX_BIAS, DGELU, BGRADB = 1, 4, 160, 164, 192, 512

    class MatmulAlgoConfigAttribute(IntEnum):
        SPLITK_NUM, REDUCTION_SCHEME = 2, 3

    class ReductionScheme(IntEnum):
        NONE, INPLACE, COMPUTE_TYPE, OUTPUT_TYPE = 0, 1, 2, 4

    class MatmulMatrixScale(IntEnum):
        SCALAR_32F, VEC16_UE4M3, VEC32_UE8M0, OUTER_VEC_32F, VEC128_32F, BLK128x128_32F = 0, 1, 2, 3, 4, 5

    class PointerMode(IntEnum):
        HOST, DEVICE = 0, 1

    cuBLASLtError = CuBLASLtError
    WIDTHS = {"TRANSA": 4, "TRANSB": 4, "POINTER_MODE": 4, "EPILOGUE": 4, "BIAS_POINTER": 8, "EPILOGUE_AUX_POINTER": 8,
              "EPILOGUE_AUX_LD": 8, "FAST_ACCUM": 1, "BIAS_DATA_TYPE": 4, "A_SCALE_POINTER": 8, "B_SCALE_POINTER": 8,
              "A_SCALE_MODE": 4, "B_SCALE_MODE": 4, "MAX_WORKSPACE_BYTES": 8, "REDUCTION_SCHEME_MASK": 4,
              "MIN_ALIGNMENT_A_BYTES": 4, "MIN_ALIGNMENT_B_BYTES": 4, "MIN_ALIGNMENT_C_BYTES": 4,
              "MIN_ALIGNMENT_D_BYTES": 4}  # fmt: skip

    def __init__(self, driver: Any, version: int = 130100, refuse: Any = lambda product: False) -> None:
        self.driver, self.version, self.refuse = driver, version, refuse
        self.objects: dict[int, dict[str, Any]] = {}
        self.algorithms = [(1, 0, 0), (4, 2, 4096), (4, 1, 64), (1, 0, 1 << 40)]
        self.calls: list[dict[str, Any]] = []
        self.heuristics = 0
        self.wishes: list[dict[str, Any]] = []  # preferences of each
        self.slow: dict[int, int] = {}  # algorithm -> empty calls that it costs beside its own: its time
        self._next = 1000

    # --- objects

    def _new(self, **values: Any) -> int:
        self._next += 1
        self.objects[self._next] = values
        return self._next

    def _delete(self, handle: int) -> None:
        del self.objects[handle]

    def create(self) -> int:
        return self._new(what="handle")

    def get_version(self) -> int:
        return self.version

    def matmul_desc_create(self, compute: int, scale: int) -> int:
        assert compute in (68, 77) and scale == R_32F
        return self._new(what="desc", compute=compute, TRANSA=0, TRANSB=0, EPILOGUE=1, POINTER_MODE=0, A_SCALE_MODE=0,
                         B_SCALE_MODE=0, A_SCALE_POINTER=0, B_SCALE_POINTER=0)  # fmt: skip

    def matrix_layout_create(self, type: int, rows: int, cols: int, ld: int) -> int:
        return self._new(what="layout", type=type, rows=rows, cols=cols, ld=ld)

    def matmul_preference_create(self) -> int:
        return self._new(what="preference", MIN_ALIGNMENT_A_BYTES=256, MIN_ALIGNMENT_B_BYTES=256,
                         MIN_ALIGNMENT_C_BYTES=256, MIN_ALIGNMENT_D_BYTES=256)  # fmt: skip

    destroy = matmul_desc_destroy = matrix_layout_destroy = matmul_preference_destroy = _delete

    def _set(self, handle: int, attribute: IntEnum, address: int, size: int) -> None:
        if size != self.WIDTHS[attribute.name]:
            raise CuBLASLtError(INVALID_VALUE)
        self.objects[handle][attribute.name] = int.from_bytes(ctypes.string_at(address, size), "little")

    def matmul_desc_set_attribute(self, handle: int, attribute: int, address: int, size: int) -> None:
        self._set(handle, self.MatmulDescAttribute(attribute), address, size)

    def matmul_preference_set_attribute(self, handle: int, attribute: int, address: int, size: int) -> None:
        self._set(handle, self.MatmulPreferenceAttribute(attribute), address, size)

    # --- algorithms: eight words, the first a magic number, then the index

    def _algorithm(self, address: int) -> tuple[int, int, int]:
        words = memory(address, 8, np.uint64)
        if words[0] != 0xA160 or words[1] >= len(self.algorithms):
            raise CuBLASLtError(INVALID_VALUE)
        return self.algorithms[int(words[1])]

    def matmul_algo_config_get_attribute(
        self, algorithm: int, attribute: int, to: int, size: int, written: int
    ) -> None:
        splits, scheme, _ = self._algorithm(algorithm)
        memory(to, 1, np.int32)[0] = {"SPLITK_NUM": splits, "REDUCTION_SCHEME": scheme}[
            self.MatmulAlgoConfigAttribute(attribute).name
        ]
        assert size == 4
        memory(written, 1, np.uint64)[0] = 4

    def matmul_algo_get_heuristic(
        self,
        handle: int,
        desc: int,
        a: int,
        b: int,
        c: int,
        d: int,
        preference: int,
        count: int,
        results: int,
        found: int,
    ) -> None:
        assert self.objects[handle]["what"] == "handle"
        self.heuristics += 1
        wishes = self.objects[preference]
        self.wishes.append(wishes)
        problem = self._problem(desc, a, b, c, d)
        for name, layout in zip("ABCD", (a, b, c, d), strict=True):
            if self.objects[layout]["type"] in NARROW and wishes[f"MIN_ALIGNMENT_{name}_BYTES"] < 16:
                raise CuBLASLtError(UNSUPPORTED)
        if self.refuse(problem):
            raise CuBLASLtError(UNSUPPORTED)
        rows = memory(results, count * 96, np.uint8).reshape(count, 96)
        n = min(count, len(self.algorithms))
        for i in range(n):
            rows[i].view(np.uint64)[:2] = 0xA160, i
            rows[i, 64:72].view(np.uint64)[0] = self.algorithms[i][2]
        memory(found, 1, np.int32)[0] = n

    def matmul_algo_check(
        self, handle: int, desc: int, a: int, b: int, c: int, d: int, algorithm: int, result: int
    ) -> None:
        if self.refuse(self._problem(desc, a, b, c, d)):
            raise CuBLASLtError(UNSUPPORTED)
        memory(result + 64, 1, np.uint64)[0] = self._algorithm(algorithm)[2]

    # --- what the documentation demands

    def _problem(self, desc: int, a: int, b: int, c: int, d: int) -> dict[str, Any]:
        """Everything about a product but its addresses; an error where the library has no such thing."""
        D = self.objects[desc]
        A, B, C, R = (self.objects[x] for x in (a, b, c, d))
        shape_a = (A["cols"], A["rows"]) if D["TRANSA"] else (A["rows"], A["cols"])
        shape_b = (B["cols"], B["rows"]) if D["TRANSB"] else (B["rows"], B["cols"])
        m, k, n = *shape_a, shape_b[1]
        good = shape_b[0] == k and (R["rows"], R["cols"]) == (m, n) and C == R
        good &= all(layout["ld"] >= layout["rows"] for layout in (A, B, R))
        if not good:
            raise CuBLASLtError(INVALID_VALUE)
        together = R["type"] in TOGETHER.get((A["type"], B["type"]), ())
        epilogue = self.Epilogue(D["EPILOGUE"]).name
        if epilogue in ("GELU_AUX", "GELU_AUX_BIAS", "DGELU"):
            aux = D.get("EPILOGUE_AUX_LD", 0)
            together &= aux % 8 == 0 and aux >= m and R["type"] == R_16BF and D.get("EPILOGUE_AUX_POINTER", 0) % 16 == 0
        if "BIAS" in epilogue:
            together &= D.get("BIAS_POINTER", 0) != 0
        if A["type"] in NARROW:
            elements = 16
            together &= (D["TRANSA"], D["TRANSB"]) == (1, 0) and all(
                x % elements == 0 for x in (m, n, k, A["ld"], B["ld"])
            )
            together &= D["A_SCALE_POINTER"] != 0 and D["B_SCALE_POINTER"] != 0
            modes = D["A_SCALE_MODE"], D["B_SCALE_MODE"]
            together &= modes in ((0, 0), (2, 2), (4, 4), (4, 5), (5, 4))  # never blocks twice, never mixed
            together &= "BIAS" not in epilogue or D.get("BIAS_DATA_TYPE") == R_16BF
        else:
            together &= not (D["A_SCALE_POINTER"] or D["B_SCALE_POINTER"])
        if not together:
            raise CuBLASLtError(UNSUPPORTED)
        return {**D, "m": m, "n": n, "k": k, "A": A, "B": B, "D": R, "epilogue": epilogue}

    # --- the product

    def matmul(
        self, handle: int, desc: int, alpha: int, a: int, adesc: int, b: int, bdesc: int, beta: int, c: int, cdesc: int,
        d: int, ddesc: int, algorithm: int, workspace: int, size: int, stream: Any,
    ) -> None:  # fmt: skip
        problem = self._problem(desc, adesc, bdesc, cdesc, ddesc)
        splits, _, need = self._algorithm(algorithm)
        if need > size or (need and not workspace) or self.refuse(problem):
            raise CuBLASLtError(UNSUPPORTED)
        index = int(memory(algorithm, 2, np.uint64)[1])

        def scalars() -> list[float]:
            return [float(memory(x, 1, np.float32)[0]) for x in (alpha, beta)]

        # Host scalars are read now; those on the device, when the stream gets there.
        numbers = scalars() if problem["POINTER_MODE"] == self.PointerMode.HOST else None
        self.calls.append({**problem, "algorithm": index, "workspace": workspace})
        at = SimpleNamespace(a=a, b=b, c=c, d=d)
        self.driver.call(lambda: self._multiply(problem, at, numbers or scalars(), splits), stream)
        for _ in range(self.slow.get(index, 0)):
            self.driver.call(lambda: None, stream)

    def _scales(self, problem: dict[str, Any], side: str) -> Array:
        """What each element [depth, row] of an operand is multiplied with, in the documented layout of each mode."""
        depth, rows = problem[side]["rows"], problem[side]["cols"]
        address, mode = problem[f"{side}_SCALE_POINTER"], self.MatmulMatrixScale(problem[f"{side}_SCALE_MODE"]).name
        k, row = np.ogrid[:depth, :rows]
        if mode == "SCALAR_32F":
            return memory(address, 1, np.float32)[0]
        if mode == "VEC128_32F":
            at = k // 128 * rows + row
        elif mode == "BLK128x128_32F":
            at = row // 128 * (-(-depth // 512) * 4) + k // 128
        else:
            assert mode == "VEC32_UE8M0"
            tiles, group = -(-depth // 128), k // 32
            at = (row // 128 * tiles + group // 4) * 512 + row % 32 * 16 + row // 32 % 4 * 4 + group % 4
            return 2.0 ** (memory(address, int(at.max()) + 1, np.uint8)[at].astype(np.float64) - 127)
        return memory(address, int(at.max()) + 1, np.float32)[at]

    def _multiply(self, problem: dict[str, Any], at: Any, scalars: list[float], splits: int) -> None:
        A, B, C, D = (columns(p, problem[n]) for p, n in ((at.a, "A"), (at.b, "B"), (at.c, "D"), (at.d, "D")))
        left, right = A.astype(np.float32), B.astype(np.float32)
        if problem["A"]["type"] in NARROW:  # [depth, rows], both
            left, right = left * self._scales(problem, "A"), right * self._scales(problem, "B")
        left = left.T if problem["TRANSA"] else left
        right = right.T if problem["TRANSB"] else right
        alpha, beta = scalars
        pieces = np.array_split(np.arange(problem["k"]), splits)
        sums = sum(left[:, p].astype(np.float64) @ right[p].astype(np.float64) for p in pieces)
        result = np.float64(alpha) * sums
        if beta:
            result = result + beta * C.astype(np.float64)
        epilogue, m = problem["epilogue"], problem["m"]
        if "BIAS" in epilogue:
            result = result + memory(problem["BIAS_POINTER"], m, D.dtype).astype(np.float64)[:, None]
        if "AUX" in epilogue or epilogue == "DGELU":
            layout = {**problem["D"], "ld": problem["EPILOGUE_AUX_LD"]}
            aux = columns(problem["EPILOGUE_AUX_POINTER"], layout)
            if epilogue == "DGELU":
                result = result * gelu_slope(aux.astype(np.float64))
            else:
                aux[...] = result.astype(np.float32).astype(aux.dtype)
                result = gelu(result)
        D[...] = result.astype(np.float32).astype(D.dtype)


# ---- cuDNN


class GraphNotSupportedError(RuntimeError):
    """cudnn.cudnnGraphNotSupportedError."""


class CudnnTensor:
    """A tensor of a graph: setters return it, as the real ones do."""

    def __init__(self, **values: Any) -> None:
        self.values: dict[str, Any] = {"uid": None, "output": False, **values}

    def _with(self, name: str, value: Any) -> CudnnTensor:
        self.values[name] = value
        return self

    def set_uid(self, uid: int) -> CudnnTensor:
        return self._with("uid", uid)

    def set_output(self, value: bool) -> CudnnTensor:
        return self._with("output", value)

    def set_dim(self, dim: list[int]) -> CudnnTensor:
        return self._with("dim", dim)

    def set_stride(self, stride: list[int]) -> CudnnTensor:
        return self._with("stride", stride)

    def set_data_type(self, kind: str) -> CudnnTensor:
        return self._with("data_type", kind)

    def at(self, address: int) -> Array:
        """The tensor's elements at an address, [b, heads, t, width], writable."""
        dim, stride = self.values["dim"], self.values["stride"]
        dtype = DTYPES[{"BFLOAT16": R_16BF, "FLOAT": R_32F}[self.values["data_type"]]]
        raw = memory(address, 1 + sum((n - 1) * s for n, s in zip(dim, stride, strict=True)), dtype).view(np.uint8)
        return np.ndarray(dim, dtype, raw, strides=[dtype.itemsize * s for s in stride])


class CudnnGraph:
    """One node, sdpa or sdpa_backward. Every step of building it must be taken, in order, before it is executed."""

    STEPS = ("validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans")

    def __init__(self, cudnn: FakeCudnn, **options: Any) -> None:
        self.cudnn, self.options = cudnn, options
        self.node, self.inputs, self.outputs, self.taken = {}, {}, {}, []
        assert options["handle"] in cudnn.handles and options["io_data_type"] == "BFLOAT16"
        assert options["compute_data_type"] == options["intermediate_data_type"] == "FLOAT"

    def __getattr__(self, name: str) -> Any:
        if name not in CudnnGraph.STEPS:
            raise AttributeError(name)
        return lambda *args: self._take(name, *args)

    def _take(self, step: str, *args: Any) -> None:
        assert self.STEPS[len(self.taken)] == step
        assert args == ((["A"],) if step == "create_execution_plans" else ())
        self.taken.append(step)
        if step == "validate":
            for tensor in (*self.inputs.values(), *self.outputs.values()):
                values = tensor.values
                assert values["uid"] is not None and len(values["dim"]) == len(values["stride"]) == 4
            assert all(tensor.values["output"] for tensor in self.outputs.values())
        if step == "check_support":
            self._support()

    def _support(self) -> None:
        q = self.inputs["q"].values["dim"]
        if q[3] % 8 or q[3] > self.cudnn.widest:
            raise GraphNotSupportedError(f"hidden_dim should be at most {self.cudnn.widest} and a multiple of 8.\nMore")
        if self.node["kind"] == "backward" and q[2] == 1:
            raise GraphNotSupportedError("s_q = s_kv = 1 is not supported.")

    def tensor(self, name: str, dim: list[int], stride: list[int], data_type: str) -> CudnnTensor:
        return CudnnTensor(name=name, dim=dim, stride=stride, data_type=data_type)

    def sdpa(
        self, q: CudnnTensor, k: CudnnTensor, v: CudnnTensor, attn_scale: float, generate_stats: bool,
        use_causal_mask: bool, name: str,
    ) -> tuple[CudnnTensor, CudnnTensor]:  # fmt: skip
        assert generate_stats and name
        self.node = {"kind": "forward", "scale": attn_scale, "causal": use_causal_mask}
        self.inputs, self.outputs = {"q": q, "k": k, "v": v}, {"o": CudnnTensor(), "stats": CudnnTensor()}
        return self.outputs["o"], self.outputs["stats"]

    def sdpa_backward(
        self, q: CudnnTensor, k: CudnnTensor, v: CudnnTensor, o: CudnnTensor, dO: CudnnTensor, stats: CudnnTensor,
        attn_scale: float, use_causal_mask: bool, use_deterministic_algorithm: bool, name: str,
    ) -> tuple[CudnnTensor, ...]:  # fmt: skip
        assert use_deterministic_algorithm and name
        self.node = {"kind": "backward", "scale": attn_scale, "causal": use_causal_mask}
        self.inputs = {"q": q, "k": k, "v": v, "o": o, "dO": dO, "stats": stats}
        self.outputs = {name: CudnnTensor() for name in ("dq", "dk", "dv")}
        return tuple(self.outputs.values())

    def get_workspace_size(self) -> int:
        return self.cudnn.workspaces[self.node["kind"]]

    def execute(self, pack: dict[int, int], workspace: int, handle: Any) -> None:
        assert tuple(self.taken) == self.STEPS and handle in self.cudnn.handles
        assert bool(workspace) == bool(self.get_workspace_size()) or self.cudnn.workspaces["backward"]
        tensors = {**self.inputs, **self.outputs}
        assert set(pack) == {tensor.values["uid"] for tensor in tensors.values()}
        at = {name: pack[tensor.values["uid"]] for name, tensor in tensors.items()}
        assert all(address % 16 == 0 for address in at.values())
        size, scratch = self.get_workspace_size(), workspace
        self.cudnn.executed.append(self.node["kind"])

        def work() -> None:
            if size:
                memory(scratch, size, np.uint8)[:] = 0xFF
            self._compute({name: tensor.at(at[name]) for name, tensor in tensors.items()})

        self.cudnn.driver.call(work, self.cudnn.handles[handle])

    def _compute(self, x: dict[str, Array]) -> None:
        q, k, v = (x[name].astype(np.float64) for name in "qkv")
        group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(a, group, axis=1) for a in (k, v))
        scores = self.node["scale"] * (q @ k.swapaxes(2, 3))
        if self.node["causal"]:
            scores[..., np.triu(np.ones(scores.shape[2:], dtype=bool), 1)] = -np.inf
        if self.node["kind"] == "forward":
            top = scores.max(axis=3, keepdims=True)
            lse = top + np.log(np.exp(scores - top).sum(axis=3, keepdims=True))
            x["stats"][...] = lse
            x["o"][...] = (np.exp(scores - lse) @ v).astype(np.float32).astype(x["o"].dtype)
            return
        p, do, o = np.exp(scores - x["stats"]), x["dO"].astype(np.float64), x["o"].astype(np.float64)
        ds = p * (do @ v.swapaxes(2, 3) - (do * o).sum(axis=3, keepdims=True)) * self.node["scale"]
        b, heads, t, d = x["k"].shape

        def shared(a: np.ndarray) -> np.ndarray:
            return a.reshape(b, heads, group, t, d).sum(axis=2)

        for name, value in (
            ("dq", ds @ k),
            ("dk", shared(ds.swapaxes(2, 3) @ q)),
            ("dv", shared(p.swapaxes(2, 3) @ do)),
        ):
            x[name][...] = value.astype(np.float32).astype(x[name].dtype)


class FakeCudnn:
    """The module. ``widest`` head that it takes; ``workspaces`` in bytes, forward and backward."""

    data_type = SimpleNamespace(BFLOAT16="BFLOAT16", FLOAT="FLOAT")
    heur_mode = SimpleNamespace(A="A")
    cudnnGraphNotSupportedError = GraphNotSupportedError

    def __init__(self, driver: Any, widest: int = 128, starts: bool = True) -> None:
        self.driver, self.widest, self.starts = driver, widest, starts
        self.workspaces = {"forward": 0, "backward": 4096}
        self.handles: dict[str, Any] = {}
        self.executed: list[str] = []
        self.graphs = 0

    def backend_version(self) -> int:
        return 92800

    def create_handle(self) -> str:
        if not self.starts:
            raise RuntimeError("cudnnHandle Create failed.\nIndeed")
        name = f"handle {len(self.handles)}"
        self.handles[name] = None
        return name

    def destroy_handle(self, handle: str) -> None:
        del self.handles[handle]

    def set_stream(self, handle: str, stream: Any) -> None:
        self.handles[handle] = stream

    def pygraph(self, **options: Any) -> CudnnGraph:
        self.graphs += 1
        return CudnnGraph(self, **options)
