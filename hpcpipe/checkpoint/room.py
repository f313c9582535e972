"""Room on a nearly full disk: before a save the oldest checkpoints go, if there is not enough for it otherwise.

In: how many bytes are wanted. Out: sentences on what was removed. What the newest checkpoint is, whether every byte of
it was found right, and whether the last save found the disk full, is remembered from save to save.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcpipe.checkpoint import master, read, write
from hpcpipe.config import UserError


@dataclass
class Room:
    """Of a run's folder ``out``, by the rank that holds its lock and while nobody writes a checkpoint."""

    out: Path
    newest: Path | None = None  # what the run has committed last, or goes on from; None: the newest there is
    full: bool = False  # the last save found no room, whatever the file system says of itself: there may be a quota
    proven: tuple[Path, int] | None = None  # a checkpoint of which every byte was right, and its master's time

    def make(self, wanted: int) -> list[str]:
        """Makes room for ``wanted`` bytes; a sentence for each folder that was removed.

        What a killed save left half written goes first. Then the oldest checkpoints: the newest stays, and nothing goes
        unless every byte of the newest is right, unless it is enough, and unless it makes room.
        """
        notes: list[str] = []
        with suppress(OSError, UserError):
            measured, self.full = not self.full, False
            free = shutil.disk_usage(self.out).free if measured else 0
            if free >= wanted:
                return notes
            half, old = self._spare()
            while free < wanted and (half or self._may_go(old, wanted - free)):
                aged = not half
                folder = (half or old).pop(0)
                before, size = free, _bytes(folder)
                write.remove(folder)
                notes.append(
                    f"checkpoint: {folder.name} is removed to make room: {wanted} bytes are to be saved, "
                    f"{before if measured else 'too few'} were free"
                )
                free = shutil.disk_usage(self.out).free if measured else free + size
                if free <= before and aged:
                    break
        return notes

    def _spare(self) -> tuple[list[Path], list[Path]]:
        """Folders of saves that surely were broken off, and what is older than the newest checkpoint, by step.

        Where all shards have their names, a master may have been lost: that one goes with the old ones, or stays.
        """
        half, old = [], []
        newest = self._newest()
        for folder, names in read.contents(self.out):
            if master.FILE not in names and any(name.endswith(".part") for name in names):
                half.append(folder)
            elif newest is not None and read.number(folder) < read.number(newest):
                old.append(folder)
        return half, old

    def _newest(self) -> Path | None:
        found = read.complete(self.out)
        if self.newest is not None:
            found = [f for f in found if read.number(f) <= read.number(self.newest)]
        return found[-1] if found else None

    def _may_go(self, old: list[Path], short: int) -> bool:
        """Whether these are enough, and the newest is good: that is read and summed once."""
        newest = self._newest()
        if newest is None or not old or sum(map(_bytes, old)) < short:
            return False
        mark = _mark(newest)
        if mark != self.proven:
            if read.Checkpoint.open(newest).verify():
                return False
            self.proven = mark
        return True


def going_on(out: Path, checkpoint: read.Checkpoint | None) -> Room:
    """For a run that goes on from a checkpoint, of which every byte was found right; None for a new one."""
    return Room(out) if checkpoint is None else Room(out, checkpoint.path, proven=_mark(checkpoint.path))


def _mark(folder: Path) -> tuple[Path, int]:
    return folder, (folder / master.FILE).stat().st_mtime_ns


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir() if write.OURS.fullmatch(f.name))
