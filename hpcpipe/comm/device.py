"""The choice of how messages leave a device: NCCL, an MPI that takes device memory, or pinned host memory.

In: the link for host memory, this rank's device, what the user wants, and which device every rank has. Out: the link
for device memory, and a line that says what was chosen and why. All ranks decide the same from everybody's answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from hpcpipe.comm import nccl
from hpcpipe.comm.aware import AwareLink, Support, supported
from hpcpipe.comm.link import Link
from hpcpipe.comm.nccl import NcclLink
from hpcpipe.comm.over import Driver
from hpcpipe.comm.staged import StagedLink
from hpcpipe.config import UserError

WANTED = ("auto", "nccl", "mpi", "staged")


def choose(
    inner: Link,
    driver: Driver,
    wanted: str,
    gpus: Sequence[str],
    period: int = 0,
    library: Callable[[], Any] = nccl.library,
) -> tuple[Link, str]:
    """The link for this device's arrays over ``inner``, and the choice in words. Collective.

    ``gpus`` names every rank's device, node and bus address, in rank order. ``wanted`` is one of WANTED; what cannot be
    is refused with JobError on every rank. For NCCL: tags that differ by a multiple of ``period`` never are in use at
    one time, and ``library`` finds cupy.cuda.nccl.
    """
    if wanted not in WANTED:
        raise UserError(f"device.transport is {wanted!r}, use one of {', '.join(WANTED)}")
    if len(gpus) != inner.size:
        raise ValueError(f"{len(gpus)} devices for {inner.size} ranks")
    if inner.size == 1:
        return StagedLink(inner, driver), "transport: none is needed by one rank"
    found, lack = _found(library) if wanted in ("auto", "nccl") else (None, "")
    aware = supported(inner, os.environ)
    answers: list[tuple[str, Support]] = inner.bcast(inner.gather((lack, aware)) or [])
    no_nccl = _shared(gpus) or _first([lack for lack, _ in answers])
    no_mpi = _first(["" if yes else reason for _, (yes, reason) in answers])
    refused = {"nccl": no_nccl, "mpi": no_mpi}.get(wanted, "")
    if refused:
        inner.agree(f'device.transport = "{wanted}" is impossible: {refused}; use device.transport = "staged"')
    by_wish = f'device.transport = "{wanted}"'
    if wanted == "nccl" or (wanted == "auto" and not no_nccl):
        why = "every rank has a GPU of its own" if wanted == "auto" else by_wish
        return NcclLink(inner, driver, found, period), f"transport: NCCL {_version(found)} ({why})"
    if wanted == "mpi" or (wanted == "auto" and not no_mpi):
        why = f"no NCCL: {no_nccl}" if wanted == "auto" else by_wish
        return AwareLink(inner, driver), f"transport: MPI from device memory ({aware.reason}; {why})"
    why = f"no NCCL: {no_nccl}; no MPI from device memory: {no_mpi}" if wanted == "auto" else by_wish
    return StagedLink(inner, driver), f"transport: staged through pinned host memory ({why})"


def _found(library: Callable[[], Any]) -> tuple[Any, str]:
    """NCCL, or why there is none."""
    try:
        return library(), ""
    except UserError as error:
        return None, str(error)


def _shared(gpus: Sequence[str]) -> str:
    """Which ranks share a device; NCCL cannot have two of them in one."""
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            return f"ranks {gpus.index(gpu)} and {rank} share the GPU {gpu}"
    return ""


def _first(reasons: Sequence[str]) -> str:
    """The first rank that lacks something, and what; nothing if none does."""
    for rank, reason in enumerate(reasons):
        if reason:
            return reason if all(reasons) else f"on rank {rank}, {reason}"
    return ""


def _version(library: Any) -> str:
    """23203 is 2.32.3."""
    number = int(library.get_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"
