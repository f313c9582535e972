"""One rank's process is stopped: every other names it, its host and what it owes, the job ends, and the next start goes
on from the newest checkpoint with the bits of a run that was never disturbed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpcpipe.checkpoint import read
from small_run import collect, run, run_toml, write_tokens
from tests.mpi import launch

pytestmark = pytest.mark.mpi
MPIS = pytest.mark.parametrize("which", [launch.first, launch.second], ids=["first", "mpich"])
TRAIN = ("-m", "hpcpipe", "train")
TIMEOUT = 4.0  # pipeline.timeout
MARGIN = 30.0  # more than that until the job has ended: it takes three; the machine may be busy
HOST = re.escape(platform.node())
# A rate that does not depend on where the run ends, so that a run may be ended anywhere and compared with a whole one.
SETTINGS = {
    "train__steps": 100000, "optimizer__schedule": "wsd", "optimizer__decay_steps": 1, "pipeline__timeout": TIMEOUT,
    "checkpoint__every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def write_run(data: Path, folder: Path, **settings: object) -> str:
    (folder / "run.toml").write_text(run_toml(data, folder / "out", **{**SETTINGS, **settings}), encoding="utf-8")
    return str(folder / "run.toml")


def ends(process: subprocess.Popen[str], program: Sequence[str]) -> launch.Done:
    """The end of a job that has a stopped rank; it must come in time, and whatever happens no process may stay."""
    ranks = launch.ranks(process, program)
    began = time.monotonic()
    while not any(stopped(pid) for pid in ranks) and time.monotonic() - began < 60:
        time.sleep(0.05)
        ranks = launch.ranks(process, program)
    began = time.monotonic()
    try:
        done = launch.finish(process, timeout=TIMEOUT + MARGIN + 30)
    finally:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - began < TIMEOUT + MARGIN
    assert done.status != 0 and "Traceback" not in done.out, done.out
    assert "the job ends, start it again to continue from its newest checkpoint" in done.out
    return done


def stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def rank_of(pid: int) -> int:
    """The rank that a process was started as."""
    found = dict(word.partition(b"=")[::2] for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return int(found.get(b"OMPI_COMM_WORLD_RANK") or found[b"PMI_RANK"])


def named(done: launch.Done, culprit: int, others: Sequence[int], owes: str) -> None:
    """Each of the others has said one sentence that ends in the culprit and what it owes (a pattern).

    On a busy machine somebody may have asked, for good reasons, before the rank stopped, and it may have answered.
    """
    last = r"(, stood last at .* and owes| and owes| and stood last at)"
    end = rf"rank {culprit} \(host {HOST}\) has not answered for \d+ s{last} ({owes})"
    for rank in others:
        said = re.findall(rf"rank {rank} \(host {HOST}\) has waited .*", done.out)
        assert len(said) == 1 and re.search(end + "$", said[0]), done.out


def goes_on(mpi: launch.Mpi, config: str, data: Path, folder: Path, at_least: int = 0, **settings: object) -> None:
    """The next start resumes from the newest checkpoint and ends with the bits of an undisturbed run."""
    newest = read.Checkpoint.open(read.complete(folder / "out")[-1])
    assert newest.verify() == [] and newest.step >= at_least
    steps = newest.step + 3
    more = ("--set", f"train.steps={steps}")
    done = launch.run(mpi, 4, (*TRAIN, config, *more), timeout=120)
    assert done.status == 0 and f"resumed from {newest.path} at step {newest.step}" in done.out, done.out
    assert not (folder / "out/standing").exists()
    whole = run(data, folder / "whole", 1, **{**SETTINGS, **settings, "train__steps": steps, "checkpoint__every": 0})
    on = collect(folder / "out")
    assert on.losses == whole.losses and on.tensors == whole.tensors


@MPIS
def test_a_stopped_rank_is_named_by_every_other_and_the_next_start_goes_on(which, data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path)
    process = launch.start(which(), 4, (*TRAIN, config))
    until_step(process, tmp_path, 5)
    victim = next(pid for pid in launch.ranks(process, TRAIN) if rank_of(pid) == 1)
    os.kill(victim, signal.SIGSTOP)
    done = ends(process, TRAIN)
    op = r"[FBW]1\.\d \(stage 1, microbatch \d\)"
    named(done, 1, (0, 2, 3), rf"{op}|the \S+ .*: it is at {op} or later|the checkpoint of step \d+ \(stage 1\)")
    goes_on(which(), config, data, tmp_path, at_least=3)


def hang(which, data: Path, tmp_path: Path, point: str, rank: int, turn: int, **settings: object) -> launch.Done:
    """A run of four ranks in which one stops after it has done something for the turn-th time."""
    program = ("-m", "tests.mpi.failing", "stands still", point, str(rank), str(turn))
    config = write_run(data, tmp_path, **settings)
    return ends(launch.start(which(), 4, (*program, "train", config)), program)


@MPIS
def test_the_chain_of_waits(which, data: Path, tmp_path: Path) -> None:
    """A rank that stops before it begins a step holds up one after the other."""
    done = hang(which, data, tmp_path, "fed", 0, 4)
    named(done, 0, (1, 2, 3), r"F0\.0 \(stage 0, microbatch 0\)")
    assert re.search(
        rf"rank 3 \(host {HOST}\) has waited \d s in step 4 for F2\.0 from rank 2: rank 2 waits for F1\.0 from rank 1, "
        r"rank 1 waits for F0\.0 from rank 0, rank 0 ", done.out,
    ), done.out  # fmt: skip


def test_a_rank_that_does_not_come_to_the_sum(data: Path, tmp_path: Path) -> None:
    done = hang(launch.first, data, tmp_path, "stepped", 3, 4, pipeline__replicas=2)
    what = "the sum over all ranks after step 4"
    tied = "the other end of a tied gradient in step 4"  # rank 2 has the one
    named(done, 3, (0, 1, 2), rf"({what}|{tied}): it is at W1\.2 \(stage 1, microbatch 2\) or later")
    assert re.search(rf"rank 1 \(host {HOST}\) has waited \d s for {what}: rank 3 ", done.out), done.out


@pytest.mark.parametrize(
    ("point", "rank"), [("wrote a shard", 2), pytest.param("wrote a master", 0, marks=pytest.mark.long)]
)
def test_a_rank_that_stops_in_a_checkpoint(point: str, rank: int, data: Path, tmp_path: Path) -> None:
    """The checkpoint in the making is none, and the one before it is whole. It is written beside the next steps, so the
    process stands still wherever it is in one of them.
    """
    done = hang(launch.first, data, tmp_path, point, rank, 2)
    op = rf"[FBW]{rank}\.\d \(stage {rank}, microbatch \d\)"
    owed = rf"the checkpoint of step 6 \(stage {rank}\)|{op}|the \S+ .*: it is at {op} or later"
    named(done, rank, [r for r in range(4) if r != rank], owed)
    # A launcher may wake a stopped process before it kills it, and a rank may just have the time to finish.
    found = [f.name for f in read.complete(tmp_path / "out")]
    assert found[0] == "step_00000003" and found[1:] in ([], ["step_00000006"])
    assert (tmp_path / "out/step_00000006").exists()
    goes_on(launch.first(), str(tmp_path / "run.toml"), data, tmp_path)


def until_step(process: subprocess.Popen[str], folder: Path, step: int, timeout: float = 60) -> None:
    """Waits until a run has written that many steps down; a run that does not is ended."""
    metrics, end = folder / "out/metrics.jsonl", time.monotonic() + timeout
    while time.monotonic() < end:
        lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        if sum("loss" in json.loads(line) for line in lines) >= step:
            return
        time.sleep(0.05)
    launch.end(process)
    raise AssertionError(f"no step {step} after {timeout} s")
