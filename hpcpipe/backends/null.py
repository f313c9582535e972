"""The null backend: runs a stage's three passes on shapes only and keeps what was called.

The result, a ``Recording``, is a flat list of kernel calls on numbered tensors per pass. The planner prices it, the
arena is laid out from it, and the fast backends execute it: Python is never in the hot loop. A layer sees only ``ops``:
every kernel of the table as a method, plus ``ops.input`` for what the data loader provides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Any, Literal, NamedTuple

from hpcpipe.backends.kernels import BY_NAME, MOVES, SIZES, Arg, Kernel, bind, evaluate, shape_of

Pass = Literal["F", "B", "W"]
PASSES: tuple[Pass, ...] = ("F", "B", "W")


class Tensor(NamedTuple):
    """A numbered shape. ``type`` is r (the backend's real type), h (bfloat16), i (int32), l (int64) or d (float64)."""

    id: int
    shape: tuple[int, ...]
    type: str = "r"


class Call(NamedTuple):
    """One kernel call: buffers in table order (None for an absent optional), then dims and ints, then reals."""

    kernel: str
    buffers: tuple[Tensor | None, ...]
    ints: tuple[int, ...]
    reals: tuple[float, ...]

    @property
    def row(self) -> Kernel:
        return BY_NAME[self.kernel]

    @property
    def env(self) -> dict[str, int]:
        """The bound dimension letters and integers."""
        return dict(zip(self.row.dims + self.row.ints, self.ints, strict=True))

    @property
    def flops(self) -> float:
        return self.row.flops(self.env)

    @property
    def nbytes(self) -> int:
        """Bytes that must move once: outputs and inputs once each, in-out arguments twice."""
        pairs = zip(self.row.buffers, self.buffers, strict=True)
        return sum(MOVES[arg.role] * SIZES[t.type] * math.prod(t.shape) for arg, t in pairs if t is not None)

    def scratch(self, on_device: bool = False) -> int:
        """Bytes of scratch: per thread, or in all on a GPU."""
        expression = self.row.device if on_device else self.row.work
        return evaluate(expression, self.env) if expression else 0


@dataclass(frozen=True)
class Recording:
    """One stage, recorded. ``x``/``dx`` are None where no activation enters, ``dy`` where none is sent back to it.

    ``y`` of a stage that ends in a loss is that loss, a float64 of shape (1,). ``halves`` are the bfloat16 copies of
    parameters that the passes read, by the parameters' names.
    """

    passes: dict[str, tuple[Call, ...]]
    params: dict[str, Tensor]
    grads: dict[str, Tensor]
    inputs: dict[str, Tensor]
    x: Tensor | None
    y: Tensor
    dy: Tensor | None
    dx: Tensor | None
    halves: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def lifetimes(self) -> dict[int, tuple[Pass, Pass]]:
        """Tensor id -> (first pass, last pass) that touches it, for every tensor in any call."""
        spans: dict[int, tuple[Pass, Pass]] = {}
        for name in PASSES:
            for call in self.passes[name]:
                for tensor in call.buffers:
                    if tensor is not None:
                        spans[tensor.id] = (spans.get(tensor.id, (name, name))[0], name)
        return spans

    def flops(self, name: str) -> float:
        """Floating-point operations of one pass over one microbatch."""
        return sum(call.flops for call in self.passes[name])

    def nbytes(self, name: str) -> int:
        """Bytes that one pass moves at least, each call's buffers counted once."""
        return sum(call.nbytes for call in self.passes[name])


@dataclass
class Recorder:
    """The ``ops`` that layers are called with: each kernel of the table is a method that returns its outputs.

    ``compute`` is the type of what the table calls "a": r, or h, and then products read bfloat16 copies of parameters.
    """

    compute: str = "r"
    calls: list[Call] = field(default_factory=list)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)  # parameter -> its gradient
    halves: dict[int, Tensor] = field(default_factory=dict)  # parameter -> its bfloat16 copy
    count: int = 0

    def tensor(self, shape: tuple[int, ...], type: str = "r") -> Tensor:
        """A fresh tensor that nothing has written yet."""
        self.count += 1
        return Tensor(self.count - 1, tuple(int(s) for s in shape), type)

    def input(self, name: str, shape: tuple[int, ...], type: str) -> Tensor:
        """What the loader provides per microbatch under this name; asking again gives the same tensor."""
        if name not in self.inputs:
            self.inputs[name] = self.tensor(shape, type)
        return self.inputs[name]

    def gradient(self, parameter: Tensor) -> Tensor:
        """What a parameter's gradient is accumulated in."""
        return self.gradients[parameter.id]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in BY_NAME:
            raise AttributeError(f"no kernel is called {name!r}")
        return lambda *args, **scalars: self._call(BY_NAME[name], args, scalars)

    def _call(self, row: Kernel, args: tuple[Tensor | None, ...], scalars: Mapping[str, float]) -> Any:
        missing = row.ins[len(args) :]
        if len(args) > len(row.ins) or not all(arg.optional for arg in missing):
            raise TypeError(f"{row.name} takes {len(row.ins)} buffers, got {len(args)}")
        args = tuple(map(self._typed, row.ins, args + (None,) * len(missing)))
        shapes = {a.name: None if t is None else t.shape for a, t in zip(row.ins, args, strict=True)}
        env = bind(row, shapes, {k: int(scalars[k]) for k in row.ints})
        outs = tuple(self.tensor(shape_of(a, env), self.compute if a.type == "a" else a.type) for a in row.outs)
        ints = tuple(env[k] for k in row.dims + row.ints)
        self.calls.append(Call(row.name, outs + args, ints, tuple(float(scalars[k]) for k in row.reals)))
        return outs[0] if len(outs) == 1 else outs or None

    def _typed(self, arg: Arg, tensor: Tensor | None) -> Tensor | None:
        """What a kernel gets for a tensor: for a parameter, where it computes on halves, the copy."""
        wanted = self.compute if arg.type == "a" else arg.type
        if tensor is None or tensor.type == wanted:
            return tensor
        if wanted != "h" or tensor.id not in self.gradients:
            raise TypeError(f"{arg.name} is of type {tensor.type}, the kernel takes {wanted}")
        if tensor.id not in self.halves:
            self.halves[tensor.id] = self.tensor(tensor.shape, "h")
        return self.halves[tensor.id]

    def take(self) -> tuple[Call, ...]:
        """The calls since the last take."""
        taken, self.calls = tuple(self.calls), []
        return taken


def record(
    layer: Any,
    x_shape: tuple[int, ...] | None,
    backward: bool = True,
    compute: str = "r",
) -> Recording:
    """Runs ``layer`` (a stage) forward, grad_input and grad_weight on nothing.

    ``x_shape`` is None for a stage that starts from loader inputs. A stage whose output is a float64 of shape (1,) ends
    in a loss and receives no gradient. ``backward=False`` records the forward pass only. ``compute`` is r or h.
    """
    ops = Recorder(compute)
    params = {name: ops.tensor(spec.shape) for name, spec in layer.params.items()}
    grads = {name: ops.tensor(t.shape) for name, t in params.items()} if backward else {}
    ops.gradients = {params[name].id: t for name, t in grads.items()}
    x = None if x_shape is None else ops.tensor(x_shape, compute)
    y, saved = layer.forward(ops, params, x)
    passes, dx, dy = {"F": ops.take(), "B": (), "W": ()}, None, None
    if backward:
        dy = None if y.type == "d" else ops.tensor(y.shape, compute)
        dx, owed = layer.grad_input(ops, params, dy, saved)
        passes["B"] = ops.take()
        layer.grad_weight(ops, grads, owed)
        passes["W"] = ops.take()
    halves = {name: ops.halves[t.id] for name, t in params.items() if t.id in ops.halves}
    return Recording(_fused(_live(passes, y, dx)), params, grads, dict(ops.inputs), x, y, dy, dx, halves)


def _live(passes: Mapping[str, tuple[Call, ...]], *results: Tensor | None) -> dict[str, tuple[Call, ...]]:
    """The passes without calls whose outputs nobody reads: a layer that runs forward again need not run to its end."""
    read = {tensor.id for tensor in results if tensor is not None}
    kept: dict[str, tuple[Call, ...]] = {}
    for name in reversed(PASSES):
        calls = []
        for call in reversed(passes[name]):
            outs = call.buffers[: len(call.row.outs)]
            changes = any(arg.role == "inout" for arg in call.row.ins)
            if changes or any(tensor is not None and tensor.id in read for tensor in outs):
                read |= {tensor.id for tensor in call.buffers if tensor is not None}
                calls.append(call)
        kept[name] = tuple(reversed(calls))
    return {name: kept[name] for name in PASSES}


FUSED = ("linear_fwd", "layernorm_dx", "rmsnorm_dx")  # kernels whose last argument is what comes around them


def _fused(passes: Mapping[str, tuple[Call, ...]]) -> dict[str, tuple[Call, ...]]:
    """The passes with each sum of two paths done by the kernel that ends one of them, where nobody else reads it."""
    reads = Counter(t.id for calls in passes.values() for call in calls for t in call.buffers if t is not None)
    found: dict[str, tuple[Call, ...]] = {}
    for name, calls in passes.items():
        kept: list[Call] = []
        for call in calls:
            before = kept[-1] if kept else None
            if call.kernel == "add_fwd" and before and before.kernel in FUSED and before.buffers[-1] is None:
                out, *terms = call.buffers
                made = before.buffers[0]
                if made in terms and made is not None and reads[made.id] == 2:  # by its maker and by this sum
                    (around,) = [t for t in terms if t != made]
                    kept[-1] = before._replace(buffers=(out, *before.buffers[1:-1], around))
                    continue
            kept.append(call)
        found[name] = tuple(kept)
    return found


def together(recording: Recording) -> Recording:
    """B and W as one pass, each call of W right after the last of B that it needs: what W alone needs lives shortly.

    For a stage whose B is followed by its W and that sends no gradient on in between; W is empty then. The same calls
    on the same numbers, so the same bits.
    """
    first, later = recording.passes["B"], recording.passes["W"]
    made = {
        t.id: i
        for i, call in enumerate(first)
        for t, arg in zip(call.buffers, call.row.buffers, strict=True)
        if t is not None and arg.role != "in"
    }
    ready: list[list[Call]] = [[] for _ in range(len(first) + 1)]
    for call in later:
        ready[1 + max((made.get(t.id, -1) for t in call.buffers if t is not None), default=-1)].append(call)
    both = [*ready[0], *(c for call, after in zip(first, ready[1:], strict=True) for c in (call, *after))]
    return replace(recording, passes={"F": recording.passes["F"], "B": tuple(both), "W": ()})


def halved(recording: Recording) -> Recording:
    """What F makes for B and W kept as bfloat16: rounded where it is made, so that all read the same numbers.

    For matrices, the stage's input among them; a row's statistics, which exponents are taken of, and gradients stay as
    they are. A decision about one tensor looks at nothing but its own call, so every layout rounds the same.
    """
    fixed = {t.id for group in (recording.params, recording.grads, recording.inputs) for t in group.values()}
    fixed |= {t.id for t in (recording.y, recording.dy, recording.dx) if t is not None}
    made = {} if recording.x is None else {recording.x.id: (-1, recording.x)}  # tensor -> its last writer in F
    for i, call in enumerate(recording.passes["F"]):
        for t, arg in zip(call.buffers, call.row.buffers, strict=True):
            if t is not None and (t.id in made or (arg.name, arg.role) == ("y", "out")) and arg.role != "in":
                made[t.id] = (i, t)
    later = {t.id for name in ("B", "W") for c in recording.passes[name] for t in c.buffers if t is not None}
    kept = {i: t for i, (_, t) in made.items() if i in later - fixed and len(t.shape) == 2}
    ids = count(1 + max(max(recording.lifetimes), *fixed))
    half = {i: Tensor(next(ids), t.shape, "h") for i, t in kept.items()}
    after: dict[int, list[Call]] = {}
    for i, t in kept.items():
        after.setdefault(made[i][0], []).append(Call("narrow", (half[i], t), t.shape, ()))
    F = [*after.get(-1, [])]
    for i, call in enumerate(recording.passes["F"]):
        F += [call, *after.get(i, [])]
    passes = {"F": tuple(F)}
    for name in ("B", "W"):
        whole: dict[int, Tensor] = {}
        calls: list[Call] = []
        for call in recording.passes[name]:
            for t in call.buffers:
                if t is not None and t.id in kept and t.id not in whole:
                    whole[t.id] = Tensor(next(ids), t.shape)
                    calls.append(Call("widen", (whole[t.id], half[t.id]), t.shape, ()))
            buffers = tuple(None if t is None else whole.get(t.id, t) for t in call.buffers)
            calls.append(call._replace(buffers=buffers))
        passes[name] = tuple(calls)
    return replace(recording, passes=passes)
