"""The link over MPI, and everything this program knows about MPI libraries and launchers; nothing else imports mpi4py.

``connect`` loads the library, sets what it needs on this node where nobody has set it (between loading and starting it,
when its vendor is known and its settings are not read yet), starts it and returns the link of all ranks.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from hpcpipe.comm.link import Channel, Link, Sum, raise_agreed
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import UserError

T = TypeVar("T")

SPINS = 200  # polls before a rank that shares its core sleeps
NAP = 50e-6  # seconds
SWAP_TAG = 32767  # above all tags of channels
PATIENCE = 5  # seconds that MPI_Abort may take
FABRICS = ("/sys/class/infiniband", "/sys/class/cxi", "/sys/class/hfi1")
LAUNCHERS = (  # (what marks it, where it tells the number of ranks, its name); the first that is there started us
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("MPI_LOCALNRANKS", "PMI_SIZE", "MPICH's mpirun"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MVAPICH's mpirun"),
    ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "srun"),
    ("FLUX_JOB_ID", "FLUX_JOB_SIZE", "flux"),
    ("PMI_SIZE", "PMI_SIZE", "a PMI launcher"),
)
STRANGERS = (("Open MPI's mpirun", ("MPICH", "Intel MPI", "MVAPICH")), ("MPICH's mpirun", ("Open MPI",)))


class Launcher(NamedTuple):
    """Who started this process, by its own account."""

    name: str
    size: int
    one_node: bool


def launcher(environment: Mapping[str, str]) -> Launcher | None:
    """What the environment says about who started us; None when nobody did."""
    for mark, variable, name in LAUNCHERS:
        if mark in environment and environment.get(variable, "").isdigit():
            size = int(environment[variable])
            local = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE" if name.startswith("Open") else "MPI_LOCALNRANKS")
            nodes = environment.get("SLURM_STEP_NUM_NODES") if name == "srun" else None
            return Launcher(name, size, size == 1 or nodes == "1" or local == str(size))
    return None


def settings(
    vendor: str, version: Sequence[int], environment: Mapping[str, str], fabric: bool, cores: int
) -> dict[str, str]:
    """Variables to set before MPI starts, only those that nobody has set.

    Open MPI: yield the core while waiting; with more ranks than cores, or unbound ones, a waiting rank otherwise holds
    up the rank it waits for (barriers of 4 to 12 ms). On one node without a fabric, naming shared memory and TCP saves
    the second that probing for fabrics takes; Open MPI 4 calls the former by another name and is left alone. Of the
    ways to prove who we are that srun offers, the one that every PMIx has; it warns of those that it has not.
    """
    wanted: dict[str, str] = {}
    if vendor == "Open MPI":
        wanted["OMPI_MCA_mpi_yield_when_idle"] = "1"
        started = launcher(environment)
        chosen = any(f"OMPI_MCA_{x}" in environment for x in ("pml", "mtl"))
        if version[0] >= 5 and not fabric and not chosen and (started is None or started.one_node):
            wanted["OMPI_MCA_pml"] = "ob1"
            wanted["OMPI_MCA_btl"] = "self,sm,tcp"
        if "native" in environment.get("PMIX_SECURITY_MODE", "").split(","):
            wanted["PMIX_MCA_psec"] = "native"
    elif vendor == "MPICH" and int(environment.get("MPI_LOCALNRANKS", "1")) > cores:
        wanted["MPIR_CVAR_POLLS_BEFORE_YIELD"] = "1"
        wanted["MPIR_CVAR_ENABLE_HEAVY_YIELD"] = "1"
    return {name: value for name, value in wanted.items() if name not in environment}


def connect() -> Link:
    """The link of all ranks that were started together; one rank alone when nobody started us.

    Raises UserError when there is a launcher but no MPI library, or one that does not understand it. From here on an
    uncaught exception on any rank ends the whole job.
    """
    started = launcher(os.environ)
    mpi = _library(started)
    if mpi is None:
        return LocalWorld(1).links[0]
    _expect_same(started, mpi, None)
    fabric = any(Path(folder).is_dir() and any(Path(folder).iterdir()) for folder in FABRICS)
    vendor, version = mpi.get_vendor()
    os.environ.update(settings(vendor, version, os.environ, fabric, len(_cores())))
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_FUNNELED)  # threads of ours compute and write files, only one speaks MPI
    _expect_same(started, mpi, mpi.COMM_WORLD.Get_size())
    link = MpiLink(mpi, mpi.COMM_WORLD)
    _end_job_on_exceptions(link)
    return link


def _library(started: Launcher | None) -> Any:
    """mpi4py's MPI, loaded but not started; None when there is none and none is needed."""
    try:
        import mpi4py

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI
    except (ImportError, RuntimeError, OSError) as error:
        if started is None or started.size == 1:
            return None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{started.name} started {started.size} ranks, but {sys.executable} finds no MPI library ({reason}): "
            "install mpi4py, and put the MPI that this launcher belongs to on LD_LIBRARY_PATH"
        ) from None
    return MPI


def _expect_same(started: Launcher | None, mpi: Any, size: int | None) -> None:
    """Refuses a launcher and a library of different makes; ``size`` is None before MPI starts, which may crash then."""
    if started is None or started.size == 1:
        return
    if size is None:
        wrong = (started.name, mpi.get_vendor()[0]) in [(name, other) for name, others in STRANGERS for other in others]
    else:
        wrong = size != started.size
    if wrong:
        library = " ".join(mpi.Get_library_version().strip("\0").splitlines()[0].split()).split(",")[0]
        srun = "srun --mpi=pmix (Open MPI) or srun --mpi=pmi2 (MPICH)"
        raise UserError(
            f"{started.name} started {started.size} ranks, but mpi4py in {sys.executable} uses {library}, which cannot "
            f"join them: start with {srun if started.name == 'srun' else 'the mpirun of that library'}"
        )


def _end_job_on_exceptions(link: MpiLink) -> None:
    """A rank that dies of an exception would leave the others waiting forever: MPI ends at exit, together."""

    def report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        link.abort("".join(traceback.format_exception(kind, error, trace)).rstrip())

    sys.excepthook = report


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


class MpiSum:
    """A request that is waited for once."""

    def __init__(self, request: Any, crowded: bool) -> None:
        self.done: Callable[[], bool] = request.Test
        self.wait: Callable[[], None] = self._share_core if crowded else request.Wait

    def _share_core(self) -> None:
        done = self.done
        for _ in range(SPINS):
            if done():
                return
        while not done():
            time.sleep(NAP)


class MpiChannel(MpiSum):
    """A persistent request."""

    def __init__(self, request: Any, crowded: bool) -> None:
        super().__init__(request, crowded)
        self.start: Callable[[], None] = request.Start


class MpiLink:
    """A communicator."""

    def __init__(self, mpi: Any, comm: Any, crowded: bool = False) -> None:
        self._mpi, self._comm = mpi, comm
        self._receives: list[Any] = []
        self._sends: list[Any] = []
        self._groups: list[MpiLink] = []
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.hostname = platform.node()
        node = comm.Split_type(mpi.COMM_TYPE_SHARED)
        self._node = node.Get_rank(), node.Get_size()
        cores: set[int] = set().union(*node.allgather(_cores()))
        self._crowded = crowded or node.Get_size() > len(cores)  # a group shares its cores with others
        node.Free()

    def sender(self, peer: int, tag: int, buffer: Any) -> Channel:
        self._sends.append(self._comm.Send_init(self._bytes(buffer), peer, tag))
        return MpiChannel(self._sends[-1], self._crowded)

    def receiver(self, peer: int, tag: int, buffer: Any) -> Channel:
        self._receives.append(self._comm.Recv_init(self._bytes(buffer), peer, tag))
        return MpiChannel(self._receives[-1], self._crowded)

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        self._comm.Sendrecv(self._bytes(send), peer, SWAP_TAG, self._bytes(recv), peer, SWAP_TAG)

    def progress(self) -> None:
        self._comm.Iprobe(self._mpi.ANY_SOURCE, SWAP_TAG)

    def allreduce(self, array: Any) -> None:
        self._comm.Allreduce(self._mpi.IN_PLACE, [array, self._mpi.DOUBLE])

    def start_allreduce(self, array: Any) -> Sum:
        return MpiSum(self._comm.Iallreduce(self._mpi.IN_PLACE, [array, self._mpi.DOUBLE]), self._crowded)

    def alltoall(self, send: Any, recv: Any) -> None:
        self._comm.Alltoall(self._bytes(send), self._bytes(recv))

    def allgather(self, send: Any, recv: Any) -> None:
        self._comm.Allgather(self._mpi.IN_PLACE if send is None else self._bytes(send), self._bytes(recv))

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        values: list[T] | None = self._comm.gather(value, root)
        return values

    def bcast(self, value: T, root: int = 0) -> T:
        received: T = self._comm.bcast(value, root)
        return received

    def barrier(self) -> None:
        self._comm.Barrier()

    def group(self, ranks: Sequence[int]) -> Link | None:
        if self.rank not in ranks:
            return None
        everybody = self._comm.Get_group()
        members = everybody.Incl(list(ranks))
        link = MpiLink(self._mpi, self._comm.Create_group(members), self._crowded)
        self._groups.append(link)
        members.Free()
        everybody.Free()
        return link

    def agree(self, error: str | None) -> None:
        raise_agreed(self._comm.allgather(error))

    def abort(self, message: str) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            print(f"rank {self.rank}: {message}\n", end="", file=sys.stderr, flush=True)
        last = threading.Timer(PATIENCE, os._exit, (1,))  # the launcher ends the others when a rank is gone
        last.daemon = True
        last.start()
        if not self._mpi.Is_finalized():
            self._mpi.COMM_WORLD.Abort(1)
        os._exit(1)

    def node_ranks(self) -> tuple[int, int]:
        return self._node

    def library(self) -> tuple[str, str]:
        """MPI's own words: its version, and the memory kinds that it takes (MPI 4.1; "" before)."""
        info = self._comm.Get_info()
        kinds = info.Get("mpi_memory_alloc_kinds") or ""
        info.Free()
        return self._mpi.Get_library_version(), kinds

    def close(self) -> None:
        for group in self._groups:
            group.close()
        for request in self._receives:  # MPI complains of requests that are left at its end
            if not request.Test():
                request.Cancel()
                request.Wait()
            request.Free()
        for request in self._sends:
            request.Free()
        self._groups, self._receives, self._sends = [], [], []
        if self._comm == self._mpi.COMM_WORLD:
            self._comm.Barrier()  # MPICH's launcher kills the others when one rank fails to end
            with contextlib.suppress(self._mpi.Exception):  # as with messages that an error left on their way
                self._mpi.Finalize()
        elif self._comm != self._mpi.COMM_NULL:
            self._comm.Free()

    def _bytes(self, buffer: Any) -> list[Any]:
        return [buffer, self._mpi.BYTE]
