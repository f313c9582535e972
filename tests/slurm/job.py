"""A job on the testbed as a test sees it: submitted from a folder, watched, frozen in mid-run, asked things, awaited.

A frozen job is one whose ranks stand still (SIGSTOP): whatever a test does to it then happens in the middle of a run
that takes a second, however slow the machine is.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
FAST = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}  # a second less to start: no probing for fabrics
PLACE = "# ---- the end of them"  # in env.sh, after the site's own lines
STEPS_BEFORE = 3  # a run is frozen after these
PATIENCE = 180  # seconds; a busy machine takes ten times as long as a quiet one
T = TypeVar("T")


class Job(NamedTuple):
    """A job in Slurm's queue, or one task of an array (JOB_TASK), its log and the folder it was submitted from."""

    id: str
    folder: Path

    def about(self) -> dict[str, str]:
        """What ``scontrol show job`` says, key by key."""
        said = slurm("scontrol", "show", "job", "-o", self.id)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def state(self) -> str:
        return self.about()["JobState"]

    def log(self) -> str:
        file = self.folder / f"{self.id}.log"
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def wait_for(self, what: Callable[[], T], timeout: float = PATIENCE) -> T:
        """Until ``what`` is true; fails with the job's log."""
        deadline = time.monotonic() + timeout
        while not (found := what()):
            assert time.monotonic() < deadline, f"job {self.id} after {timeout} s: {self.about()}\n{self.log()}"
            time.sleep(0.05)
        return found

    def says(self, text: str, timeout: float = PATIENCE) -> None:
        """Until the log has these words."""
        self.wait_for(lambda: text in self.log(), timeout)

    def restarted(self, times: int = 1, timeout: float = PATIENCE) -> None:
        """Until Slurm has taken the job back into the queue; it may start at once then, not minutes later."""
        self.wait_for(lambda: int(self.about()["Restarts"]) >= times and self.state() != "COMPLETING", timeout)
        self.wake()

    def wake(self) -> None:
        """A requeued job waits two minutes; not this one."""
        time.sleep(1.2)  # what begins and what ended in one second is one life of the job to Slurm
        if self.state() == "PENDING":
            slurm("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def ended(self, timeout: float = PATIENCE) -> dict[str, str]:
        """Until it is over; what is known of it then."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.state() in over, timeout)
        return self.about()

    # --- in mid-run

    def freeze(self, out: Path, saved: bool = False) -> list[int]:
        """Stops all ranks after a few steps of the run in ``out``, or after its first checkpoint; their process ids."""
        metrics = out / "metrics.jsonl"

        def far() -> bool:
            steps = metrics.read_text(encoding="utf-8").count('"loss"') if metrics.exists() else 0
            return steps >= STEPS_BEFORE and (not saved or any(out.glob("step_*/master.h5")))

        self.wait_for(far)
        pids = self.ranks()
        self.signal(signal.SIGSTOP, pids)
        assert pids, f"job {self.id} was over before it was frozen: {self.log()}"
        return pids

    def ranks(self) -> list[int]:
        """The processes of this job that train."""
        array, _, task = self.id.partition("_")
        said = [f"SLURM_ARRAY_JOB_ID={array}", f"SLURM_ARRAY_TASK_ID={task}"] if task else [f"SLURM_JOB_ID={array}"]
        marks, found = {word.encode() for word in said}, []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                trains = b"python" in words[0] and words[1].endswith(b"/hpcpipe") and words[2] == b"train"
                if trains and marks <= set((process / "environ").read_bytes().split(b"\0")):
                    found.append(int(process.name))
        return found

    def signal(self, number: int, pids: Sequence[int] = ()) -> None:
        """To processes of this job, by default all ranks."""
        for pid in pids or self.ranks():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)


def submit(folder: Path, *words: str, script: str = "train.sbatch", **variables: str) -> Job:
    """``sbatch OPTIONS... SCRIPT WORDS...`` from ``folder``; options are the words before "--"."""
    cut = words.index("--")
    command = ["sbatch", "--parsable", "--output=%j.log", *words[:cut], str(SCRIPTS / script), *words[cut + 1 :]]
    return Job(slurm(*command, folder=folder, **variables).strip(), folder)


def chain(folder: Path, *words: str, **variables: str) -> list[Job]:
    """The jobs that ``chain.sh WORDS...`` submits."""
    said = slurm(str(SCRIPTS / "chain.sh"), *words, folder=folder, **variables)
    return [Job(id, folder) for id in said.split()]


def home(folder: Path, lines: str, environment: Path = ROOT / ".venv") -> Path:
    """A copy of what a user has, with lines of a site in env.sh and a .venv."""
    (folder / "slurm").mkdir(parents=True)
    text = (SCRIPTS / "env.sh").read_text(encoding="utf-8")
    assert text.count(PLACE) == 1
    (folder / "slurm" / "env.sh").write_text(text.replace(PLACE, f"{lines}\n{PLACE}"), encoding="utf-8")
    (folder / ".venv").symlink_to(environment)
    return folder


def stand_in(folder: Path, hpcpipe: str) -> Path:
    """The same with a program of the test's in place of hpcpipe, as a shell script's text."""
    mine = home(folder, "")
    (mine / ".venv").unlink()
    program(mine / ".venv" / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    program(mine / ".venv" / "bin" / "hpcpipe", f"#!/bin/sh\n{hpcpipe}\n")
    return mine


def program(file: Path, text: str) -> Path:
    """An executable script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)
    return file


def slurm(*command: str, folder: Path = ROOT, **variables: str) -> str:
    """What a command of Slurm prints. Fails where there is no testbed, or with what the command said."""
    testbed = os.environ.get("HPCPIPE_TESTBED")
    assert testbed, "there is no Slurm to test on: run `make test-slurm`, which starts one"
    clean = {k: v for k, v in os.environ.items() if not re.match("SLURM_|SBATCH_|OMPI_|PMI|PRTE_|HPCPIPE_", k)}
    env = {**clean, "SLURM_CONF": f"{testbed}/slurm.conf", "HPCPIPE_HOME": str(ROOT), **FAST, **variables}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    sys.stderr.write(done.stderr)
    return done.stdout
