"""The driver's side of the line protocol: starts a competitor, lets it run alone, and ends it.

A process is stopped (SIGSTOP to its group) whenever it is not the one being asked, so a spinning thread pool of one
competitor takes no core from another.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 900.0  # seconds for one answer; max-autotune compiles for minutes

# MKL keeps its AVX-512 kernels for one vendor; on another's CPU that has them this answer more than doubles PyTorch's
# products, and a comparison that left it out would measure the question, not PyTorch.
SHIM = "int mkl_serv_intel_cpu_true(void) { return 1; }\nint mkl_serv_intel_cpu(void) { return 1; }\n"


class Failed(Exception):
    """A competitor could not start or stopped answering; the message is one sentence."""


class Competitor(NamedTuple):
    """A module that serves the protocol, the interpreter that has its libraries, and its variant."""

    name: str
    module: str
    variant: str
    python: str

    @classmethod
    def named(cls, text: str, ours: str, peers: str) -> Competitor:
        """``hpcpipe``, ``jax`` or ``torch``, with an optional ``:variant``; raises ValueError for another name."""
        kind, _, variant = text.partition(":")
        if kind not in ("hpcpipe", "jax", "torch"):
            raise ValueError(f"no competitor is called {kind!r}; there are hpcpipe, jax and torch")
        variant = variant or {"torch": "eager"}.get(kind, "")
        return cls(text, f"benchmarks.peer_{kind}", variant, ours if kind == "hpcpipe" else peers)


class Process:
    """One worker. It is stopped except while ``ask`` waits for its answer."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str], patience: float = PATIENCE) -> None:
        self.log, self.patience = log, patience
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=os.environ | environment, start_new_session=True, bufsize=0,
            )  # fmt: skip
        try:
            self.ready = self._answer()
        except BaseException:
            self.end()
            raise
        self._signal(signal.SIGSTOP)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Wakes the process, waits for its answer and stops it again."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # it has died; the missing answer tells why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        """Ends the process and whatever it started."""
        self._signal(signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], self.patience)
        if not readable:
            raise Failed(f"no answer within {self.patience:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            tail = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Failed(f"it ended with status {self.process.wait()}: {''.join(tail) or 'it said nothing'}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"].strip().partition("\n")[0])
        return answer


def start(
    competitor: Competitor, job: Path, threads: int, preload: str = "", compilers: int = 1, patience: float = PATIENCE
) -> Process:
    """A competitor that has compiled and warmed up, stopped; raises Failed.

    ``compilers``: processes that PyTorch may compile in; on a CPU they would be a pool beside what is measured.
    """
    command = [competitor.python, "-m", competitor.module, str(job), "--threads", str(threads)]
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": str(compilers)}
    shimmed = bool(preload) and competitor.module.endswith("torch")
    if shimmed:
        environment["LD_PRELOAD"] = ":".join(filter(None, (preload, os.environ.get("LD_PRELOAD"))))
    log = job.with_name(competitor.name.replace(":", "-") + ".log")
    process = Process([*command, "--variant", competitor.variant], log, environment, patience)
    if shimmed:
        process.ready["about"] += ", MKL's AVX-512 kernels enabled on this vendor"
    return process


def start_peak(folder: Path) -> Process:
    """The process that measures the matrix-product peak, stopped."""
    return Process([sys.executable, "-m", "benchmarks.peak", "--serve"], folder / "peak.log", {})


def vendor_shim(folder: Path) -> str:
    """Builds the shared object that has MKL treat any x86 CPU alike; "" where it is not needed or cannot be built."""
    info = Path("/proc/cpuinfo")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if platform.machine() != "x86_64" or not info.exists() or "GenuineIntel" in info.read_text() or compiler is None:
        return ""
    source, library = folder / "vendor.c", folder / "vendor.so"
    source.write_text(SHIM)
    done = subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], capture_output=True)
    return str(library) if done.returncode == 0 else ""
