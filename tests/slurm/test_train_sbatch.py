"""The batch script without a cluster: a stand-in srun on the PATH records what it is given and hears the signal."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "slurm" / "train.sbatch"
pytestmark = pytest.mark.slurm

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > args
env > environment
trap 'echo saved > heard; exit 7' USR1
echo $$ > started.part; mv started.part started
while [ -e hold ]; do sleep 0.02; done
exit 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    return tmp_path


def start(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "4"}
    return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=folder, env=env)


def test_syntax():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True, text=True).stderr == ""


def test_directives_ask_for_the_signal_early_enough():
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SCRIPT.read_text(), re.M))
    assert directives["signal"] == "B:USR1@120"
    assert {"requeue", "time", "ntasks", "open-mode"} <= set(directives)


def test_srun_gets_the_run_and_its_status_is_the_jobs(folder: Path):
    job = start(folder, "my run.toml", "--set", "train.steps=3")
    assert job.wait(30) == 3
    words = (folder / "args").read_text().splitlines()
    assert words[-5:] == ["hpcpipe", "train", "my run.toml", "--set", "train.steps=3"]
    seen = (folder / "environment").read_text().splitlines()
    assert {"SLURM_MPI_TYPE=pmix", "SRUN_CPUS_PER_TASK=4"} <= set(seen)
    assert next(line for line in seen if line.startswith("PATH=")).startswith(f"PATH={folder}/.venv/bin:")


def test_the_signal_before_the_limit_reaches_the_ranks_and_the_job_waits_for_them(folder: Path):
    (folder / "hold").touch()
    job = start(folder, "run.toml")
    deadline = time.monotonic() + 30
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    try:
        assert job.wait(30) == 7
    finally:
        (folder / "hold").unlink()
    assert (folder / "heard").read_text() == "saved\n"
