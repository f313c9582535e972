"""Room for the next save on a nearly full disk: what goes, in which order, and what never does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpcpipe.checkpoint import read, write
from hpcpipe.checkpoint.room import Room
from tests.runtime.checkpoint_state import save, state


def full(monkeypatch: pytest.MonkeyPatch, out: Path, room: int) -> None:
    """A disk with room for so many checkpoints of 100 bytes."""

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=100 * (room - len(read.step_folders(out))))

    monkeypatch.setattr(write.shutil, "disk_usage", usage)


def test_on_a_full_disk_the_oldest_go_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, state(step))
    full(monkeypatch, tmp_path, 4)
    room = Room(tmp_path)
    assert [line.split()[1] for line in room.make(200)] == ["step_00000001", "step_00000002"]
    assert [read.number(f) for f in read.complete(tmp_path)] == [3, 4]
    assert room.make(10**9) == []  # it would not be enough
    assert [read.number(f) for f in read.complete(tmp_path)] == [3, 4]


def test_what_makes_no_room_ends_the_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, state(step))
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))  # as with snapshots
    assert len(Room(tmp_path).make(200)) == 1
    assert [read.number(f) for f in read.complete(tmp_path)] == [2, 3, 4]


def test_nothing_goes_for_a_newest_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step))
    next(write.step_folder(tmp_path, 2).glob("shard_*")).unlink()
    full(monkeypatch, tmp_path, 2)
    assert Room(tmp_path).make(100) == []
    assert [read.number(f) for f in read.complete(tmp_path)] == [1, 2]


def test_what_was_killed_goes_before_any_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 5):
        save(tmp_path, step, state(step))
    (write.step_folder(tmp_path, 5) / "master.h5").unlink()  # lost, or never written: nobody knows
    half = write.step_folder(tmp_path, 4)
    half.mkdir()
    (half / "shard_0000.h5.part").write_bytes(b"half")
    full(monkeypatch, tmp_path, 4)
    assert [line.split()[1] for line in Room(tmp_path).make(100)] == ["step_00000004"]
    assert [read.number(f) for f in read.step_folders(tmp_path)] == [1, 2, 5]


def test_room_is_made_by_what_this_run_has_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a run that went back lies what it has passed over as damaged: that is not the newest."""
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    next(write.step_folder(tmp_path, 3).glob("shard_*")).unlink()
    full(monkeypatch, tmp_path, 3)
    assert Room(tmp_path).make(100) == []
    assert len(Room(tmp_path, write.step_folder(tmp_path, 2)).make(100)) == 1
    assert [read.number(f) for f in read.complete(tmp_path)] == [2, 3]


def test_a_quota_counts_for_a_full_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system may say that there is room where a save has found none."""
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))
    room = Room(tmp_path)
    assert room.make(100) == []
    room.full = True
    assert [line.split()[1] for line in room.make(100)] == ["step_00000001"]
    assert room.make(100) == [] and [read.number(f) for f in read.complete(tmp_path)] == [2, 3]


def test_the_newest_is_proven_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, state(step))
    seen: list[int] = []
    whole = read.Checkpoint.verify

    def verify(self: read.Checkpoint, *rest: Any, **more: Any) -> list[str]:
        seen.append(self.step)
        return whole(self, *rest, **more)

    monkeypatch.setattr(read.Checkpoint, "verify", verify)
    room = Room(tmp_path)
    for more in (3, 2):
        full(monkeypatch, tmp_path, more)
        assert len(room.make(100)) == 1
    assert seen == [3] and [read.number(f) for f in read.complete(tmp_path)] == [3]
