"""Saves a training state: a shard per writer, then the master whose rename is the commit.

Every file is written under a name ending in .part, synced, renamed, and its folder synced. Nothing that a committed
master refers to is ever overwritten, so whatever fails, and wherever, the previous checkpoint stays as it is. The
caller sees to the order: all shards, their records gathered, ``commit`` once, ``prune`` last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from hpcpipe.checkpoint import layout, master, read, shard
from hpcpipe.checkpoint.headers import PAGE, Headers
from hpcpipe.checkpoint.layout import Entry, ShardRecord
from hpcpipe.config import UserError

FULL = "free some space or lower checkpoint.keep"  # ends the sentence on a save for which there was no room
LARGE = 1 << 16  # bytes; datasets from here on begin on a page
SHARD = re.compile(r"shard_\d+(\.\d+)?\.h5")
OURS = re.compile(r"(shard_\d+(\.\d+)?|master)\.h5(\.part)?")


class Piece(NamedTuple):
    """A box of a tensor held by this writer: global ``shape``, where the box begins, its values on the host.

    ``kind`` is parameter, moment1 or moment2; ``array`` (usually float32) must not change until it is written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    array: np.ndarray[Any, Any]


class _Out(NamedTuple):
    """A shard being written: its file, the sums of what is in it, the HDF5 paths that are taken."""

    fd: int
    sums: shard.Sums
    paths: set[str]


def step_folder(out: Path | str, step: int) -> Path:
    """Where the checkpoint of a step lives: out/step_00000020."""
    return Path(out) / f"step_{step:08d}"


def write_shard(folder: Path, index: int, pieces: Iterable[Piece]) -> ShardRecord:
    """Write the pieces, one after the other as they come, as shard number ``index``; on return they are on the disk.

    Writers of different numbers may write at the same time. UserError when it cannot be written (disk full, ...): its
    own half-written file is gone then, and ``discard``, once all writers have stopped, removes what the others wrote.
    """
    with _saving(folder / f"shard_{index:04d}.h5") as attempt:
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / _free_name(folder, index)
        part = folder / f"{target.name}.part"
        attempt.files = (part, target)
        entries, blocks, size = _write(part, index, attempt.count(pieces))
        part.replace(target)
        shard.sync_folder(folder)
    return ShardRecord(file=target.name, bytes=size, digest=shard.digest(blocks), blocks=blocks, entries=entries)


def commit(folder: Path, records: Sequence[ShardRecord], attributes: Mapping[str, master.Value]) -> None:
    """Make the shards of ``records`` the checkpoint in ``folder``: once this returns it is complete and durable.

    Raises UserError, and discards the shards, when they do not hold every element exactly once or the master cannot be
    written; a checkpoint that was in this folder before is still there then.
    """
    renamed = False
    part = folder / f"{master.FILE}.part"
    try:
        with _saving(folder / master.FILE) as attempt:
            attempt.files = (part,)
            _check(folder, records)
            data = master.to_bytes(records, attributes)
            attempt.bytes = len(data)
            _write_plain(part, data)
            part.replace(folder / master.FILE)
            renamed = True
            shard.sync_folder(folder)
            shard.sync_folder(folder.parent)
    except BaseException:
        # A renamed but unsynced master may be lost with the power, and the one before it would need its shards.
        if not renamed:
            discard(folder)
        raise
    discard(folder)


def discard(folder: Path) -> None:
    """Remove what an unfinished save left in a folder: all files of ours that its master does not refer to."""
    names = _names(folder)
    keep: set[str] = set()
    if master.FILE in names:
        try:
            keep = {master.FILE, *(s.file for s in read.Checkpoint.open(folder).shards)}
        except UserError:
            return  # a damaged master: leave all there is to whoever wants to rescue it
    for name in names:
        if OURS.fullmatch(name) and name not in keep:
            with suppress(OSError):
                (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()


def prune(out: Path | str, keep: int, deep: bool = True, every: int = 0, committed: Path | None = None) -> list[str]:
    """Keep the newest ``keep`` complete checkpoints (0 = all) and remove half-written folders older than the newest.

    Steps that are multiples of ``every`` stay, too. The newest is the folder ``committed`` by the caller where it is
    given: those of later steps, which a run that went back has passed over as damaged, do not count and stay.

    Nothing is removed before the newest is proven complete: with ``deep`` every byte is read and summed, without it the
    files must have their sizes (for callers that have just written it). Returns sentences on what is in the way.
    """
    found = read.complete(out)
    if committed is not None:
        found = [f for f in found if read.number(f) <= read.number(committed)]
    if not found:
        return []
    try:
        wrong = read.Checkpoint.open(found[-1]).verify(deep=deep)
    except UserError as error:
        wrong = [str(error)]
    if wrong:
        return [f"checkpoint: nothing older than {found[-1].name} is removed because it is not good: {wrong[0]}"]
    newest = read.number(found[-1])
    half = [f for f in read.step_folders(out) if read.number(f) < newest and unfinished(f)]
    old = found[:-keep] if keep else []
    for folder in half + [f for f in old if not every or read.number(f) % every]:
        remove(folder)
    for folder in found[-keep:]:
        if any(OURS.fullmatch(name) and name.count(".") > 1 for name in _names(folder)):
            discard(folder)  # one who saved this step again may have died at it
    return []


def note(folder: Path) -> None:
    """Writes down in the run's folder which checkpoint was committed last: should its master be lost, this says so."""
    file = folder.parent / read.NOTE
    part = file.with_name(f"{file.name}.part")
    with suppress(OSError):  # a hint: the checkpoint is good without it
        _write_plain(part, json.dumps({"committed": folder.name}).encode())
        part.replace(file)


def remove(folder: Path) -> None:
    """Take a checkpoint away, its master first so that at no moment it looks complete; foreign files stay."""
    with suppress(OSError):
        (folder / master.FILE).unlink(missing_ok=True)
        shard.sync_folder(folder)
    if master.FILE not in _names(folder):
        discard(folder)


def unfinished(folder: Path) -> bool:
    """Whether it surely has no master: one that cannot be looked into may hold a good checkpoint."""
    try:
        return master.FILE not in [f.name for f in folder.iterdir()]
    except OSError:
        return False


def _names(folder: Path) -> list[str]:
    try:
        return [f.name for f in folder.iterdir()]
    except OSError:
        return []


def _free_name(folder: Path, index: int) -> str:
    """shard_0003.h5, or shard_0003.1.h5, ... beside a committed checkpoint, whose files are not to be touched.

    OSError where the folder cannot be listed: what cannot be seen might be overwritten.
    """
    names, stem, turn = [f.name for f in folder.iterdir()], f"shard_{index:04d}", 0
    name = f"{stem}.h5"
    while master.FILE in names and name in names:
        turn += 1
        name = f"{stem}.{turn}.h5"
    return name


def _check(folder: Path, records: Sequence[ShardRecord]) -> None:
    """The shards must be there, in full, and together hold every element once."""
    wrong = layout.problems(layout.collect([r["entries"] for r in records]))
    if wrong:
        raise UserError(f"checkpoint: {folder} is not committed because of {len(wrong)} tensors: {wrong[0]}")
    for record in records:
        size = (folder / record["file"]).stat().st_size
        if size != record["bytes"]:
            raise UserError(
                f"checkpoint: {folder / record['file']} has {size} bytes, {record['bytes']} were written; "
                "is another job writing to the same folder?"
            )


def _write(part: Path, index: int, pieces: Iterable[Piece]) -> tuple[list[Entry], list[int], int]:
    """(entries, block sums, bytes) of a shard written and synced under its temporary name.

    HDF5 lays out the file and makes the headers; the values go to their place in it with pwrite, summed on the way.
    """
    headers, entries = Headers(), []
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    out = _Out(fd, shard.Sums(), set())
    try:
        with h5py.File(headers, "w", libver=master.LIBVER, alignment_threshold=LARGE, alignment_interval=PAGE) as file:
            file.attrs["about"] = "part of a checkpoint: open master.h5 beside this file"
            file.attrs["shard"] = index
            for piece in pieces:
                entries.append(_write_piece(file, out, piece))
        for offset, data in headers.written():
            shard.write_at(fd, data, offset, out.sums)
        os.ftruncate(fd, headers.size)
        os.fsync(fd)
        return entries, out.sums.blocks(headers.size), headers.size
    finally:
        os.close(fd)


def _write_piece(file: Any, out: _Out, piece: Piece) -> Entry:
    """One contiguous dataset, allocated at once and never filled by HDF5, with the attributes that explain it."""
    array = np.ascontiguousarray(piece.array)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if array.dtype.kind not in "fiu" or array.size == 0 or array.ndim != len(piece.shape):
        raise UserError(
            f"checkpoint: {piece.name} of shape {list(piece.shape)} has a piece {array.shape} {array.dtype}"
        )
    path = layout.path(piece.kind, piece.name)
    if path in out.paths:  # a second box of the same tensor
        path += "@" + ",".join(map(str, piece.start))
    out.paths.add(path)
    plan, link = h5py.h5p.create(h5py.h5p.DATASET_CREATE), h5py.h5p.create(h5py.h5p.LINK_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plan.set_obj_track_times(False)  # the same state gives the same bytes
    link.set_create_intermediate_group(True)
    kind, space = h5py.h5t.py_create(array.dtype), h5py.h5s.create_simple(array.shape)
    try:
        dataset = h5py.h5d.create(file.id, path.encode(), kind, space, plan, link)
    except ValueError as error:  # a disk error, too, may come as one
        raise RuntimeError(f"HDF5 cannot create {path}: {error}") from error
    offset = dataset.get_offset()
    crc = shard.write_at(out.fd, array.reshape(-1).view(np.uint8).data, offset, out.sums)
    about = {"name": piece.name, "kind": piece.kind, "shape": list(piece.shape), "start": list(piece.start)}
    master.explain(dataset, {**about, "crc32": np.uint32(crc)})
    return Entry(
        name=piece.name,
        kind=piece.kind,
        shape=list(piece.shape),
        start=list(piece.start),
        extent=list(array.shape),
        dtype=array.dtype.str,
        crc32=crc,
        path=path,
        offset=offset,
    )


def _write_plain(file: Path, data: bytes) -> None:
    fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        shard.write_at(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


@dataclass
class _Attempt:
    """What is being written: the files to remove if it fails, the bytes it takes (as far as they are known)."""

    files: tuple[Path, ...] = ()
    bytes: int = 0

    def count(self, pieces: Iterable[Piece]) -> Iterable[Piece]:
        """The same pieces; their bytes are known at once for a list, one after the other for a generator."""
        if isinstance(pieces, Sequence):
            self.bytes = sum(p.array.nbytes for p in pieces)
            return pieces
        return self._count(pieces)

    def _count(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            self.bytes += piece.array.nbytes
            yield piece


@contextmanager
def _saving(target: Path) -> Iterator[_Attempt]:
    """Whatever goes wrong inside, the files of the attempt are removed; errors of disk and HDF5 become UserError."""
    attempt = _Attempt()
    try:
        yield attempt
    except BaseException as error:
        for file in attempt.files:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError):
            raise UserError(_sentence(target, error, attempt.bytes)) from error
        raise


def _sentence(target: Path, error: Exception, wanted: int) -> str:
    """What, where, how many bytes, what now. HDF5 puts the system's error number into its text."""
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"errno = (\d+)", str(error))):
        number = int(found[1])
    text = f"checkpoint: {target} cannot be saved: {os.strerror(number) if number else str(error).strip()}"
    if number not in (errno.ENOSPC, errno.EDQUOT):
        return f"{text}; the previous checkpoint is untouched"
    there = next((f for f in (target.parent, *target.parents) if f.exists()), Path())
    free = shutil.disk_usage(there).free
    return (
        f"{text} (it takes at least {wanted} bytes, {free} are free in {there}); "
        f"the previous checkpoint is untouched, {FULL}"
    )
