"""The master file of a checkpoint: what it says, to bytes and back.

``master.h5`` shows every tensor whole, as an HDF5 virtual dataset over the shards beside it, and carries the attributes
and tables that say what was saved and where each byte lies. It is made and parsed in memory: 512 bytes of text (an HDF5
"user block", which tools skip) hold the digest of all that follows, so HDF5 never sees a damaged byte and the file is
written with plain system calls whose errors are plain.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import platform
import socket
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcpipe.checkpoint import layout
from hpcpipe.checkpoint.layout import Entry, Layout, ShardRecord
from hpcpipe.config import UserError

FILE = "master.h5"
FORMAT = 1
USER_BLOCK = 512
HIT = 8  # bytes; a digest of other data has more than so many other characters
LIBVER = ("v108", "v110")  # every HDF5 since 1.10 reads it

Value = str | int | float

ABOUT = """One training state. /parameters, /moment1 and /moment2 hold whole tensors by name: layer.0.mlp.up.weight is
/parameters/layer/0/mlp/up/weight. They are virtual datasets over the shard_*.h5 files in this folder: keep them
together; where a shard is missing, HDF5 reads NaN. Arrays are row-major and little-endian; a linear layer computes
x @ weight.T, so its weight is [outputs, inputs]. moment1 and moment2 are AdamW's running means of the gradient and its
square, before bias correction. Attributes: step = optimizer steps done; tokens = training tokens seen; loss = training
loss of that step, nats per token; config = the run's TOML text; schedule = the order of the pipeline's operations;
plan_digest = digest of the plan; version.* = software that wrote this; created = UTC. /table/shards lists each file
with its size and digest, /table/blocks the CRC-32 of each MiB of them in turn, /table/pieces which box of which tensor
lies at which byte of which file."""
GROUPS = {
    "parameters": "trained weights",
    "moment1": "AdamW: running mean of the gradient (beta1)",
    "moment2": "AdamW: running mean of the squared gradient (beta2)",
}


class Shard(NamedTuple):
    """One row of the table of shards: file name, size in bytes, digest, CRC-32 of each MiB."""

    file: str
    bytes: int
    digest: str
    blocks: tuple[int, ...]


class Master(NamedTuple):
    """All that a master file says."""

    attributes: dict[str, Value]
    shards: tuple[Shard, ...]
    layout: Layout


def environment() -> dict[str, Value]:
    """What wrote the checkpoint: format, versions, host, time."""
    try:
        own = importlib.metadata.version("hpcpipe")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"
    return {
        "about": ABOUT,
        "format": FORMAT,
        "version.hpcpipe": own,
        "version.h5py": h5py.version.version,
        "version.hdf5": h5py.version.hdf5_version,
        "version.numpy": np.__version__,
        "version.python": platform.python_version(),
        "host": socket.gethostname(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def to_bytes(records: Sequence[ShardRecord], attributes: Mapping[str, Value]) -> bytes:
    """The file, with the shards numbered as given; their layout must have been checked."""
    buffer = io.BytesIO()
    tensors = layout.collect([r["entries"] for r in records])
    with h5py.File(buffer, "w", libver=LIBVER, userblock_size=USER_BLOCK) as f:
        for key, value in {**environment(), **attributes}.items():
            f.attrs[key] = value
        for (kind, name), tensor in tensors.items():
            _show(f, layout.path(kind, name), name, tensor, [r["file"] for r in records])
        for group in f.values():
            group.attrs["about"] = GROUPS[group.name.strip("/")]
        _tabulate(f.create_group("table"), records)
    body = buffer.getvalue()[USER_BLOCK:]
    return _head(body) + body


def from_bytes(data: bytes) -> Master:
    """The inverse. Raises ValueError, with the reason, for anything that is not exactly what ``to_bytes`` made."""
    if wrong := damage(data):
        raise ValueError(wrong)
    try:
        with h5py.File(io.BytesIO(data), "r") as f:
            attributes = {str(k): _plain(v) for k, v in f.attrs.items()}
            if attributes.get("format") != FORMAT:
                raise ValueError(f"it has format {attributes.get('format')}, this program reads {FORMAT}")
            shards = _shards(f["table/shards"][()], f["table/blocks"][()].tolist())
            entries = _entries(f["table/pieces"][()], len(shards))
        return Master(attributes, shards, layout.collect(entries))
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, IndexError, UserError) as error:
        raise ValueError(f"it cannot be read as a master file ({error})") from error


def damage(data: bytes) -> str:
    """What is wrong with the bytes of a master file and where, as the end of a sentence; "" for nothing.

    Other data have another digest in nearly every character, so one that is off in a few was itself hit.
    """
    head, body = data[:USER_BLOCK], data[USER_BLOCK:]
    meant = _head(body)
    if head == meant:
        return ""
    if len(data) < USER_BLOCK:
        return f"it ends at byte {len(data)}, within the {USER_BLOCK} that hold its digest"
    off = [at for at, (found, wanted) in enumerate(zip(head, meant, strict=True)) if found != wanted]
    if len(off) <= HIT:
        return f"bytes {off[0]} to {off[-1] + 1}, in the text that holds its digest, are not as they were written"
    return f"bytes {USER_BLOCK} to {len(data)} do not have the digest noted in the first {USER_BLOCK}"


def _head(body: bytes) -> bytes:
    """The user block: text that names the file and its digest, padded with spaces."""
    digest = hashlib.blake2b(body, digest_size=32).hexdigest()
    text = f"hpcpipe checkpoint {FORMAT}\nHDF5 from byte {USER_BLOCK} on\nblake2b-256 of that: {digest}\n"
    return text.encode().ljust(USER_BLOCK - 1) + b"\n"


def _show(f: Any, path: str, name: str, tensor: layout.Tensor, files: Sequence[str]) -> None:
    """One virtual dataset; a missing shard shows as NaN (integers: their largest value), never as plausible zeros."""
    dtype = np.dtype(tensor.dtype)
    plan, link = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5p.create(h5py.h5p.LINK_CREATE)
    plan.set_layout(h5py.h5d.VIRTUAL)
    for part in tensor.parts:
        box, source = h5py.h5s.create_simple(tensor.shape), h5py.h5s.create_simple(part.extent)
        box.select_hyperslab(part.start, part.extent)
        plan.set_virtual(box, files[part.shard].encode(), part.path.encode(), source)
    plan.set_fill_value(np.array([np.nan if dtype.kind == "f" else np.iinfo(dtype).max], dtype))
    link.set_create_intermediate_group(True)
    kind, space = h5py.h5t.py_create(dtype, logical=True), h5py.h5s.create_simple(tensor.shape)
    explain(h5py.h5d.create(f.id, path.encode(), kind, space, plan, link), {"name": name})


def explain(dataset: Any, values: Mapping[str, Any]) -> None:
    """Attributes of a new dataset, by its low-level identifier: there are many, and h5py first looks for each."""
    for key, value in values.items():
        array = np.asarray(value, h5py.string_dtype() if isinstance(value, str) else None)
        space = h5py.h5s.create_simple(array.shape)
        attribute = h5py.h5a.create(dataset, key.encode(), h5py.h5t.py_create(array.dtype, logical=True), space)
        attribute.write(array, mtype=h5py.h5t.py_create(array.dtype))


def _tabulate(group: Any, records: Sequence[ShardRecord]) -> None:
    """Write the tables of shards, of their blocks and of the pieces in them."""
    rows = [(r["file"], r["bytes"], r["digest"], len(r["blocks"])) for r in records]
    group["shards"] = _table({"file": "S", "bytes": "<u8", "digest": "S", "blocks": "<u8"}, rows)
    group["blocks"] = np.asarray([b for r in records for b in r["blocks"]], "<u4")
    columns = {"kind": "S", "name": "S", "dtype": "S", "shape": "S", "start": "S", "extent": "S", "path": "S"}
    columns |= {"shard": "<u4", "offset": "<u8", "crc32": "<u4"}
    pieces = [{**e, "shard": i} for i, r in enumerate(records) for e in r["entries"]]
    group["pieces"] = _table(columns, [tuple(_cell(p[c]) for c in columns) for p in pieces])  # type: ignore[literal-required]


def _cell(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _table(columns: Mapping[str, str], rows: Sequence[tuple[Any, ...]]) -> np.ndarray[Any, Any]:
    """A structured array; columns of type S become UTF-8 strings as wide as their longest."""
    rows = [tuple(v.encode() if isinstance(v, str) else v for v in row) for row in rows]
    widths = [max([1, *(len(row[i]) for row in rows)]) if t == "S" else 0 for i, t in enumerate(columns.values())]
    types = [h5py.string_dtype("utf-8", w) if w else t for t, w in zip(columns.values(), widths, strict=True)]
    return np.array(rows, np.dtype(list(zip(columns, types, strict=True))))


def _shards(rows: np.ndarray[Any, Any], blocks: list[int]) -> tuple[Shard, ...]:
    ends = np.cumsum(rows["blocks"]).tolist()
    starts = [0, *ends][: len(ends)]
    return tuple(
        Shard(row["file"].decode(), int(row["bytes"]), row["digest"].decode(), tuple(blocks[a:b]))
        for row, a, b in zip(rows, starts, ends, strict=True)
    )


def _entries(rows: np.ndarray[Any, Any], shards: int) -> list[list[Entry]]:
    found: list[list[Entry]] = [[] for _ in range(shards)]
    for row in rows:
        texts = {c: row[c].decode() for c in ("kind", "name", "dtype", "path")}
        boxes = {c: [int(i) for i in row[c].decode().split(",")] for c in ("shape", "start", "extent")}
        numbers = {c: int(row[c]) for c in ("offset", "crc32")}
        found[int(row["shard"])].append(Entry(**texts, **boxes, **numbers))  # type: ignore[typeddict-item]
    return found


def _plain(value: Any) -> Value:
    return value.item() if isinstance(value, np.generic) else value
