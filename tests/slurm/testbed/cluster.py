"""A real Slurm of four emulated hosts on one machine: brings it up, kills and revives hosts, takes it away.

Each host is a network namespace (its own address on one bridge), a host name and private mounts (/etc/hosts, /dev/shm,
PMIx's folder), in which a slurmd runs; a fifth one runs slurmctld. Everything else is under one folder: munge's key and
socket, state, logs. Nothing of the machine's own is changed. Needs root, iproute2 and Debian's packages.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BRIDGE, PREFIX = "hpcpipe", "hpcpipe-"
CONTROL = "control"
HOSTS = {CONTROL: "10.77.0.10", "n1": "10.77.0.11", "n2": "10.77.0.12", "n3": "10.77.0.13", "n4": "10.77.0.14"}
GATEWAY = "10.77.0.1"
NODES = [host for host in HOSTS if host != CONTROL]
GPUS = 4  # of each node
PATIENCE = 30  # seconds until all nodes must be up
LOCK = "/run/lock/hpcpipe-testbed"
PATHS = "/usr/sbin:/usr/bin:/sbin:/bin"

# In the host's namespaces: the name, what only this host sees, then its daemon.
ENTER = """
hostname {host} && mount --make-rprivate / && mount --bind {folder}/hosts /etc/hosts &&
mount -t tmpfs tmpfs {folder}/pmix && mount -t tmpfs tmpfs /dev/shm && exec {daemon}
"""


class ClusterError(Exception):
    """One sentence: what did not come up."""


class Cluster:
    """The testbed in ``folder``; only one can be up on a machine at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.alone: int | None = None  # held while it is up: its addresses and names are the machine's only ones

    # --- up and down

    def up(self) -> None:
        """Starts everything and waits until all nodes are idle. Raises ClusterError."""
        lock = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise ClusterError("another testbed is up on this machine: wait until its tests have ended") from None
        self.alone = lock
        self._clear()
        self._write()
        self._munge()
        _run("ip", "link", "add", BRIDGE, "type", "bridge")
        _run("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        _run("ip", "link", "set", BRIDGE, "up")
        for host, address in HOSTS.items():
            _wire(host, address)
        self._start(CONTROL, f"slurmctld -D -c -f {self.conf}")
        for node in NODES:
            self.start(node)
        self.wait_for(dict.fromkeys(NODES, "idle"))

    def down(self) -> None:
        """Takes away what ``up`` has made."""
        if self.alone is not None:
            self._clear()
            os.close(self.alone)
            self.alone = None

    def _clear(self) -> None:
        """Ends whatever there is, also what an earlier, killed run left."""
        for host in HOSTS:
            if _exists(host):
                self.kill(host)
                _run("ip", "netns", "del", PREFIX + host)
            with contextlib.suppress(ClusterError):
                _run("ip", "link", "del", PREFIX + host)
        with contextlib.suppress(ClusterError):
            _run("ip", "link", "del", BRIDGE)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((self.folder / "munge" / "pid").read_text()), signal.SIGTERM)

    def _write(self) -> None:
        """A folder with nothing of an earlier run."""
        for name in ("state", "spool", "log", "run", "gpu", "pmix", "munge"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        for node in NODES:
            (self.folder / "spool" / node).mkdir()
        for file in ("slurm.conf", "gres.conf", "mpi.conf"):
            text = (HERE / file).read_text(encoding="utf-8").replace("@FOLDER@", str(self.folder))
            (self.folder / file).write_text(text, encoding="utf-8")
        lines = ["127.0.0.1 localhost", *(f"{address} {host}" for host, address in HOSTS.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n", encoding="utf-8")
        null = Path("/dev/null").stat()
        for gpu in range(GPUS):
            os.mknod(self.folder / "gpu" / str(gpu), 0o666 | stat.S_IFCHR, null.st_rdev)

    def _munge(self) -> None:
        """A munged with a key of its own, apart from the machine's."""
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "key").chmod(0o600)
        options = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        _run("munged", "--force", *(f"--{option}={folder / name}" for option, name in options.items()))

    # --- hosts

    def start(self, node: str) -> None:
        """Boots a node: its slurmd, with an empty spool."""
        spool = self.folder / "spool" / node
        shutil.rmtree(spool)  # sockets of a life before make PMIx fail
        spool.mkdir()
        self._start(node, f"slurmd -D -N {node} -f {self.conf}")

    def kill(self, host: str) -> None:
        """Power off: every process of a host dies at once."""
        deadline = time.monotonic() + 10
        while pids := _run("ip", "netns", "pids", PREFIX + host).split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise ClusterError(f"processes of {host} cannot be killed: {' '.join(pids)}")
            time.sleep(0.02)

    def wait_for(self, wanted: dict[str, str]) -> None:
        """Until nodes are in these states (as sinfo calls them, without flags)."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = self.states()
            if all(found.get(node) == state for node, state in wanted.items()):
                return
            time.sleep(0.1)
        raise ClusterError(f"nodes are {self.states()}, not {wanted}, after {PATIENCE} s; see {self.folder / 'log'}")

    def states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down ...; nothing while the controller does not answer."""
        with contextlib.suppress(ClusterError):
            lines = _run("sinfo", "-h", "-N", "-p", "normal", "-o", "%N %T", SLURM_CONF=str(self.conf)).splitlines()
            return dict(line.split() for line in lines)
        return {}

    def _start(self, host: str, daemon: str) -> None:
        script = ENTER.format(host=host, folder=self.folder, daemon=daemon)
        enter = ["nsenter", f"--net=/run/netns/{PREFIX}{host}", "unshare", "--uts", "--mount", "sh", "-c", script]
        with (self.folder / "log" / f"{host}.err").open("ab") as log:
            subprocess.Popen(
                enter, cwd=self.folder, env={"PATH": PATHS}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip


def _wire(host: str, address: str) -> None:
    """A namespace with one interface, eth0, whose other end is on the bridge."""
    name = PREFIX + host
    _run("ip", "netns", "add", name)
    _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
    _run("ip", "link", "set", name, "master", BRIDGE, "up")
    _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
    for interface in ("eth0", "lo"):
        _run("ip", "-n", name, "link", "set", interface, "up")
    _run("ip", "-n", name, "route", "add", "default", "via", GATEWAY)


def _exists(host: str) -> bool:
    return Path("/run/netns", PREFIX + host).exists()


def _run(*words: str, **variables: str) -> str:
    """A command's output. Raises ClusterError with what it said when it fails."""
    env = {**os.environ, "PATH": PATHS, **variables}
    done = subprocess.run(words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise ClusterError(f"{' '.join(words)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
