"""The arena: one allocation per rank, and where every tensor lies in it, known before step 0.

In: the recordings of a rank's stages and the slot counts of its program. Out: ``Memory``, a table of offsets whose
total is exactly what is allocated. A tensor's address is arena + base of its region + offset; the base depends on the
microbatch slot, so one recorded pass serves every microbatch and nothing is allocated, or looked up by name, while
training runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpcpipe.backends.kernels import BY_NAME, SIZES, evaluate
from hpcpipe.backends.null import PASSES, Call, Recording, Tensor
from hpcpipe.schedule.op import Kind
from hpcpipe.schedule.program import POOLS, Lifetimes

RESIDENT = ("PARAM", "GRAD", "MOMENT1", "MOMENT2", "BEFORE", "HALF", "SCALAR", "INPUT", "CURRENT", "TEMP", "SCRATCH")
OPTIONAL = ("BEFORE", "HALF", "CURRENT")  # regions that not every run has
REGIONS = (*RESIDENT, *POOLS)
INDEX = {name: i for i, name in enumerate(REGIONS)}
ALIGN = 64  # bytes: a cache line, and the widest vector register
HYPER = 8  # float64 scalars of the optimizer, at the start of SCALAR
Inputs = dict[tuple[int, str], tuple[int, Tensor]]  # (copy, loader input) -> (offset within a microbatch, tensor)
BUCKET = 1 << 20  # elements of SCRATCH at most: the unit of a data-parallel or tied-embedding exchange


def align(n: int, to: int = ALIGN) -> int:
    """n rounded up to a multiple of ``to``."""
    return -(-n // to) * to


def size_of(tensor: Tensor, real: int) -> int:
    """Bytes of a tensor, padded to the alignment."""
    return align(math.prod(tensor.shape) * {**SIZES, "r": real}[tensor.type])


@dataclass(frozen=True)
class Parameters:
    """The flat parameter buffer of a rank: offsets in elements, stage by stage, decayed tensors first within each.

    ``tied`` maps a copy to its owner. A copy on its owner's rank shares the owner's values and moments; its gradient is
    always its own, so that both gradients are summed in one fixed order on every layout.
    """

    shapes: dict[str, tuple[int, ...]]
    param: dict[str, int]
    grad: dict[str, int]
    decay: dict[str, bool]
    stage: dict[int, tuple[int, int, int]]  # stage -> start, end of the decayed ones, end (elements, in both buffers)
    tied: dict[str, str]  # the copies on this rank
    ties: dict[str, str]  # all of the model's
    size: int  # elements of PARAM
    grad_size: int
    shards: int = 1  # ranks that divide the moments of a stage among them

    @property
    def moments(self) -> int:
        """Elements of each moment on this rank."""
        return self.size // self.shards

    @property
    def owned(self) -> list[str]:
        """Names with values of their own on this rank."""
        return [name for name in self.param if self.tied.get(name) not in self.param]


def parameters(stages: Mapping[int, object], ties: Mapping[str, str], replicas: int, shard: bool = False) -> Parameters:
    """Lays the parameters of a rank's stages (index -> layer) out; a stage's share is a multiple of 16 x replicas.

    ``shard``: the replicas divide the moments.
    """
    shapes, param, grad, decay, spans = {}, {}, {}, {}, {}
    names = {name for layer in stages.values() for name in layer.params}  # type: ignore[attr-defined]
    tied = {copy: owner for copy, owner in ties.items() if copy in names}
    at = 0
    for index, layer in stages.items():
        start, edge = at, at
        specs = layer.params  # type: ignore[attr-defined]
        for group in (True, False):
            for name, spec in specs.items():
                shapes[name], decay[name] = spec.shape, spec.decay
                if spec.decay is group and tied.get(name) not in names:
                    param[name] = grad[name] = at
                    at += align(math.prod(spec.shape), 16)
            edge = at if group else edge
        at = align(at, 16 * replicas)
        spans[index] = (start, edge, at)
    size = at
    for copy, owner in tied.items():
        if owner in names:
            param[copy], grad[copy] = param[owner], at
            at += align(align(math.prod(shapes[copy]), 16), 16 * replicas)
    return Parameters(shapes, param, grad, decay, spans, tied, dict(ties), size, at, replicas if shard else 1)


def scratch_elements(params: Parameters, replicas: int) -> int:
    """Elements of SCRATCH that the exchanges of a rank need: one bucket, or less where the gradients are smaller."""
    exchanged = any(name in params.param for pair in params.ties.items() for name in pair)
    return min(BUCKET, params.grad_size) if replicas > 1 or exchanged else 0


@dataclass(frozen=True)
class Layout:
    """Where the tensors of one recorded stage lie: (region, offset), and the bytes one slot of each pool takes."""

    where: dict[int, tuple[int, int]]
    slot: dict[str, int]
    temp: int
    work: int  # scratch bytes per thread, on a GPU in all
    lifetimes: Lifetimes


def layout(
    recording: Recording, params: Parameters, inputs: Inputs, real: int, copy: int = 0, on_device: bool = False
) -> Layout:
    """Gives every tensor of a recording its place; what a pass writes and a later pass reads decides the pool.

    ``inputs`` are the rank's, of which the stage reads those of its ``copy``. Temporaries share memory by linear scan.
    ``on_device``: scratch is a GPU's.
    """
    where: dict[int, tuple[int, int]] = {}
    for name, tensor in recording.params.items():
        where[tensor.id] = (INDEX["PARAM"], real * params.param[name])
    for name, tensor in recording.halves.items():
        where[tensor.id] = (INDEX["HALF"], SIZES["h"] * params.param[name])
    for name, tensor in recording.grads.items():
        where[tensor.id] = (INDEX["GRAD"], real * params.grad[name])
    for name, tensor in recording.inputs.items():
        where[tensor.id] = (INDEX["INPUT"], inputs[copy, name][0])
    slot = dict.fromkeys(POOLS, 0)
    for pool, boundary in zip(POOLS, (recording.x, recording.y, recording.dy, recording.dx), strict=False):
        if boundary is not None:
            if boundary.id in where:
                raise ValueError(f"a stage hands {pool} on unchanged; every stage must write its own output")
            where[boundary.id], slot[pool] = (INDEX[pool], 0), size_of(boundary, real) + ALIGN  # the sender's clock
    pool_of = {("F", "B"): "SAVED", ("F", "W"): "KEPT", ("B", "W"): "OWED"}
    for tensor in _tensors(recording):
        kept = pool_of.get(recording.lifetimes[tensor.id])
        if tensor.id not in where and kept:
            where[tensor.id] = (INDEX[kept], slot[kept])
            slot[kept] += size_of(tensor, real)
    temp = max(_temporaries(recording.passes[name], where, real, on_device) for name in PASSES)
    work = max((call.scratch(on_device) for name in PASSES for call in recording.passes[name]), default=0)
    if on_device:  # the optimizer's norm needs some there
        work = max(work, evaluate(BY_NAME["sumsq"].device, {"n": params.size}))
    return Layout(where, slot, temp, align(work), lifetimes(recording))


def lifetimes(recording: Recording) -> Lifetimes:
    """The last pass that touches each tensor at the stage's boundary."""
    spans = recording.lifetimes

    def last(tensor: Tensor | None, born: Kind) -> Kind:
        return spans[tensor.id][1] if tensor is not None and tensor.id in spans else born

    return Lifetimes(
        x=last(recording.x, "F"), y=last(recording.y, "F"), dy=last(recording.dy, "B"), dx=last(recording.dx, "B")
    )


def _tensors(recording: Recording) -> list[Tensor]:
    """Every tensor of a recording once, in the order of first use."""
    seen: dict[int, Tensor] = {}
    for name in PASSES:
        for call in recording.passes[name]:
            for tensor in call.buffers:
                if tensor is not None:
                    seen.setdefault(tensor.id, tensor)
    return list(seen.values())


def _temporaries(calls: Sequence[Call], where: dict[int, tuple[int, int]], real: int, pairs: bool = False) -> int:
    """Places the tensors that live within one pass by linear scan, first fit; returns the bytes they need together.

    ``pairs``: a call and the next one may become one, so what the first reads outlives what the second writes.
    """
    last = {t.id: i for i, call in enumerate(calls) for t in call.buffers if t is not None}
    live: list[tuple[int, int, int]] = []  # (offset, end, last call), by offset
    top = 0
    for i, call in enumerate(calls):
        live = [span for span in live if span[2] >= i - pairs]
        for tensor in call.buffers:
            if tensor is None or tensor.id in where:
                continue
            size, offset = size_of(tensor, real), 0
            for start, end, _ in live:
                if start - offset >= size:
                    break
                offset = max(offset, end)
            live = sorted([*live, (offset, offset + size, last[tensor.id])])
            where[tensor.id] = (INDEX["TEMP"], offset)
            top = max(top, offset + size)
    return top


@dataclass(frozen=True)
class Memory:
    """The map of a rank's arena: where each region starts, the slots of each pool, and the bytes in all."""

    resident: dict[str, tuple[int, int]]  # region -> (base, bytes)
    pools: dict[tuple[int, str], tuple[int, int, int]]  # (stage, pool) -> (base, bytes of a slot, slots)
    inputs: Inputs
    stride: int  # bytes of one microbatch's inputs
    work: int  # base of the kernels' scratch
    total: int

    def base(self, stage: int, pool: str, index: int) -> int:
        """Where a slot starts, in bytes from the start of the arena."""
        start, size, _ = self.pools[stage, pool]
        return start + size * index

    def by_use(self) -> dict[str, int]:
        """Bytes by purpose, in the order people ask for them; they sum to ``total``."""
        parts = {name.lower(): size for name, (_, size) in self.resident.items() if size or name not in OPTIONAL}
        for (_, pool), (_, size, count) in self.pools.items():
            use = "messages" if pool in ("X", "Y", "DY", "DX") else "activations"
            parts[use] = parts.get(use, 0) + size * count
        parts["work"] = self.total - sum(parts.values())
        return parts


def input_offsets(recordings: Sequence[tuple[int, Recording]]) -> tuple[Inputs, int]:
    """Offsets of a rank's loader inputs within one microbatch, and the bytes of one microbatch.

    ``recordings`` come with the number of the model's copy that they belong to: each copy has inputs of its own.
    """
    table: Inputs = {}
    at = 0
    for copy, recording in recordings:
        for name, tensor in recording.inputs.items():
            if (copy, name) not in table:
                table[copy, name] = (at, tensor)
                at += size_of(tensor, 8)
    return table, at


def arrange(
    layouts: Mapping[int, Layout],
    counts: Mapping[tuple[int, str], int],
    params: Parameters,
    inputs: tuple[Inputs, int],
    micros: int,
    scratch: int,
    threads: int,
    real: int,
    early: bool = False,
    half: bool = False,
    on_device: bool = False,
) -> Memory:
    """Stacks the regions of one rank: flat buffers, scalars, inputs of a step, temporaries, slots, scratch.

    ``counts[stage, pool]`` are slots, ``scratch`` the elements that exchanges need, ``micros`` a step's microbatches;
    ``early`` asks for the room that an update on a guess needs, ``half`` for bfloat16 copies of the parameters.
    ``on_device``: room for the inputs and the loss of the microbatch that is being computed, in one place for all.
    """
    sizes = {
        "PARAM": real * params.size,
        "GRAD": real * params.grad_size,
        "MOMENT1": real * params.moments,
        "MOMENT2": real * params.moments,
        "BEFORE": real * params.moments * early,
        "HALF": SIZES["h"] * params.size * half,
        "SCALAR": 8 * (HYPER + len(params.owned)),
        "INPUT": inputs[1] * micros,
        "CURRENT": (inputs[1] + ALIGN) * on_device,
        "TEMP": max(part.temp for part in layouts.values()),
        "SCRATCH": real * scratch,
    }
    at = 0
    resident, pools = {}, {}
    for name, size in sizes.items():
        resident[name] = (at, align(size))
        at += align(size)
    for stage, part in layouts.items():
        for pool in POOLS:
            count = counts[stage, pool]
            if part.slot[pool] and count:
                pools[stage, pool] = (at, part.slot[pool], count)
                at += part.slot[pool] * count
    work = at
    return Memory(resident, pools, inputs[0], inputs[1], work, at + threads * max(p.work for p in layouts.values()))
