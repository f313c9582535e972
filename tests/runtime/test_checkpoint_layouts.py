"""A state saved by four stages on two replicas is the same state on any other layout, and is read about once.

The saving run tells what it wrote, what it would train on next and at which rate, before any file is involved; every
other layout must come to the same bits by way of the files. Bytes are those that the system's reads return: the proof
before a resume reads each file once, shared by all ranks; then each copy of the model reads the parameters once, and
its moments, or (optimizer.shard) its share of them.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.checkpoint import read, write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.job import Job
from small_run import run, write_tokens

STEP = 4
OFTEN = {"model__layers": 3, "train__steps": STEP + 1, "train__batch": 16, "train__microbatch": 1}
OFTEN |= {"checkpoint__every": STEP, "checkpoint__keep": 0}
SAVED = {"pipeline__replicas": 2, "pipeline__cut": [2, 1, 1, 1]}
LAYOUTS = {  # ranks, copies of the model, settings
    "pipeline 1, data 8": (8, 8, {"pipeline__replicas": 8}),
    "pipeline 2, data 1": (2, 1, {}),
    "pipeline 3, data 1": (3, 1, {}),
    "another cut": (8, 2, {"pipeline__replicas": 2, "pipeline__cut": [1, 1, 1, 2]}),
    "another schedule": (4, 2, {"pipeline__replicas": 2, "pipeline__schedule": "zb_v"}),
    "chains of both directions": (2, 2, {"pipeline__schedule": "dualpipe"}),
    "moments divided by 4": (4, 4, {"pipeline__replicas": 4, "optimizer__shard": True}),
    "moments divided, 2 stages": (4, 2, {"pipeline__replicas": 2, "optimizer__shard": True}),
}


DIVIDED = {"moment1": 1, "moment2": 1}  # how often all ranks together hold them

Key = tuple[str, str]  # (kind, name)
Box = tuple[tuple[int, ...], np.ndarray]  # where it begins in the tensor, its values


@dataclass
class Seen:
    """What a run wrote, held after loading, was fed and read."""

    written: dict[Key, np.ndarray] = field(default_factory=dict)  # of step STEP
    loaded: dict[int, list[tuple[Key, Box]]] = field(default_factory=dict)  # by rank
    steps: set[int] = field(default_factory=set)  # that the ranks went on from
    fed: dict[int, dict[tuple[int, int], bytes]] = field(default_factory=dict)  # step -> (copy, micro) -> ids
    read: Counter[int] = field(default_factory=Counter)  # bytes by thread
    proof: Counter[int] = field(default_factory=Counter)  # bytes by rank
    load: Counter[int] = field(default_factory=Counter)

    def batch(self, step: int) -> bytes:
        """The ids of a step, in the order of its sequences."""
        return b"".join(ids for _, ids in sorted(self.fed[step].items()))


def within(start: tuple[int, ...], values: np.ndarray) -> tuple[slice, ...]:
    """The box of a tensor that the values are."""
    return tuple(slice(s, s + n) for s, n in zip(start, values.shape, strict=True))


def held(job: Job) -> Iterator[tuple[Key, Box]]:
    """Copies of all that a rank has to hold: whole parameters, its boxes of the moments."""
    for name in job.mine.params.owned:
        owner, at = job.plan.ties.get(name, name), job.mine.params.param[name]
        values = job.executor.array("PARAM", job.backend.real * at, job.mine.params.shapes[name])
        yield ("parameter", owner), ((0,) * values.ndim, values.copy())
        yield from (((kind, owner), (start, v.copy())) for kind, start, v in job.owned(name) if kind != "parameter")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Of all runs from here on; the ranks are threads."""
    found, lock = Seen(), threading.Lock()
    preadv, whole_load, feed = os.preadv, Job._load, Job.feed
    write_shard = write.write_shard

    def counting(*args: Any) -> int:
        got = preadv(*args)
        with lock:
            found.read[threading.get_ident()] += got
        return got

    def writing(folder: Path, index: int, pieces: Any) -> Any:
        def copied() -> Iterator[write.Piece]:
            for piece in pieces:
                if read.number(folder) == STEP:
                    with lock:
                        whole = found.written.setdefault((piece.kind, piece.name), np.zeros(piece.shape, np.float32))
                    whole[within(piece.start, piece.array)] = piece.array
                yield piece

        return write_shard(folder, index, copied())

    def loading(job: Job) -> None:
        me, rank = threading.get_ident(), job.link.rank
        before = found.read[me]
        whole_load(job)
        with lock:
            found.proof[rank], found.load[rank] = before, found.read[me] - before
            found.steps.add(job.step)
            found.loaded[rank] = list(held(job))

    def feeding(job: Job, split: str, step: int) -> None:
        feed(job, split, step)
        for chain, micro, ids, _, _ in job.inputs:
            if ids is not None and split == "train" and micro < job.plan.micros:
                copy = job.replica * job.plan.schedule.chains + chain
                with lock:
                    found.fed.setdefault(step, {})[copy, micro] = ids.tobytes()

    monkeypatch.setattr(os, "preadv", counting)
    monkeypatch.setattr(write, "write_shard", writing)
    monkeypatch.setattr(Job, "_load", loading)
    monkeypatch.setattr(Job, "feed", feeding)
    monkeypatch.setattr(CpuBackend, "matmul_peak", lambda self, seconds: 1e11)  # told, not used
    return found


def rates(metrics: list[dict[str, float]]) -> dict[int, float]:
    return {int(m["step"]): m["lr"] for m in metrics if "lr" in m}


@pytest.mark.parametrize("model", ["untied", "llama"])
def test_any_layout_loads_the_same_state_and_reads_it_once(tmp_path: Path, seen: Seen, model: str) -> None:
    data = write_tokens(tmp_path / "data")
    first = run(data, tmp_path / "saved", 8, model, **OFTEN, **SAVED)
    shutil.rmtree(write.step_folder(tmp_path / "saved", STEP + 1))
    state, batch = {key: array.copy() for key, array in seen.written.items()}, seen.batch(STEP)
    checkpoint = read.Checkpoint.open(tmp_path / "saved")
    files = sum(s.bytes for s in checkpoint.shards)
    assert len(checkpoint.shards) == 4 and state.keys() == checkpoint.layout.keys() and batch != seen.batch(STEP - 1)
    for name, (ranks, copies, settings) in LAYOUTS.items():
        for part in (seen.loaded, seen.fed, seen.steps, seen.read, seen.proof, seen.load):
            part.clear()
        out = shutil.copytree(tmp_path / "saved", tmp_path / name)
        again = run(data, out, ranks, model, **OFTEN, **settings)
        assert seen.steps == {STEP} and len(seen.loaded) == ranks, name
        for key, (start, values) in (item for items in seen.loaded.values() for item in items):
            assert state[key][within(start, values)].tobytes() == values.tobytes(), name
        assert seen.batch(STEP) == batch and rates(again.metrics)[STEP + 1] == rates(first.metrics)[STEP + 1], name
        check_bytes(seen, state, dict.fromkeys(KINDS, copies) | ({} if "optimizer__shard" not in settings else DIVIDED))
        assert sum(seen.proof.values()) == files, "the proof reads every file once, whatever the number of ranks"


def check_bytes(seen: Seen, state: dict[Key, np.ndarray], copies: dict[str, int]) -> None:
    """Every element is held as often as there are copies of its kind, and read as often: no rank reads what it does
    not hold. A tied weight is held, and read, once more by each copy whose two ends are on different ranks.
    """
    times = {key: np.zeros(array.shape, int) for key, array in state.items()}
    for rank, items in seen.loaded.items():
        assert seen.load[rank] == sum(values.nbytes for _, (_, values) in items)
        for key, (start, values) in items:
            times[key][within(start, values)] += 1
    more = {key for key, count in times.items() if (count != copies[key[0]]).any()}
    assert {name for _, name in more} <= {"embed.weight"} and all((times[key] >= copies[key[0]]).all() for key in more)
    size = sum(copies[key[0]] * array.nbytes for key, array in state.items())
    assert more or sum(seen.load.values()) <= 1.05 * size
