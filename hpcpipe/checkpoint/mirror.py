"""A second copy of every shard, made by a rank of another node in a folder of its own choosing, and taken from there.

In: shards that lie in a checkpoint's folder, each with the digest that its writer gave. The copy is made by reading
them from there, so that another node than the writer's has seen that they are right; it is used when the first one is
missing or damaged. Copies are no checkpoint by themselves: what they belong to, the master in the run's folder says.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from hpcpipe.checkpoint import read, shard, write
from hpcpipe.config import UserError


def place(mirror: str, host: str, out: Path) -> Path:
    """The folder for the copies of the run in ``out``: in the one that checkpoint.mirror names on a node.

    Several runs may name the same one, so each has a folder in it, called after the digest of its path.
    """
    own = hashlib.blake2b(os.fsencode(out.resolve()), digest_size=6).hexdigest()
    return Path(mirror.replace("{host}", host)) / own


def found(place: Path, name: str, digest: str) -> Path | None:
    """A good copy of a shard, ``name`` being step_00000020/shard_0000.h5; None where there is none.

    A run's folder may have been moved since: its digest says whether what lies in another place is the same.
    """
    others = sorted(f for f in (place.parent / name, *place.parent.glob(f"*/{name}")) if f != place / name)
    return next((file for file in (place / name, *others) if good(file, digest)), None)


def holder(hosts: Sequence[str], writer: int) -> int:
    """The rank that copies a writer's shard: as many ranks on as the writer's node has, so that nodes copy alike.

    From there the first one on another node; where there is no other, the next rank.
    """
    size, step = len(hosts), hosts.count(hosts[writer])
    others = ((writer + step + i) % size for i in range(size))
    return next((rank for rank in others if hosts[rank] != hosts[writer]), (writer + 1) % size)


def keep(folder: Path, place: Path, files: Iterable[tuple[str, str]]) -> list[str]:
    """Copies shards (file, digest) of a checkpoint's folder; a sentence for each of which there is no copy."""
    notes = []
    for name, digest in files:
        try:
            copy(folder / name, place / folder.name / name, digest)
        except UserError as problem:
            notes.append(f"{problem}; there is no second copy")
    return notes


def copy(source: Path, target: Path, digest: str) -> None:
    """Copies a shard whole or not at all; UserError where it has another digest, or cannot be read or written."""
    part, sums = target.with_name(f"{target.name}.part"), []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as found, part.open("wb") as to:
            while block := found.read(shard.BLOCK):
                sums.append(zlib.crc32(block))
                to.write(block)
            to.flush()
            os.fsync(to.fileno())
        if shard.digest(sums) != digest:
            raise UserError(f"checkpoint: {source} has not the bytes that were written")
        part.replace(target)
        shard.sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"checkpoint: {source} cannot be copied to {target}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def good(file: Path, digest: str) -> bool:
    """Whether a copy is there and has every byte."""
    try:
        with file.open("rb") as found:
            return shard.digest([zlib.crc32(block) for block in iter(lambda: found.read(shard.BLOCK), b"")]) == digest
    except OSError:
        return False


def tidy(current: Path, place: Path) -> None:
    """Removes the copies of steps that the run's folder has no more; none where that cannot be looked into.

    Those of ``current``, the step folder just written, stay: a node may see an old listing for a while.
    """
    with suppress(OSError):
        kept = {current.name, *(each.name for each in current.parent.iterdir())}
        for old in read.step_folders(place):
            if old.name not in kept:
                write.discard(old)
