"""Copies of the model that divide the moments: the same bits in fewer bytes, saved by all, read by any layout."""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from hpcpipe.checkpoint import layout, read, write
from hpcpipe.config import UserError
from hpcpipe.planner.slots import Slot
from hpcpipe.runtime import share
from hpcpipe.steps import Steps
from small_plan import planned
from small_run import run, write_tokens

KINDS = ("parameter", "moment1", "moment2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


# --- which elements


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 5), (4, 1), (3, 5), (2, 3, 4), (3, 1, 2, 2)], ids=str)
def test_a_stretch_of_a_tensor_is_a_few_boxes(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    flat = np.arange(size).reshape(shape)
    for first in range(size + 1):
        for end in range(size + 1):
            found = list(share.stretch(shape, first, end))
            values = [flat[tuple(slice(s, s + n) for s, n in zip(*box, strict=True))].ravel() for box in found]
            assert np.concatenate([np.empty(0, int), *values]).tolist() == list(range(first, end))
            assert all(min(extent) > 0 and len(extent) == len(shape) for _, extent in found)
            assert len(found) <= 2 * len(shape) - 1


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"pipeline__replicas": 2}),
        (6, {"pipeline__replicas": 3, "pipeline__schedule": "zb_v"}),
        (4, {"pipeline__replicas": 2, "pipeline__schedule": "dualpipe", "model__layers": 4, "train__batch": 16}),
    ],
)
@pytest.mark.parametrize("model", ["llama", "untied"])
def test_the_shares_are_every_element_once(model: str, ranks: int, settings: dict[str, Any]) -> None:
    p = planned(model, ranks, optimizer__shard=True, **settings)
    seen = {name: np.zeros(p.stages[p.stage_of(name)].layer.params[name].shape, int) for name in p.names}
    for rank in p.ranks:
        params = rank.params
        assert params.shards == p.copies and params.moments * p.copies == params.size
        depth, chains = p.schedule.depth, p.schedule.chains
        for replica in range(p.replicas):
            own = share.spans(params, {s: replica * chains + s // depth for s in rank.stages})
            taken = Counter[int]()
            for name in params.owned:
                for box in share.boxes(params, own, name):
                    taken.update(range(box.moments, box.moments + math.prod(box.extent)))
                    if name in seen:
                        seen[name][tuple(slice(s, s + n) for s, n in zip(box.start, box.extent, strict=True))] += 1
            assert set(taken.values()) == {1} and max(taken) < params.moments
    assert all((counts == 1).all() for counts in seen.values())


# --- the bits

LAYOUTS: list[tuple[int, str, dict[str, Any]]] = [
    (2, "llama", {"pipeline__replicas": 2}),
    (3, "gpt2", {"pipeline__replicas": 3, "model__dropout": 0.2, "optimizer__clip": 0.0}),
    (4, "llama", {"pipeline__replicas": 2, "pipeline__schedule": "zb_h1", "optimizer__early": True}),
    (4, "untied", {"pipeline__replicas": 2, "pipeline__schedule": "zb_v", "train__recompute": "block"}),
    (2, "llama", {"pipeline__schedule": "dualpipe", "model__layers": 4, "optimizer__early": True}),
    (4, "gpt2", {"pipeline__schedule": "interleaved", "pipeline__replicas": 2, "model__layers": 4}),
    (2, "gpt2", {"pipeline__replicas": 2, "train__compute": "bfloat16", "device__backend": "reference"}),
    (2, "llama", {"pipeline__replicas": 2, "train__compute": "bfloat16", "device__backend": "reference",
                  "optimizer__early": True}),
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "model", "settings"), LAYOUTS)
def test_a_share_has_the_bits_of_the_whole(
    data: Path, tmp_path: Path, ranks: int, model: str, settings: dict[str, Any]
) -> None:
    settings = {"train__steps": 5, "optimizer__clip": 0.9, "eval__every": 2, "eval__microbatches": 6} | settings
    settings |= {"eval__microbatches": 4} if settings.get("pipeline__schedule") == "dualpipe" else {}
    whole = run(data, tmp_path / "whole", ranks, model, **settings)
    shares = run(data, tmp_path / "shares", ranks, model, optimizer__shard=True, **settings)
    assert whole.losses == shares.losses and whole.tensors == shares.tensors
    for key in ("grad_norm", "val_loss"):
        assert [m.get(key) for m in whole.metrics] == [m.get(key) for m in shares.metrics]


def test_wrong_guesses_are_taken_back(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voided = []
    redo = Steps._redo

    def noted(self: Steps) -> None:
        voided.append(self.pending is not None and self.pending.guessed)
        redo(self)

    monkeypatch.setattr(Steps, "_redo", noted)
    settings = {"pipeline__replicas": 2, "train__steps": 8, "optimizer__clip": 0.9, "model__layers": 4}
    found = [
        run(data, tmp_path / f"{shard}{early}", 4, "llama", optimizer__shard=shard, optimizer__early=early, **settings)
        for shard, early in ((False, False), (True, False), (True, True))
    ]
    assert sum(voided) >= 4  # at least one step, on each of four ranks
    norms = [m["grad_norm"] for m in found[0].metrics if "grad_norm" in m]
    assert min(norms) < 0.9 < max(norms)
    assert all((f.losses, f.tensors) == (found[0].losses, found[0].tensors) for f in found[1:])


def test_without_copies_there_is_nothing_to_divide(data: Path, tmp_path: Path) -> None:
    found = [run(data, tmp_path / str(s), 2, "llama", optimizer__shard=s) for s in (False, True)]
    assert (found[0].losses, found[0].tensors) == (found[1].losses, found[1].tensors)
    assert planned("llama", 2, optimizer__shard=True).most == planned("llama", 2).most


# --- the bytes


@pytest.mark.parametrize("early", [False, True])
def test_a_rank_holds_its_share_of_the_moments(early: bool) -> None:
    settings = {"pipeline__replicas": 3, "optimizer__early": early}
    whole, shares = (planned("untied", 6, optimizer__shard=s, **settings) for s in (False, True))
    for before, after in zip(whole.ranks, shares.ranks, strict=True):
        one, other = (rank.memory.resident for rank in (before, after))
        names = ["MOMENT1", "MOMENT2", *["BEFORE"] * early]
        assert all(one[name][1] == 3 * other[name][1] > 0 for name in names)
        saved = sum(one[name][1] - other[name][1] for name in names)
        assert before.memory.total - after.memory.total == saved
        assert before.memory.by_use()["moment1"] == 3 * after.memory.by_use()["moment1"]


def test_what_the_cut_weighs_is_what_is_divided() -> None:
    stage = planned("gpt2", 2, pipeline__replicas=2, optimizer__shard=True).stages[0]
    slot, values = Slot(stage.layer, stage.recording), sum(math.prod(s.shape) for s in stage.layer.params.values())
    assert slot.state(4) == 16 * values and slot.state(4, 2) == stage.state(4) == 12 * values


def test_a_memory_limit_counts_the_share() -> None:
    most = planned("untied", 3, pipeline__replicas=3).most
    limit = {"pipeline__replicas": 3, "pipeline__memory": (most - 1) / 2**30}
    with pytest.raises(UserError, match=r"pipeline\.memory is"):
        planned("untied", 3, **limit)
    assert planned("untied", 3, optimizer__shard=True, **limit).most < most


# --- the checkpoint


def same(folder: Path, other: Path) -> bool:
    one, two = read.Checkpoint.open(folder), read.Checkpoint.open(other)
    assert one.verify() == two.verify() == []
    return all((one.read(k, n) == two.read(k, n)).all() for k in KINDS for n in one.tensors)


def test_every_copy_writes_its_share(data: Path, tmp_path: Path) -> None:
    settings = {"pipeline__replicas": 3, "train__steps": 2, "model__width": 48}
    for shard in (False, True):
        run(data, tmp_path / str(shard), 6, "untied", optimizer__shard=shard, **settings)
    whole, shares = (write.step_folder(tmp_path / name, 2) for name in ("False", "True"))
    assert same(whole, shares)
    assert [len(list(folder.glob("shard_*"))) for folder in (whole, shares)] == [2, 6]
    found = read.Checkpoint.open(shares)
    assert layout.problems(found.layout) == []
    written, total = Counter[int](), 0
    for tensor in found.layout.values():
        total += 4 * math.prod(tensor.shape)
        assert max(Counter(part.shard for part in tensor.parts).values()) <= 2 * len(tensor.shape) - 1
        for part in tensor.parts:
            written[part.shard] += 4 * math.prod(part.extent)
    assert set(written) == set(range(6))
    for stage in (0, 1):  # the copies of a stage share it evenly, but for what fills up the last share
        parts = [written[stage + 2 * copy] for copy in range(3)]
        assert max(parts) - min(parts) <= 0.05 * total
    with h5py.File(shares / "master.h5", locking=False) as file:
        for kind, name in found.layout:
            assert (file[layout.path(kind, name)][()] == found.read(kind, name)).all()


NEXT: list[tuple[int, dict[str, Any]]] = [
    (2, {"pipeline__replicas": 2, "optimizer__shard": False}),
    (2, {"pipeline__replicas": 2, "optimizer__shard": True}),
    (4, {"pipeline__replicas": 2, "optimizer__shard": True, "pipeline__schedule": "zb_v", "optimizer__early": True}),
    (2, {"pipeline__schedule": "dualpipe", "optimizer__shard": True}),
]


@pytest.mark.parametrize("before", [False, True])
def test_any_layout_goes_on_bit_for_bit(data: Path, tmp_path: Path, before: bool) -> None:
    deep = {"model__layers": 4, "optimizer__schedule": "wsd", "optimizer__decay_steps": 1}
    first = {"pipeline__replicas": 2, "optimizer__shard": before, **deep}
    straight = run(data, tmp_path / "straight", 2, "llama", **first, train__steps=4, checkpoint__every=2)
    cut(tmp_path / "straight", 2)
    for i, (ranks, settings) in enumerate(NEXT):
        parts = tmp_path / str(i)
        shutil.copytree(tmp_path / "straight", parts)
        again = run(data, parts, ranks, "llama", **deep, **settings, train__steps=4)
        assert again.tensors == straight.tensors and again.losses[-2:] == straight.losses[-2:]


def cut(out: Path, step: int) -> None:
    """What a run has done after ``step`` is gone."""
    for folder in read.step_folders(out):
        if read.number(folder) > step:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()


def test_another_number_of_copies_goes_on_alike(data: Path, tmp_path: Path) -> None:
    """Two copies saved; one or three go on, divided or not."""
    wsd = {"optimizer__schedule": "wsd", "optimizer__decay_steps": 1, "train__steps": 4}
    run(data, tmp_path / "two", 2, "gpt2", pipeline__replicas=2, optimizer__shard=True, checkpoint__every=2, **wsd)
    cut(tmp_path / "two", 2)
    for copies in (1, 3):
        found = []
        for shard in (False, True):
            out = shutil.copytree(tmp_path / "two", tmp_path / f"{copies}{shard}")
            found.append(run(data, out, copies, "gpt2", pipeline__replicas=copies, optimizer__shard=shard, **wsd))
        assert found[0].losses == found[1].losses and found[0].tensors == found[1].tensors


def test_a_slow_disk_gets_the_state_of_the_step(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that writes late holds its own update, and so nobody's share comes too early."""
    settings = {"pipeline__replicas": 2, "optimizer__shard": True, "optimizer__early": True, "train__steps": 4}
    often = {"checkpoint__every": 1, "checkpoint__keep": 0, **settings}
    run(data, tmp_path / "plain", 2, "untied", **often)
    whole = write.write_shard

    def late(folder: Path, index: int, pieces: Any) -> Any:
        def slowly() -> Any:
            for i, piece in enumerate(pieces):
                if index == 1 and i % 8 == 0:
                    time.sleep(0.01)
                yield piece

        return whole(folder, index, slowly())

    monkeypatch.setattr(write, "write_shard", late)
    run(data, tmp_path / "late", 2, "untied", **often)
    for step in range(1, 5):
        assert same(write.step_folder(tmp_path / "plain", step), write.step_folder(tmp_path / "late", step))
