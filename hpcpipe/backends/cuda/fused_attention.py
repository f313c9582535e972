"""Attention by cuDNN's fused kernels, where there are such for a shape; elsewhere it is left to our own kernels.

In: attention_fwd and attention_dx calls at their places. Out: steps, each one execution of a cuDNN graph whose plan was
made once per shape. cudnn, the Python frontend, is imported here and nowhere else.

qkv[n,(h+2k)d] needs no copies: q, k and v are its columns, seen as [b, heads, t, d] with strides (t row, d, row, 1) and
row = (h+2k)d. The statistics are log Σ exp of the scaled scores, natural logarithm, as the table's lse; cuDNN keeps
them as [b, h, t] where the table says [b, t, h]. Nobody reads lse but attention_dx, so cuDNN either does both passes of
a shape or none of them. dq is summed without atomics (``use_deterministic_algorithm``), or the shape is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpcpipe.backends.cuda.driver import Driver
from hpcpipe.backends.cuda.launch import Site

LIMIT = 1 << 30  # bytes of workspace at most: partial sums of dq grow with the sequence
WIDTH, WIDEST = 8, 256  # heads are multiples of this; how wide they may be depends on the device, and cuDNN says it
ALIGNMENT = 16  # bytes, of every tensor
# Names of tensors by number, which is how an execution is told their addresses.
UIDS = {name: uid for uid, name in enumerate(("q", "k", "v", "y", "lse", "dy", "dq", "dk", "dv"), 1)}
BFLOAT16, SINGLE = 2, 4  # bytes


class Shape(NamedTuple):
    """b sequences of t tokens, h query heads and k key/value heads of d channels."""

    b: int
    t: int
    h: int
    k: int
    d: int

    @property
    def row(self) -> int:
        """Elements of a token's qkv."""
        return (self.h + 2 * self.k) * self.d

    def __str__(self) -> str:
        return f"{self.b} x {self.t} tokens, {self.h} heads on {self.k}, {self.d} wide"


class Tensor(NamedTuple):
    """Sizes [b, heads, t, width] and strides, in elements, of one of cuDNN's tensors."""

    size: tuple[int, int, int, int]
    stride: tuple[int, int, int, int]


class Plans(NamedTuple):
    """The built graphs of both passes of a shape, and the bytes of workspace that they need."""

    forward: Any
    backward: Any
    workspace: int


def load() -> tuple[Any | None, str]:
    """The frontend, or None and why there is none."""
    try:
        import cudnn  # type: ignore[import-not-found,unused-ignore]

        cudnn.backend_version()
    except ImportError:
        return None, "the package nvidia-cudnn-frontend is not installed"
    except (RuntimeError, OSError) as error:
        return None, f"cuDNN itself could not be loaded ({_sentence(error)})"
    return cudnn, ""


def tensors(shape: Shape) -> dict[str, Tensor]:
    """How the table's buffers look to cuDNN."""
    b, t, h, k, d = shape
    queries = Tensor((b, h, t, d), (t * shape.row, d, shape.row, 1))
    keys = queries._replace(size=(b, k, t, d))
    rows = Tensor((b, h, t, d), (t * h * d, d, h * d, 1))
    statistics = Tensor((b, h, t, 1), (h * t, t, 1, 1))
    found = {"q": queries, "k": keys, "v": keys, "y": rows, "dy": rows, "lse": statistics}
    return found | {"dq": queries, "dk": keys, "dv": keys}


def addresses(site: Site) -> dict[str, int]:
    """Where each tensor of a call starts."""
    size, at = site.size, site.at
    past_q, past_k = (BFLOAT16 * heads * size["d"] for heads in (size["h"], size["h"] + size["k"]))
    found = {name: at[name] for name in ("y", "lse", "dy") if name in at}
    for prefix, base in (("", at["qkv"]), ("d", at.get("dqkv", 0))):
        if base:
            found |= {f"{prefix}q": base, f"{prefix}k": base + past_q, f"{prefix}v": base + past_k}
    return found


class FusedAttention:
    """cuDNN for a backend: ``take`` says whether it does the next call, and how.

    ``cudnn`` is the frontend's module, or None with a ``reason`` (see ``load``); ``limit`` bounds the workspace.
    """

    def __init__(self, driver: Driver, cudnn: Any | None, reason: str = "", limit: int = LIMIT) -> None:
        self.driver, self.limit = driver, limit
        self.cudnn: Any = cudnn  # None where there is none
        self.handle = None
        self._plans: dict[Shape, Plans | None] = {}
        self._lines: list[str] = [f"attention: our own kernels; {reason}"] if cudnn is None else []
        self._rooms: list[tuple[int, int]] = []  # (bytes, address) of workspace, the largest last
        if cudnn is not None:
            try:
                self.handle = cudnn.create_handle()
            except RuntimeError as error:
                self.cudnn = None
                self._lines.append(f"attention: our own kernels; cuDNN does not start here ({_sentence(error)})")

    def take(self, sites: Sequence[Site]) -> tuple[int, Sequence[AttentionStep]] | None:
        """One step for the first call; None where it is not attention or cuDNN does not do its shape."""
        site = sites[0]
        if site.call.kernel not in ("attention_fwd", "attention_dx") or not site.half or self.cudnn is None:
            return None
        size, at = site.size, addresses(site)
        shape = Shape(size["n"] // size["t"], *(size[name] for name in "thkd"))
        if shape not in self._plans:
            self._plans[shape] = self._build(shape)
        plans = self._plans[shape]
        if plans is None:
            return None
        if odd := [name for name, address in at.items() if address % ALIGNMENT]:
            raise ValueError(f"attention: {', '.join(odd)} are not aligned to {ALIGNMENT} bytes")
        graph = plans.forward if site.call.kernel == "attention_fwd" else plans.backward
        return 1, [AttentionStep(self.cudnn, self.handle, graph, at, self._room(plans.workspace))]

    def chosen(self) -> Sequence[str]:
        """Which shapes cuDNN does and which not, and why, in lines for the banner."""
        return list(self._lines)

    def close(self) -> None:
        """Gives workspace and handle back; no graph with these steps may run after it."""
        self._plans.clear()
        for _, address in self._rooms:
            self.driver.release(address)
        self._rooms.clear()
        if self.cudnn is not None and self.handle is not None:
            self.cudnn.destroy_handle(self.handle)
            self.handle = None

    # --- plans

    def _build(self, shape: Shape) -> Plans | None:
        """The plans of both passes; None, with a line that says why, where one of them is not to be had."""
        if shape.d % WIDTH or shape.d > WIDEST:
            refusal = f"heads must be multiples of {WIDTH} channels, at most {WIDEST}"
        else:
            try:
                return self._built(shape)
            except (self.cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError, NotImplementedError) as error:
                refusal = _sentence(error)
        self._lines.append(f"attention: our own kernels for {shape}; cuDNN refuses ({refusal})")
        return None

    def _built(self, shape: Shape) -> Plans:
        forward, backward = self._finished(self._forward(shape)), self._finished(self._backward(shape))
        workspace = max(int(graph.get_workspace_size()) for graph in (forward, backward))
        if workspace > self.limit:
            raise ValueError(f"its workspace of {workspace / 2**20:.0f} MiB is more than {self.limit / 2**20:.0f} MiB")
        version = self.cudnn.backend_version()
        self._lines.append(f"attention: cuDNN {version} for {shape}; {workspace / 2**20:.1f} MiB of workspace")
        return Plans(forward, backward, workspace)

    def _graph(self, shape: Shape, names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
        """An empty graph with the inputs of these names."""
        cudnn, layout = self.cudnn, tensors(shape)
        types = cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )
        inputs = {}
        for name in names:
            size, stride = layout[name]
            kind = types.FLOAT if name == "lse" else types.BFLOAT16
            inputs[name] = graph.tensor(name=name, dim=list(size), stride=list(stride), data_type=kind)
            inputs[name].set_uid(UIDS[name])
        return graph, inputs

    def _outputs(self, shape: Shape, found: Mapping[str, Any]) -> None:
        types = self.cudnn.data_type
        for name, tensor in found.items():
            size, stride = tensors(shape)[name]
            tensor.set_output(True).set_dim(list(size)).set_stride(list(stride)).set_uid(UIDS[name])
            tensor.set_data_type(types.FLOAT if name == "lse" else types.BFLOAT16)

    def _forward(self, shape: Shape) -> Any:
        graph, inputs = self._graph(shape, ("q", "k", "v"))
        y, lse = graph.sdpa(
            **inputs, attn_scale=1 / math.sqrt(shape.d), generate_stats=True, use_causal_mask=True, name="attention_fwd"
        )
        self._outputs(shape, {"y": y, "lse": lse})
        return graph

    def _backward(self, shape: Shape) -> Any:
        graph, inputs = self._graph(shape, ("q", "k", "v", "y", "dy", "lse"))
        q, k, v, y, dy, lse = inputs.values()
        dq, dk, dv = graph.sdpa_backward(
            q=q, k=k, v=v, o=y, dO=dy, stats=lse, attn_scale=1 / math.sqrt(shape.d), use_causal_mask=True,
            use_deterministic_algorithm=True, name="attention_dx",
        )  # fmt: skip
        self._outputs(shape, {"dq": dq, "dk": dk, "dv": dv})
        return graph

    def _finished(self, graph: Any) -> Any:
        """A graph with the plan that cuDNN's heuristics put first."""
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        if getattr(graph, "selected_engine", None) is not None:
            raise ValueError("the frontend offers a kernel in Python only")  # made at run time, by other packages
        return graph

    def _room(self, nbytes: int) -> int:
        """The address of workspace. Steps run one after the other and share it; what was given stays valid."""
        if not nbytes:
            return 0
        if not self._rooms or self._rooms[-1][0] < nbytes:
            self._rooms.append((nbytes, self.driver.allocate(nbytes)))
        return self._rooms[-1][1]


class AttentionStep:
    """One pass of attention at its place: ``enqueue`` executes a built graph, in a capture too."""

    def __init__(self, cudnn: Any, handle: Any, graph: Any, at: Mapping[str, int], workspace: int) -> None:
        self.cudnn, self.handle, self.graph, self.workspace = cudnn, handle, graph, workspace
        self.pack = {UIDS[name]: address for name, address in at.items()}

    def enqueue(self, stream: Any) -> None:
        self.cudnn.set_stream(handle=self.handle, stream=getattr(stream, "ptr", stream))
        self.graph.execute(self.pack, self.workspace, handle=self.handle)


def _sentence(error: BaseException) -> str:
    """The first line of a message, without its end."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")
