"""Finds, proves and reads checkpoints: by name and global slice, so that any layout loads any other.

Values are read straight from the shards at the offsets the master notes, each byte once; neither virtual datasets
(which give fill values for missing files) nor the HDF5 headers of the shards (which may be damaged) are trusted for it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.checkpoint import layout, master, shard
from hpcpipe.checkpoint.layout import Index, Key, Part, Tensor
from hpcpipe.checkpoint.master import Shard, Value
from hpcpipe.config import UserError

STEP = re.compile(r"step_(\d{8,})")
NOTE = "committed.json"  # in the run's folder: the name of the step folder that was committed last


def step_folders(out: Path | str) -> list[Path]:
    """All step folders of a run, complete or not, by step."""
    try:
        return _by_step(out)
    except OSError:
        return []


def contents(out: Path | str) -> list[tuple[Path, set[str]]]:
    """All step folders of a run, by step, with the names in them. OSError where one cannot be looked into."""
    return [(folder, {f.name for f in folder.iterdir()}) for folder in _by_step(out) if folder.is_dir()]


def noted(out: Path | str) -> str:
    """The name of the step folder that was committed last, as the run wrote it down; "" where nothing says so."""
    try:
        found = json.loads((Path(out) / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(found.get("committed", "")) if isinstance(found, dict) else ""


def complete(out: Path | str) -> list[Path]:
    """The step folders of a run that were committed, newest last; whether they are still good, ``verify`` says."""
    return [f for f in step_folders(out) if _committed(f)]


def newest_good(out: Path | str, deep: bool = True) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run folder that verifies, and a sentence for each newer one that was passed over."""
    warnings: list[str] = []
    for folder in reversed(step_folders(out)):
        if not _committed(folder):
            warnings.append(f"checkpoint: {folder.name} is passed over: it was never finished (no {master.FILE})")
            continue
        try:
            found = Checkpoint.open(folder)
            wrong = found.verify(deep=deep)
        except UserError as error:
            wrong = [str(error)]
        if not wrong:
            return found, warnings
        more = f" (and {len(wrong) - 1} more problems)" if len(wrong) > 1 else ""
        warnings.append(f"checkpoint: {folder.name} is passed over: {wrong[0]}{more}")
    return None, warnings


@dataclass(frozen=True)
class Checkpoint:
    """A committed training state: what its master says. ``layout`` maps (kind, name) to shape, dtype and parts."""

    path: Path
    attributes: Mapping[str, Value]
    shards: tuple[Shard, ...]
    layout: layout.Layout

    @classmethod
    def open(cls, path: Path | str) -> Checkpoint:
        """Open a step folder, its master.h5, or the newest complete one of a run folder. UserError if there is none."""
        folder = _folder(Path(path))
        file = folder / master.FILE
        try:
            return cls(folder, *master.from_bytes(file.read_bytes()))
        except OSError as error:
            raise UserError(f"checkpoint: {file} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise UserError(f"checkpoint: {file} is damaged: {error}; use an earlier checkpoint") from error

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.attributes.get("step", number(self.path)))

    @property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """name -> (shape, dtype) of the parameters."""
        return {name: (t.shape, np.dtype(t.dtype)) for (kind, name), t in self.layout.items() if kind == "parameter"}

    def verify(self, shards: Sequence[int] | None = None, deep: bool = True) -> list[str]:
        """Problems, a sentence each, of these shards (default all; ranks can share the work); none = all is right.

        Every byte is read and summed, those of the master once more where all shards are asked for; without ``deep``
        only that the files are there and have their sizes.
        """
        numbers = range(len(self.shards)) if shards is None else shards
        found = self._changed() if deep and shards is None else []
        return found + [sentence for number in numbers for sentence in self._problems(number, deep)]

    def read(
        self,
        kind: str,
        name: str,
        out: np.ndarray[Any, Any] | None = None,
        slices: Sequence[slice] | None = None,
    ) -> np.ndarray[Any, Any]:
        """A tensor, or a global slice of it, into ``out`` (same shape, same or wider dtype) or a new array.

        Each byte is read once; a part that is read as a whole is held against its checksum (for smaller slices call
        ``verify`` first). Raises UserError for what is missing or damaged, ValueError for an ``out`` that does not fit.
        """
        tensor = self.layout.get((kind, name))
        if tensor is None:
            raise UserError(f"checkpoint: {self.path} has no {kind} {name}; was it saved by another model?")
        start, extent = layout.region(tensor.shape, slices)
        if out is None:
            out = np.empty(extent, tensor.dtype)
        if out.shape != extent or not np.can_cast(tensor.dtype, out.dtype, "safe"):
            raise ValueError(f"{kind} {name}: out is {out.shape} {out.dtype}, read are {extent} {tensor.dtype}")
        for part in tensor.parts:
            common = layout.overlap(start, extent, part)
            if common:
                box = tuple(slice(s - t, s - t + n) for s, t, n in zip(common[0], start, common[1], strict=True))
                self._read_part((kind, name), part, *common, out[box])
        return out

    def _read_part(self, key: Key, part: Part, start: Index, extent: Index, out: np.ndarray[Any, Any]) -> None:
        """Read the box ``start``, ``extent`` of one part into ``out``, stretch by stretch in file order."""
        file, crc, dtype = self.path / self.shards[part.shard].file, 0, np.dtype(self.layout[key].dtype)
        title = " ".join(key)
        try:
            fd = os.open(file, os.O_RDONLY)
            try:
                for first, position, _ in layout.runs(part, start, extent):
                    view, offset = out[position], part.offset + first * dtype.itemsize
                    straight = view.flags.c_contiguous and view.dtype == dtype
                    target = view if straight else np.empty(view.shape, dtype)
                    crc = shard.read_run(fd, target, offset, crc)
                    if not straight:
                        view[...] = target
            finally:
                os.close(fd)
        except EOFError as error:
            raise UserError(f"checkpoint: {file} is cut short: {error}, inside {title}") from error
        except OSError as error:
            raise UserError(f"checkpoint: {file}, needed for {title}, cannot be read: {error.strerror}") from error
        if extent == part.extent and crc != part.crc32:
            end = part.offset + shard.nbytes(part, dtype.itemsize)
            raise UserError(
                f"checkpoint: {file} is damaged in bytes {part.offset} to {end}: "
                f"{title} has CRC {crc:08x} instead of {part.crc32:08x}"
            )

    def _changed(self) -> list[str]:
        """A sentence when the master on the disk is no longer whole: it was when this was opened."""
        file = self.path / master.FILE
        try:
            wrong = master.damage(file.read_bytes())
        except OSError as error:
            return [f"{file} cannot be read: {error.strerror or error}"]
        return [f"{file} is damaged: {wrong}"] if wrong else []

    def _problems(self, number: int, deep: bool) -> list[str]:
        record = self.shards[number]
        file = self.path / record.file
        inside = [(f"{k[0]} {k[1]}", t, p) for k, t in self.layout.items() for p in t.parts if p.shard == number]
        held = f"{_several([title for title, _, _ in inside])}"
        try:
            size = file.stat().st_size
            if size != record.bytes:
                return [f"{file} has {size} bytes instead of {record.bytes}; it holds {held}"]
            return self._damage(file, record, inside) if deep else []
        except FileNotFoundError:
            return [f"{file} is missing; it holds {held}"]
        except OSError as error:
            return [f"{file} cannot be read: {error.strerror or error}; it holds {held}"]

    def _damage(self, file: Path, record: Shard, inside: Sequence[tuple[str, Tensor, Part]]) -> list[str]:
        """Sentences for the damaged blocks of a shard and for the tensors whose own checksum is wrong."""
        fd = os.open(file, os.O_RDONLY)
        try:
            sizes = [np.dtype(t.dtype).itemsize for _, t, _ in inside]
            blocks, parts = shard.damage(fd, record.blocks, [p for _, _, p in inside], sizes)
        finally:
            os.close(fd)
        hurt = [(inside[i][0], inside[i][2].offset, shard.nbytes(inside[i][2], sizes[i])) for i in parts]
        found = []
        for first, end in _ranges(blocks):
            low, high = first * shard.BLOCK, min(end * shard.BLOCK, record.bytes)
            titles = [title for title, at, size in hurt if at < high and at + size > low]
            told = _several(titles) if titles else "no tensor's values, but the HDF5 headers"
            found.append(f"{file} is damaged in bytes {low} to {high}: {told}")
        if shard.digest(record.blocks) != record.digest:
            found.append(f"{file}: the digest in {master.FILE} is not that of its own list of blocks")
        if parts and not blocks:
            found.append(f"{file} holds other values than were meant to be written: {_several([t for t, *_ in hurt])}")
        return found


def _by_step(out: Path | str) -> list[Path]:
    return sorted((f for f in Path(out).iterdir() if STEP.fullmatch(f.name)), key=number)


def _folder(path: Path) -> Path:
    """The step folder meant by a path; UserError names what is there instead."""
    if path.name == master.FILE:
        return path.parent
    if _committed(path):
        return path
    if found := complete(path):
        return found[-1]
    if not path.exists():
        raise UserError(f"checkpoint: {path} does not exist")
    if STEP.fullmatch(path.name):
        raise UserError(f"checkpoint: {path} was never finished (it has no {master.FILE}); use an earlier one")
    raise UserError(f"checkpoint: there is no finished checkpoint in {path}")


def _committed(folder: Path) -> bool:
    try:
        return (folder / master.FILE).is_file()
    except OSError:  # the disk does not answer: nothing to build on
        return False


def number(folder: Path) -> int:
    """The step that a folder is named after, 0 for another one."""
    found = STEP.fullmatch(folder.name)
    return int(found[1]) if found else 0


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as [first, end) of their unbroken stretches."""
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and found[-1][1] == n:
            found[-1] = (found[-1][0], n + 1)
        else:
            found.append((n, n + 1))
    return found


def _several(titles: Sequence[str]) -> str:
    """At most three names, then how many more."""
    text = ", ".join(dict.fromkeys(titles[:3])) or "nothing"
    return text + (f" and {len(titles) - 3} more" if len(titles) > 3 else "")
