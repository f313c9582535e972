"""What one slot of the chain (embed, a layer, head) costs and holds: what the cut weighs. Layers are alike: one stands
for all. Prices come from the roofline, or from whoever ran the recordings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hpcpipe import model
from hpcpipe.backends.kernels import SIZES
from hpcpipe.backends.null import Recording, halved, record, together
from hpcpipe.config import Config
from hpcpipe.layers.loss import BLOCK
from hpcpipe.planner.costs import Cost, Device, price
from hpcpipe.runtime.arena import size_of
from hpcpipe.schedule.op import Schedule

WHOLE, MOMENTS = 2, 2  # values and gradients, which every copy of the model has; moments, which copies may divide
ON_DEVICE = 1 << 27  # logits that a GPU makes at once: its products want thousands of tokens, and it has the memory


class Slot(NamedTuple):
    """One kind of slot, recorded alone."""

    layer: Any
    recording: Recording

    def held(self, real: int) -> int:
        """Bytes of one microbatch from its F to its W."""
        seen = {t.id: t for calls in self.recording.passes.values() for c in calls for t in c.buffers if t is not None}
        kept = (seen[i] for i, (first, last) in self.recording.lifetimes.items() if first == "F" and last != "F")
        return sum(size_of(t, real) for t in kept if not self._given(t.id))

    def state(self, real: int, shards: int = 1) -> int:
        """Bytes of parameters, gradients and moments, and of the bfloat16 copies that products read.

        ``shards`` ranks divide the moments.
        """
        elements = sum(int(math.prod(spec.shape)) for spec in self.layer.params.values())
        own = real * (WHOLE * elements + -(-MOMENTS * elements // shards))
        return own + sum(size_of(t, real) for t in self.recording.halves.values())

    def _given(self, tensor: int) -> bool:
        r = self.recording
        return any(tensor == t.id for group in (r.params, r.halves, r.grads, r.inputs) for t in group.values())


def chain(config: Config) -> Any:
    """The whole model of a resolved config."""
    train, at_once = config.train, ON_DEVICE if config.device.backend == "cuda" else BLOCK
    return model.chain(
        config.model, train.microbatch, train.length, scale=1 / (train.batch * train.length), recompute=train.recompute,
        at_once=at_once,
    )  # fmt: skip


def kind(name: str) -> str:
    """``layer.7`` is a layer."""
    return "layer" if name.startswith("layer.") else name


def alone(config: Config, whole: Any) -> dict[str, Slot]:
    """The kinds of slots, each recorded as a stage of its own."""
    shape, names = activation(config), list(whole.children)
    found: dict[str, Slot] = {}
    for i, name in enumerate(names):
        if kind(name) not in found:
            edges = [edge for edge in (0, i, i + 1, len(names)) if edge in (i, i + 1) or 0 < i < len(names) - 1]
            layer = model.cut(whole, sorted({0, *edges, len(names)}))[min(i, 1)]
            found[kind(name)] = Slot(layer, recorded(config, layer, shape if i else None))
    return found


def recorded(config: Config, layer: Any, shape: tuple[int, ...] | None, merged: bool = False) -> Recording:
    """A stage as it will run: ``shape`` of what enters it, None for the loader's; ``merged`` does W within B."""
    recording = record(layer, shape, compute=compute(config))
    recording = together(recording) if merged else recording
    return halved(recording) if config.train.activations == "bfloat16" else recording


def compute(config: Config) -> str:
    """The type that kernels compute on: r, or h for bfloat16."""
    return "r" if config.train.compute == "float32" else "h"


def activation(config: Config) -> tuple[int, int]:
    """Tokens and channels of what goes from slot to slot."""
    return config.train.microbatch * config.train.length, config.model.width


def message(config: Config, real: int) -> int:
    """Bytes of what goes from slot to slot."""
    return math.prod(activation(config)) * {**SIZES, "r": real}[compute(config)]


def roofline(slots: Mapping[str, Slot], device: Device) -> dict[str, Cost]:
    """What the kinds cost on a device."""
    return {name: price(slot.recording, device) for name, slot in slots.items()}


def in_flight(schedule: Schedule) -> list[int]:
    """Of every stage: the most microbatches it holds at once from F to W."""
    most, now = [0] * schedule.stages, [0] * schedule.stages
    for row in schedule.rows:
        for op in row:
            now[op.stage] += (op.kind == "F") - (op.kind == "W")
            most[op.stage] = max(most[op.stage], now[op.stage])
    return most


def sums(names: Sequence[str], by_kind: Mapping[str, float]) -> list[float]:
    """Running sums over the slots, from 0."""
    total = [0.0]
    for name in names:
        total.append(total[-1] + by_kind[kind(name)])
    return total
