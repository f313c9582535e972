"""Saving beside the steps: what is written is the state of its step, however long it takes; one job in a folder."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.checkpoint import read, write
from hpcpipe.checkpoint.lock import Lock
from hpcpipe.checkpoint.room import Room
from hpcpipe.config import UserError
from hpcpipe.runtime.optimizer import AdamW
from hpcpipe.steps import Steps
from small_run import run, write_tokens

KINDS = ("parameter", "moment1", "moment2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def contents(folder: Path) -> dict[tuple[str, str], bytes]:
    checkpoint = read.Checkpoint.open(folder)
    assert checkpoint.verify() == []
    return {(k, n): checkpoint.read(k, n).tobytes() for k in KINDS for n in checkpoint.tensors}


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Writers that take longer than a step: they look at each tensor late."""
    told: list[str] = []
    whole = write._write_piece

    def late(file: Any, fd: int, piece: write.Piece) -> Any:
        time.sleep(0.01)
        told.append(piece.name)
        return whole(file, fd, piece)

    monkeypatch.setattr(write, "_write_piece", late)
    return told


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, {}), (2, {}), (4, {"pipeline__replicas": 2}), (3, {"pipeline__schedule": "zb_h2", "optimizer__early": True})],
)
def test_a_slow_disk_gets_the_state_of_the_step(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest, ranks: int, settings: dict[str, object]
) -> None:
    often = {"train__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 0, **settings}
    plain = run(data, tmp_path / "plain", ranks, "untied", **often)
    told = request.getfixturevalue("slow")
    late = run(data, tmp_path / "late", ranks, "untied", **often)
    assert told and late.losses == plain.losses and late.tensors == plain.tensors
    for step in (2, 4, 6):
        one, other = (contents(write.step_folder(tmp_path / name, step)) for name in ("plain", "late"))
        assert one == other
    assert contents(write.step_folder(tmp_path / "late", 2)) != contents(write.step_folder(tmp_path / "late", 4))


def test_a_step_computes_while_the_last_one_is_written(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer waits for the next step's passes to have run: were it waited for before them, nothing would move."""
    ran: list[int] = []
    whole, steps = write.write_shard, Steps._close

    def closing(self: Steps, step: int, *rest: Any) -> None:
        ran.append(step)
        steps(self, step, *rest)

    def patient(folder: Path, index: int, pieces: Any) -> Any:
        end = time.monotonic() + 20
        while read.number(folder) == 2 and 2 not in ran and time.monotonic() < end:
            time.sleep(0.001)
        assert read.number(folder) != 2 or 2 in ran  # step number 2 is the third
        return whole(folder, index, pieces)

    monkeypatch.setattr(Steps, "_close", closing)
    monkeypatch.setattr(write, "write_shard", patient)
    run(data, tmp_path / "run", 1, train__steps=4, checkpoint__every=2, checkpoint__keep=0)
    assert [f.name for f in read.complete(tmp_path / "run")] == ["step_00000002", "step_00000004"]


def test_it_is_called_saved_when_it_is(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(data, tmp_path / "run", 2, train__steps=5, checkpoint__every=2)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("saved")]
    assert [line.split(":")[0] for line in lines] == [f"saved {tmp_path}/run/step_0000000{i}" for i in (2, 4, 5)]
    assert all(" MiB in " in line and "the steps waited " in line for line in lines)


def test_what_a_writer_stumbles_over_is_told_and_the_run_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = write.write_shard

    def failing(folder: Path, index: int, pieces: Any) -> Any:
        if read.number(folder) == 2 and index == 1:
            raise ZeroDivisionError("an accident")
        return whole(folder, index, pieces)

    monkeypatch.setattr(write, "write_shard", failing)
    run(data, tmp_path / "run", 2, train__steps=4, checkpoint__every=2)
    assert "NOT saved: the checkpoint of step 2 failed: ZeroDivisionError: an accident" in capfd.readouterr().out
    assert [f.name for f in read.step_folders(tmp_path / "run")] == ["step_00000004"]


def test_nobody_writes_before_there_is_room(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    whole = write.write_shard

    def clearing(*_: Any) -> list[str]:
        time.sleep(0.2)
        told.append("room")
        return []

    def writing(folder: Path, index: int, pieces: Any) -> Any:
        told.append("write")
        return whole(folder, index, pieces)

    monkeypatch.setattr(Room, "make", clearing)
    monkeypatch.setattr(write, "write_shard", writing)
    run(data, tmp_path / "run", 2, train__steps=4, checkpoint__every=2)
    assert told == ["room", "write", "write"] * 2


@pytest.mark.usefixtures("slow")
def test_what_is_being_written_becomes_a_checkpoint_though_the_run_ends_badly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, close, begun = AdamW.squares, Steps._close, [0]

    def closing(self: Steps, step: int, *rest: Any) -> None:
        begun[0] = step
        close(self, step, *rest)

    def squares(self: AdamW, into: np.ndarray) -> None:
        whole(self, into)
        if begun[0] == 3:  # the fourth step, beside which the third is written
            into[:] = np.nan

    monkeypatch.setattr(Steps, "_close", closing)
    monkeypatch.setattr(AdamW, "squares", squares)
    with pytest.raises(UserError, match=r"step \d+: .* are not finite"):
        run(data, tmp_path / "run", 2, train__steps=50, checkpoint__every=1, checkpoint__keep=0)
    found = read.complete(tmp_path / "run")
    assert found == read.step_folders(tmp_path / "run") and [read.number(f) for f in found] == [1, 2, 3]
    for folder in found:
        assert read.Checkpoint.open(folder).verify() == []
    Lock(tmp_path / "run").release()  # nobody holds the folder any more


# --- what is kept


def test_multiples_of_a_step_are_kept(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", 1, train__steps=7, checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3)
    assert [read.number(f) for f in read.complete(tmp_path / "run")] == [3, 6, 7]


def test_a_save_without_room_is_remembered(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, make, seen = write.write_shard, Room.make, []

    def failing(folder: Path, index: int, pieces: Any) -> Any:
        if read.number(folder) == 2 and index == 1:
            raise UserError(write._sentence(folder, OSError(errno.EDQUOT, ""), 1))
        return whole(folder, index, pieces)

    def making(self: Room, wanted: int) -> list[str]:
        seen.append((self.full, self.newest and self.newest.name))
        return make(self, wanted)

    monkeypatch.setattr(write, "write_shard", failing)
    monkeypatch.setattr(Room, "make", making)
    run(data, tmp_path / "run", 2, train__steps=4, checkpoint__every=1, checkpoint__keep=0)
    assert "NOT saved: checkpoint: " in capfd.readouterr().out
    assert seen == [(False, None), (False, "step_00000001"), (True, "step_00000001"), (False, "step_00000003")]


def test_a_save_after_a_step_back_is_kept(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The newest is damaged, the run goes on before it and ends earlier: what it saves there is the one to keep."""
    run(data, tmp_path / "run", 2, train__steps=6, checkpoint__every=3, checkpoint__keep=2)
    file = write.step_folder(tmp_path / "run", 6) / "shard_0001.h5"
    found = bytearray(file.read_bytes())
    found[99] ^= 1  # in its headers: the values can still be read
    file.write_bytes(found)
    run(data, tmp_path / "run", 2, train__steps=5, checkpoint__every=3, checkpoint__keep=1)
    assert "step_00000006 is passed over" in capfd.readouterr().out
    assert [read.number(f) for f in read.complete(tmp_path / "run")] == [5, 6]
    assert read.Checkpoint.open(write.step_folder(tmp_path / "run", 5)).verify() == []


@pytest.mark.parametrize("number", [1, 2])
def test_a_commit_that_fails_behind_its_rename_leaves_all_shards(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    """Which master the disk has after a loss of power, nobody knows: both must find their shards."""
    run(data, tmp_path / "run", 1, train__steps=4, checkpoint__every=2)
    folder = write.step_folder(tmp_path / "run", 4)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    assert "shard_0000.h5" in before
    turned = bytearray(before["shard_0000.h5"])
    turned[99] ^= 1
    (folder / "shard_0000.h5").write_bytes(turned)  # so that step 4 is saved again
    sync, calls = write.shard.sync_folder, [0]

    def failing(path: Path) -> None:
        if (folder / "shard_0000.1.h5").exists() and not (folder / "master.h5.part").exists():
            calls[0] += 1
            if calls[0] == number + 1:  # the first is that of the shard
                raise OSError(errno.EIO, "Input/output error")
        sync(path)

    monkeypatch.setattr(write.shard, "sync_folder", failing)
    with pytest.raises(UserError, match=r"cannot be saved: Input/output error"):
        run(data, tmp_path / "run", 1, train__steps=4, checkpoint__every=2)
    assert "NOT saved" in capfd.readouterr().out
    assert {f.name for f in folder.iterdir()} == {"master.h5", "shard_0000.h5", "shard_0000.1.h5"}
