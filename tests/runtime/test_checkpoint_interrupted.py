"""A save that fails or is killed at any point leaves the checkpoint before it as it was, and the next save works."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import pytest

from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.read import Checkpoint, complete, newest_good
from hpcpipe.config import UserError
from tests.runtime.checkpoint_state import by_tensor, load, same, save, state

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children touch no thread
CALLS = {
    "write": (os, "pwrite"),
    "fsync": (os, "fsync"),
    "rename": (Path, "replace"),
    "create a dataset": (h5py.h5d, "create"),
    "close HDF5": (h5py.File, "close"),
    "open": (os, "open"),
    "make a folder": (Path, "mkdir"),
    "stat": (Path, "stat"),
}
FAILURES = {
    "disk full": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "HDF5's words for it": lambda: RuntimeError(
        "Can't flush (file write failed: errno = 28, error message = 'No space')"
    ),
    "input/output error": lambda: OSError(errno.EIO, os.strerror(errno.EIO)),
    "Ctrl-C": KeyboardInterrupt,
}


def break_call(
    monkeypatch, where: tuple[Any, str], number: int, act: Callable[[], Any], after: bool = False
) -> list[int]:
    """From now on call ``number`` of a function (from 0) runs ``act`` first, or once done; returns a live count."""
    owner, name = where
    real, count = getattr(owner, name), [0]

    def broken(*args: Any, **more: Any) -> Any:
        count[0] += 1
        if count[0] - 1 == number and not after:
            act()
        result = real(*args, **more)
        if count[0] - 1 == number and after:
            act()
        return result

    monkeypatch.setattr(owner, name, broken)
    return count


def throw(make: Callable[[], BaseException]) -> Callable[[], None]:
    def act() -> None:
        raise make()

    return act


def check_survivor(out: Path, before: int, after: int) -> int:
    """The newest good checkpoint is one of the two, with that one's values; returns its step."""
    found, _ = newest_good(out)
    assert found and found.step in (before, after)
    assert same(load(found), state(int(found.attributes["seed"])))
    return found.step


CASES = [(call, False, "disk full") for call in CALLS]
CASES += [(call, True, "input/output error") for call in ("write", "fsync", "rename", "close HDF5", "make a folder")]
CASES += [(call, False, "HDF5's words for it") for call in ("create a dataset", "close HDF5")]
CASES += [(call, after, "Ctrl-C") for call in ("fsync", "rename", "close HDF5") for after in (False, True)]


@pytest.mark.parametrize(("call", "after", "failure"), CASES)
def test_failure_at_every_call(tmp_path, monkeypatch, call, after, failure):
    """Every write, fsync, rename, ... of a save fails in turn: no half file, open file or lost checkpoint is left."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what is on the disk after a power cut is not tested here
    save(tmp_path, 20, state(20), seed=20)
    values, handles = state(40), len(list(Path("/proc/self/fd").iterdir()))
    for number in itertools.count():
        with monkeypatch.context() as patch:
            count = break_call(patch, CALLS[call], number, throw(FAILURES[failure]), after)
            try:
                save(tmp_path, 40, values, by_tensor(1), seed=40)
                failed = None
            except (UserError, KeyboardInterrupt) as error:
                failed = error
        step = check_survivor(tmp_path, 20, 40)
        assert len(list(Path("/proc/self/fd").iterdir())) == handles
        if count[0] <= number:
            assert failed is None and step == 40
            break
        if isinstance(failed, UserError):
            assert str(failed).startswith("checkpoint: ") and "previous checkpoint is untouched" in str(failed)
            assert step == 40 or not write.step_folder(tmp_path, 40).exists()
        assert list(tmp_path.rglob("*.part")) == []
        shutil.rmtree(write.step_folder(tmp_path, 40), ignore_errors=True)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "create a dataset"])
def test_failure_while_saving_the_same_step_again(tmp_path, monkeypatch, call):
    """The folder holds the old state or the new one, whole; and what is not part of it is gone."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    seen = set()
    for number in itertools.count():
        save(tmp_path, 20, state(1), by_tensor(2), seed=1)
        with monkeypatch.context() as patch:
            count = break_call(patch, CALLS[call], number, throw(FAILURES["disk full"]))
            try:
                folder = save(tmp_path, 20, state(2), by_tensor(1), seed=2)
            except UserError:
                folder = write.step_folder(tmp_path, 20)
        found = Checkpoint.open(folder)
        assert found.verify() == [] and same(load(found), state(int(found.attributes["seed"])))
        assert {f.name for f in folder.iterdir()} == {"master.h5", *(s.file for s in found.shards)}
        seen.add(found.attributes["seed"])
        if count[0] <= number:
            assert found.attributes["seed"] == 2
            break
    assert seen == {1, 2}


def in_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a forked process that ends without any clean-up; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "create a dataset", "close HDF5"])
def test_death_at_every_call(tmp_path, monkeypatch, call):
    """A process that is gone between two calls cleans nothing up: the rest is no checkpoint, and is removed later."""
    save(tmp_path, 20, state(20), seed=20)
    monkeypatch.setattr(os, "fsync", lambda fd: None)

    def work(number: int) -> None:
        break_call(monkeypatch, CALLS[call], number, lambda: os._exit(9))
        save(tmp_path, 40, state(40), seed=40)

    for number in itertools.count():
        code = os.waitstatus_to_exitcode(os.waitpid(in_child(partial(work, number)), 0)[1])
        step = check_survivor(tmp_path, 20, 40)
        if code == 0:
            assert step == 40
            break
        assert complete(tmp_path)[-1].name == write.step_folder(tmp_path, step).name
    save(tmp_path, 40, state(40), seed=40)
    write.step_folder(tmp_path, 30).mkdir()
    (write.step_folder(tmp_path, 30) / "shard_0000.h5.part").touch()
    assert write.prune(tmp_path, 2) == []
    assert [f.name for f in sorted(tmp_path.iterdir())] == ["step_00000020", "step_00000040"]


def sweep(out: Path, room: Callable[[int], Any], step: int = 4096) -> list[str]:
    """Save step 2 with ever more room until it fits; returns what was said when it did not."""
    said: list[str] = []
    for size in itertools.count(0, step):
        with room(size):
            try:
                save(out, 2, state(2, scale=20), by_tensor(1), seed=2)
                fits = True
            except UserError as error:
                fits = False
                said.append(str(error))
        found, _ = newest_good(out)
        if fits:
            assert found and found.step == 2 and same(load(found), state(2, scale=20))
            return said
        assert found and found.step == 1 and same(load(found), state(1, scale=20))
        assert [f.name for f in out.iterdir()] == ["step_00000001"]
    raise AssertionError


def test_file_size_limit(tmp_path):
    """A real failing write, all through the file, without being root: the system's limit on file sizes."""

    class Room:
        def __init__(self, size: int) -> None:
            self.size = size

        def __enter__(self) -> None:
            self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.old[1]))

        def __exit__(self, *_: object) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, self.old)

    save(tmp_path, 1, state(1, scale=20), by_tensor(1), seed=1)
    said = sweep(tmp_path, Room, 16384)
    assert len(said) > 10 and all("File too large" in s for s in said)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB, in memory; only root can have one."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2M", "tmpfs", str(where)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here (not root?)")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_disk_full(small_disk):
    """A real full disk, with one more free page each time."""
    out = small_disk / "run"
    save(out, 1, state(1, scale=20), by_tensor(1), seed=1)
    total = os.statvfs(small_disk)
    free, fill = total.f_bavail * total.f_frsize, small_disk / "fill"

    class Room:
        def __init__(self, size: int) -> None:
            self.size = size

        def __enter__(self) -> None:
            fill.write_bytes(bytes(free - self.size))

        def __exit__(self, *_: object) -> None:
            fill.unlink()

    said = sweep(out, Room)
    assert len(said) > 50
    for sentence in said:
        assert "No space left on device (it takes at least" in sentence and "free some space" in sentence
    assert sum("master.h5" in s for s in said) >= 2 and sum("shard_0000.h5" in s for s in said) > 40


def test_prune_keeps_the_newest_and_foreign_files(tmp_path):
    for step in (20, 40, 60, 80):
        save(tmp_path, step, state(step))
    (write.step_folder(tmp_path, 20) / "notes.txt").write_text("mine")
    write.write_shard(write.step_folder(tmp_path, 50), 0, by_tensor(1)(state(1))[0])
    write.write_shard(write.step_folder(tmp_path, 10**8), 0, by_tensor(1)(state(1))[0])
    assert write.prune(tmp_path, 0) == []
    assert [f.name[-2:] for f in complete(tmp_path)] == ["20", "40", "60", "80"]
    assert not write.step_folder(tmp_path, 50).exists()
    assert write.prune(tmp_path, 2) == []
    assert [f.name[-2:] for f in complete(tmp_path)] == ["60", "80"]
    assert [f.name for f in write.step_folder(tmp_path, 20).iterdir()] == ["notes.txt"]
    assert write.step_folder(tmp_path, 10**8).exists()  # newer than the newest: someone may be writing it


@pytest.mark.parametrize("name", ["shard_0001.h5", "master.h5"])
@pytest.mark.parametrize("harm", ["flip", "cut", "lose"])
def test_prune_removes_nothing_before_the_newest_is_proven(tmp_path, name, harm):
    for step in (20, 40):
        save(tmp_path, step, state(step))
    file = write.step_folder(tmp_path, 40) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data if harm == "flip" else data[:-1])
    if harm == "lose" and name != "master.h5":
        file.unlink()
    (said,) = write.prune(tmp_path, 1)
    assert "step_00000040" in said and "not good" in said and name in said
    found, _ = newest_good(tmp_path)
    assert found and found.step == 20 and same(load(found), state(20))


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_counts_from_what_was_committed(tmp_path, keep):
    """A run that went back before a damaged checkpoint saves again: the damaged one must not count for a good one."""
    for step in (20, 40, 60):
        save(tmp_path, step, state(step), seed=step)
    file = write.step_folder(tmp_path, 60) / "shard_0001.h5"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    folder = save(tmp_path, 50, state(50), seed=50)
    assert write.prune(tmp_path, keep, deep=False, committed=folder) == []
    assert [f.name[-2:] for f in complete(tmp_path)] == ["40", "50", "60"][2 - keep :]
    assert check_survivor(tmp_path, 50, 50) == 50
