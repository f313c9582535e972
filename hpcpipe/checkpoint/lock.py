"""One job in a run's folder: a lock that its process holds and that goes with it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from datetime import datetime, timezone
from pathlib import Path

from hpcpipe.config import UserError

FILE = ".lock"
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Lock:
    """Held from its making to ``release``. Raises UserError where another process, on any host, holds it.

    The file says who holds it: host, pid, job. A holder that has died leaves only the file, which is taken over. Where
    the file system knows no locks, ``warning`` says so and nothing is locked.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.warning = folder / FILE, ""
        self.fd = self._taken()

    def _taken(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held = error.errno in (errno.EAGAIN, errno.EACCES)
                sentence = self._sentence(fd) if held else ""
                os.close(fd)
                if held:
                    raise UserError(sentence) from None
                if error.errno not in UNSUPPORTED:
                    raise
                self.warning = f"{self.path.parent} cannot be locked here: see to it that no other job writes to it"
                return -1
            if self._is(fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(_who()).encode(), 0)
                return fd
            os.close(fd)  # its holder has just removed it

    def _is(self, fd: int) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _sentence(self, fd: int) -> str:
        try:
            found = json.loads(os.pread(fd, 1 << 12, 0))
            who = f"by process {found['pid']} on {found['host']} since {found['since']}"
            who += f" (job {found['job']})" if found["job"] else ""
        except (ValueError, KeyError, TypeError):
            who = "by another job"
        return f"out: {self.path.parent} is in use {who}; wait for it, stop it or choose another folder"

    def release(self) -> None:
        """Lets go, and takes the file away."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1


def _who() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
