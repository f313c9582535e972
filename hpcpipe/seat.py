"""Where a rank works: its cores, its device, and how messages leave that; and what the node has, in lines to print.

In: the config and the link of all ranks, which tell each other what they see. Out: a ``Seat`` with a backend and with
the link for what lies in its memory. Refusals come before anything is planned, the same on every rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hpcpipe.backends.backend import open_backend
from hpcpipe.comm import device as transports
from hpcpipe.comm import nccl
from hpcpipe.comm.link import Link
from hpcpipe.config import Config, UserError
from hpcpipe.placement import cores, devices, mapping, memory, network
from hpcpipe.placement.mapping import Place

T = TypeVar("T")

LIBRARIES = 256 << 20  # bytes beside a device's arena: what cuDNN and NCCL take, graphs


@dataclass(frozen=True)
class Seat:
    """``threads`` are what the plan counts with, ``hosts`` every rank's node, ``link`` knows the device's memory."""

    backend: Any  # a Backend
    link: Any  # a Link
    threads: int
    hosts: Sequence[str]
    lines: Sequence[str]
    sharers: int = 1  # ranks on this rank's GPU

    def check_memory(self, need: int) -> None:
        """Refuses an arena of ``need`` bytes that this rank's device, or its node, cannot hold."""
        if self.backend.on_device:
            need += LIBRARIES
            name = self.backend.driver.properties.name
            have, where = self.backend.driver.room() // self.sharers, f"its share of the free memory of its {name}"
        else:
            free = memory.free_bytes()
            have = need if free is None else free // self.link.node_ranks()[1]
            where = "its share of this machine's free memory"
        if need > have:
            raise UserError(
                f"rank {self.link.rank} needs {need / 2**30:.1f} GiB, {where} is {have / 2**30:.1f} GiB; try "
                'train.microbatch = 1, train.recompute = "block" or more pipeline stages'
            )

    def recall(self, file: Path) -> None:
        """Before anything is laid out: a run that goes on takes the algorithms that it began with. Collective."""
        if self.backend.on_device:
            table: dict[str, Any] = {}
            if self.link.rank == 0:
                with suppress(OSError, ValueError):
                    table = json.loads(file.read_text(encoding="utf-8"))
            self.backend.adopt(self.link.bcast(table))

    def ready(self, links: Iterable[Any], arena: Any, file: Path) -> Sequence[str]:
        """Before step 0, when all is laid out: on a device, the channels of these links are joined, products take one
        algorithm on all ranks, which ``file`` keeps, and everything is captured; what was chosen, in lines. The arena
        is zeros. Collective.
        """
        if not self.backend.on_device:
            return ()
        for link in links:
            link.connect()
        tables = _everybody(self.link, self.backend.table())
        common = {key: value for table in reversed(tables) for key, value in table.items()}
        self.backend.adopt(common)
        if self.link.rank == 0 and common:
            with suppress(OSError):  # without it another run may take another algorithm, and other last bits
                file.write_text(json.dumps(common, indent=1), encoding="utf-8")
        self.backend.capture(arena)
        return self.backend.chosen()


def take(config: Config, link: Link, tags: int) -> Seat:
    """Binds this rank to its cores and opens its device. Collective; JobError on every rank where one cannot.

    ``tags`` is the distance between the tags of two programs that never run at one time.
    """
    cuda = config.device.backend == "cuda"
    return _with_gpu(config, link, tags) if cuda else _with_cores(config, link)


def _everybody(link: Link, value: T) -> list[T]:
    return link.bcast(link.gather(value) or [])


def _opened(config: Config, link: Link, threads: int, index: int = 0) -> Any:
    """The backend, on every rank or on none."""
    found, error = None, None
    try:
        found = open_backend(config.device.backend, threads, index, config.train.compute)
    except UserError as problem:
        error = str(problem)
    link.agree(error)
    return found


def _with_cores(config: Config, link: Link) -> Seat:
    """Threads of this rank; cores are shared out among the ranks of a node that may use the same ones."""
    masks = _everybody(link, (link.hostname, cores.allowed()))
    mine = cores.share(masks, link.rank)
    if not config.device.threads:
        cores.bind(mine)
    threads = config.device.threads or len(mine)
    return Seat(_opened(config, link, threads), link, threads, [host for host, _ in masks], ())


def _with_gpu(config: Config, link: Link, tags: int) -> Seat:
    """The GPU nearest to this rank's cores, which it keeps to, and the transport for all of them."""
    place = _place(link)
    if place.cores:
        cores.bind(place.cores)
    os.environ.update(network.settings(place, os.environ, network.configured(os.environ)))
    os.environ.update(nccl.settings(os.environ))  # before CUDA starts
    backend = _opened(config, link, 1, place.device)
    places = _everybody(link, place)
    gpus = [f"{p.host} {p.gpu.bus} {p.mig}".rstrip() for p in places]
    over, line = transports.choose(link, backend.driver, config.device.transport, gpus, tags)
    lines = (*mapping.table(places), line, *network.notes(place, os.environ))
    return Seat(backend, over, 1, [p.host for p in places], lines, gpus.count(gpus[link.rank]))


def _place(link: Link) -> Place:
    """This rank's place among those of its node."""
    node, error, places = devices.describe(), None, []
    number, _ = link.node_ranks()
    own = mapping.seat(node, os.environ, link.hostname, number, cores.allowed())
    seats = sorted((s for s in _everybody(link, own) if s.host == own.host), key=lambda s: s.local)
    try:
        places = mapping.assign(node, seats)
    except UserError as problem:
        error = str(problem)
    link.agree(error)
    return places[seats.index(own)]
