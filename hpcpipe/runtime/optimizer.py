"""AdamW over the flat buffers: decay groups, a global gradient norm over all stages, clipping, the learning rate.

The update is recorded like any stage. The norm is exact to the last bit on every layout: each tensor's sum of squares
comes from one kernel on one rank, and the terms are added in the order of their names with math.fsum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from hpcpipe.backends.kernels import SIZES
from hpcpipe.backends.null import Call, Tensor
from hpcpipe.config import OptimizerConfig, TrainConfig
from hpcpipe.runtime.arena import HYPER, INDEX, Parameters
from hpcpipe.runtime.executor import Executor
from hpcpipe.runtime.share import Span, spans


def learning_rate(step: int, optimizer: OptimizerConfig, train: TrainConfig) -> float:
    """The rate of step 0, 1, …: linear warm-up, then cosine or warm-up-stable-decay (linear, decay_steps) to min_lr.

    Cosine: Loshchilov & Hutter 2017 (SGDR) without restarts. WSD: Hu et al. 2024 (MiniCPM).
    """
    if step < optimizer.warmup:
        return optimizer.lr * (step + 1) / optimizer.warmup
    if optimizer.schedule == "cosine":
        done = (step - optimizer.warmup) / max(1, train.steps - 1 - optimizer.warmup)
        return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = (train.steps - 1 - step) / max(1, optimizer.decay_steps)
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * min(1.0, left)


class AdamW:
    """The optimizer of one rank. ``names`` is the order of all owned parameters of the model, the same on all ranks.

    ``counted`` are those whose squares this rank tells (None: all but tied copies, which hold their owner's gradient):
    each name is told once, however many copies of the model there are. ``own`` is what it updates of each stage (None:
    all of it), and ``spread``, if that is a share, brings what the other copies have updated.
    """

    def __init__(
        self,
        executor: Executor,
        params: Parameters,
        config: OptimizerConfig,
        names: Sequence[str],
        counted: Collection[str] | None = None,
        own: Mapping[int, Span] | None = None,
        spread: Callable[[], None] | None = None,
    ) -> None:
        self.executor, self.config, self._spread = executor, config, spread
        own = own or spans(params, {})
        self.hyper = executor.array("SCALAR", 0, (HYPER,), "d")
        self._norms = self._compile(_norm_calls(params))
        half = executor.memory.resident["HALF"][1] > 0
        self._whole, self._try, self._keep = (
            self._compile(_update_calls(params, own, config.weight_decay, kernel, half and spread is None))
            for kernel in UPDATES
        )
        self._halve = self._compile(_halve_calls(params)) if half else lambda: None
        self._sums = executor.array("SCALAR", 8 * HYPER, (len(params.owned),), "d")
        mine = [n for n in params.owned if (n not in params.tied if counted is None else n in counted)]
        self._index = np.array([names.index(name) for name in mine], np.intp)
        self._mine = np.array([params.owned.index(name) for name in mine], np.intp)
        early = own.values() if executor.memory.resident["BEFORE"][1] else ()
        self._old = [
            (self._view("PARAM", first, end), self._view("BEFORE", at, at + end - first)) for first, end, at in early
        ]
        around = [(params.stage[stage], span) for stage, span in own.items()]
        others = [part for (start, _, stop), span in around for part in ((start, span.first), (span.end, stop))]
        self._others = [self._view("GRAD", first, end) for first, end in others if first < end]

    def squares(self, into: np.ndarray) -> None:
        """Writes Σ g² of this rank's own parameters to their places in ``into`` (float64, one per name)."""
        self._norms()
        into[self._index] = np.asarray(self._sums)[self._mine]

    def scale(self, squares: np.ndarray) -> tuple[float, float]:
        """The global gradient norm and the factor that clips it."""
        norm = math.sqrt(math.fsum(squares.tolist()))
        clip = self.config.clip
        return norm, clip / norm if 0 < clip < norm else 1.0

    def update(self, step: int, lr: float, scale: float) -> None:
        """p, m, v <- AdamW; the gradient is cleared. ``step`` counts from 0."""
        self._set(step, lr, scale)
        self._whole()
        self._clear_others()
        self._gather()

    # The same in two halves: the new values before the norm is known, on the guess that nothing is clipped; then, when
    # it is known, the rest, or everything back. Needs memory for the old values (region BEFORE).

    def guess(self, step: int, lr: float) -> None:
        """p <- AdamW as if nothing were clipped; moments and gradient stay."""
        self._set(step, lr, 1.0)
        self._try()
        self._gather()

    def keep(self) -> None:
        """The guess was right: m, v <- AdamW, the gradient is cleared. ``update`` is then done, bit for bit."""
        self._keep()
        self._clear_others()

    def take_back(self) -> None:
        """The guess was wrong: p is again what it was before it; of a share, what others own comes with the update."""
        for values, before in self._old:
            values[...] = before
        self._halve()

    def refresh(self) -> None:
        """The values have come from elsewhere: what is made of them, is made."""
        self._halve()

    def _gather(self) -> None:
        """After the update of a share: the others' shares, and what is made of all values."""
        if self._spread is not None:
            self._spread()
            self._halve()

    def _clear_others(self) -> None:
        """The gradient of what other copies update."""
        for part in self._others:
            part.fill(0)

    def _view(self, region: str, first: int, end: int) -> Any:
        return self.executor.array(region, self.executor.backend.real * first, (end - first,))

    def _set(self, step: int, lr: float, scale: float) -> None:
        c = self.config
        self.hyper[:] = (lr, c.beta1, c.beta2, c.eps, 1 - c.beta1 ** (step + 1), 1 - c.beta2 ** (step + 1), scale, 0)

    def _compile(self, placed: list[tuple[Call, dict[int, tuple[str, int]]]]) -> Callable[[], None]:
        """Prepares calls whose tensors carry unique numbers; places are (region, bytes or elements of r)."""
        executor, backend, real = self.executor, self.executor.backend, self.executor.backend.real
        where: dict[int, tuple[int, int]] = {}
        for call, places in placed:
            for tensor in call.buffers:
                if tensor is not None:
                    region, at = places[tensor.id]
                    where[tensor.id] = (INDEX[region], at * {"SCALAR": 1, "HALF": SIZES["h"]}.get(region, real))
        handle = backend.compile([call for call, _ in placed], lambda t: where[t.id])
        run: Callable[[], None] = backend.bound(handle, executor.arena, executor.bases(), executor.memory.work)
        return run


def _norm_calls(params: Parameters) -> list[tuple[Call, dict[int, tuple[str, int]]]]:
    calls = []
    for i, name in enumerate(params.owned):
        n = math.prod(params.shapes[name])
        s, x = Tensor(2 * i, (1,), "d"), Tensor(2 * i + 1, (n,))
        places = {s.id: ("SCALAR", 8 * (HYPER + i)), x.id: ("GRAD", params.grad[name])}
        calls.append((Call("sumsq", (s, x), (n,), ()), places))
    return calls


def _halve_calls(params: Parameters) -> list[tuple[Call, dict[int, tuple[str, int]]]]:
    half, values = Tensor(0, (params.size,), "h"), Tensor(1, (params.size,))
    return [(Call("halve", (half, values), (params.size,), ()), {0: ("HALF", 0), 1: ("PARAM", 0)})]


# Kernel -> its buffers; the first ones are regions.
UPDATES = {
    "adamw_step": ("PARAM", "GRAD", "MOMENT1", "MOMENT2", "HALF"),
    "adamw_try": ("BEFORE", "PARAM", "GRAD", "MOMENT1", "MOMENT2", "HALF"),
    "adamw_keep": ("GRAD", "MOMENT1", "MOMENT2"),
}
MOMENTS = ("MOMENT1", "MOMENT2", "BEFORE")  # regions that hold what is the rank's own


def _update_calls(
    params: Parameters, own: Mapping[int, Span], weight_decay: float, kernel: str, half: bool
) -> list[tuple[Call, dict[int, tuple[str, int]]]]:
    calls, regions = [], UPDATES[kernel]
    groups = [(*own[i], s, e, weight_decay) for i, (s, e, _) in params.stage.items()]
    groups += [(*own[i], e, t, 0.0) for i, (_, e, t) in params.stage.items()]
    cut = [(max(low, s), min(high, e), at - low, decay) for low, high, at, s, e, decay in groups]
    for i, (start, end, shift, decay) in enumerate(part for part in cut if part[0] < part[1]):
        n, first = end - start, (len(regions) + 1) * i
        hyper = Tensor(first + len(regions), (HYPER,), "d")
        flat = [
            None if region == "HALF" and not half else Tensor(first + j, (n,), "h" if region == "HALF" else "r")
            for j, region in enumerate(regions)
        ]
        buffers = (*flat, hyper)
        places = {first + j: (r, start + shift * (r in MOMENTS)) for j, r in enumerate(regions)}
        places[hyper.id] = ("SCALAR", 0)
        calls.append((Call(kernel, buffers, (n,), (decay,) if kernel != "adamw_keep" else ()), places))
    return calls
