"""Starts programs under mpirun for tests, with a limit on their time.

The first MPI is the one beside the Python that runs the tests, or on the PATH; the second one is MPICH's wheel, which
`make test` puts into .venv-mpich (SECOND_MPI names another environment). A missing one is an error, not a skip.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SECOND = Path(os.environ.get("SECOND_MPI", ROOT / ".venv-mpich"))
OPEN_MPI = {  # what the environment's own mpirun tells Open MPI, for one that is used as it came
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


class Mpi(NamedTuple):
    """An mpirun and the Python that belongs to it."""

    mpirun: Path
    python: Path

    @property
    def is_open_mpi(self) -> bool:
        return "Open MPI" in _version(self.mpirun) or "OpenRTE" in _version(self.mpirun)


class Done(NamedTuple):
    """How a job ended: exit status and everything it printed."""

    status: int
    out: str


def first() -> Mpi:
    """The MPI of this environment."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(
            f"there is no mpirun beside {sys.executable} or on the PATH: run `make test`, which installs one"
        )
    return Mpi(Path(found), Path(sys.executable))


def second() -> Mpi:
    """MPICH."""
    mpi = Mpi(SECOND / "bin" / "mpirun", SECOND / "bin" / "python")
    if not mpi.mpirun.exists():
        raise FileNotFoundError(
            f"{mpi.mpirun} is missing: run `make test`, which installs a second MPI, or set SECOND_MPI"
        )
    return mpi


def start(
    mpi: Mpi, ranks: int, program: Sequence[str], options: Sequence[str] = (), **variables: str
) -> subprocess.Popen[str]:
    """Starts ``mpirun -n ranks python program...`` in a session of its own, output and errors in one pipe."""
    return spawn([str(mpi.mpirun), *options, "-n", str(ranks), str(mpi.python), *program], **variables)


def spawn(command: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    """Starts any command as ``start`` does."""
    return subprocess.Popen(
        command, cwd=ROOT, env=_environment(variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Done:
    """Waits for the end, or ends it and fails."""
    try:
        out, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        end(process)
        out, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s: {process.args}\n{out}") from None
    return Done(process.returncode, out)


def run(
    mpi: Mpi, ranks: int, program: Sequence[str], options: Sequence[str] = (), timeout: float = 60, **variables: str
) -> Done:
    """Starts a job and waits for its end."""
    return finish(start(mpi, ranks, program, options, **variables), timeout)


def end(process: subprocess.Popen[str]) -> None:
    """Kills a job with all its ranks."""
    job = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(3)
    for pid in job:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.kill()


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and these in turn; a rank may be in a group and session of its own."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
    found = [pid]
    for each in found:
        found += sorted(parents.get(each, ()))
    return found[1:]


def ranks(process: subprocess.Popen[str], program: Sequence[str]) -> list[int]:
    """The processes of a job that run ``python program...``, as they were given to ``start``."""
    wanted = b"\0".join(word.encode() for word in program)
    found = []
    for pid in descendants(process.pid):
        with contextlib.suppress(OSError):
            python, _, words = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")
            if b"python" in Path(os.fsdecode(python)).name.encode() and words.startswith(wanted + b"\0"):
                found.append(pid)
    return found


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    started = ("OMPI_COMM", "PMI_", "PMIX_", "SLURM_")  # the tests themselves may run under a launcher
    clean = {k: v for k, v in os.environ.items() if not k.startswith(started)}
    ours = Path(sys.executable).parent / "mpirun"
    wired = ours.exists() and b"bootstrap.py" in ours.read_bytes()
    return {**clean, **({} if wired else OPEN_MPI), "PYTHONPATH": str(ROOT), **variables}


@cache
def _version(mpirun: Path) -> str:
    return subprocess.run(
        [mpirun, "--version"], env=_environment({}), capture_output=True, text=True, timeout=60
    ).stdout  # fmt: skip
