"""Passes measured before step 0: nothing of it is left, every rank predicts the same, slots can be priced alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcpipe import measure
from hpcpipe.backends.backend import open_backend
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import UserError, loads
from hpcpipe.job import Job
from hpcpipe.planner.costs import Cost
from hpcpipe.planner.plan import plan
from hpcpipe.rehearsal import rehearse
from small_plan import configured, planned
from small_run import run, run_toml, write_tokens


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, {}),
        (3, {"pipeline__schedule": "1f1b"}),
        (2, {"pipeline__schedule": "zb_v"}),
        (3, {"pipeline__schedule": "interleaved", "pipeline__stages": 4}),
        (4, {"pipeline__schedule": "dualpipe", "pipeline__ranks": 2, "pipeline__replicas": 2, "train__batch": 16}),
    ],
)
def test_a_rehearsal_predicts_and_leaves_no_trace(tmp_path: Path, ranks: int, settings: dict[str, object]) -> None:
    data = write_tokens(tmp_path / "data")
    config = loads(run_toml(data, tmp_path / "run", "untied", **settings))

    def rank(link: Link) -> tuple[object, ...]:
        job = Job(config, link)
        before = job.executor.array("PARAM", 0, (job.mine.params.size,)).tobytes()
        predicted = rehearse(job)
        grads = job.executor.array("GRAD", 0, (job.mine.params.grad_size,))
        assert not grads.any()
        assert job.executor.array("PARAM", 0, (job.mine.params.size,)).tobytes() == before
        assert not job.executor.array("MOMENT1", 0, (job.mine.params.size,)).any()
        assert predicted.rows == job.plan.schedule.rows
        return predicted.events

    found = LocalWorld(ranks).run(rank)
    assert all(events == found[0] for events in found)
    assert all(event.end > event.start for event in found[0])


def test_slots_are_priced_alone_and_cut_by_it() -> None:
    config = configured("untied", model__layers=6)
    prices = measure.prices(config, open_backend("cpu", 1))
    assert set(prices) == {"embed", "layer", "head"}
    assert all(min(cost) >= 0 and cost.total > 0 for cost in prices.values())
    heavy = {"embed": Cost(0, 0, 0.1), "layer": Cost(1, 1, 1), "head": Cost(4, 4, 4)}
    cut = [stage.slots for stage in plan(config, 2, prices=heavy).stages]
    assert cut == [("embed", "layer.0", "layer.1", "layer.2", "layer.3", "layer.4"), ("layer.5", "head")]
    costs = [stage.cost for stage in plan(config, 2, prices=heavy).stages]
    assert costs == [pytest.approx(Cost(5, 5, 5.1)), Cost(5, 5, 5)]


def test_a_measured_cut_gives_the_same_bits(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "data")
    one = run(data, tmp_path / "one", 1, "llama")
    assert run(data, tmp_path / "two", 2, "llama", pipeline__cut="measured").tensors == one.tensors


def test_the_cut_heeds_the_memory_that_a_rank_may_use() -> None:
    """An early stage holds more microbatches at once: it gets fewer layers where memory is short."""
    free = planned("untied", 3, model__layers=9, train__batch=32)
    most = [rank.memory.total for rank in free.ranks]
    limit = 0.93 * max(most) / 2**30
    tight = planned("untied", 3, model__layers=9, train__batch=32, pipeline__memory=limit)
    assert max(rank.memory.total for rank in tight.ranks) <= limit * 2**30 < max(most)
    assert len(tight.stages[0].slots) < len(free.stages[0].slots)
    with pytest.raises(UserError, match=r"needs .* [GM]iB"):
        planned("untied", 3, model__layers=9, train__batch=32, pipeline__memory=limit / 3)


def test_metrics_account_for_the_step(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "data")
    for name, settings in (("plain", {}), ("early", {"optimizer__early": True, "optimizer__clip": 0.0})):
        found = run(data, tmp_path / name, 2, "untied", pipeline__schedule="zb_v", train__steps=6, **settings)
        for line in (line for line in found.metrics if "parts" in line):
            assert sum(line["parts"].values()) == pytest.approx(line["seconds"], rel=1e-9)
            assert 0 <= line["bubble"] < 1 and line["predicted_seconds"] > 0
            assert line["worst_wait"]["rank"] in (0, 1) and line["worst_wait"]["op"][0] in "FB"
        assert np.isfinite([line["loss"] for line in found.metrics if "loss" in line]).all()
