"""Saving beside the steps: what is written is the state of its step, however long it takes; one job in a folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcpipe.checkpoint import read, write
from hpcpipe.checkpoint.lock import FILE, Lock
from hpcpipe.config import UserError
from hpcpipe.runtime.optimizer import AdamW
from hpcpipe.steps import Steps
from small_run import run, write_tokens
from tests.runtime.checkpoint_state import save, state

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

    monkeypatch.setattr(write, "make_room", clearing)
    monkeypatch.setattr(write, "write_shard", writing)
    run(data, tmp_path / "run", 2, train__steps=4, checkpoint__every=2)
    assert told == ["room", "write", "write"] * 2


@pytest.mark.usefixtures("slow")
def test_what_is_being_written_becomes_a_checkpoint_though_the_run_ends_badly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = AdamW.squares, [0]

    def squares(self: AdamW, into: np.ndarray) -> None:
        whole(self, into)
        calls[0] += 1
        if calls[0] > 8:  # two ranks: some each for the rehearsal, then one for each of two steps
            into[:] = np.nan

    monkeypatch.setattr(AdamW, "squares", squares)
    with pytest.raises(UserError, match=r"step \d+: .* are not finite"):
        run(data, tmp_path / "run", 2, train__steps=50, checkpoint__every=1, checkpoint__keep=0)
    found = read.complete(tmp_path / "run")
    assert found == read.step_folders(tmp_path / "run")
    for folder in found:
        assert read.Checkpoint.open(folder).verify() == []
    Lock(tmp_path / "run").release()  # nobody holds the folder any more


# --- what is kept


def test_multiples_of_a_step_are_kept(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "run", 1, train__steps=7, checkpoint__every=1, checkpoint__keep=2, checkpoint__keep_every=3)
    assert [read.number(f) for f in read.complete(tmp_path / "run")] == [3, 6, 7]


def full(monkeypatch: pytest.MonkeyPatch, out: Path, room: int) -> None:
    """A disk with room for so many checkpoints of 100 bytes."""

    def usage(_: Path) -> SimpleNamespace:
        return SimpleNamespace(free=100 * (room - len(read.step_folders(out))))

    monkeypatch.setattr(write.shutil, "disk_usage", usage)


def test_on_a_full_disk_the_oldest_go_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, state(step))
    full(monkeypatch, tmp_path, 4)
    assert [line.split()[1] for line in write.make_room(tmp_path, 200)] == ["step_00000001", "step_00000002"]
    assert [read.number(f) for f in read.complete(tmp_path)] == [3, 4]
    assert write.make_room(tmp_path, 10**9) == []  # it would not be enough
    assert [read.number(f) for f in read.complete(tmp_path)] == [3, 4]


def test_what_makes_no_room_ends_the_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, state(step))
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))  # as with snapshots
    assert len(write.make_room(tmp_path, 200)) == 1
    assert [read.number(f) for f in read.complete(tmp_path)] == [2, 3, 4]


def test_nothing_goes_for_a_newest_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(tmp_path, step, state(step))
    next(write.step_folder(tmp_path, 2).glob("shard_*")).unlink()
    full(monkeypatch, tmp_path, 2)
    assert write.make_room(tmp_path, 100) == []
    assert [read.number(f) for f in read.complete(tmp_path)] == [1, 2]


# --- one job in a folder

HOLDER = """
import sys, time
from pathlib import Path
from hpcpipe.checkpoint.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder: Path, **env: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | env)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_a_second_job_is_refused_and_told_who_has_the_folder(data: Path, tmp_path: Path) -> None:
    other = holder(tmp_path, SLURM_JOB_ID="4711")
    try:
        with pytest.raises(UserError, match=rf"in use by process {other.pid} on \S+ since \S+ \(job 4711\); wait for"):
            run(data, tmp_path, 2)
        assert not read.step_folders(tmp_path)
    finally:
        other.kill()
        other.wait()


def test_a_folder_whose_holder_was_killed_is_taken_over(data: Path, tmp_path: Path) -> None:
    other = holder(tmp_path)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / FILE).exists()
    run(data, tmp_path, 1)
    assert not (tmp_path / FILE).exists() and read.complete(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("hpcpipe.checkpoint.lock.fcntl.lockf", refuse)
    lock = Lock(tmp_path)
    assert "cannot be locked here" in lock.warning
    lock.release()
