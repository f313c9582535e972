"""One job in a run's folder: who comes second is told, or waits; who is gone holds nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpcpipe.checkpoint import lock as locks
from hpcpipe.checkpoint import read
from hpcpipe.checkpoint.lock import FILE, PLAIN, Lock
from hpcpipe.config import UserError
from small_run import run, write_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


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


def test_a_second_job_is_refused_and_told_who_has_the_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
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
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on .*; if it has ended, remove {tmp_path}"):
        Lock(tmp_path)
    assert (tmp_path / PLAIN).exists()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_holder_that_is_gone_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcpipe.checkpoint.lock.UNSUPPORTED", (errno.EPERM,))

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr("hpcpipe.checkpoint.lock.fcntl.lockf", refuse)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    who = locks._who() | {"pid": child.pid}
    (tmp_path / PLAIN).write_text(json.dumps(who | {"host": "elsewhere"}))
    with pytest.raises(UserError, match=f"by process {child.pid} on elsewhere"):
        Lock(tmp_path)
    (tmp_path / PLAIN).write_text(json.dumps(who))
    lock = Lock(tmp_path)
    assert json.loads((tmp_path / PLAIN).read_text())["pid"] == os.getpid()
    lock.release()


def test_a_job_of_slurm_waits_for_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(locks, "PAUSE", 0.05)
    other = holder(tmp_path, SLURM_JOB_ID="11")
    timer = threading.Timer(0.5, other.kill)
    timer.start()
    Lock(tmp_path).release()
    timer.join()
    assert other.wait() == -signal.SIGKILL
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and told.startswith("waiting up to 180 s: out: ") and "(job 11)" in told
    monkeypatch.setattr(locks, "PATIENCE", 0.2)
    other = holder(tmp_path, SLURM_JOB_ID="11")
    try:
        with pytest.raises(UserError, match="in use by process"):
            Lock(tmp_path)
    finally:
        other.kill()
        other.wait()
