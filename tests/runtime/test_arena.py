"""The memory map: nothing that is live at the same time shares a byte, and what is not does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from hpcpipe import model
from hpcpipe.backends.null import PASSES, Call, Recording, Tensor, record
from hpcpipe.layers.combinators import Chain
from hpcpipe.layers.linear import Linear
from hpcpipe.planner.plan import Plan
from hpcpipe.runtime import arena
from hpcpipe.runtime.arena import ALIGN, INDEX, POOLS, REGIONS, RESIDENT, Layout, Parameters
from small_plan import planned
from small_run import MODELS

VARIANTS: list[dict[str, Any]] = [
    {},
    {"train__recompute": "block"},
    {"model__dropout": 0.1},
    {"model__dropout": 0.1, "train__recompute": "block"},
    {"pipeline__replicas": 3, "train__batch": 12},
]
CASES = [(name, ranks, settings) for name in MODELS for ranks in (1, 2, 3, 4) for settings in VARIANTS]
CASES += [
    (name, 2, {"pipeline__schedule": schedule, "optimizer__early": True})
    for name in MODELS
    for schedule in ("zb_h2", "zb_v", "dualpipe", "interleaved")
]


def told(case: object) -> str:
    if isinstance(case, dict):
        return " ".join(f"{k.rpartition('__')[2]}={v}" for k, v in case.items()) or "plain"
    return str(case)


@pytest.fixture(scope="module", params=CASES, ids=lambda c: " ".join(map(told, c)))
def case(request: pytest.FixtureRequest) -> Plan:
    name, ranks, settings = request.param
    return planned(name, ranks * settings.get("pipeline__replicas", 1), **settings)


def laid(p: Plan) -> Iterator[tuple[Recording, Layout, Parameters]]:
    for rank in p.ranks:
        for stage in rank.stages:
            yield p.stages[stage % len(p.stages)].recording, rank.layouts[stage], rank.params


def extent(tensor: Tensor, real: int = 4) -> int:
    return math.prod(tensor.shape) * {"r": real, "h": 2, "i": 4, "l": 8, "d": 8}[tensor.type]


def spans_of(calls: tuple[Call, ...]) -> dict[Tensor, tuple[int, int]]:
    """First and last call of a pass that touch each tensor."""
    found: dict[Tensor, tuple[int, int]] = {}
    for i, call in enumerate(calls):
        for tensor in call.buffers:
            if tensor is not None:
                found[tensor] = (found.get(tensor, (i, i))[0], i)
    return found


def disjoint(spans: list[tuple[int, int]]) -> bool:
    """Whether half-open intervals share nothing."""
    return all(a[1] <= b[0] for a, b in pairwise(sorted(spans)))


def test_tensors_that_live_together_share_no_byte(case: Plan) -> None:
    for recording, layout, params in laid(case):
        tied = [t for copy, t in recording.params.items() if copy not in params.owned]  # shares its owner's values
        for name in PASSES:
            calls = recording.passes[name]
            spans = spans_of(calls)
            for i in range(len(calls)):
                taken: dict[int, list[tuple[int, int]]] = {}
                for tensor, (first, last) in spans.items():
                    region, offset = layout.where[tensor.id]
                    # what lives within the pass lives from its first to its last call, everything else throughout
                    if tensor not in tied and (region != INDEX["TEMP"] or first <= i <= last):
                        taken.setdefault(region, []).append((offset, offset + extent(tensor)))
                for region, spaces in taken.items():
                    assert disjoint(spaces), f"{name} call {i}: {calls[i].kernel} in {REGIONS[region]}"


def test_what_a_slot_holds_is_disjoint_over_all_passes(case: Plan) -> None:
    """Between two passes of a microbatch its slot must keep everything that either has put there."""
    for recording, layout, _ in laid(case):
        every = {tensor for name in PASSES for tensor in spans_of(recording.passes[name])}
        for pool in POOLS:
            spaces = [
                (offset, offset + extent(tensor))
                for tensor in every
                for region, offset in [layout.where[tensor.id]]
                if region == INDEX[pool]
            ]
            assert disjoint(spaces)
            room = layout.slot[pool] - (ALIGN if pool in ("X", "Y", "DY", "DX") else 0)  # for the sender's clock
            assert max((end for _, end in spaces), default=0) <= max(room, 0)
            assert layout.slot[pool] % ALIGN == 0


def test_a_tensor_outlives_the_pass_that_made_it_only_in_a_slot(case: Plan) -> None:
    """TEMP is overwritten by the next pass of any microbatch, so no tensor there may be touched by two passes."""
    expected = {("F", "B"): "SAVED", ("F", "W"): "KEPT", ("B", "W"): "OWED"}
    for recording, layout, _ in laid(case):
        ends = {t.id for t in (recording.x, recording.y, recording.dy, recording.dx) if t is not None}
        ends |= {t.id for table in (recording.params, recording.grads, recording.inputs) for t in table.values()}
        assert set(layout.where) == ends | set(recording.lifetimes)
        for number, (first, last) in recording.lifetimes.items():
            if number not in ends:
                pool = "TEMP" if first == last else expected[first, last]
                assert REGIONS[layout.where[number][0]] == pool


def test_offsets_are_cache_lines(case: Plan) -> None:
    for _, layout, _ in laid(case):
        assert [offset for _, offset in layout.where.values() if offset % ALIGN or offset < 0] == []


def test_temporaries_stay_in_their_region_and_reuse_it(case: Plan) -> None:
    reused = False
    for recording, layout, _ in laid(case):
        for name in PASSES:
            temps = [t for t in spans_of(recording.passes[name]) if layout.where[t.id][0] == INDEX["TEMP"]]
            assert max((layout.where[t.id][1] + extent(t) for t in temps), default=0) <= layout.temp
            reused = reused or sum(map(extent, temps)) > layout.temp
    assert reused


def test_temporaries_take_what_is_live_at_the_worst_call(case: Plan) -> None:
    """First fit is not optimal, but here nothing is lost: a stage needs what its hungriest call has around it."""
    for recording, layout, _ in laid(case):
        worst = 0
        for name in PASSES:
            spans = spans_of(recording.passes[name])
            temps = {t: span for t, span in spans.items() if layout.where[t.id][0] == INDEX["TEMP"]}
            for i in range(len(recording.passes[name])):
                live = sum(arena.size_of(t, 4) for t, (first, last) in temps.items() if first <= i <= last)
                worst = max(worst, live)
        assert worst <= layout.temp <= 1.5 * worst


# --- the flat buffers


def test_flat_buffers_do_not_overlap(case: Plan) -> None:
    for rank in case.ranks:
        params = rank.params
        size = {name: math.prod(shape) for name, shape in params.shapes.items()}
        assert set(params.param) == set(params.grad) == set(params.shapes) == set(params.decay)
        assert disjoint([(params.param[n], params.param[n] + size[n]) for n in params.owned])
        assert disjoint([(params.grad[n], params.grad[n] + size[n]) for n in params.grad])
        assert max(params.param[n] + size[n] for n in params.param) <= params.size <= params.grad_size
        assert max(params.grad[n] + size[n] for n in params.grad) <= params.grad_size
        # one offset serves parameter, gradient and moments: what the update's four arguments rely on
        assert {n: params.grad[n] for n in params.owned} == {n: params.param[n] for n in params.owned}


def test_stages_divide_by_the_copies(case: Plan) -> None:
    unit = 16 * case.copies
    assert case.copies == case.replicas * case.schedule.chains
    for rank in case.ranks:
        params = rank.params
        assert list(params.stage) == list(rank.stages)
        starts = [0, *(end for _, _, end in params.stage.values())]
        for (stage, (start, edge, end)), before in zip(params.stage.items(), starts, strict=False):
            assert start == before and start <= edge <= end
            assert start % unit == 0 and end % unit == 0 and edge % 16 == 0
            names = case.stages[stage % len(case.stages)].layer.params
            for name in (n for n in names if n in params.owned):
                low, high = (start, edge) if params.decay[name] else (edge, end)
                assert low <= params.param[name] < high
                assert params.decay[name] == names[name].decay == (len(names[name].shape) == 2)
        assert params.size == starts[-1]
        assert params.grad_size % unit == 0


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_tied_copy_shares_values_on_its_owners_rank_but_never_gradients(name: str) -> None:
    alone = planned(name, 1).ranks[0].params
    assert alone.param["head.weight"] == alone.param["embed.weight"]
    assert alone.grad["head.weight"] == alone.size != alone.grad["embed.weight"]
    assert "head.weight" not in alone.owned and alone.tied == {"head.weight": "embed.weight"}
    first, last = (rank.params for rank in planned(name, 2).ranks)
    assert "head.weight" not in first.param and first.tied == {}
    assert "head.weight" in last.owned and last.tied == {"head.weight": "embed.weight"}
    assert last.grad_size == last.size
    assert first.ties == last.ties == alone.ties


def test_two_stages_on_one_rank_lie_one_after_the_other() -> None:
    p = planned("llama", 4, pipeline__replicas=1)
    layers = {s: p.stages[s].layer for s in (3, 0)}
    params = arena.parameters(layers, p.ties, 3)
    assert list(params.stage) == [3, 0]
    assert params.stage[3][0] == 0 and params.stage[3][2] == params.stage[0][0]
    assert params.param["head.weight"] == params.param["embed.weight"] == params.stage[0][0]
    assert params.size % 48 == 0 and params.grad["head.weight"] == params.size


def test_untied_models_have_no_ties() -> None:
    for rank in planned("untied", 2).ranks:
        assert rank.params.tied == {} and rank.params.ties == {}
        assert rank.memory.resident["SCRATCH"][1] == 0


def test_scratch_is_for_exchanges_only() -> None:
    def scratch(ranks: int, **settings: Any) -> list[int]:
        return [r.memory.resident["SCRATCH"][1] // 4 for r in planned("llama", ranks, **settings).ranks]

    p = planned("llama", 3)
    assert scratch(3) == [p.ranks[0].params.grad_size, 0, p.ranks[2].params.grad_size]
    assert min(scratch(6, pipeline__replicas=2)) > 0


def test_a_bucket_bounds_the_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    params = planned("llama", 1).ranks[0].params
    monkeypatch.setattr(arena, "BUCKET", 64)
    assert arena.scratch_elements(params, 2) == 64


# --- the whole arena


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("real", [4, 8])
@pytest.mark.parametrize(
    "settings",
    [{}, {"eval__every": 1, "eval__microbatches": 40}, {"optimizer__early": True, "pipeline__schedule": "zb_h1"}],
    ids=told,
)
@pytest.mark.parametrize("ranks", [1, 3])
def test_regions_and_slots_do_not_overlap(ranks: int, settings: dict[str, Any], real: int, threads: int) -> None:
    p = planned("gpt2", ranks, threads, real, model__dropout=0.1, **settings)
    for rank in p.ranks:
        m = rank.memory
        assert list(m.resident) == list(RESIDENT)
        spaces = [(at, at + size) for at, size in m.resident.values()]
        for (stage, pool), (_, size, count) in m.pools.items():
            assert size == rank.layouts[stage].slot[pool]
            spaces += [(m.base(stage, pool, i), m.base(stage, pool, i) + size) for i in range(count)]
        spaces.append((m.work, m.total))
        assert disjoint(spaces)
        assert {at % ALIGN for at, _ in spaces} == {0}
        assert sum(end - start for start, end in spaces) == m.total  # and nothing is lost between them
        assert m.total - m.work == threads * max(layout.work for layout in rank.layouts.values())
        assert m.resident["TEMP"][1] >= max(layout.temp for layout in rank.layouts.values())
        assert m.resident["PARAM"][1] >= real * rank.params.size
        assert m.resident["BEFORE"][1] == (m.resident["PARAM"][1] if p.early else 0)


def test_every_slot_of_the_programs_exists() -> None:
    p = planned("llama", 3, eval__every=1, eval__microbatches=9)
    for rank in p.ranks:
        assert rank.evaluation is not None
        for program in (rank.program, rank.evaluation):
            for instruction in program.instructions:
                for slot in (*instruction.slots, instruction.slot):
                    if slot is not None and rank.layouts[slot.stage].slot[slot.pool]:
                        assert slot.number < rank.memory.pools[slot.stage, slot.pool][2]
                        assert rank.memory.base(*slot) + rank.memory.pools[slot.stage, slot.pool][1] <= rank.memory.work


def test_inputs_of_a_step_lie_side_by_side() -> None:
    p = planned("gpt2", 1, model__dropout=0.1)
    m = p.ranks[0].memory
    spaces = [(at, at + extent(t)) for at, t in m.inputs.values()]
    assert sorted(m.inputs) == [(0, "ids"), (0, "key"), (0, "targets")]
    assert disjoint(spaces) and max(end for _, end in spaces) <= m.stride
    assert m.resident["INPUT"][1] == m.stride * p.micros and m.stride % ALIGN == 0


def test_stages_of_one_rank_share_their_loader_inputs() -> None:
    p = planned("gpt2", 4, model__dropout=0.1)
    table, stride = arena.input_offsets([(0, p.stages[s].recording) for s in (0, 3)])
    assert list(table) == [(0, "ids"), (0, "key"), (0, "targets")]
    assert stride == 128 + 64 + 128


def test_copies_of_the_model_on_one_rank_have_inputs_of_their_own() -> None:
    """Stage 0 of one copy and the last of the other: each reads what its own copy is given."""
    p = planned("gpt2", 2, model__dropout=0.1, pipeline__schedule="dualpipe")
    for rank in p.ranks:
        first, last = sorted(rank.stages)  # of copy 0 and of copy 1
        m = rank.memory
        sides = [["ids", "key"], ["key", "targets"]][:: 1 if first == 0 else -1]
        assert sorted(m.inputs) == [(copy, name) for copy, names in enumerate(sides) for name in names]
        spaces = [(at, at + extent(t)) for at, t in m.inputs.values()]
        assert disjoint(spaces) and max(end for _, end in spaces) <= m.stride
        for copy, stage in enumerate((first, last)):
            where = rank.layouts[stage].where
            for name, tensor in p.stages[stage % 2].recording.inputs.items():
                assert where[tensor.id] == (INDEX["INPUT"], m.inputs[copy, name][0])


def test_a_stage_that_hands_its_input_on_is_refused() -> None:
    class Nothing:
        params: dict[str, Any] = {}

        def forward(self, ops: Any, p: Any, x: Any) -> Any:
            return x, None

        def grad_input(self, ops: Any, p: Any, dy: Any, saved: Any) -> Any:
            return dy, None

        def grad_weight(self, ops: Any, g: Any, owed: Any) -> None:
            pass

    recording = record(Chain(only=Nothing()), (4, 3))
    with pytest.raises(ValueError, match="a stage hands Y on unchanged; every stage must write its own output"):
        arena.layout(recording, arena.parameters({0: Nothing()}, {}, 1), {}, 4)


def test_first_fit_takes_the_first_hole() -> None:
    """Four in a row, of which the second and third end early: the next one goes where they were."""
    a, b, c, d, e = (Tensor(i, shape) for i, shape in enumerate([(16,), (16,), (32,), (16,), (40,)]))
    calls = [
        Call("accumulate", pair, (), ())
        for pair in ((a, b), (c, d), (b, c), (a, e), (d, e))
    ]  # fmt: skip
    where: dict[int, tuple[int, int]] = {}
    assert arena._temporaries(calls, where, 4) == 320
    assert [where[i][1] for i in range(5)] == [0, 64, 128, 256, 64]
    wider = e._replace(shape=(64,))
    where.clear()
    calls[3:] = [Call("accumulate", (t, wider), (), ()) for t in (a, d)]
    assert arena._temporaries(calls, where, 4) == 320 + 256
    assert where[4][1] == 320


def test_rounding_up() -> None:
    assert [arena.align(n) for n in (0, 1, 64, 65)] == [0, 64, 64, 128]
    assert arena.align(17, 16) == 32
    assert arena.size_of(Tensor(0, (3, 5)), 4) == 64 == arena.size_of(Tensor(0, (8,), "l"), 4)
    assert arena.size_of(Tensor(0, (3, 5)), 8) == 128


def test_a_forward_only_layout_keeps_nothing() -> None:
    p = planned("llama", 1)
    chain = model.chain(p.config.model, 1, 16, logits=True)
    recording = record(chain, None, backward=False)
    params = arena.parameters({0: chain}, p.ties, 1)
    layout = arena.layout(recording, params, arena.input_offsets([(0, recording)])[0], 4)
    assert [pool for pool in POOLS if layout.slot[pool]] == ["Y"]
    one = record(Linear(3, 4), (5, 3))
    assert arena.lifetimes(one).x == "W"  # the weight gradient reads it
