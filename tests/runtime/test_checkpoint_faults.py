"""Every system call of save, commit and prune fails in turn, or is the last of its process; and kill -9 at any moment.

All calls that touch the disk are numbered together, whatever they are, so that none is left out. Afterwards the newest
complete checkpoint must be found, load and equal what was saved, those before it that were to be kept must be whole,
and the next save must leave a folder without any trace of the accident.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.checkpoint import master, write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.checkpoint.read import Checkpoint, complete, newest_good, number, step_folders
from hpcpipe.config import UserError
from tests.runtime.checkpoint_state import State, by_tensor, load, same, save, unsynced  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children touch no thread
CALLS = {
    "open": (os, "open"),
    "write": (os, "pwrite"),
    "read": (os, "preadv"),
    "fsync": (os, "fsync"),
    "ftruncate": (os, "ftruncate"),
    "close": (os, "close"),
    "rename": (Path, "replace"),
    "mkdir": (Path, "mkdir"),
    "unlink": (Path, "unlink"),
    "rmdir": (Path, "rmdir"),
    "list": (Path, "iterdir"),
    "stat": (Path, "stat"),
    "read whole": (Path, "read_bytes"),
}
Act = Callable[[], None]


class Calls:
    """The calls that touch the disk, counted from 0; number ``at`` acts before it is done, in its midst, or after.

    In its midst means for a write that half of its bytes are on the disk. A close always acts after: its file is closed
    whatever it says; an open that says no has opened nothing.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int = -1, act: Act = lambda: None, when: str = "before") -> None:
        self.count, self.at, self.act, self.when = 0, at, act, when
        self.seen: Counter[str] = Counter()
        self.hit = ""
        for what, (owner, name) in CALLS.items():
            patch.setattr(owner, name, self._counted(what, getattr(owner, name)))

    def _counted(self, what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            mine = self.count == self.at
            self.count += 1
            self.seen[what] += 1
            self.hit = what if mine else self.hit
            late = (self.when == "after" and what != "open") or what == "close"
            if mine and not late:
                if self.when == "midst" and what == "write":
                    fd, data, offset = args
                    real(fd, data[: len(data) // 2], offset)
                self.act()
            result = real(*args, **more)
            if mine and late:
                self.act()
            return result

        return call


def fail(number_: int) -> Act:
    def act() -> None:
        raise OSError(number_, os.strerror(number_))

    return act


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os._exit(9)


@cache
def values(seed: int) -> State:
    """Less than a page, since there are many saves: two tensors and their moments."""
    rng = np.random.default_rng(seed)
    shapes = {"a.weight": (5, 3), "b.weight": (7,)}
    return {(kind, n): rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items() for kind in KINDS}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, and between them one that was never finished."""
    out = tmp_path_factory.mktemp("begun")
    save(out, 10, values(10), by_tensor(1), seed=10)
    write.write_shard(write.step_folder(out, 15), 0, by_tensor(2)(values(15))[0])
    save(out, 20, values(20), by_tensor(1), seed=20)
    return out


def work(out: Path, step: int) -> bool:
    """What a run does, as ``saving`` does it: save, prune, and discard what failed; returns whether it is saved.

    Here prune reads every byte of the new one first, so that reads fail in turn, too.
    """
    folder = write.step_folder(out, step)
    try:
        records = [write.write_shard(folder, i, pieces) for i, pieces in enumerate(by_tensor(2)(values(30)))]
        write.commit(folder, records, {"step": step, "seed": 30})
    except UserError as error:
        assert str(error).startswith("checkpoint: ") and "previous checkpoint is untouched" in str(error)
        write.discard(folder)
        return False
    write.prune(out, 2)
    return True


def check(out: Path, step: int, saved: bool) -> None:
    """The newest complete checkpoint is right, those to be kept, too, and unfinished ones are none."""
    found, warnings = newest_good(out)
    assert found and found.step in {step, 20} and found.attributes["seed"] in ((30,) if saved else (20, 30))
    steps = [number(f) for f in complete(out)]
    assert steps in ([10, 20], [10, 20, 30], [20, 30]) and steps[-1] == found.step
    for folder in complete(out):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.verify() == [] and same(load(checkpoint), values(int(checkpoint.attributes["seed"])))
    newer = [f for f in step_folders(out) if number(f) > found.step]
    assert len(warnings) == len(newer) and all("never finished" in w for w in warnings)


def check_clean(out: Path) -> None:
    """After the next save nothing of the accident is there."""
    save(out, 40, values(40), seed=40)
    assert write.prune(out, 2) == []
    left = step_folders(out)
    assert len(left) == 2 and number(left[1]) == 40 and {*out.iterdir()} == {*left}
    for folder in left:
        checkpoint = Checkpoint.open(folder)
        assert {f.name for f in folder.iterdir()} == {master.FILE, *(s.file for s in checkpoint.shards)}
        assert checkpoint.verify() == [] and same(load(checkpoint), values(int(checkpoint.attributes["seed"])))


def handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


DISK_FULL, TOLD = (fail(errno.ENOSPC), "midst"), (fail(errno.EIO), "after")
CASES = [
    pytest.param(*DISK_FULL, 20, id="disk full, a write half done; the same step again"),
    pytest.param(*TOLD, 30, id="done, but told as an error"),
    pytest.param(*DISK_FULL, 30, id="disk full, a write half done", marks=pytest.mark.long),
    pytest.param(*TOLD, 20, id="done, but told as an error; the same step again", marks=pytest.mark.long),
    pytest.param(interrupt, "before", 30, id="Ctrl-C", marks=pytest.mark.long),
    pytest.param(interrupt, "before", 20, id="Ctrl-C; the same step again", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("act", "when", "step"), CASES)
def test_every_call_fails_in_turn(tmp_path: Path, begun: Path, act: Act, when: str, step: int) -> None:
    hit = Counter[str]()
    for at in itertools.count():
        out = shutil.copytree(begun, tmp_path / str(at))
        before, saved = handles(), False
        with pytest.MonkeyPatch.context() as patch:
            calls = Calls(patch, at, act, when)
            try:
                saved = work(out, step)
            except KeyboardInterrupt:
                assert act is interrupt
        assert handles() == before
        check(out, step, saved)
        check_clean(out)
        if not calls.hit:
            assert saved
            break
        hit[calls.hit] += 1
    assert hit == calls.seen and set(hit) == set(CALLS), "each kind of call is made, and each call failed once"


@pytest.mark.parametrize("step", [30, pytest.param(20, id="the same step again", marks=pytest.mark.long)])
def test_every_call_is_the_last(tmp_path: Path, begun: Path, step: int) -> None:
    """The process is gone, at once and without any clean-up, at each call in turn."""
    for at in itertools.count():
        out = shutil.copytree(begun, tmp_path / str(at))

        def child(out: Path = out, at: int = at) -> None:
            Calls(pytest.MonkeyPatch(), at, die, "midst")
            os._exit(0 if work(out, step) else 1)

        code = in_child(child)
        check(out, step, code == 0)
        check_clean(out)
        if code == 0:
            break
        assert code == 9
    assert at > 60


def in_child(act: Act) -> int:
    """The exit code of a forked process that does this and ends without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_write_may_be_short_but_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, rng = os.pwrite, random.Random(6)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: rng.randint(1, 700)], at))
    folder = save(tmp_path, 20, values(20))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(UserError, match=r"cannot be saved: Input/output error; the previous checkpoint is untouched"):
        save(tmp_path, 30, values(30))
    assert step_folders(tmp_path) == [folder]
    found = Checkpoint.open(folder)
    assert found.verify() == [] and same(load(found), values(20))


def save_for_ever(out: Path, first: int, told: int) -> None:
    """A process that saves one step after the other, and says so."""
    for step in itertools.count(first):
        save(out, step, values(step), by_tensor(3), seed=step)
        write.prune(out, 2)
        os.write(told, b"x")


@pytest.mark.parametrize("moments", [20, pytest.param(200, marks=pytest.mark.long)])
def test_kill_at_random_moments(tmp_path: Path, moments: int) -> None:
    """kill -9 up to a save's time after 0, 1 or 2 saves; the next process goes on with what it finds."""
    rng, before, cut = random.Random(moments), 2, 0
    start = time.monotonic()
    for step in (1, 2):
        save(tmp_path, step, values(step), by_tensor(3), seed=step)
    pace = (time.monotonic() - start) / 2
    for _ in range(moments):
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, before + 1, told)
            finally:
                os._exit(7)
        os.close(told)
        saves = rng.randrange(3)
        assert all(os.read(ready, 1) for _ in range(saves))
        time.sleep(rng.uniform(0, pace))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        os.close(ready)
        found, _ = newest_good(tmp_path)
        assert found and found.step >= before + saves and same(load(found), values(found.step))
        there = complete(tmp_path)  # more than two where it died before an old one was removed
        assert len(there) >= 2 and all(Checkpoint.open(f).verify() == [] for f in there)
        cut += step_folders(tmp_path) != there
        before = found.step
    assert cut > moments // 5  # it was hit in the midst of a save
    save(tmp_path, before + 1, values(0))
    assert write.prune(tmp_path, 1) == []
    (left,) = tmp_path.iterdir()
    assert sorted(f.name for f in left.iterdir()) == ["master.h5", "shard_0000.h5", "shard_0001.h5"]
