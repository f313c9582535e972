"""The batch scripts on a real Slurm of four emulated hosts: every way in which a job can end, and go on, bit for bit.

`make test-slurm` starts the testbed. Wherever a run was interrupted, its losses and its final parameters and moments
are those of the same run in one process that nobody disturbed.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from small_run import Result, collect, run, run_toml, write_tokens
from tests.slurm.job import ROOT, Job, chain, home, program, slurm, stand_in, submit
from tests.slurm.testbed.cluster import NODES, Cluster

pytestmark = pytest.mark.slurm_real
STEPS = 200
SAVING = "every = 2"
SETTINGS = {"train__steps": STEPS, "model__layers": 4, "checkpoint__every": 100_000, "optimizer__lr": 0.003}
TWO = ("-N2", "--ntasks-per-node=1", "--time=10")
FOUR = ("-N4", "--ntasks-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """The run in one process."""
    return run(data, tmp_path_factory.mktemp("undisturbed") / "out", **SETTINGS)


@pytest.fixture
def folder(data: Path, tmp_path: Path) -> Iterator[Path]:
    """Where a user types: run.toml, whose run goes to out. What is left in the queue afterwards is cancelled."""
    (tmp_path / "run.toml").write_text(run_toml(data, Path("out"), **SETTINGS), encoding="utf-8")
    yield tmp_path
    slurm("scancel", "--signal=KILL", "--full", "--user=root")
    slurm("scancel", "--user=root")


def same(folder: Path, job: Job, undisturbed: Result, out: str = "out") -> None:
    """The run is finished, by its record, and nobody can see that it was interrupted."""
    assert (folder / out / "done.json").exists(), job.log()
    found = collect(folder / out)
    assert found.losses == undisturbed.losses and len(found.losses) == STEPS, job.log()
    assert found.tensors == undisturbed.tensors, job.log()


def often(folder: Path, data: Path) -> Path:
    """A folder whose run saves every other step."""
    folder.mkdir(exist_ok=True)
    text = run_toml(data, Path("out"), **{**SETTINGS, "checkpoint__every": 2})
    (folder / "run.toml").write_text(text, encoding="utf-8")
    return folder


def rarely(file: Path) -> None:
    """From its next start on the run saves at its end only: every save costs the slowest disk's time."""
    text = file.read_text(encoding="utf-8")
    assert SAVING in text
    file.write_text(text.replace(SAVING, "every = 100000"), encoding="utf-8")


def over(job: Job, state: str, restarts: int = 0, code: str = "0:0") -> None:
    """The job ended in this way, after so many restarts."""
    about = job.ended()
    assert (about["JobState"], about["ExitCode"], about["Restarts"]) == (state, code, str(restarts)), job.log()


def finished(folder: Path, job: Job, undisturbed: Result, restarts: int = 0) -> None:
    """The job ended well, after so many restarts, and so did the run."""
    over(job, "COMPLETED", restarts)
    assert job.log().count("resumed from") >= restarts
    same(folder, job, undisturbed)


# ---- launchers -------------------------------------------------------------------------------------------------------


def test_srun_and_pmix_on_four_nodes(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *FOUR, "--", "run.toml")
    finished(folder, job, undisturbed)
    again = submit(folder, *FOUR, "--", "run.toml")
    over(again, "COMPLETED")
    assert again.log() == f"train.sbatch: out is finished: {STEPS} steps\n"


def test_srun_and_pmi2_of_another_mpi_by_the_sites_lines(folder: Path, undisturbed: Result) -> None:
    lines = 'export HPCPIPE_LAUNCHER=pmi2 PATH="$HPCPIPE_HOME/bin:$PATH"'
    mine = home(folder / "home", lines, Path(os.environ.get("SECOND_MPI", ROOT / ".venv-mpich")))
    program(mine / "bin" / "hpcpipe", '#!/bin/sh\nexec python -m hpcpipe "$@"\n')
    job = submit(folder, *TWO, "--", "run.toml", HPCPIPE_HOME=str(mine))
    finished(folder, job, undisturbed)


def test_mpirun(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *TWO, "--", "run.toml", HPCPIPE_LAUNCHER="mpirun")
    job.freeze(folder / "out")
    slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.says("asked to save and requeue (SIGUSR1)")
    job.thaw()
    job.restarted()
    finished(folder, job, undisturbed, restarts=1)


@pytest.mark.parametrize(
    ("options", "seen"),
    [(("-N2", "--ntasks=4", "--ntasks-per-node=2", "--gpus-per-task=1"), 1),
     (("-N2", "--ntasks-per-node=2", "--gpus-per-node=2"), 2)],
    ids=["per-task", "per-node"],
)  # fmt: skip
def test_each_rank_sees_its_gpu_or_those_of_its_node(folder: Path, options: tuple[str, ...], seen: int) -> None:
    mine = stand_in(folder / "home", 'echo "gpus $(hostname) $CUDA_VISIBLE_DEVICES"; sleep 1; exit 2')
    job = submit(folder, *options, "--", "run.toml", HPCPIPE_HOME=str(mine))
    over(job, "FAILED", code="2:0")
    gpus = re.findall(r"^gpus (\S+) (\S+)$", job.log(), re.M)
    assert len(gpus) == 4 and {len(devices.split(",")) for _, devices in gpus} == {seen}, job.log()
    assert len({(node, device) for node, devices in gpus for device in devices.split(",")}) == 4


# ---- the end of a job's time, and of a user's patience ---------------------------------------------------------------


def test_the_time_limit_saves_requeues_and_goes_on(folder: Path, undisturbed: Result) -> None:
    # Slurm looks every half minute, and half a minute ahead: between 10 and 40 seconds after the start.
    job = submit(folder, *TWO, "--time=1", "--signal=B:USR1@20", "--", "run.toml")
    job.freeze(folder / "out")
    job.says("asked to save and requeue (SIGUSR1)")
    job.thaw()
    job.says("is saved in out; requeued")
    job.restarted()
    slurm("scontrol", "update", f"JobId={job.id}", "TimeLimit=10")  # a slow machine must not reach it again
    finished(folder, job, undisturbed, restarts=1)


def test_without_requeue_it_ends_and_the_next_job_goes_on(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *TWO, "--no-requeue", "--", "run.toml")
    job.freeze(folder / "out")
    slurm("scancel", "--batch", "--signal=USR1", job.id)
    job.says("asked to save")
    job.thaw()
    over(job, "COMPLETED")
    assert "is saved in out; this job is not requeued: submit it again to go on" in job.log()
    assert not (folder / "out" / "done.json").exists()
    finished(folder, submit(folder, *FOUR, "--", "run.toml"), undisturbed)


def test_asked_to_end_it_saves_and_is_not_requeued(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *TWO, "--", "run.toml")
    job.freeze(folder / "out")
    slurm("scancel", "--batch", "--signal=INT", job.id)
    job.says("asked to save and end (SIGINT)")
    job.thaw()
    over(job, "COMPLETED")
    assert "is saved in out; submit it again to go on" in job.log()
    finished(folder, submit(folder, *TWO, "--", "run.toml"), undisturbed)


def test_a_cancelled_job_has_saved(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *TWO, "--", "run.toml")
    job.freeze(folder / "out")
    slurm("scancel", job.id)
    assert job.ended()["JobState"] == "CANCELLED", job.log()
    job.says("is saved in out; Slurm is ending this job")
    finished(folder, submit(folder, *TWO, "--", "run.toml"), undisturbed)


# ---- requeued by others ----------------------------------------------------------------------------------------------


def test_requeued_by_hand(folder: Path, undisturbed: Result) -> None:
    job = submit(folder, *TWO, "--", "run.toml")
    job.freeze(folder / "out")
    slurm("scontrol", "requeue", job.id)
    job.restarted()
    assert "stopped, as asked" in job.log()
    finished(folder, job, undisturbed, restarts=1)


def urgent(folder: Path) -> Job:
    """A job that all others must make room for."""
    options = ("--partition=urgent", "-N4", "--exclusive", "--output=urgent.log")
    return Job(slurm("sbatch", "--parsable", *options, "--wrap", "hostname", folder=folder).strip(), folder)


@pytest.mark.parametrize(("partition", "end"), [("normal", "requeued"), ("hasty", "Slurm is ending this job")])
def test_preempted(partition: str, end: str, folder: Path, undisturbed: Result) -> None:
    """With a grace time the ranks hear of it and the job requeues itself; without, Slurm does both at once."""
    job = submit(folder, *TWO, f"--partition={partition}", "--", "run.toml")
    job.freeze(folder / "out")
    other = urgent(folder)
    job.restarted()
    assert "stopped, as asked" in job.log() and f"is saved in out; {end}" in job.log()
    assert other.ended()["JobState"] == "COMPLETED"
    finished(folder, job, undisturbed, restarts=1)


def test_preempted_before_the_ranks_start(folder: Path) -> None:
    """While the script takes its first look at the run, it is requeued all the same."""
    mine = stand_in(folder / "home", "echo the ranks have started; exit 2")
    python = mine / ".venv" / "bin" / "python"
    once = f"! mkdir {folder}/looks || exec sleep 60\nexec"
    program(python, python.read_text(encoding="utf-8").replace("exec", once))
    job = submit(folder, *TWO, "--partition=hasty", "--", "run.toml", HPCPIPE_HOME=str(mine))
    job.wait_for((folder / "looks").exists)
    urgent(folder)
    job.restarted()
    assert "asked to save and requeue (SIGTERM)" in job.log()
    assert "nothing is saved in out yet; Slurm is ending" in job.log() and "have started" not in job.log()
    over(job, "FAILED", restarts=1, code="2:0")
    assert "the ranks have started" in job.log()


def test_a_preempted_attempt_is_not_counted(folder: Path) -> None:
    """In the grace time, of which the script is not told."""
    mine = stand_in(folder / "home", f"mkdir {folder}/began || exit 2; exec sleep 60")
    job = submit(folder, "--ntasks=1", "--", "run.toml", HPCPIPE_HOME=str(mine), HPCPIPE_TRIES="1")
    job.wait_for((folder / "began").exists)
    urgent(folder)
    job.restarted()
    assert "nothing is saved in out yet; requeued\n" in job.log()
    over(job, "FAILED", restarts=1, code="2:0")


def test_a_killed_rank(folder: Path, data: Path, undisturbed: Result) -> None:
    job = submit(often(folder, data), *TWO, "--", "run.toml")
    pids = job.freeze(folder / "out", saved=True)
    rarely(folder / "run.toml")
    os.kill(pids[0], signal.SIGKILL)
    job.thaw()
    job.says("the ranks ended with status")
    job.restarted()
    finished(folder, job, undisturbed, restarts=1)


# ---- what must not go on ---------------------------------------------------------------------------------------------


def test_a_mistake_is_not_tried_again(folder: Path) -> None:
    job = submit(folder, *TWO, "--", "run.toml", "--set", "data.path=nowhere")
    over(job, "FAILED", code="2:0")
    assert job.log().count("hpcpipe: ") == 1 and "Traceback" not in job.log()


def test_a_run_that_gets_nowhere_stops(folder: Path) -> None:
    mine = stand_in(folder / "home", "kill -9 $$")
    job = submit(folder, *TWO, "--", "run.toml", HPCPIPE_HOME=str(mine))
    job.restarted()
    over(job, "FAILED", restarts=1, code="1:0")
    assert "stopped: 2 attempts in a row have ended without a checkpoint after step 0 of out" in job.log()


# ---- chains and arrays -----------------------------------------------------------------------------------------------


def test_a_chain_of_jobs_finishes_a_run(folder: Path, undisturbed: Result) -> None:
    first, second, third = chain(folder, "3", *TWO, "--output=%j.log", "--", "run.toml")
    assert second.about()["Dependency"] == f"afterany:{first.id}(unfulfilled)"
    first.freeze(folder / "out")
    slurm("scancel", "--batch", "--signal=USR1", first.id)
    first.says("asked to save")
    first.thaw()
    over(first, "COMPLETED")
    finished(folder, second, undisturbed)
    assert "resumed from" in second.log()
    over(third, "COMPLETED")
    assert third.log() == f"train.sbatch: out is finished: {STEPS} steps\n"


def test_an_array_trains_every_seed_in_a_folder_of_its_own(folder: Path, undisturbed: Result) -> None:
    words = ("--", "run.toml", "--set", "seed=%a", "--set", "out=seed-%a")
    (job,) = chain(folder, "1", "--array=11,12", "--ntasks=2", "--time=10", "--output=%A_%a.log", *words)
    log = folder / f"{job.id}_11.log"
    said = job.wait_for(lambda: "JobState=COMPLETED" in (s := slurm("scontrol", "show", "job", "-o", job.id)) and s)
    job.wait_for(lambda: slurm("squeue", "-h", "-j", job.id) == "")
    assert said and "resumed" not in log.read_text(encoding="utf-8")
    same(folder, job, undisturbed, "seed-11")  # the seed of run.toml
    other = collect(folder / "seed-12")
    assert len(other.losses) == STEPS and other.losses != undisturbed.losses


def test_every_task_of_an_array_requeues_itself_alone(folder: Path, undisturbed: Result) -> None:
    words = ("--", "run.toml", "--set", "out=task-%a")
    whole = submit(folder, "--array=1,2", "--ntasks=2", "--time=10", "--output=%A_%a.log", *words)
    tasks = {f"task-{number}": Job(f"{whole.id}_{number}", folder) for number in (1, 2)}
    for out, job in tasks.items():
        job.freeze(folder / out)
    for job in tasks.values():
        slurm("scancel", "--batch", "--signal=USR1", job.id)
        job.says("asked to save and requeue (SIGUSR1)")
    for out, job in tasks.items():  # the second one stands still until the first one is back
        job.thaw()
        job.restarted()
        over(job, "COMPLETED", restarts=1)
        same(folder, job, undisturbed, out)
    assert all(job.log().count("; requeued") == 1 for job in tasks.values())


# ---- what a site has -------------------------------------------------------------------------------------------------


def test_the_probe_finds_what_is_there(folder: Path) -> None:
    job = submit(folder, "-N4", "--ntasks-per-node=1", "--gpus-per-node=2", "--", script="probe.sbatch")
    assert job.ended()["ExitCode"] == "0:0", job.log()
    log = job.log()
    for node in NODES:
        assert re.search(rf"^{node} +\d+ +\d+ GiB 2 +none +eth0 +yes +yes$", log, re.M), log
    assert re.search(r"^srun can do +.*pmix.*pmi2", log, re.M), log
    assert re.search(r"^pmix +\d+ ms", log, re.M) and re.search(r"^mpirun +\d+ ms", log, re.M), log
    assert re.search(r"^pmi2 +no: .*Open MPI", log, re.M), log
    assert "READY: HPCPIPE_LAUNCHER=pmix works" in log and not list(folder.glob(".probe*"))


def test_the_probe_says_what_is_missing(folder: Path) -> None:
    (folder / "home").mkdir()
    mine = home(folder / "home" / "here", "export HPCPIPE_LAUNCHER=pmi2")
    job = submit(folder, "-N2", "--ntasks-per-node=1", "--", "/proc", script="probe.sbatch", HPCPIPE_HOME=str(mine))
    assert job.ended()["ExitCode"] == "1:0", job.log()
    missing = re.findall(r"^MISSING: (.*)$", job.log(), re.M)
    assert missing[0] == "/proc cannot be written: give a folder that can, for runs and data"
    assert any("/proc is not shared with n1" in line for line in missing)
    assert missing[-1] == "HPCPIPE_LAUNCHER is pmi2, which does not work here: set it to pmix in slurm/env.sh"


# ---- last, because it takes nodes away -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1], ids=["of-the-script", "another"])
def test_a_lost_node(which: int, folder: Path, data: Path, undisturbed: Result) -> None:
    """Slurm requeues a job whose script is gone; where only a rank is, the script does. It goes on on other nodes."""
    cluster = Cluster(Path(os.environ["HPCPIPE_TESTBED"]))
    job = submit(often(folder, data), *TWO, "--", "run.toml")
    job.freeze(folder / "out", saved=True)
    rarely(folder / "run.toml")
    about = job.about()
    nodes = slurm("scontrol", "show", "hostnames", about["NodeList"]).split()
    assert about["BatchHost"] == nodes[0] and len(nodes) == 2
    try:
        cluster.kill(nodes[which])
        job.thaw()
        job.restarted()
        finished(folder, job, undisturbed, restarts=1)
        assert nodes[which] not in slurm("scontrol", "show", "hostnames", job.about()["NodeList"]).split()
    finally:
        cluster.start(nodes[which])
        cluster.wait_for(dict.fromkeys(NODES, "idle"))
