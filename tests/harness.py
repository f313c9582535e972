"""Runs a recorded layer on a backend without the runtime: one arena, a place of its own for every tensor, no reuse.

``Rig(layer, x_shape)`` records, places and compiles; ``rig.run("F")`` runs a pass; views are live. Between the tensors
lie canaries, so a kernel that writes past its output is caught at the pass that does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from hpcpipe.backends.definitions import halve
from hpcpipe.backends.null import PASSES, Recording, Tensor, record
from hpcpipe.backends.reference import ReferenceBackend

CANARY = 64  # bytes before and after every tensor, and the alignment
PATTERN = 0xA5


class Rig:
    """A layer with memory. ``real`` values are random normal at first, inputs are zero; ``key`` says that it trains."""

    def __init__(
        self,
        layer: Any,
        x_shape: tuple[int, ...] | None = None,
        backend: Any = None,
        seed: int = 0,
        change: Callable[[Recording], Recording] = lambda recording: recording,
        compute: str = "r",
    ) -> None:
        self.backend, self.layer = ReferenceBackend("float64") if backend is None else backend, layer
        self.recording = change(record(layer, x_shape, compute=compute))
        sizes = {"r": self.backend.real, "h": 2, "i": 4, "l": 8, "d": 8}
        self.offsets: dict[int, int] = {}
        self.gaps: list[tuple[int, int]] = []
        top = 0
        for tensor in tensors(self.recording):
            end = top + CANARY + math.prod(tensor.shape) * sizes[tensor.type]
            self.offsets[tensor.id] = top + CANARY
            self.gaps += [(top, top + CANARY), (end, -(-end // CANARY) * CANARY)]
            top = -(-end // CANARY) * CANARY
        self.gaps.append((top, top + CANARY))
        self.work = top + CANARY
        calls = [call for name in PASSES for call in self.recording.passes[name]]
        work = max((c.scratch() for c in calls), default=0)
        self.arena = self.backend.allocate(self.work + -(-work // CANARY) * CANARY * self.backend.threads)
        self.bytes = self.backend.array(self.arena, 0, (self.work // 4,), "i").view(np.uint8)
        self.handles = {
            name: self.backend.compile(self.recording.passes[name], lambda t: (0, self.offsets[t.id]))
            for name in PASSES
        }
        for start, end in self.gaps:
            self.bytes[start:end] = PATTERN
        self._start(seed)

    def _start(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        r = self.recording
        for tensor in (*r.params.values(), r.x, r.dy):
            if tensor is not None:
                self[tensor][...] = rng.standard_normal(tensor.shape)
        if "key" in r.inputs:
            self["key"][3] = 1

    def __getitem__(self, key: Tensor | str) -> np.ndarray:
        """A live view: of a tensor, of x, y, dy, dx, of an input, or of a parameter by its name."""
        if isinstance(key, str):
            r = self.recording
            key = getattr(r, key) if key in ("x", "y", "dy", "dx") else {**r.params, **r.inputs}[key]
        return self.backend.array(self.arena, self.offsets[key.id], key.shape, key.type)

    def grad(self, name: str) -> np.ndarray:
        """A live view of a parameter's gradient."""
        return self[self.recording.grads[name]]

    def run(self, *passes: str) -> Rig:
        """Runs passes in order and checks the canaries after each."""
        for name, half in self.recording.halves.items():
            halve(self[half], np.asarray(self[self.recording.params[name]]))
        for name in passes or PASSES:
            self.backend.run(self.handles[name], self.arena, np.zeros(1, dtype=np.int64), self.work)
            for start, end in self.gaps:
                assert (self.bytes[start:end] == PATTERN).all(), f"pass {name} wrote outside its tensors"
        return self

    def clear(self) -> Rig:
        """Parameter gradients to zero."""
        for tensor in self.recording.grads.values():
            self[tensor][...] = 0
        return self

    def fill(self, values: Mapping[str, np.ndarray]) -> Rig:
        """Writes parameters and inputs by name."""
        for name, value in values.items():
            self[name][...] = value
        return self

    def objective(self) -> float:
        """What the gradients are of, after F: the loss, or Σ y dy for a layer that ends in an activation."""
        dy = self.recording.dy
        return float(self["y"][0] if dy is None else np.sum(self["y"] * self[dy], dtype=np.float64))


def tensors(recording: Recording) -> Iterator[Tensor]:
    """Every tensor of a recording once."""
    seen: dict[int, Tensor] = {}
    ends = (recording.x, recording.y, recording.dy, recording.dx)
    groups = (recording.params, recording.halves, recording.grads, recording.inputs)
    named = (*(t for group in groups for t in group.values()), *ends)
    called = (t for name in PASSES for call in recording.passes[name] for t in call.buffers)
    for tensor in (*named, *called):
        if tensor is not None:
            seen[tensor.id] = tensor
    return iter(seen.values())


def touched(recording: Recording, name: str) -> set[int]:
    """Ids of the tensors in a pass's calls."""
    return {t.id for call in recording.passes[name] for t in call.buffers if t is not None}


def check_gradients(rig: Rig, scale: float = 1.0, probes: int = 12, tolerance: float = 2e-8) -> None:
    """Central differences of ``scale`` x objective against dx and every parameter gradient, float64.

    For each tensor: one random direction over all elements, and ``probes`` single elements. At this step the truncation
    of the difference (step² and a third derivative) and its rounding (1e-16 f/step) are both near 1e-10.
    """
    rig.clear().run("F", "B", "W")
    r, step = rig.recording, 1e-5
    pairs = [(name, rig[name], rig.grad(name).copy()) for name in r.params]
    if r.x is not None:
        pairs.append(("x", rig["x"], rig["dx"].copy()))
    assert pairs
    rng = np.random.default_rng(1)
    for name, value, gradient in pairs:
        kept = value.copy()
        assert np.isfinite(gradient).all(), name
        size = max(1.0, float(np.linalg.norm(gradient)))
        directions = [rng.standard_normal(value.shape)]
        for index in rng.choice(value.size, min(probes, value.size), replace=False):
            directions.append(np.zeros(value.shape))
            directions[-1].flat[index] = 1.0
        for direction in directions:
            ends = []
            for sign in (1, -1):
                value[...] = kept + sign * step * direction
                ends.append(rig.run("F").objective())
            value[...] = kept
            slope = scale * (ends[0] - ends[1]) / (2 * step)
            error = abs(slope - float(np.sum(gradient * direction)))
            assert error < tolerance * size * max(1.0, float(np.linalg.norm(direction))), name
