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
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.checkpoint.layout import Part

BLOCK = 1 << 20
POLYNOMIAL = 0xEDB88320  # of CRC-32, x^32 left out, its first coefficient the lowest bit


class Sums:
    """CRC-32 of each MiB of a file, from those of what was written to it: no byte is summed twice or read again.

    What nobody wrote is zero, and nothing may be written twice.
    """

    def __init__(self) -> None:
        self.written: dict[int, list[tuple[int, int, int]]] = {}  # number of the MiB -> (offset in it, bytes, CRC-32)

    def add(self, offset: int, size: int, crc: int) -> None:
        """``size`` bytes from ``offset`` on, all within one MiB."""
        self.written.setdefault(offset // BLOCK, []).append((offset % BLOCK, size, crc))

    def blocks(self, size: int) -> list[int]:
        """Of a file of so many bytes."""
        return [self._block(number, min(BLOCK, size - number * BLOCK)) for number in range(-(-size // BLOCK))]

    def _block(self, number: int, size: int) -> int:
        crc, end = 0, 0
        for offset, count, part in (*sorted(self.written.get(number, [])), (size, 0, 0)):
            if offset < end:
                raise ValueError(f"byte {number * BLOCK + offset} was written twice")
            crc = combined(zlib.crc32(bytes(offset - end), crc), part, count)
            end = offset + count
        return crc


def combined(first: int, second: int, size: int) -> int:
    """The CRC-32 of two stretches of bytes, one after the other, from those of each; the second has ``size`` bytes.

    A CRC is a polynomial over bits modulo POLYNOMIAL; behind it come 8 x size bits: it is multiplied by x^(8 size)
    (Adler's crc32_combine in zlib).
    """
    if first == 0 or size == 0:
        return first ^ second
    power, n = 3, size
    while n:
        if n & 1:
            first = _times(POWERS[power % len(POWERS)], first)
        n, power = n >> 1, power + 1
    return first ^ second


def _times(a: int, b: int) -> int:
    """The product of two polynomials; their first coefficient is the highest bit."""
    product = 0
    while a:
        if a & 1 << 31:
            product ^= b
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ POLYNOMIAL if b & 1 else b >> 1
    return product


def _powers() -> tuple[int, ...]:
    """x to the 1, 2, 4, 8, ...; after 32 of them they come again."""
    found = [1 << 30]
    while len(found) < 32:
        found.append(_times(found[-1], found[-1]))
    return tuple(found)


POWERS = _powers()


def write_at(fd: int, data: memoryview, offset: int, sums: Sums | None = None) -> int:
    """Write all of ``data`` (bytes) at ``offset``, block by block while each is in the cache; returns its CRC-32.

    The disk begins with a block while the next one is summed: otherwise all of it would wait for the sync.
    """
    crc, at = 0, 0
    while at < len(data):
        where = offset + at
        block = data[at : at + BLOCK - where % BLOCK]
        part = zlib.crc32(block)
        crc = combined(crc, part, len(block))
        if sums is not None:
            sums.add(where, len(block), part)
        done = 0
        while done < len(block):
            wrote = os.pwrite(fd, block[done:], where + done)
            if wrote == 0:  # a file system may; asking it again and again would not end
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            done += wrote
        if len(block) == BLOCK:
            _start_writing(fd, where)
        at += len(block)
    return crc


def _start_writing(fd: int, offset: int) -> None:
    """Linux begins to write out what it is told that nobody needs; elsewhere it may be forgotten, or nothing."""
    with suppress(AttributeError, OSError):
        os.posix_fadvise(fd, offset, BLOCK, os.POSIX_FADV_DONTNEED)


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
