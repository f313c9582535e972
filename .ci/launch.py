"""What .venv/bin/mpirun runs: the real mpirun, told what nobody should have to type.

    python launch.py REAL_MPIRUN ARGUMENTS...

It finds the environment's programs, allows root and more ranks than cores, and leaves binding to the program, which
divides the cores itself. No parameter file can do the last thing it does: Open MPI kills the ranks half a second after
Ctrl-C or SIGTERM, too soon to save. So the first of these reaches the ranks as SIGUSR1 (save and end); the second one,
or a minute, ends the job at once. MPICH ignores the variables and forwards the signals all the same.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

GRACE = 60  # seconds
VARIABLES = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",  # Open MPI 5
    "OMPI_MCA_hwloc_base_binding_policy": "none",  # Open MPI 4
}
OVERSUBSCRIBE = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
ALLOCATIONS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")  # where a scheduler has decided how many ranks there are


def main():
    programs = str(Path(sys.executable).parent)
    os.environ["PATH"] = programs + os.pathsep + os.environ.get("PATH", os.defpath)
    allocated = any(name in os.environ for name in ALLOCATIONS)
    for name, value in {**VARIABLES, **({} if allocated else OVERSUBSCRIBE)}.items():
        os.environ.setdefault(name, value)  # what the user has set stays
    child = start(sys.argv[1:])
    pass_signals_on(child)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    return os.WEXITSTATUS(status)


def start(command):
    """The real mpirun as a child in a process group of its own: the terminal's Ctrl-C must reach this file only."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: a killed launcher leaves no ranks behind
        if os.getppid() == parent:
            if os.isatty(0):  # a background group may not read the terminal
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.execv(command[0], command)
    except OSError as error:
        print(f"mpirun: {command[0]}: {error.strerror}", file=sys.stderr)
    os._exit(127)


def pass_signals_on(child):
    asked = []

    def end(number, _):
        os.kill(child, signal.SIGTERM if asked else signal.SIGUSR1)
        if not asked:
            if number == signal.SIGINT:
                os.write(2, b"\nmpirun: asked the ranks to save and end; Ctrl-C again ends them at once\n")
            signal.alarm(GRACE)
        asked.append(number)

    def suspend(*_):
        os.kill(child, signal.SIGTSTP)
        os.kill(os.getpid(), signal.SIGSTOP)
        os.kill(child, signal.SIGCONT)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    signal.signal(signal.SIGUSR1, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGTSTP, suspend)


if __name__ == "__main__":
    sys.exit(main())
