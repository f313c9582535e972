"""The MPI link: the checks of every link under two MPI libraries, how jobs end, and who started us."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hpcpipe.comm import mpi
from tests.mpi import launch
from tests.mpi.link_checks import CHECKS

pytestmark = pytest.mark.mpi
MPIS = pytest.mark.parametrize("which", [launch.first, launch.second], ids=["first", "mpich"])
PROGRAM = ("-m", "tests.mpi.link_checks")


def expect_all_checks(done: launch.Done, ranks: int) -> None:
    passed = [line.strip() for line in done.out.splitlines()]
    assert done.status == 0 and "MPICH:" not in done.out, done.out  # MPICH tells of requests that nobody freed
    assert [line for check in CHECKS for line in passed if line == f"{check.__name__} {ranks}"] == [
        f"{check.__name__} {ranks}" for check in CHECKS
    ], done.out


@MPIS
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_check(which, ranks):
    expect_all_checks(launch.run(which(), ranks, PROGRAM), ranks)


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_check_over_tcp(ranks):
    here = launch.first()
    if not here.is_open_mpi:
        pytest.skip("the first MPI is not Open MPI, whose transports can be named")
    expect_all_checks(launch.run(here, ranks, PROGRAM, ("--mca", "btl", "self,tcp")), ranks)


@MPIS
def test_more_ranks_than_cores(which):
    expect_all_checks(launch.run(which(), 8, PROGRAM, timeout=120), 8)


@MPIS
def test_alone_without_mpirun(which):
    here = which()
    expect_all_checks(launch.finish(launch.spawn([str(here.python), *PROGRAM])), 1)


ENDINGS = ("", " while others compute", " while others receive", " after the end")


@MPIS
@pytest.mark.parametrize("how", [f"exception{ending}" for ending in ENDINGS])
def test_an_exception_on_one_rank_ends_the_job(which, how):
    began = time.monotonic()
    done = launch.run(which(), 3, ("-m", "tests.mpi.failing", how), timeout=30)
    assert done.status != 0 and "went on" not in done.out
    assert "rank 2: Traceback" in done.out and "RuntimeError: the last rank has lost its way" in done.out
    assert time.monotonic() - began < 20  # it takes one; the machine may be busy


@MPIS
def test_abort_ends_the_job_with_the_message(which):
    done = launch.run(which(), 3, ("-m", "tests.mpi.failing", "abort"), timeout=30)
    assert done.status != 0 and "went on" not in done.out
    assert "rank 2: the disk is full; make room and start again" in done.out


@MPIS
@pytest.mark.parametrize("how", ["agree", "agree received 10", "agree sent 10"])
def test_an_agreed_error_is_told_once_whatever_is_on_its_way(which, how):
    done = launch.run(which(), 3, ("-m", "tests.mpi.failing", how), timeout=30)
    assert done.status in (2, 9) and "went on" not in done.out and "Traceback" not in done.out, done.out
    assert done.status == 2 or how.startswith("agree sent")  # which MPICH cannot end cleanly
    assert done.out.count("rank 2: model.layers is 0") == 1


def test_a_launcher_of_another_mpi_is_refused():
    one, other = launch.first(), launch.second()
    if not one.is_open_mpi:
        pytest.skip("both MPIs here are MPICH's kin and may start each other")
    for mpirun, python, names in (
        (one.mpirun, other.python, ("Open MPI's mpirun started 2 ranks", "MPICH Version")),
        (other.mpirun, one.python, ("MPICH's mpirun started 2 ranks", "Open MPI v")),
    ):
        done = launch.run(launch.Mpi(mpirun, python), 2, ("-m", "tests.mpi.failing", "agree"), timeout=30)
        assert done.status != 0 and all(name in done.out for name in names), done.out


NO_LIBRARY = """
import sys
sys.modules["mpi4py"] = None  # importing it fails
from hpcpipe.comm import mpi
from hpcpipe.config import UserError
try:
    link = mpi.connect()
    print(type(link).__name__, link.rank, link.size)
except UserError as error:
    print("refused:", error)
"""


def test_without_an_mpi_library():
    def said(**variables: str) -> str:
        return launch.finish(launch.spawn([sys.executable, "-c", NO_LIBRARY], **variables)).out

    assert said() == "LocalLink 0 1\n"
    refused = said(OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_LOCAL_SIZE="4")
    assert refused.startswith("refused: Open MPI's mpirun started 4 ranks") and "install mpi4py" in refused


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a batch script, not one of its steps
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, ("Open MPI's mpirun", 8, True)),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, ("Open MPI's mpirun", 8, False)),
        (  # mpirun inside an allocation: its daemons are a step of as many tasks as there are nodes
            {
                "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2",
            },
            ("Open MPI's mpirun", 8, False),
        ),
        ({"PMI_SIZE": "3", "MPI_LOCALNRANKS": "3"}, ("MPICH's mpirun", 3, True)),
        ({"PMI_SIZE": "6", "MPI_LOCALNRANKS": "3"}, ("MPICH's mpirun", 6, False)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "PMI_SIZE": "4"},
            ("srun", 4, True),
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, ("srun", 4, False)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, ("srun", 1, True)),
    ],
)  # fmt: skip
def test_who_started_us(environment, expected):
    assert mpi.launcher(environment) == expected


ONE_NODE = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
TWO_NODES = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
YIELD, SHARED = {"OMPI_MCA_mpi_yield_when_idle": "1"}, {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}


@pytest.mark.parametrize(
    ("vendor", "version", "environment", "fabric", "expected"),
    [
        ("Open MPI", (5, 0, 11), {}, False, YIELD | SHARED),
        ("Open MPI", (5, 0, 11), ONE_NODE, False, YIELD | SHARED),
        ("Open MPI", (5, 0, 11), ONE_NODE, True, YIELD),  # a cluster's node keeps its own transports
        ("Open MPI", (5, 0, 11), TWO_NODES, False, YIELD),
        ("Open MPI", (4, 1, 4), ONE_NODE, False, YIELD),
        ("Open MPI", (5, 0, 11), ONE_NODE | {"OMPI_MCA_pml": "ucx"}, False, YIELD),
        ("Open MPI", (5, 0, 11), ONE_NODE | {"OMPI_MCA_mtl": "ofi"}, False, YIELD),
        ("Open MPI", (5, 0, 11), ONE_NODE | {"OMPI_MCA_btl": "self,tcp"}, False, YIELD | {"OMPI_MCA_pml": "ob1"}),
        ("Open MPI", (5, 0, 11), ONE_NODE | {"OMPI_MCA_mpi_yield_when_idle": "0"}, False, SHARED),
        ("Open MPI", (5, 0, 11), {"PMIX_SECURITY_MODE": "munge,native"}, True, YIELD | {"PMIX_MCA_psec": "native"}),
        ("Open MPI", (5, 0, 11), {"PMIX_SECURITY_MODE": "munge"}, True, YIELD),
        ("MPICH", (5, 0, 2), {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, False, {}),
        (
            "MPICH", (5, 0, 2), {"PMI_SIZE": "3", "MPI_LOCALNRANKS": "3"}, False,
            {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"},
        ),
        ("Intel MPI", (2021, 18), {"PMI_SIZE": "9", "MPI_LOCALNRANKS": "9"}, False, {}),
    ],
)  # fmt: skip
def test_what_is_set_for_whom(vendor, version, environment, fabric, expected):
    assert mpi.settings(vendor, version, environment, fabric, cores=2) == expected


def test_importing_the_link_starts_no_mpi():
    code = "import sys, hpcpipe.comm.mpi; print('mpi4py' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=launch.ROOT).stdout
        == "False\n"
    )
