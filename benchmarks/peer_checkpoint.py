"""One way to save a training state and to load it again, in a process of its own.

    driver -> worker   {"do": "save" | "load" | "verify", "folder": path}
    worker -> driver   {"seconds": s, "device_bytes": b}
    driver -> worker   {"do": "check" | "hurt", ...}: did the last load bring what was saved, is a flipped bit noticed
    worker -> driver   {"yes": true | false}

The variant names the way: ``hpcpipe`` (``hpcpipe:2``: two writers, as two ranks), ``plain`` (what dd does), ``torch``,
``dcp`` (torch.distributed.checkpoint) or ``safetensors``. All save the same arrays, which lie in one shared file in
memory, and load into arrays that are there already, as a resume does. A save ends when the disk has everything; before
a load the files are dropped from the page cache, and ``device_bytes`` tells what the disk was then asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.shape import Shape, parse
from benchmarks.worker import die_with_parent, private_stdout, send

KINDS = ("parameter", "moment1", "moment2")
BLOCK = 4 << 20  # bytes of a write or read of dd
FILE = "state"


class State(NamedTuple):
    """One float32 buffer, and its tensors as views: "parameter/layer.0.norm1.weight" -> values."""

    whole: np.ndarray
    arrays: Mapping[str, np.ndarray]


Move = Callable[[Path, State], None]


class Way(NamedTuple):
    """Both directions of a format, and what it is; ``verify`` where it can prove itself without loading."""

    save: Move
    load: Move  # into the arrays
    about: str
    verify: Callable[[Path], None] | None = None


def state_in(buffer: np.ndarray, shape: Shape) -> State:
    """The state of a shape, tensor after tensor."""
    found, at = {}, 0
    for kind in KINDS:
        for name, size in shape.parameters.items():
            count = int(np.prod(size))
            found[f"{kind}/{name}"] = buffer[at : at + count].reshape(size)
            at += count
    return State(buffer, found)


def elements(shape: Shape) -> int:
    """Of the whole state."""
    return len(KINDS) * sum(int(np.prod(size)) for size in shape.parameters.values())


# --- the ways


def hpcpipe(writers: int) -> Way:
    """The writers of a run: one shard each, whole tensors dealt out in turn; then the commit."""
    from hpcpipe.checkpoint import write
    from hpcpipe.checkpoint.read import Checkpoint

    def together(work: Callable[[int], None]) -> None:
        failed: list[BaseException] = []

        def one(index: int) -> None:
            try:
                work(index)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def save(folder: Path, state: State) -> None:
        step, records = write.step_folder(folder, 1), {}

        def part(index: int) -> None:
            mine = [(*key.split("/"), a) for key, a in list(state.arrays.items())[index::writers]]
            pieces = [write.Piece(name, kind, a.shape, (0,) * a.ndim, a) for kind, name, a in mine]
            records[index] = write.write_shard(step, index, pieces)

        together(part)
        write.commit(step, [records[i] for i in range(writers)], {"step": 1})

    def load(folder: Path, state: State) -> None:
        checkpoint = Checkpoint.open(folder)

        def part(index: int) -> None:
            for key, array in list(state.arrays.items())[index::writers]:
                kind, name = key.split("/")
                checkpoint.read(kind, name, array)

        together(part)

    def verify(folder: Path) -> None:
        checkpoint, wrong = Checkpoint.open(folder), []
        together(lambda index: wrong.extend(checkpoint.verify(range(index, writers, writers))))
        if wrong:
            raise ValueError(wrong[0])

    return Way(save, load, f"{writers} shards of HDF5, CRC-32 of each MiB and each tensor, written and checked", verify)


def plain(_: int) -> Way:
    """One file, block after block, then fsync: dd bs=4M conv=fsync."""

    def blocks(state: State) -> list[memoryview]:
        data = memoryview(state.whole.view(np.uint8))
        return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]

    def save(folder: Path, state: State) -> None:
        fd = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for block in blocks(state):
            while block:
                block = block[os.write(fd, block) :]
        os.fsync(fd)
        os.close(fd)

    def load(folder: Path, state: State) -> None:
        fd = os.open(folder / FILE, os.O_RDONLY)
        for block in blocks(state):
            while block:
                got = os.readv(fd, [block])
                if not got:
                    raise EOFError(f"{folder / FILE} is cut short")
                block = block[got:]
        os.close(fd)

    return Way(save, load, f"one file in blocks of {BLOCK >> 20} MiB, fsync, as dd conv=fsync; no checksums")


def torch_save(_: int) -> Way:
    """torch.save and torch.load, which reads into new tensors."""
    import torch

    def save(folder: Path, state: State) -> None:
        with (folder / FILE).open("wb") as file:
            torch.save({key: torch.from_numpy(a) for key, a in state.arrays.items()}, file)
            file.flush()
            os.fsync(file.fileno())

    def load(folder: Path, state: State) -> None:
        for key, tensor in torch.load(folder / FILE, weights_only=True).items():
            torch.from_numpy(state.arrays[key]).copy_(tensor)

    return Way(save, load, f"torch.save of torch {torch.__version__} to one file, then fsync; torch.load, then copied")


def dcp(writers: int) -> Way:
    """torch.distributed.checkpoint without a process group, as a run on one device uses it."""
    import torch
    import torch.distributed.checkpoint as checkpoint

    def tensors(state: State) -> dict[str, Any]:
        return {key: torch.from_numpy(a) for key, a in state.arrays.items()}

    def save(folder: Path, state: State) -> None:
        writer = checkpoint.FileSystemWriter(folder / FILE, thread_count=writers, sync_files=True)
        checkpoint.save(tensors(state), storage_writer=writer, no_dist=True)

    def load(folder: Path, state: State) -> None:
        checkpoint.load(tensors(state), storage_reader=checkpoint.FileSystemReader(folder / FILE), no_dist=True)

    return Way(save, load, f"torch.distributed.checkpoint of torch {torch.__version__}, {writers} threads, sync_files")


def safetensors(_: int) -> Way:
    """safetensors' numpy interface."""
    import safetensors as library
    from safetensors.numpy import save_file

    def save(folder: Path, state: State) -> None:
        save_file(dict(state.arrays), str(folder / FILE))
        fd = os.open(folder / FILE, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)

    def load(folder: Path, state: State) -> None:
        with library.safe_open(str(folder / FILE), framework="np") as file:
            for key, array in state.arrays.items():
                array[...] = file.get_tensor(key)

    return Way(save, load, f"safetensors {library.__version__}, save_file, then fsync; no checksums")


WAYS = {"hpcpipe": hpcpipe, "plain": plain, "torch": torch_save, "dcp": dcp, "safetensors": safetensors}


# --- the worker


def drop(folder: Path) -> None:
    """Forget what the page cache has of the files below; they must be on the disk, or it cannot."""
    for file in folder.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def device_bytes() -> int:
    """What this process has made the disks read so far; 0 where the kernel does not count it."""
    with suppress(OSError):
        for line in Path("/proc/self/io").read_text().splitlines():
            if line.startswith("read_bytes:"):
                return int(line.split()[1])
    return 0


class Worker:
    """Holds the state; ``loaded`` is what the last load has brought."""

    def __init__(self, way: Way, shape: Shape, state: Path) -> None:
        self.way, self.shape = way, shape
        self.buffer = np.asarray(np.memmap(state, np.float32, "c", shape=(elements(shape),)))
        self.buffer[:: 1 << 10].sum()  # every page is mapped before the first turn
        self.loaded: np.ndarray | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does one thing and times it; the disk is quiet before, the memory to load into is there."""
        folder, what = Path(request["folder"]), request["do"]
        if what == "check":
            equal = self.loaded is not None and bool(np.array_equal(self.loaded, self.buffer))
            self.loaded = None
            return {"yes": equal}
        if what == "hurt":
            return {"yes": self._notices(folder)}
        work: Callable[[], None]
        if what == "save":
            folder.mkdir(parents=True, exist_ok=True)
            state = state_in(self.buffer, self.shape)
            work = partial(self.way.save, folder, state)
        else:
            drop(folder)
            self.loaded = np.full(len(self.buffer), np.nan, np.float32) if what == "load" else self.loaded
            work = self._reading(what, folder)
        os.sync()
        before, begin = device_bytes(), time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "device_bytes": device_bytes() - before}

    def _notices(self, folder: Path) -> bool:
        """Whether a load fails when a bit in the middle of the largest file is another."""
        file = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        with file.open("r+b") as stream:
            stream.seek(file.stat().st_size // 2)
            (byte,) = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte ^ 4]))
        into = np.zeros(len(self.buffer), np.float32)
        try:
            self.way.load(folder, state_in(into, self.shape))
        except Exception as error:
            print(error, file=sys.stderr)
            return True
        if np.array_equal(into, self.buffer):
            raise ValueError(f"the flipped bit of {file} is in no value")
        return False

    def _reading(self, what: str, folder: Path) -> Callable[[], None]:
        if what == "load":
            assert self.loaded is not None
            into = state_in(self.loaded, self.shape)
            return lambda: self.way.load(folder, into)
        verify = self.way.verify
        if what != "verify" or verify is None:
            raise ValueError(f"{what!r} cannot be done here")
        return lambda: verify(folder)


def main() -> None:
    """Answers line by line until its input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("--shape", type=parse, required=True)
    parser.add_argument("--variant", required=True)
    args = parser.parse_args()
    die_with_parent()
    out = private_stdout()
    try:
        kind, _, writers = args.variant.partition(":")
        worker = Worker(WAYS[kind](int(writers or 1)), args.shape, args.state)
        send(out, {"ready": True, "about": worker.way.about, "verifies": worker.way.verify is not None})
        for line in sys.stdin:
            send(out, worker.answer(json.loads(line)))
    except Exception as error:
        send(out, {"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
