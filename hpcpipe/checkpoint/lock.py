"""One job in a run's folder: a lock that its process holds and that goes with it, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hpcpipe.config import UserError

FILE = ".lock"
PLAIN = ".lock.held"  # where the file system knows no locks
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# Seconds, in a job of Slurm, between two tries and in all: the job before may be requeued or followed before its last
# process is gone, and its file server may give a dead client's lock back late.
PAUSE, PATIENCE = 2.0, 180.0


class Lock:
    """Held from its making to ``release``. Raises UserError where another process, on any host, holds it.

    The file says who holds it: host, pid, job. A holder that has died leaves only the file, which is taken over. Where
    the file system knows no locks, a file that is there counts as held, unless its process was on this host and is
    gone; ``warning`` says so. In a job of Slurm a lock that is held is waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.warning = folder / FILE, ""
        self.plain, self.stands = folder / PLAIN, False
        end, told = time.monotonic() + (PATIENCE if os.environ.get("SLURM_JOB_ID") else 0.0), False
        while True:
            try:
                self.fd = self._taken()
                return
            except UserError as held:
                if time.monotonic() >= end:
                    raise
                if not told:
                    print(f"waiting up to {PATIENCE:.0f} s: {held}", file=sys.stderr, flush=True)
                told = True
            time.sleep(PAUSE)

    def _taken(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                held = error.errno in (errno.EAGAIN, errno.EACCES)
                sentence = self._sentence(_read(fd)) if held else ""
                os.close(fd)
                if held:
                    raise UserError(sentence) from None
                if error.errno not in UNSUPPORTED:
                    raise
                self._take_plain()
                return -1
            if self._is(fd):
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps(_who()).encode(), 0)
                return fd
            os.close(fd)  # its holder has just removed it

    def _take_plain(self) -> None:
        """Makes the file that only one can make; takes it from a process of this host that is gone."""
        while True:
            try:
                fd = os.open(self.plain, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
                break
            except FileExistsError:
                who = self._holder()
                if who is None:
                    continue  # just let go
                if not _gone(who):
                    raise UserError(
                        f"{self._sentence(who)}; if it has ended, remove {self.plain}, as this file system has no locks"
                    ) from None
                self.plain.unlink(missing_ok=True)
        try:
            os.write(fd, json.dumps(_who()).encode())
        finally:
            os.close(fd)
        self.stands = True
        self.warning = f"{self.path.parent} cannot be locked here: {self.plain.name} stands for it, and if this job is "
        self.warning += "killed, one on another host has to be told by removing that file"

    def _holder(self) -> dict[str, Any] | None:
        try:
            fd = os.open(self.plain, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return _read(fd)
        finally:
            os.close(fd)

    def _is(self, fd: int) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(fd))
        except FileNotFoundError:
            return False

    def _sentence(self, found: dict[str, Any]) -> str:
        try:
            who = f"by process {found['pid']} on {found['host']} since {found['since']}"
            who += f" (job {found['job']})" if found["job"] else ""
        except KeyError:
            who = "by another job"
        return f"out: {self.path.parent} is in use {who}; wait for it, stop it or choose another folder"

    def release(self) -> None:
        """Lets go, and takes the file away."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = -1
        if self.stands:
            self.path.unlink(missing_ok=True)
            self.plain.unlink(missing_ok=True)
            self.stands = False


def _read(fd: int) -> dict[str, Any]:
    """What a lock's file says; nothing where its holder has not written it yet."""
    try:
        found = json.loads(os.pread(fd, 1 << 12, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _gone(who: dict[str, Any]) -> bool:
    """Whether this was a process of this host that has ended."""
    if who.get("host") != socket.gethostname() or not isinstance(who.get("pid"), int):
        return False
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # there, and of somebody else
    return False


def _who() -> dict[str, str | int]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
