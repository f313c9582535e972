"""A state saved by four stages on two replicas is the same state on any other layout, and is read about once.

The saving run tells what it wrote, what it would train on next and at which rate, before any file is involved; every
other layout must come to the same bits by way of the files. Bytes are those that the system's reads return: the proof
before a resume reads each file once, shared by all ranks; then each copy of the model reads the state once for itself.
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
}


@dataclass
class Seen:
    """What a run wrote, held after loading, was fed and read."""

    written: dict[tuple[str, str], bytes] = field(default_factory=dict)  # (kind, name), of step STEP
    loaded: dict[int, dict[tuple[str, str], bytes]] = field(default_factory=dict)  # by rank
    steps: set[int] = field(default_factory=set)  # that the ranks went on from
    fed: dict[int, dict[tuple[int, int], bytes]] = field(default_factory=dict)  # step -> (copy, micro) -> ids
    read: Counter[int] = field(default_factory=Counter)  # bytes by thread
    proof: Counter[int] = field(default_factory=Counter)  # bytes by rank
    load: Counter[int] = field(default_factory=Counter)

    def batch(self, step: int) -> bytes:
        """The ids of a step, in the order of its sequences."""
        return b"".join(ids for _, ids in sorted(self.fed[step].items()))


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
                    found.written[piece.kind, piece.name] = piece.array.tobytes()
                yield piece

        return write_shard(folder, index, copied())

    def loading(job: Job) -> None:
        me, rank = threading.get_ident(), job.link.rank
        before = found.read[me]
        whole_load(job)
        with lock:
            found.proof[rank], found.load[rank] = before, found.read[me] - before
            found.steps.add(job.step)
            found.loaded[rank] = {
                (kind, job.plan.ties.get(name, name)): view.tobytes()
                for name in job.mine.params.owned
                for kind, view in zip(KINDS, job.views(name), strict=True)
            }

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
    state, batch = dict(seen.written), seen.batch(STEP)
    checkpoint = read.Checkpoint.open(tmp_path / "saved")
    size, files = sum(map(len, state.values())), sum(s.bytes for s in checkpoint.shards)
    assert len(checkpoint.shards) == 4 and len(state) == len(checkpoint.layout) and batch != seen.batch(STEP - 1)
    for name, (ranks, copies, settings) in LAYOUTS.items():
        for part in (seen.loaded, seen.fed, seen.steps, seen.read, seen.proof, seen.load):
            part.clear()
        out = shutil.copytree(tmp_path / "saved", tmp_path / name)
        again = run(data, out, ranks, model, **OFTEN, **settings)
        assert seen.steps == {STEP} and len(seen.loaded) == ranks, name
        together: dict[tuple[str, str], bytes] = {}
        for held in seen.loaded.values():
            assert all(state[key] == value for key, value in held.items()), name
            together |= held
        assert together == state, name
        assert seen.batch(STEP) == batch and rates(again.metrics)[STEP + 1] == rates(first.metrics)[STEP + 1], name
        check_bytes(seen, copies, size, files)


def check_bytes(seen: Seen, copies: int, size: int, files: int) -> None:
    """The proof reads every file once, whatever the number of ranks; then the state is read once for each copy of the
    model (replicas, and chains of a bidirectional schedule); a tied weight by both ranks that hold it.
    """
    assert sum(seen.proof.values()) == files
    for rank, held in seen.loaded.items():
        assert seen.load[rank] == sum(map(len, held.values()))
    sizes = {key: len(value) for held in seen.loaded.values() for key, value in held.items()}
    holders = Counter(key for held in seen.loaded.values() for key in held)
    again = {key: (n - copies) * sizes[key] for key, n in holders.items() if n != copies}
    assert {name for _, name in again} <= {"embed.weight"} and all(n > 0 for n in again.values())
    assert sum(seen.load.values()) == copies * size + sum(again.values())
    assert again or sum(seen.load.values()) <= 1.05 * copies * size
