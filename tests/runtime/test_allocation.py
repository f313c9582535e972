"""While a run trains, it allocates nothing: neither Python nor the libraries grow, and the system hands out no page."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import loads
from hpcpipe.job import Job
from hpcpipe.rehearsal import rehearse
from hpcpipe.steps import Steps
from small_run import run_toml, write_tokens

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted as Linux does")

WARM, STEPS = 10, 50
LOGITS = 32 * 4096 * 4  # bytes of the largest activation of the runs below

# Far less than one tensor of the model per step. The standard library notes a few objects (an epoch's order, caches).
PAGES = 64
BYTES = 64 << 10


class Growth(NamedTuple):
    """Over some steps: pages the system handed out, more bytes in use at malloc, and at their highest in Python."""

    pages: int
    malloc: int
    python: int


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free", "fast", "maps", "mapped", "old", "fast_bytes", "used", "free_bytes", "top")
    ]


def malloc_bytes() -> int:
    """What the C library has handed out; 0 where it does not tell."""
    asked = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if asked is None:
        return 0
    asked.restype = _Mallinfo2
    found = asked()
    return int(found.used + found.mapped)


def measured(work: Callable[[], None]) -> Growth:
    """Runs the same work three times: as it is, and twice with Python's allocations traced.

    The second time fills what is kept of the last steps with objects that are known to the trace; the third counts.
    """
    gc.collect()
    used, pages = malloc_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    pages, used = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages, malloc_bytes() - used
    tracemalloc.start()
    try:
        work()
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        work()
        return Growth(pages, used, tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


def bounded(growth: Growth) -> bool:
    return growth.pages < PAGES and growth.malloc < BYTES and growth.python < BYTES


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.mark.parametrize(
    ("model", "ranks", "settings"),
    [
        ("llama", 1, {}),
        ("gpt2", 1, {"model__dropout": 0.1, "train__recompute": "block", "device__threads": 2}),
        ("llama", 2, {}),
        ("llama", 4, {"pipeline__replicas": 2}),
        ("llama", 2, {"pipeline__schedule": "zb_v", "optimizer__early": True, "optimizer__clip": 0.0}),
        ("untied", 2, {"pipeline__schedule": "dualpipe", "optimizer__early": True, "optimizer__clip": 1e-3}),
    ],
)
def test_a_step_allocates_nothing(data: Path, tmp_path: Path, model: str, ranks: int, settings: dict[str, Any]) -> None:
    config = loads(run_toml(data, tmp_path, model, model__vocab=4096, train__steps=1000, train__batch=8, **settings))

    def rank(link: Link) -> Growth | None:
        job = Job(config, link)
        job.begin(rehearse(job))
        loop, done = Steps(job), 0

        def steps(count: int) -> None:
            nonlocal done
            for _ in range(count):
                loop.run(done, False)
                done += 1

        steps(WARM)
        if link.rank == 0:
            found = measured(lambda: steps(STEPS))
        else:
            found = None
            steps(3 * STEPS)
        loop.settle()
        assert loop.voided == 0 and loop.loss > 0  # nothing clips, or every step does: then nothing is guessed
        job.close(0.0, True)
        return found

    found = LocalWorld(ranks).run(rank)[0]
    assert found is not None and bounded(found), found


def test_a_tensor_per_step_would_be_seen() -> None:
    """The control: what the bounds must not let through."""

    def temporary() -> None:
        for _ in range(STEPS):
            np.ones(LOGITS, np.uint8).sum()

    kept: list[Any] = []
    assert not bounded(measured(temporary))
    assert not bounded(measured(lambda: kept.extend(np.ones(24 * 32, np.float32) for _ in range(STEPS))))
