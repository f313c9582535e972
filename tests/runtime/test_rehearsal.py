"""Passes measured before step 0: nothing of it is left, every rank predicts the same, slots can be priced alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from hpcpipe.runtime.executor import Executor
from hpcpipe.steps import Steps
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
    assert costs == [pytest.approx(Cost(5, 10.1, 0)), Cost(5, 5, 5)]  # B and W of the first stage are one


def test_slots_are_priced_as_they_are_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss makes its gradients only for who trains."""
    made: list[Executor] = []

    class Kept(Executor):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(measure, "Executor", Kept)
    measure.prices(configured("untied"), open_backend("cpu", 1))
    keys = [key for executor in made if (key := executor.input("key", 0)) is not None]
    assert len(made) == 3 and [int(key[3]) for key in keys] == [1]


def test_a_measured_cut_gives_the_same_bits(tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "data")
    one = run(data, tmp_path / "one", 1, "llama")
    assert run(data, tmp_path / "two", 2, "llama", pipeline__cut="measured").tensors == one.tensors


def test_the_cut_heeds_the_memory_that_a_rank_may_use() -> None:
    """An early stage holds more microbatches at once: it gets fewer layers where memory is short."""
    free = planned("untied", 3, model__layers=18, train__batch=32)
    most = [rank.memory.total for rank in free.ranks]
    limit = 0.99 * max(most) / 2**30
    tight = planned("untied", 3, model__layers=18, train__batch=32, pipeline__memory=limit)
    assert max(rank.memory.total for rank in tight.ranks) <= limit * 2**30 < max(most)
    assert len(tight.stages[0].slots) < len(free.stages[0].slots)
    with pytest.raises(UserError, match=r"needs .* [GM]iB"):
        planned("untied", 3, model__layers=18, train__batch=32, pipeline__memory=limit / 3)


def slow(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def later(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return later


@pytest.mark.parametrize("early", [False, True])
def test_the_parts_of_a_step_add_up_to_the_time_it_took(tmp_path: Path, early: bool) -> None:
    """The sum of the parts beside a clock that knows nothing of them; everything outside of passes takes 10 ms."""
    data = write_tokens(tmp_path / "data")
    settings = {"optimizer__early": early, "optimizer__clip": 1e9, "train__steps": 40}
    config = loads(run_toml(data, tmp_path / "run", "untied", **settings))
    job = Job(config, LocalWorld(1).links[0])
    job.begin(rehearse(job))
    steps, told, optimizer = Steps(job), [], job.optimizer
    job.feed = slow(job.feed, 0.01)
    for name in ("squares", "guess", "keep", "update"):
        setattr(optimizer, name, slow(getattr(optimizer, name), 0.01))
    job.tell = lambda step, seconds, values: told.append((seconds, values["parts"]))
    steps.run(0, False)
    begin = time.perf_counter()
    for step in range(1, 11):
        steps.run(step, False)
    steps.settle()
    wall = time.perf_counter() - begin
    assert len(told) == 11
    parts, seconds = [parts for _, parts in told[1:]], [seconds for seconds, _ in told[1:]]
    close = pytest.approx(wall, rel=0.15)  # what falls between two readings, on a busy machine
    assert sum(sum(p.values()) for p in parts) == close and sum(seconds) == close
    for p in parts[1:]:
        assert p["other"] >= 0.01 and p["optimizer"] >= (0.03 if early else 0.02)


def test_a_step_that_is_done_again_pays_for_it(tmp_path: Path) -> None:
    """The first try of a void step is time that the step took."""
    data = write_tokens(tmp_path / "data")
    config = loads(run_toml(data, tmp_path / "run", "untied", optimizer__early=True, optimizer__clip=1e9))
    job = Job(config, LocalWorld(1).links[0])
    job.begin(rehearse(job))
    steps, told = Steps(job), []
    job.tell = lambda step, seconds, values: told.append((step, seconds, values))
    for step in range(3):
        steps.run(step, False)
    assert steps.guessing and steps.voided == 0
    job.optimizer.config = replace(job.optimizer.config, clip=1e-3)
    job.program.calls = tuple(slow(call, 0.002) for call in job.program.calls)
    steps.run(3, False)
    assert steps.voided == 1 and not steps.guessing
    assert [step for step, *_ in told] == [1, 2, 3, 4]
    before = 0.002 * job.program.turning  # what was done of the void step until it was known to be void
    assert told[3][2]["parts"]["other"] > before and told[3][1] > before + 0.002 * len(job.program.calls)
