"""A file of which HDF5 writes the headers and we the values.

HDF5 gets this object for a file: it lays out datasets in it and writes its headers, which stay in memory. The values go
to their offsets in the real file by themselves, and the headers are put between them at the end. So HDF5 never sees a
full disk (version 1.12 crashes when it cannot close a file), and gigabytes of values do not pass through it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np

PAGE = 4096


class Headers(io.RawIOBase):
    """Bytes by offset, and for each whether it was ever written; the rest reads as zero."""

    def __init__(self) -> None:
        self.pages: dict[int, np.ndarray[Any, Any]] = {}  # page number -> [2, PAGE]: the bytes, 1 where written
        self.at = 0
        self.size = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def write(self, data: Any) -> int:
        view = np.frombuffer(data, np.uint8)
        for number, page, part in self._parts(len(view)):
            if number not in self.pages:
                self.pages[number] = np.zeros((2, PAGE), np.uint8)
            self.pages[number][0, page], self.pages[number][1, page] = view[part], 1
        self.at += len(view)
        self.size = max(self.size, self.at)
        return len(view)

    def readinto(self, buffer: Any) -> int:
        view = np.frombuffer(buffer, np.uint8)
        for number, page, part in self._parts(len(view)):
            view[part] = self.pages[number][0, page] if number in self.pages else 0
        self.at += len(view)
        return len(view)

    def written(self) -> Iterator[tuple[int, memoryview]]:
        """(offset, bytes) of all that was written, in order; neighbours within a page are one."""
        for number in sorted(self.pages):
            data, mask = self.pages[number]
            edges = np.flatnonzero(np.diff(mask, prepend=0, append=0)).tolist()
            for low, high in zip(edges[::2], edges[1::2], strict=True):
                yield number * PAGE + low, data[low:high].data

    def _parts(self, count: int) -> Iterator[tuple[int, slice, slice]]:
        """(page number, where in the page, where in the ``count`` bytes at the present position)."""
        done = 0
        while done < count:
            number, low = divmod(self.at + done, PAGE)
            size = min(PAGE - low, count - done)
            yield number, slice(low, low + size), slice(done, done + size)
            done += size
