"""One competitor in its own process: builds, compiles and warms up, then answers requests, one JSON line each.

    worker -> driver   {"ready": true, "losses": [...], "setup_seconds": s, "warm_seconds": s, "about": text, ...}
    driver -> worker   {"steps": k}
    worker -> driver   {"seconds": s, "loss": x, "step": n, "peak_bytes": b, "steady_bytes": b, ...}
    worker -> driver   {"error": text}     instead of either, and the worker ends

Between two requests a worker blocks on its standard input (the driver stops the whole process group to be sure).
It ends when its input ends, and with the driver. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from benchmarks.shape import Job, read

WARM = 5  # steps before the first request: they compile, and their losses show that all train the same model
PR_SET_PDEATHSIG = 1

# Trains steps first, first + 1, … first + count - 1 and returns their losses once all of that work is done.
Run = Callable[[int, int], list[float]]
# What more a worker tells with each answer: on a GPU "device_bytes", ...
More = Callable[[], dict[str, float]]
# From the job, the number of threads and the variant to (run, one line about versions and settings[, more]).
Build = Callable[[Job, int, str], tuple[Run, str] | tuple[Run, str, More]]


def serve(build: Build, argv: list[str] | None = None) -> None:
    """The whole life of a worker; ``build`` is what distinguishes it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("job", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant", default="")
    args = parser.parse_args(argv)
    die_with_parent()
    out = private_stdout()
    try:
        _answer(build, args, out)
    except BrokenPipeError:
        pass
    except Exception as error:
        send(out, {"error": f"{type(error).__name__}: {error}"})
        raise


def _answer(build: Build, args: argparse.Namespace, out: TextIO) -> None:
    start = time.perf_counter()
    run, about, *more = build(read(args.job), args.threads, args.variant)
    built = time.perf_counter()
    losses = run(0, WARM)
    warm = time.perf_counter()
    step = WARM
    times = {"setup_seconds": built - start, "warm_seconds": warm - built}
    send(out, {"ready": True, "losses": losses, "about": about, "peak_bytes": peak_bytes(), **times})
    whole = peak_bytes()
    forget_peak()
    for line in sys.stdin:
        count = int(json.loads(line)["steps"])
        begin = time.perf_counter()
        losses = run(step, count)
        seconds = time.perf_counter() - begin
        step += count
        steady = peak_bytes()
        whole = max(whole, steady)
        memory = {"peak_bytes": whole, "steady_bytes": steady}
        told = {key: value for tell in more for key, value in tell().items()}
        send(out, {"seconds": seconds, "loss": losses[-1], "step": step, **memory, **told})


def send(out: TextIO, message: dict[str, Any]) -> None:
    """One message, one line."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def private_stdout() -> TextIO:
    """The protocol's own stream; file descriptor 1 becomes standard error, so that no library can speak on it."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


def die_with_parent() -> None:
    """A stopped worker would outlive a driver that was killed; Linux ends it instead."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def peak_bytes() -> int:
    """Largest resident memory of this process (VmHWM) since it started or since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM line; the peak memory cannot be read on this system")


def forget_peak() -> None:
    """Starts a new VmHWM from what is resident now; where the kernel refuses, the peak stays that of the whole life."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
