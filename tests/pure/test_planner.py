"""The plan: the numbers of every table agree, and what is planned is what is allocated."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe import model
from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.null import Call, Recording, Tensor
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import ModelConfig, UserError, loads
from hpcpipe.planner import describe
from hpcpipe.planner.costs import CORE, Cost, Device, price
from hpcpipe.planner.plan import plan, resolve
from hpcpipe.runtime.arena import align
from hpcpipe.schedule import families
from hpcpipe.schedule.timeline import Timeline
from small_plan import configured, executor_of, planned
from small_run import MODELS, VOCAB, run_toml, write_tokens

ROOT = Path(__file__).resolve().parents[2]


# --- the price


def recording_of(**passes: tuple[Call, ...]) -> Recording:
    y = Tensor(0, (1,), "d")
    return Recording({"F": (), "B": (), "W": (), **passes}, {}, {}, {}, None, y, None, None)


def linear(n: int, o: int, c: int) -> Call:
    tensors = (Tensor(1, (n, o)), Tensor(2, (n, c)), Tensor(3, (o, c)), Tensor(4, (o,)), None)
    return Call("linear_fwd", tensors, (n, o, c), ())


def add(n: int, c: int) -> Call:
    return Call("add_fwd", (Tensor(5, (n, c)), Tensor(6, (n, c)), Tensor(7, (n, c))), (n, c), ())


def test_a_call_costs_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    recording = recording_of(F=(linear(100, 80, 60), add(100, 80)), B=(add(10, 8),), W=())
    flops, traffic = 2 * 100 * 80 * 60, 4 * (100 * 80 + 100 * 60 + 80 * 60 + 80)
    added, moved = 100 * 80, 4 * 3 * 100 * 80
    device = Device(flops=1e6, bandwidth=1e6)  # the product is bound by its arithmetic, the sum by memory
    assert flops > traffic and moved > added
    assert price(recording, device) == pytest.approx((flops / 1e6 + moved / 1e6, 4 * 3 * 80 / 1e6, 0.0))
    slow, *_ = price(recording, Device(1e3, 1e12))
    starved, *_ = price(recording, Device(1e15, 1e3))
    assert slow == pytest.approx((flops + added) / 1e3)
    assert starved == pytest.approx((traffic + moved) / 1e3)


def test_a_cost_sums_its_passes() -> None:
    assert Cost(1.0, 2.5, 4.0).total == 7.5


def test_the_auto_cut_follows_the_device() -> None:
    """A head over a large vocabulary is worth many blocks: an even cut would give it company."""
    p = planned("llama", 2, model__vocab=20000)
    assert [stage.slots for stage in p.stages] == [("embed", "layer.0", "layer.1"), ("head",)]
    even = planned("llama", 2, model__vocab=20000, pipeline__cut="even")
    assert [len(stage.slots) for stage in even.stages] == [2, 2]
    totals = [[stage.cost.total for stage in one.stages] for one in (p, even)]
    assert max(totals[0]) < max(totals[1])


# --- the plan


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_cover_the_model(name: str, ranks: int) -> None:
    p = planned(name, ranks)
    assert [slot for stage in p.stages for slot in stage.slots] == ["embed", "layer.0", "layer.1", "head"]
    assert [s for rank in p.ranks for s in rank.stages] == list(range(len(p.stages)))
    assert p.names == list(model.parameters(p.config.model))
    assert all(name in p.stages[p.stage_of(name)].layer.params for name in p.names)
    assert sum(prod(p.stages[p.stage_of(n)].layer.params[n].shape) for n in p.names) == model.parameter_count(
        p.config.model
    )
    owned = [n for rank in p.ranks for n in rank.params.owned if n not in p.ties]
    assert sorted(owned) == sorted(p.names)
    assert p.tokens == 12 * 16 and p.micros == 6
    assert isinstance(p.timeline, Timeline) and len(p.timeline.events) == 3 * p.micros * len(p.stages)


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_has_the_same_flops_on_every_layout(name: str, recompute: str) -> None:
    found = {
        planned(name, ranks, pipeline__replicas=replicas, train__recompute=recompute).flops
        for ranks, replicas in ((1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (4, 2), (9, 3))
    }
    found |= {
        planned(name, 2, pipeline__schedule=schedule, train__recompute=recompute).flops
        for schedule in ("interleaved", "zb_v", "dualpipe")
    }
    assert len(found) == 1
    p = planned(name)
    exact = model.model_flops_per_token(p.config.model, p.config.train.length) * p.tokens
    assert found.pop() > exact  # the mathematics of the products, and what norms, activations and the update cost


def test_recompute_costs_flops_and_saves_memory() -> None:
    plain, again = planned("llama", 2), planned("llama", 2, train__recompute="block")
    assert again.flops > plain.flops
    for a, b in zip(again.ranks, plain.ranks, strict=True):
        assert a.memory.by_use()["activations"] < b.memory.by_use()["activations"]


def test_equal_configs_have_equal_plans() -> None:
    a, b = planned("gpt2", 2), planned("gpt2", 2)
    assert a.digest == b.digest and len(a.digest) == 16


def test_another_cut_or_schedule_is_another_plan() -> None:
    settings: list[dict[str, Any]] = [
        {"pipeline__cut": [2, 2]}, {"pipeline__cut": [1, 3]}, {"pipeline__cut": [3, 1]},
        {"pipeline__cut": [2, 2], "pipeline__schedule": "gpipe"}, {"pipeline__cut": [2, 2], "train__batch": 16},
        {"pipeline__cut": [2, 2], "pipeline__schedule": "zb_h1"}, {"pipeline__stages": 4},
        {"pipeline__schedule": "interleaved"}, {"pipeline__schedule": "interleaved", "pipeline__group": 3},
    ]  # fmt: skip
    assert len({planned("gpt2", 2, **s).digest for s in settings}) == len(settings)


def test_every_process_computes_the_same_digest(tmp_path: Path) -> None:
    """Ranks compare digests, so nothing in one may depend on a process, such as the order of a set of texts."""
    program = "from small_plan import planned; print(planned('llama', 3).digest)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    found = {
        subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=environment | {"PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert found == {planned("llama", 3).digest}


def test_resolve_fills_what_the_data_and_the_model_decide() -> None:
    config = resolve(loads(run_toml(Path("d"), Path("o"), "gpt2", train__length=0)), 77)
    assert (config.model.vocab, config.train.length) == (77, 16)
    assert (config.model.kv_heads, config.model.ffn, config.model.tied) == (2, 96, True)
    assert resolve(config, 77) == config
    with pytest.raises(UserError, match="the data's tokenizer has 78 tokens; raise it to 78"):
        resolve(config, 78)


def test_an_evaluation_that_replicas_cannot_share_is_a_sentence() -> None:
    with pytest.raises(
        UserError, match=r"^eval\.microbatches = 3 cannot be shared by 2 copies of the model; use a multiple of 2$"
    ):
        planned("llama", 2, pipeline__replicas=2, eval__every=5, eval__microbatches=3)
    planned("llama", 2, pipeline__replicas=2, eval__microbatches=3)  # never evaluated: no reason to refuse


def test_ranks_that_do_not_fit_are_a_sentence() -> None:
    with pytest.raises(UserError, match=r"^pipeline: 3 ranks cannot be laid out as 2 replicas"):
        planned("llama", 3, pipeline__replicas=2)
    with pytest.raises(UserError, match=r"^pipeline: 5 stages for a model of 4 slots"):
        planned("llama", 5)


# --- the schedule


@pytest.mark.parametrize("name", families.SCHEDULES)
def test_every_schedule_is_planned_by_its_name(name: str) -> None:
    p = planned("gpt2", 2, pipeline__schedule=name)
    assert p.schedule.name == name and len(p.ranks) == 2 and p.copies == families.SCHEDULES[name].chains
    assert len(p.stages) == families.default_stages(name, 2) and p.micros == 6 // p.copies
    assert sorted(s for rank in p.ranks for s in rank.stages) == list(range(len(p.stages) * p.copies))
    for i, rank in enumerate(p.ranks):
        assert {p.schedule.placement[s] for s in rank.stages} == {i}
    assert len(p.timeline.events) == 3 * p.micros * len(p.stages) * p.copies
    twice = planned("gpt2", 4, pipeline__schedule=name, pipeline__replicas=2, train__batch=24)
    assert twice.copies == 2 * p.copies and twice.flops == 2 * p.flops and twice.micros == p.micros


def test_stages_of_the_model_are_named_or_listed() -> None:
    for settings in ({"pipeline__stages": 3}, {"pipeline__cut": [2, 1, 1]}):
        p = planned("gpt2", 2, **settings)
        assert len(p.stages) == 3 and p.schedule.placement == (0, 0, 1)
    assert planned("gpt2", 2, pipeline__schedule="interleaved").schedule.placement == (0, 1, 0, 1)
    assert planned("gpt2", 2, pipeline__schedule="zb_v").schedule.placement == (0, 1, 1, 0)


@pytest.mark.parametrize(
    ("ranks", "settings", "sentence"),
    [
        (
            2, {"schedule": "1f1"},
            "zb_v, v_half, v_min, dualpipe_v, dualpipe, search or file:PATH; did you mean 1f1b?",
        ),
        (2, {"schedule": "1f1"}, "pipeline.schedule is 1f1, expected gpipe, 1f1b, interleaved, zb_h1, zb_h2, zb_v, "),
        (2, {"schedule": "serch"}, "search or file:PATH; did you mean search?"),
        (2, {"schedule": "ZB_V"}, "search or file:PATH; did you mean zb_v?"),
        (2, {"schedule": "file:"}, "pipeline.schedule is file: without a path; write file:PATH"),
        (2, {"schedule": "qqqq"}, "search or file:PATH"),
        (2, {"schedule": ""}, "pipeline.schedule is , expected gpipe, "),
        (3, {"schedule": "dualpipe"}, "pipeline.schedule: dualpipe lets rank r and rank P-1-r serve the two copies"),
        (2, {"schedule": "zb_v", "stages": 3}, "pipeline.schedule: zb_v has 2 stages on every rank: 2 ranks need 4"),
        (3, {"cut": [2, 2]}, "pipeline.schedule: 2 stages cannot occupy 3 ranks"),
        (3, {"cut": [1, 1]}, "2 stages cannot occupy 3 ranks; use 2 ranks or more stages"),
        (3, {"schedule": "zb_v"}, "pipeline: 6 stages for a model of 4 slots"),
        (2, {"group": 2}, "pipeline.schedule: 1f1b has no groups of microbatches"),
        (2, {"schedule": "file:none.txt"}, "pipeline.schedule: none.txt cannot be read"),
    ],
)  # fmt: skip
def test_a_schedule_that_cannot_be_is_a_sentence(ranks: int, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        planned("llama", ranks, **{f"pipeline__{key}": value for key, value in settings.items()})
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_copies_of_the_model_share_a_batch_as_replicas_do() -> None:
    with pytest.raises(UserError, match=r"train\.batch = 12 sequences cannot be shared by 4 copies of the model"):
        planned("gpt2", 4, pipeline__schedule="dualpipe", pipeline__replicas=2)
    with pytest.raises(
        UserError, match=r"^eval\.microbatches = 3 cannot be shared by 2 copies of the model; use a multiple of 2$"
    ):
        planned("gpt2", 2, pipeline__schedule="dualpipe", eval__every=5, eval__microbatches=3)


@pytest.mark.parametrize("name", ["zb_v", "dualpipe"])
def test_a_schedule_from_a_file(tmp_path: Path, name: str) -> None:
    named = planned("gpt2", 2, pipeline__schedule=name)
    file = tmp_path / "mine.txt"
    file.write_text(str(named.schedule), encoding="utf-8")
    given = planned("gpt2", 2, pipeline__schedule=f"file:{file}")
    assert given.schedule == named.schedule and given.copies == named.copies
    assert [r.memory for r in given.ranks] == [r.memory for r in named.ranks]
    depth = named.schedule.depth
    for settings, ranks, sentence in (
        ({"train__batch": 24}, 2, f"has {named.micros} microbatches, the run has {2 * named.micros} per replica"),
        ({}, 4, f"is for 2 ranks and {depth} stages, the run has 4 ranks; start as many, or make the file for them"),
        ({"pipeline__stages": 3}, 2, f"is for 2 ranks and {depth} stages, the run has 2 ranks and 3 stages"),
    ):
        with pytest.raises(UserError) as caught:
            planned("gpt2", ranks, pipeline__schedule=f"file:{file}", **settings)
        assert sentence in str(caught.value)
    file.write_text(str(named.schedule).replace("F0.0 ", "", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"^pipeline\.schedule: .*F0\.0"):
        planned("gpt2", 2, pipeline__schedule=f"file:{file}")


def test_who_gains_by_it_guesses() -> None:
    """Not where ranks wait for each other anyway, be it the schedule or a tie that crosses ranks; or as one wishes."""
    for name, schedule, ranks, early in (
        ("untied", "zb_h2", 3, True), ("untied", "dualpipe", 4, True), ("untied", "1f1b", 2, False),
        ("untied", "gpipe", 4, False), ("llama", "zb_h2", 2, False), ("llama", "dualpipe", 4, False),
        ("untied", "1f1b", 1, False),
    ):  # fmt: skip
        deep: dict[str, Any] = {"model__layers": 6, "train__batch": 24, "pipeline__schedule": schedule}
        # Passes of so small a model are as short as a message; here only the schedule counts.
        p = plan(configured(name, **deep), ranks, device=CORE._replace(latency=0.0, link=1e15))
        assert p.early == early, (name, schedule)
        gains = families.period(p.timeline) < 0.99 * p.timeline.makespan
        assert p.early == (gains and name == "untied")
        for wish in (True, False):
            assert planned(name, ranks, **deep, optimizer__early=wish).early == wish


# --- memory


@pytest.mark.parametrize("settings", [{}, {"eval__every": 1, "eval__microbatches": 20}, {"train__recompute": "block"}])
@pytest.mark.parametrize("name", MODELS)
def test_memory_by_use_sums_to_the_total(name: str, settings: dict[str, Any]) -> None:
    for ranks in (1, 3):
        for rank in planned(name, ranks, 2, **settings).ranks:
            parts = rank.memory.by_use()
            assert sum(parts.values()) == rank.memory.total
            assert min(parts.values()) >= 0
            for region in ("param", "moment1", "moment2"):
                assert parts[region] == 4 * rank.params.size  # a multiple of 64 bytes
            assert parts["grad"] == 4 * rank.params.grad_size


def test_threads_add_only_scratch() -> None:
    one, three = planned("gpt2", 2, 1).ranks[0].memory, planned("gpt2", 2, 3).ranks[0].memory
    assert one.work == three.work
    assert three.total - three.work == 3 * (one.total - one.work) > 0


def test_a_longer_evaluation_than_a_step_has_room() -> None:
    short = planned("gpt2", 2, eval__every=1, eval__microbatches=2).ranks[1]
    long = planned("gpt2", 2, eval__every=1, eval__microbatches=50).ranks[1]
    assert short.memory.resident["INPUT"][1] == 6 * short.memory.stride
    assert long.memory.resident["INPUT"][1] == 50 * long.memory.stride
    assert long.memory.pools[1, "Y"][2] == 50  # a loss per microbatch


class Noting:
    """A backend that notes what was asked of it."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.asked, self.arenas = backend, list[int](), list[np.ndarray]()

    def allocate(self, nbytes: int) -> Any:
        self.asked.append(nbytes)
        self.arenas.append(self.backend.allocate(nbytes))
        return self.arenas[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@pytest.mark.parametrize("backend", [ReferenceBackend("float32"), ReferenceBackend("float64"), CpuBackend(2)])
def test_what_is_planned_is_what_is_allocated(backend: Any) -> None:
    p = planned("llama", 2, backend.threads, backend.real, eval__every=1)
    for i, rank in enumerate(p.ranks):
        noting = Noting(backend)
        executor = executor_of(p, i, noting, LocalWorld(2).links[i])
        executor.bind(rank.program, lambda stage: None)
        executor.bind(rank.evaluation, tags=1 << 12)
        assert noting.asked == [rank.memory.total]
        assert noting.arenas[0].nbytes == rank.memory.total
        assert noting.arenas[0].ctypes.data % 64 == 0 and not noting.arenas[0].any()
        assert rank.memory.work == align(rank.memory.work)


# --- the plan in words


def test_describe_tells_the_numbers(tmp_path: Path) -> None:
    write_tokens(tmp_path / "data", 400, 100)
    config = loads(run_toml(tmp_path / "data", tmp_path / "run", "llama", device__threads=2))
    p = plan(resolve(config, VOCAB), 2, 2)
    lines = describe.describe(config, 2).splitlines()
    text = "\n".join(lines)
    assert lines[0].startswith("llama: 2 layers, 4 heads (2 kv), width 24, ffn 40, vocabulary 61, ")
    assert f"{model.parameter_count(p.config.model):,} parameters" in lines[0]
    assert lines[1] == (
        "2 stages x 1 replicas, 2 threads each; 12 sequences of 16 tokens per step in 6 microbatches of 2 per replica"
    )
    assert lines[2].startswith(f"{p.flops / 1e9:,.2f} GFLOP per step, {p.flops / p.tokens / 1e6:,.3f} MFLOP per token")
    stages = [line.split() for line in lines[5:7]]
    assert sum(int(row[-4].replace(",", "")) for row in stages) == model.parameter_count(p.config.model)
    for row, stage in zip(stages, p.stages, strict=True):
        assert row[-3:] == [f"{stage.recording.flops(name) / 1e9:.3f}" for name in "FBW"]
    at = next(i for i, line in enumerate(lines) if line.startswith("MiB per rank"))
    for i, rank in enumerate(p.ranks):
        numbers = lines[at + 2 + i].split()
        assert numbers[0] == str(i) and numbers[-1] == f"{rank.memory.total / 2**20:.2f}"
        assert numbers[1:-1] == [
            f"{rank.memory.by_use().get(use, 0) / 2**20:.2f}" for use in lines[at + 1].split()[1:-2]
        ]
    assert f"schedule 1f1b, predicted bubble {p.timeline.bubble:.1%}" in text
    assert "rank 1" in text.split("predicted bubble")[1]


def test_describe_works_without_data_and_takes_the_ranks_from_the_config() -> None:
    config = loads(
        run_toml(Path("nowhere"), Path("o"), "gpt2", model__vocab=300, pipeline__ranks=2, pipeline__replicas=3)
    )
    assert "2 stages x 3 replicas, " in describe.describe(config)
    listed = loads(run_toml(Path("nowhere"), Path("o"), "gpt2", model__vocab=300, pipeline__cut=[1, 2, 1]))
    assert "3 stages x 1 replicas, " in describe.describe(listed)
    assert "rank 1" not in describe.describe(listed)  # a listed cut is of stages: they may share one rank
    with pytest.raises(UserError, match=r"model\.vocab is not set and there is no data"):
        describe.describe(loads(run_toml(Path("nowhere"), Path("o"), "gpt2")))


def test_a_preset_is_planned_without_being_built() -> None:
    """A model of 8 billion parameters: nothing of its size may be touched."""
    config = configured("llama")
    large = resolve(loads('[model]\npreset = "llama-8B"\n[train]\nlength = 512\nbatch = 8\nmicrobatch = 1\n'))
    assert isinstance(large.model, ModelConfig) and large != config
    p = plan(large, 8)
    assert sum(rank.memory.by_use()["param"] for rank in p.ranks) >= 4 * 8_030_261_248
    assert max(s.cost.total for s in p.stages) < 1.5 * min(s.cost.total for s in p.stages)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_search_is_never_worse_than_a_name(ranks: int, early: bool) -> None:
    """Whatever number of stages the name has, where the search may choose its own."""
    deep: dict[str, Any] = {"model__layers": 8, "train__batch": 12, "optimizer__early": early}
    found = planned("untied", ranks, **deep, pipeline__schedule="search")
    names = [name for name, family in families.SCHEDULES.items() if family.chains == 1]
    by_name = [planned("untied", ranks, **deep, pipeline__schedule=name).expected for name in names]
    assert found.expected <= min(by_name) * (1 + 1e-9)


def test_a_search_says_what_it_cannot() -> None:
    for settings, sentence in (
        ({"pipeline__stages": 1}, "1 stage cannot occupy 2 ranks"),
        ({"pipeline__group": 2}, "pipeline.group = 2 is for interleaved only; leave it out with search"),
        ({"pipeline__memory": 1e-6}, "MiB"),
    ):
        with pytest.raises(UserError) as caught:
            planned("untied", 2, pipeline__schedule="search", **settings)
        assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_with_two_copies_of_a_stage_on_one_rank_is_refused(tmp_path: Path) -> None:
    good = families.build("dualpipe", 2, 2, 3)
    for where, chains in (((0, 1, 0, 1), "2 chains"), ((0, 1, 1, 0), "0 chains")):
        file = tmp_path / "rows.txt"
        rows = tuple(tuple(op for row in good.rows for op in row if where[op.stage] == rank) for rank in (0, 1))
        head, *rest = str(replace(good, rows=rows, placement=where)).splitlines()
        file.write_text("\n".join([head.replace("2 chains", chains), *rest]) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"^pipeline\.schedule: ") as caught:
            planned("untied", 2, pipeline__schedule=f"file:{file}")
        assert "every copy needs a rank of its own" in str(caught.value) or chains == "0 chains"


@pytest.mark.parametrize(
    ("ranks", "settings", "merged"),
    [
        (1, {}, {0}),
        (1, {"pipeline__schedule": "gpipe"}, {0}),
        (2, {}, {0}),  # rank 1 sends its gradient on before it turns to W
        (2, {"pipeline__schedule": "zb_v"}, set()),
        (2, {"pipeline__schedule": "interleaved"}, {0}),
    ],
)
def test_a_stage_that_sends_nothing_between_b_and_w_does_both_at_once(
    ranks: int, settings: dict[str, Any], merged: set[int]
) -> None:
    p = planned("llama", ranks, train__batch=8, **settings)
    assert {i for i, stage in enumerate(p.stages) if not stage.recording.passes["W"]} == merged
    assert {i for i, stage in enumerate(p.stages) if stage.cost.W == 0.0} == merged
    for rank in p.ranks:
        for (stage, pool), (_, size, _) in rank.memory.pools.items():
            assert pool != "OWED" or (stage not in merged and size)
