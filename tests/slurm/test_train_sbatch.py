"""The batch scripts without a cluster: stand-ins for srun, scontrol and sbatch note what they are given."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from small_run import run_toml
from tests.slurm.job import SCRIPTS, program

SCRIPT = SCRIPTS / "train.sbatch"
STEPS = 6
pytestmark = pytest.mark.slurm

# Ends when `hold` goes, or by the signal; leaves behind what the test has put into `result`, as the ranks would.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" > args
env > environment
finish() { mkdir -p out; [ ! -e result ] || cp -r result/. out; exit "$1"; }
trap 'echo saved >> heard; finish 0' USR1 TERM
echo $$ > started.part; mv started.part started
while [ -e hold ]; do sleep 0.02; done
finish "$(cat status)"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> asked
case "$1" in
  show)
    [ "$(grep -c show asked)" -gt "$(cat busy 2>/dev/null || echo 0)" ] || exit 1
    preempted="StartTime=2026-01-02T03:00:00 PreemptTime=$(cat preempted 2>/dev/null || echo None)"
    echo "JobId=7 JobState=$(cat state) Reason=None Requeue=$(cat may) $preempted Restarts=0"
    ;;
  requeue) [ "$(grep -c requeue asked)" -gt "$(cat refused 2>/dev/null || echo 0)" ] ;;
esac
"""
SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >> sent
echo "$HPCPIPE_CHAIN" >> chains
[ ! -e full ] || { echo "sbatch: error: no" >&2; exit 1; }
echo "$((100 + $(wc -l < sent)));cluster"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: the scripts, an environment, a run of a few steps, and a job 7 that runs and may be requeued."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        program(tmp_path / "bin" / name, text)
    program(tmp_path / ".venv" / "bin" / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "slurm").symlink_to(SCRIPTS)
    (tmp_path / "my run.toml").write_text(run_toml(Path("tokens"), Path("out"), train__steps=STEPS), encoding="utf-8")
    for name, text in (("state", "RUNNING"), ("may", "1"), ("status", "0")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def environment(folder: Path, **variables: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not re.match("SLURM_|HPCPIPE_|OMP_NUM|OPENBLAS_NUM", k)}
    job = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7"}
    return {**clean, "PATH": f"{folder}/bin:{os.environ['PATH']}", **job, **variables}


def start(folder: Path, *words: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(SCRIPT), *(words or ("my run.toml",))], cwd=folder, env=environment(folder, **variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status and what was said."""
    said, _ = job.communicate(timeout=60)
    return job.returncode, said


def leaves(folder: Path, checkpoint: int = 0, done: int = 0) -> None:
    """What the ranks have written when they end."""
    shutil.rmtree(folder / "result", ignore_errors=True)
    (folder / "result").mkdir()
    if checkpoint:
        (folder / "result" / f"step_{checkpoint:08}").mkdir()
        (folder / "result" / f"step_{checkpoint:08}" / "master.h5").touch()
    if done:
        (folder / "result" / "done.json").write_text(json.dumps({"steps": done}), encoding="utf-8")


def asked(folder: Path) -> list[str]:
    """What scontrol was asked to do."""
    said = (folder / "asked").read_text(encoding="utf-8").splitlines() if (folder / "asked").exists() else []
    return [line for line in said if not line.startswith("show")]


def begun(folder: Path, what: str = "started") -> None:
    deadline = time.monotonic() + 60
    while not (folder / what).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", ["train.sbatch", "probe.sbatch", "chain.sh", "env.sh"])
def test_syntax(name):
    assert subprocess.run(["bash", "-n", str(SCRIPTS / name)], capture_output=True, text=True).stderr == ""


def test_directives_ask_for_the_signal_early_enough():
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", SCRIPT.read_text(encoding="utf-8"), re.M))
    assert directives["signal"] == "B:USR1@120"
    assert {"requeue", "time", "open-mode"} <= set(directives)
    assert "ntasks" not in directives  # it would win over -N 4 --ntasks-per-node=8


def test_srun_gets_the_run_and_the_settings(folder: Path):
    leaves(folder, checkpoint=STEPS, done=STEPS)
    assert ended(start(folder, "my run.toml", "--set", "train.batch=2")) == (0, "")
    words = (folder / "args").read_text(encoding="utf-8").splitlines()
    assert words == ["--kill-on-bad-exit=0", "--wait=30", "hpcpipe", "train", "my run.toml", "--set", "train.batch=2"]
    seen = (folder / "environment").read_text(encoding="utf-8").splitlines()
    assert {"SLURM_MPI_TYPE=pmix", "SRUN_CPUS_PER_TASK=4", "OMP_NUM_THREADS=1"} <= set(seen)
    assert next(line for line in seen if line.startswith("PATH=")).startswith(f"PATH={folder}/.venv/bin:")


def test_mpirun_and_the_number_of_ranks(folder: Path):
    (folder / "bin" / "srun").rename(folder / "bin" / "mpirun")
    leaves(folder, done=STEPS)
    variables = {"HPCPIPE_LAUNCHER": "mpirun", "SLURM_JOB_NUM_NODES": "2"}
    assert ended(start(folder, **variables, SLURM_NTASKS="8"))[0] == 0
    assert (folder / "args").read_text(encoding="utf-8").split()[:4] == ["-n", "8", "hpcpipe", "train"]


def test_the_other_plugin_of_srun(folder: Path):
    leaves(folder, done=STEPS)
    assert ended(start(folder, SLURM_MPI_TYPE="pmi2"))[0] == 0
    assert "SLURM_MPI_TYPE=pmi2\n" in (folder / "environment").read_text(encoding="utf-8")


def test_in_an_array_a_word_may_hold_the_tasks_number(folder: Path):
    (folder / "out-5").mkdir()
    (folder / "out-5" / "done.json").write_text(json.dumps({"steps": STEPS}), encoding="utf-8")
    words = ("my run.toml", "--set", "seed=%a", "--set", "out=out-%a")
    assert ended(start(folder, *words, SLURM_ARRAY_TASK_ID="5")) == (
        0, f"train.sbatch: out-5 is finished: {STEPS} steps\n",
    )  # fmt: skip
    assert not (folder / "started").exists()


def test_elsewhere_the_folder_of_hpcpipe_is_asked_for(folder: Path):
    status, said = ended(start(folder, HPCPIPE_HOME=str(folder / "bin")))
    assert status == 1 and said.startswith(f"train.sbatch: there is no {folder}/bin/slurm/env.sh: ")


# ---- how it ends -----------------------------------------------------------------------------------------------------


def ask(job: subprocess.Popen[str], folder: Path, number: int) -> None:
    """As Slurm does it: SIGTERM goes to the ranks too, any other signal to the script alone."""
    begun(folder)
    job.send_signal(number)
    if number == signal.SIGTERM:
        time.sleep(0.2)  # would have been passed on by now
        assert not (folder / "heard").exists()
        os.kill(int((folder / "started").read_text(encoding="utf-8")), number)


@pytest.mark.parametrize(("number", "name"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGTERM, "SIGTERM")])
def test_asked_near_the_end_of_its_time_it_saves_and_requeues_itself(folder: Path, number: int, name: str):
    (folder / "hold").touch()
    leaves(folder, checkpoint=4)
    job = start(folder)
    ask(job, folder, number)
    status, said = ended(job)
    assert (folder / "heard").read_text(encoding="utf-8").count("saved") == 1
    assert status == 0 and asked(folder) == ["requeue 7"]
    assert said == (
        f"train.sbatch: asked to save and requeue ({name})\ntrain.sbatch: step 4 of {STEPS} is saved in out; requeued\n"
    )


@pytest.mark.parametrize(
    ("number", "file", "value", "sentence"),
    [
        (signal.SIGINT, "state", "RUNNING", "submit it again to go on"),
        (signal.SIGUSR1, "may", "0", "this job is not requeued: submit it again to go on"),
        (signal.SIGTERM, "state", "COMPLETING", "Slurm is ending this job or requeues it itself"),
    ],
)
def test_when_it_is_asked_but_must_not_requeue(folder: Path, number: int, file: str, value: str, sentence: str):
    (folder / "hold").touch()
    (folder / file).write_text(value, encoding="utf-8")
    leaves(folder, checkpoint=4)
    job = start(folder)
    ask(job, folder, number)
    status, said = ended(job)
    assert status == 0 and asked(folder) == []
    assert said.endswith(f"train.sbatch: step 4 of {STEPS} is saved in out; {sentence}\n")


def test_a_save_that_failed_is_not_called_a_good_end(folder: Path):
    program(folder / "bin" / "srun", SRUN.replace("finish 0' USR1", "finish 2' USR1"))
    (folder / "hold").touch()
    job = start(folder)
    ask(job, folder, signal.SIGINT)
    status, said = ended(job)
    assert status == 2 and said.endswith("train.sbatch: nothing is saved in out yet; submit it again to go on\n")


def test_the_record_counts_and_not_what_the_launcher_returns(folder: Path):
    leaves(folder, checkpoint=STEPS, done=STEPS)
    (folder / "status").write_text("1", encoding="utf-8")
    assert ended(start(folder)) == (0, "")


def test_a_launcher_that_returns_0_of_an_unfinished_run_is_not_believed(folder: Path):
    leaves(folder, checkpoint=2)
    status, said = ended(start(folder))
    assert status == 0 and asked(folder) == ["requeue 7"] and "step 2 of" in said


def test_a_record_of_fewer_steps_than_now_wanted_does_not_count(folder: Path):
    (folder / "out").mkdir()
    (folder / "out" / "done.json").write_text(json.dumps({"steps": STEPS - 1}), encoding="utf-8")
    leaves(folder, checkpoint=STEPS, done=STEPS)
    assert ended(start(folder)) == (0, "")
    assert (folder / "started").exists()


@pytest.mark.parametrize(("status", "requeued"), [("2", []), ("137", ["requeue 7"])])
def test_a_mistake_ends_the_job_and_a_lost_rank_does_not(folder: Path, status: str, requeued: list[str]):
    leaves(folder, checkpoint=2)
    (folder / "status").write_text(status, encoding="utf-8")
    assert ended(start(folder))[0] == (0 if requeued else 2)
    assert asked(folder) == requeued


def test_without_requeue_a_lost_rank_fails_the_job(folder: Path):
    (folder / "may").write_text("0", encoding="utf-8")
    (folder / "status").write_text("137", encoding="utf-8")
    assert ended(start(folder))[0] == 137


def hurried(folder: Path) -> Path:
    """Waiting takes no time; the file says how often it was waited."""
    program(folder / "bin" / "sleep", f"#!/bin/sh\necho >> {folder}/slept\n")
    return folder / "slept"


def test_a_refused_requeue_is_tried_again_and_then_told(folder: Path):
    slept = hurried(folder)
    leaves(folder, checkpoint=2)
    (folder / "refused").write_text("5", encoding="utf-8")
    status, said = ended(start(folder))
    assert status == 1 and "it could not be requeued: submit it again to go on" in said
    assert asked(folder) == ["requeue 7"] * 5 and slept.read_text(encoding="utf-8").count("\n") == 4
    status, said = ended(start(folder))  # the sixth is granted
    assert status == 0 and said.endswith("requeued\n") and asked(folder) == ["requeue 7"] * 6


@pytest.mark.parametrize(("busy", "state", "requeued"), [(4, "COMPLETING", 0), (4, "RUNNING", 1), (9, "COMPLETING", 1)])
def test_a_busy_controller_is_asked_again_and_then_not_waited_for(folder: Path, busy: int, state: str, requeued: int):
    """A job that it says nothing of is taken to be running."""
    slept = hurried(folder)
    (folder / "busy").write_text(str(busy), encoding="utf-8")
    (folder / "state").write_text(state, encoding="utf-8")
    leaves(folder, checkpoint=2)
    assert ended(start(folder))[0] == 0
    assert asked(folder) == ["requeue 7"] * requeued
    assert slept.read_text(encoding="utf-8").count("\n") == 4


def test_a_task_of_an_array_asks_for_itself_alone(folder: Path):
    leaves(folder, checkpoint=2)
    assert ended(start(folder, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3"))[0] == 0
    assert (folder / "asked").read_text(encoding="utf-8") == "show job -o 7_3\nrequeue 7_3\n"


def test_a_wrong_run_is_one_sentence_and_starts_nothing(folder: Path):
    status, said = ended(start(folder, "other.toml"))
    assert status == 2 and said.startswith("hpcpipe: config: there is no file other.toml") and said.count("\n") == 1
    assert not (folder / "started").exists()


def test_attempts_without_progress_stop(folder: Path):
    (folder / "status").write_text("1", encoding="utf-8")
    assert ended(start(folder))[0] == 0
    status, said = ended(start(folder))
    assert status == 1 and asked(folder) == ["requeue 7"]
    assert "stopped: 2 attempts in a row have ended without a checkpoint after step 0 of out" in said
    (folder / "started").unlink()
    assert ended(start(folder))[0] == 1  # a third one, requeued by somebody else, does not begin
    assert not (folder / "started").exists()
    assert ended(start(folder, SLURM_JOB_ID="8"))[0] == 0  # a new job counts from the start


def test_progress_begins_the_count_again(folder: Path):
    (folder / "status").write_text("1", encoding="utf-8")
    for checkpoint in (0, 2, 0, 3):
        leaves(folder, checkpoint)
        assert ended(start(folder))[0] == 0
    assert asked(folder) == ["requeue 7"] * 4


def test_progress_behind_a_damaged_checkpoint_counts(folder: Path):
    (folder / "status").write_text("1", encoding="utf-8")
    leaves(folder, checkpoint=5)
    shutil.move(folder / "result", folder / "out")
    for checkpoint in (3, 4):
        leaves(folder, checkpoint)
        status, said = ended(start(folder))
        assert status == 0 and said.endswith(f"step {checkpoint} of {STEPS} is saved in out; requeued\n")
    leaves(folder)
    assert [ended(start(folder))[0] for _ in range(2)] == [0, 1]  # neither saves


def test_a_preempted_attempt_does_not_count(folder: Path):
    program(folder / "bin" / "srun", SRUN.replace("finish 0' USR1", "finish 2' USR1"))  # nothing can be saved yet
    (folder / "hold").touch()
    for number, at in ((signal.SIGTERM, "None"), (signal.SIGTERM, "None"), (signal.SIGUSR1, "2026-01-02T03:01:00")):
        (folder / "preempted").write_text(at, encoding="utf-8")
        job = start(folder)
        ask(job, folder, number)
        assert ended(job)[0] == 0
        [(folder / name).unlink() for name in ("started", "heard")]
    assert asked(folder) == ["requeue 7"] * 3
    (folder / "preempted").write_text("2026-01-02T02:59:00", encoding="utf-8")  # in an earlier life
    for _ in range(2):  # but these do: the signal of the time limit
        job = start(folder)
        ask(job, folder, signal.SIGUSR1)
        (folder / "started").unlink()
        status, said = ended(job)
    assert status == 1 and "stopped: 2 attempts in a row" in said and asked(folder) == ["requeue 7"] * 4


def test_the_end_that_a_requeue_brings_is_no_preemption(folder: Path):
    """Slurm sends SIGTERM to a job that it requeues: the attempt counts all the same."""
    program(folder / "bin" / "scontrol", SCONTROL.replace("  requeue)", "  requeue) kill -TERM $PPID; sleep 0.1;"))
    (folder / "status").write_text("1", encoding="utf-8")
    assert [ended(start(folder))[0] for _ in range(2)] == [0, 1]


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGTERM, ["requeue 7"]), (signal.SIGINT, [])])
def test_asked_before_the_ranks_have_started(folder: Path, number: int, requeued: list[str]):
    """Python is ended, too, while it looks at the job for the first time."""
    python = folder / ".venv" / "bin" / "python"
    text = python.read_text(encoding="utf-8")
    program(python, "#!/bin/sh\necho $$ > looks.part; mv looks.part looks; while :; do sleep 0.02; done\n")
    job = start(folder)
    begun(folder, "looks")
    program(python, text)
    os.kill(int((folder / "looks").read_text(encoding="utf-8")), signal.SIGTERM)
    job.send_signal(number)
    status, said = ended(job)
    assert status == 0 and asked(folder) == requeued and not (folder / "started").exists()
    assert "nothing is saved in out yet" in said


# ---- chains ----------------------------------------------------------------------------------------------------------


def links(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPTS / "chain.sh"), *words], cwd=folder, env=environment(folder), capture_output=True, text=True
    )


def test_every_link_waits_for_the_one_before(folder: Path):
    done = links(folder, "3", "-N", "2", "--", "my run.toml", "--set", "seed=3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "101\n102\n103\n", "")
    rest = f"-N 2 {folder}/slurm/train.sbatch my run.toml --set seed=3"
    after = ["", "--dependency=afterany:101 ", "--dependency=afterany:102 "]
    sent = (folder / "sent").read_text(encoding="utf-8").splitlines()
    assert sent == [f"--parsable --no-requeue {each}{rest}" for each in after]
    assert len(set((folder / "chains").read_text(encoding="utf-8").splitlines())) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("my run.toml",), "the first word is the number of jobs, not 'my run.toml'"),
        (("2", "-N", "2", "my run.toml"), "the run's TOML is missing after --"),
        (("1", "--array=1-4", "--", "my run.toml", "--set", "seed=%a"), "every task of an array needs a folder"),
    ],
)
def test_a_wrong_chain_is_refused_with_a_sentence(folder: Path, words: tuple[str, ...], sentence: str):
    done = links(folder, *words)
    assert done.returncode == 2 and done.stderr.startswith(f"chain.sh: {sentence}") and not (folder / "sent").exists()


def test_a_chain_that_cannot_be_sent_ends(folder: Path):
    (folder / "full").touch()
    done = links(folder, "3", "--", "my run.toml")
    assert done.returncode == 1 and len((folder / "sent").read_text(encoding="utf-8").splitlines()) == 1
