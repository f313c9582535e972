"""A whole training run on GPUs that are not there: the job of tests/small_run.py, a ``HostDriver`` for each rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from hpcpipe import seat
from hpcpipe.backends.cuda import modules, opening
from hpcpipe.backends.cuda.modules import Image
from hpcpipe.placement.devices import Gpu
from hpcpipe.placement.mapping import Place
from tests.gpu.host import build
from tests.gpu.host_driver import HostDriver
from tests.small_run import Result, run


def place(number: int, gpu: int) -> Place:
    """Where rank ``number`` sits, on GPU ``gpu`` of a node without NICs."""
    device = Gpu(f"0000:{gpu:02x}:00.0", (), -1, "host memory posing as a GPU")
    values = dict.fromkeys(Place._fields, ())
    values |= {"host": "here", "local": number, "device": gpu, "gpu": device, "mig": "", "card": None, "distance": None}
    values |= {"numa": -1, "mixed": False, "imex": False}
    return Place(**values)


@contextlib.contextmanager
def gpus(
    count: int,
    seed: int = 0,
    libraries: Callable[..., Sequence[Any]] = lambda driver, launchers, backend, compute: (),
    fails: Mapping[int, int] = {},
    **options: Any,
) -> Iterator[list[HostDriver]]:
    """Inside, ``device.backend = "cuda"`` finds ``count`` devices; rank r sits at device r % count.

    ``fails``: of a device, after how many verbs it fails.
    """
    drivers: list[HostDriver] = []
    real, compiled = opening.assemble, build.images()

    def connect(index: int) -> HostDriver:
        driver = HostDriver(seed=seed + index, peers=drivers, **options)
        if index in fails:
            driver.fail_at(fails[index])
        return driver

    def images(arch: str) -> dict[str, Image]:
        assert arch in ("sm_90a", "sm_100a")
        return {stem: Image(data, tuple(entries)) for stem, (data, entries) in compiled.items()}

    def sit(link: Any) -> Place:
        return place(link.rank, link.rank % count)

    def assemble(driver: Any, compute: str) -> Any:
        return real(driver, compute, libraries)

    with (
        mock.patch.object(opening, "connect", connect),
        mock.patch.object(opening, "assemble", assemble),
        mock.patch.object(modules, "images", images),
        mock.patch.object(seat, "_place", sit),
        mock.patch.object(opening, "SIDE", 32),  # of the product that measures a device nobody knows
    ):
        yield drivers


def gpu_run(data: Path, out: Path, ranks: int = 1, model: str = "llama", seed: int = 0, **settings: Any) -> Result:
    """``small_run.run`` with a device for each rank."""
    with gpus(ranks, seed):
        return run(data, out, ranks, model, device__backend="cuda", **settings)
