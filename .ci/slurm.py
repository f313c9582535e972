"""`make test-slurm`: the batch scripts on a real Slurm, which is installed, started, tested on and taken away.

    .venv/bin/python .ci/slurm.py [WORDS FOR PYTEST]...

Needs root, for hosts that are network namespaces, and Debian's packages, which apt-get installs where they are missing.
Where one of these is not to be had it says SKIPPED, loudly, and why, and ends with 0; with HPCPIPE_NEED_SLURM=1, for
machines that must have it, with 1. Daemons and namespaces go when the tests end; their logs stay in build/slurm.
"""

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "slurm"
TESTBED = ROOT / "tests" / "slurm" / "testbed" / "cluster.py"
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "slurm-wlm-basic-plugins", "munge", "libpmix2", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
PMIX = "pmix2/lib/libpmix.so"  # how Slurm calls it; Debian has the name in a development package only
LONGEST_SOCKET = 107  # characters in the path of munge's
CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWUTS = 0x00020000, 0x40000000, 0x04000000
RULE = "=" * 100


class Missing(Exception):
    """One sentence: why there can be no Slurm here."""


def main(words: list[str]) -> int:
    try:
        check_rights()
        install()
    except Missing as reason:
        needed = os.environ.get("HPCPIPE_NEED_SLURM") == "1"
        return tell(f"{'FAILED' if needed else 'SKIPPED'}: {reason}", int(needed))
    testbed = load(TESTBED)
    FOLDER.mkdir(parents=True, exist_ok=True)
    cluster = testbed.Cluster(FOLDER)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        cluster.up()
        return test(words)
    except testbed.ClusterError as error:
        return tell(f"FAILED: {error}", 1)
    finally:
        cluster.down()


def tell(sentence: str, status: int) -> int:
    """Says it so that nobody overlooks it."""
    print(f"{RULE}\ntest-slurm: {sentence}\n{RULE}", flush=True)
    return status


def check_rights() -> None:
    if sys.platform != "linux" or os.geteuid():
        raise Missing("the real Slurm needs Linux and root, to make network namespaces; nothing of it was tested")
    child = os.fork()
    if not child:  # leaves its namespaces at once
        os._exit(ctypes.CDLL(None).unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWUTS) != 0)
    if os.waitpid(child, 0)[1]:
        raise Missing("this root may not make network namespaces (a container without CAP_SYS_ADMIN?)")
    if len(str(FOLDER / "munge" / "socket")) > LONGEST_SOCKET:
        raise Missing(f"the path {FOLDER} is too long for a socket: check out to a shorter one")


def install() -> None:
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    wanting = [program for program in PROGRAMS if not shutil.which(program, path=path)]
    if wanting or not libraries():
        if not shutil.which("apt-get"):
            raise Missing(f"there is no {wanting[0] if wanting else 'libpmix2'} and no apt-get to install it with")
        print("test-slurm: installing " + " ".join(PACKAGES), flush=True)
        # Nothing is started by the installation: the testbed has its own daemons.
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        options = ("-q", "-y", "--no-install-recommends")
        apt(env, "update", "-q")
        apt(env, "install", *options, *PACKAGES)
    for folder in libraries():
        name = folder / PMIX
        if not name.exists():
            name.symlink_to("libpmix.so.2")


def libraries() -> list[Path]:
    """Where Debian has put the PMIx that Slurm loads."""
    return [file.parents[2] for file in Path("/usr/lib").glob("*/pmix2/lib/libpmix.so.2")]


def apt(env: dict[str, str], *words: str) -> None:
    done = subprocess.run(["apt-get", *words], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        raise Missing(f"apt-get {words[0]} failed ({last})")


def load(file: Path) -> ModuleType:
    """A file as a module, without its folders on the path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test(words: list[str]) -> int:
    env = {**os.environ, "HPCPIPE_TESTBED": str(FOLDER)}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slurm_real", "tests/slurm", *words]
    status = subprocess.call(command, cwd=ROOT, env=env)
    if status == 1:  # tests failed; daemons of a crowded machine may have missed a deadline of theirs, a defect stays
        print("test-slurm: what failed is tried once more", flush=True)
        status = subprocess.call([*command, "--last-failed"], cwd=ROOT, env=env)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
