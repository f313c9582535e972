"""The bytes of a checkpoint file: write them, sync them, sum them, find the damaged ones.

A shard is summed twice: per dataset (CRC-32 of its values, checked whenever a whole one is read) and per MiB of the
file (CRC-32 again, which covers the HDF5 headers too and says where the damage is). CRC-32 finds every flipped bit and
every burst up to 32 bits at memory speed; it is no defence against someone who means it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.checkpoint.layout import Part

BLOCK = 1 << 20


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write all of ``data`` (bytes) at ``offset``, block by block while each is in the cache; returns its CRC-32."""
    crc = 0
    for at in range(0, len(data), BLOCK):
        block = data[at : at + BLOCK]
        crc = zlib.crc32(block, crc)
        done = 0
        while done < len(block):
            done += os.pwrite(fd, block[done:], offset + at + done)
    return crc


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable; file systems that cannot sync a folder do so by themselves."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def block_sums(fd: int) -> list[int]:
    """CRC-32 of each MiB of an open file."""
    return [zlib.crc32(block) for _, block in _blocks(fd)]


def digest(blocks: Sequence[int]) -> str:
    """One short name for the contents of a file: BLAKE2b-128 of its block sums as little-endian 32-bit integers."""
    return hashlib.blake2b(np.asarray(blocks, "<u4").tobytes(), digest_size=16).hexdigest()


def damage(
    fd: int, blocks: Sequence[int], parts: Sequence[Part], itemsizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(numbers of the blocks, numbers of the parts) whose sums differ, in one pass over the file.

    ``parts`` are those stored in this file, ``itemsizes`` the bytes per element of each.
    """
    ends = [p.offset + nbytes(p, size) for p, size in zip(parts, itemsizes, strict=True)]
    waiting = sorted(range(len(parts)), key=lambda i: parts[i].offset, reverse=True)
    open_parts: list[int] = []
    sums = [0] * len(parts)
    bad = []
    for number, block in _blocks(fd):
        if number >= len(blocks) or zlib.crc32(block) != blocks[number]:
            bad.append(number)
        at = number * BLOCK
        while waiting and parts[waiting[-1]].offset < at + len(block):
            open_parts.append(waiting.pop())
        for i in open_parts:
            sums[i] = zlib.crc32(block[max(parts[i].offset - at, 0) : max(ends[i] - at, 0)], sums[i])
        open_parts = [i for i in open_parts if ends[i] > at + len(block)]
    return bad, [i for i, part in enumerate(parts) if sums[i] != part.crc32]


def read_run(fd: int, out: np.ndarray[Any, Any], offset: int, crc: int) -> int:
    """Fill a C-contiguous array from ``offset`` on; returns the CRC-32 continued. EOFError if the file ends early."""
    data = out.reshape(-1).view(np.uint8).data
    done = 0
    while done < len(data):
        got = os.preadv(fd, [data[done : done + BLOCK]], offset + done)
        if got == 0:
            raise EOFError(f"the file ends at byte {offset + done}")
        crc = zlib.crc32(data[done : done + got], crc)
        done += got
    return crc


def _blocks(fd: int) -> Iterator[tuple[int, memoryview]]:
    """(number, bytes) of each MiB of a file; the bytes are overwritten by the next."""
    buffer = memoryview(bytearray(BLOCK))
    number = 0
    while True:
        filled = 0
        while filled < BLOCK and (got := os.preadv(fd, [buffer[filled:]], number * BLOCK + filled)):
            filled += got
        if not filled:
            return
        yield number, buffer[:filled]
        number += 1


def nbytes(part: Part, itemsize: int) -> int:
    """Bytes that the values of a part take."""
    return int(np.prod(part.extent, dtype=np.int64)) * itemsize
