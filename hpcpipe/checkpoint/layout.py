"""Where every element of every tensor lies: name -> global shape, dtype, [(shard, slice)].

Pure: integers and tuples, no files, no arrays, no ranks. Each shard is described by a JSON-able ``ShardRecord``. Out
of all records comes one ``Layout``, which is checked (every element exactly once) before a checkpoint may exist, and
through which any region of any tensor is found again, however it was divided when it was saved.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypedDict

from hpcpipe.config import UserError

KINDS = {"parameter": "parameters", "moment1": "moment1", "moment2": "moment2"}  # kind -> HDF5 group
NAME = re.compile(r"[^\s/.@\x00]+(\.[^\s/.@\x00]+)*")

Index = tuple[int, ...]
Key = tuple[str, str]  # (kind, name)


class Entry(TypedDict):
    """One contiguous dataset of a shard; ``offset`` is where its first byte lies in the file."""

    name: str
    kind: str
    shape: list[int]
    start: list[int]
    extent: list[int]
    dtype: str
    crc32: int
    path: str
    offset: int


class ShardRecord(TypedDict):
    """One shard file: ``blocks`` holds the CRC-32 of each MiB of the file, ``digest`` is the digest of that list."""

    file: str
    bytes: int
    digest: str
    blocks: list[int]
    entries: list[Entry]


class Part(NamedTuple):
    """The box ``start``, ``extent`` of a tensor, stored row-major in shard number ``shard`` from byte ``offset`` on."""

    shard: int
    start: Index
    extent: Index
    path: str
    offset: int
    crc32: int


class Tensor(NamedTuple):
    """A whole logical tensor: global shape, dtype as numpy writes it ("<f4"), the boxes it is stored in."""

    shape: Index
    dtype: str
    parts: tuple[Part, ...]


Layout = Mapping[Key, Tensor]


def path(kind: str, name: str) -> str:
    """HDF5 path of a tensor: the dots of the name become groups. UserError for a kind or name nobody could find."""
    if kind not in KINDS:
        raise UserError(f"checkpoint: {kind!r} of {name!r} is not one of {', '.join(KINDS)}")
    if not NAME.fullmatch(name):
        raise UserError(f"checkpoint: {name!r} cannot name a tensor; use parts joined by dots, without spaces, / and @")
    return f"{KINDS[kind]}/{name.replace('.', '/')}"


def collect(shards: Sequence[Iterable[Entry]]) -> dict[Key, Tensor]:
    """Join the entries of all shards (shard number = position) by name; UserError where shapes or dtypes disagree."""
    found: dict[Key, Tensor] = {}
    for shard, entries in enumerate(shards):
        for e in entries:
            part = Part(shard, tuple(e["start"]), tuple(e["extent"]), e["path"], e["offset"], e["crc32"])
            key, shape, dtype = (e["kind"], e["name"]), tuple(e["shape"]), e["dtype"]
            before = found.get(key, Tensor(shape, dtype, ()))
            if (before.shape, before.dtype) != (shape, dtype):
                raise UserError(
                    f"checkpoint: {_title(key)} is {list(before.shape)} {before.dtype} in one shard "
                    f"and {list(shape)} {dtype} in shard {shard}; all ranks must save the same model"
                )
            found[key] = before._replace(parts=(*before.parts, part))
    return found


def problems(layout: Layout) -> list[str]:
    """Every element of every tensor must be stored exactly once; one sentence per tensor for which this is not so."""
    found = [_problem(key, tensor) or _clash(key, layout) for key, tensor in layout.items()]
    return [sentence for sentence in found if sentence]


def region(shape: Index, slices: Sequence[slice] | None) -> tuple[Index, Index]:
    """(start, extent) of ``slices`` (fewer than dimensions: the rest is whole). ValueError for steps other than 1."""
    slices = tuple(slices or ())
    if len(slices) > len(shape):
        raise ValueError(f"{len(slices)} slices for a tensor of {len(shape)} dimensions")
    ranges = [range(n)[s] for n, s in zip(shape, (*slices, *[slice(None)] * (len(shape) - len(slices))), strict=True)]
    if any(r.step != 1 for r in ranges):
        raise ValueError(f"slices {slices} have a step other than 1")
    return tuple(r.start for r in ranges), tuple(len(r) for r in ranges)


def overlap(start: Index, extent: Index, part: Part) -> tuple[Index, Index] | None:
    """(start, extent), in global indices, of what the box has in common with a part; None for nothing."""
    low = tuple(map(max, start, part.start))
    high = tuple(min(s + n, t + m) for s, n, t, m in zip(start, extent, part.start, part.extent, strict=True))
    if any(h <= lo for lo, h in zip(low, high, strict=True)):
        return None
    return low, tuple(h - lo for lo, h in zip(low, high, strict=True))


def runs(part: Part, start: Index, extent: Index) -> Iterator[tuple[int, Index, int]]:
    """The stretches of ``part`` that hold the box ``start``, ``extent`` (inside it), in file order.

    Yields (first element counted from the part's first, position in the box along its leading axes, elements).
    """
    split = len(extent)  # a stretch spans the axes from split - 1 on: all but the first of them are whole
    while split > 1 and extent[split - 1] == part.extent[split - 1]:
        split -= 1
    strides = [math.prod(part.extent[a + 1 :]) for a in range(len(extent))]
    base = sum((s - t) * stride for s, t, stride in zip(start, part.start, strides, strict=True))
    outer, length = extent[: split - 1], math.prod(extent[split - 1 :])
    for position in _positions(outer):
        yield base + sum(i * stride for i, stride in zip(position, strides, strict=False)), position, length


def _positions(extent: Index) -> Iterator[Index]:
    for flat in range(math.prod(extent)):
        position = []
        for n in reversed(extent):
            flat, i = divmod(flat, n)
            position.append(i)
        yield tuple(reversed(position))


def _problem(key: Key, tensor: Tensor) -> str:
    """The sentence for one tensor, empty when it is whole: boxes inside, disjoint, as many elements as there are."""
    if not tensor.shape or min(tensor.shape) < 1:
        return f"{_title(key)} has the shape {list(tensor.shape)}: at least one dimension and one element are needed"
    for part in tensor.parts:
        if not _inside(part, tensor.shape):
            return f"{_title(key)}: {_box(part)} of shard {part.shard} is not a box inside {list(tensor.shape)}"
    parts = sorted(tensor.parts, key=lambda p: p.start)
    for i, part in enumerate(parts):
        for other in parts[i + 1 :]:
            if other.start[0] >= part.start[0] + part.extent[0]:
                break
            if overlap(part.start, part.extent, other):
                return f"{_title(key)}: {_box(part)} of shard {part.shard} and {_box(other)} of {other.shard} overlap"
    there, wanted = sum(math.prod(p.extent) for p in parts), math.prod(tensor.shape)
    return "" if there == wanted else f"{_title(key)}: {wanted - there} of its {wanted} elements are in no shard"


def _clash(key: Key, layout: Layout) -> str:
    """An HDF5 path is a group or a dataset: a tensor cannot have its name inside another's."""
    parts = key[1].split(".")
    above = (".".join(parts[:n]) for n in range(1, len(parts)))
    return next(
        (f"{_title(key)} lies inside the tensor {name}; rename one" for name in above if (key[0], name) in layout), ""
    )


def _inside(part: Part, shape: Index) -> bool:
    if not len(part.start) == len(part.extent) == len(shape):
        return False
    return all(s >= 0 and n > 0 and s + n <= m for s, n, m in zip(part.start, part.extent, shape, strict=True))


def _box(part: Part) -> str:
    return "[" + ", ".join(f"{s}:{s + n}" for s, n in zip(part.start, part.extent, strict=False)) + "]"


def _title(key: Key) -> str:
    return f"{key[0]} {key[1]}"
