"""Any layout, the same bits: runs of random shape against one process for each copy of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.schedule.families import SCHEDULES, Family
from small_run import MODELS, Result, run, write_tokens

pytestmark = pytest.mark.long

LAYERS = 3
SLOTS = LAYERS + 2
CLIP = {"gpt2": 1.05, "llama": 0.65, "untied": 0.75}  # of the norms of the product some are above, some below


@pytest.fixture(scope="module", autouse=True)
def no_measurement() -> Iterator[None]:
    """The peak of the products is told, not used; measuring it takes longer than a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "matmul_peak", lambda self, seconds: 1e11)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def fits(family: Family, ranks: int) -> bool:
    """Whether the model can be cut for that many ranks."""
    return (family.per_rank or 1) * ranks <= SLOTS and (family.chains == 1 or ranks % 2 == 0)


@st.composite
def layouts(draw: st.DrawFn, copies: int) -> tuple[int, dict[str, Any]]:
    """(all ranks, settings of the layout) for so many copies of the model."""
    named = [name for name, family in SCHEDULES.items() if copies % family.chains == 0]
    schedule = draw(st.sampled_from(named))
    family = SCHEDULES[schedule]
    ranks = draw(st.sampled_from([n for n in range(1, SLOTS + 1) if fits(family, n)]))
    stages = family.per_rank * ranks or draw(st.integers(ranks, SLOTS))
    cut: object = draw(st.sampled_from(["auto", "even", "listed"]))
    if cut == "listed":
        edges = draw(st.sets(st.integers(1, SLOTS - 1), min_size=stages - 1, max_size=stages - 1))
        cut = [b - a for a, b in pairwise((0, *sorted(edges), SLOTS))]
    replicas = copies // family.chains
    return ranks * replicas, {
        "pipeline__replicas": replicas,
        "pipeline__cut": cut,
        "pipeline__schedule": schedule,
        "pipeline__stages": stages,
        "pipeline__group": draw(st.integers(0, 4)) if schedule == "interleaved" else 0,
        "optimizer__early": draw(st.sampled_from([True, False])),
        "device__threads": draw(st.integers(1, 2)),
    }


@st.composite
def works(draw: st.DrawFn) -> tuple[str, int, tuple[tuple[str, Any], ...]]:
    """(model, copies, settings that decide the result)."""
    copies, size = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    micros = draw(st.integers(1, 7))
    values: dict[str, Any] = {
        "model__layers": LAYERS,
        "train__steps": 3,
        "optimizer__clip": draw(st.sampled_from([0.0, 0.7, 0.9, 1.0])),  # among the norms of these runs
        "train__microbatch": size,
        "train__batch": size * micros * copies,
        "train__recompute": draw(st.sampled_from(["none", "block"])),
        "model__dropout": draw(st.sampled_from([0.0, 0.1])),
        "eval__every": draw(st.sampled_from([0, 2])),
        "eval__microbatches": copies * draw(st.integers(1, 4)),
    }
    return draw(st.sampled_from(sorted(MODELS))), copies, tuple(values.items())


@cache
def trained(data: Path, copies: int, model: str, values: tuple[tuple[str, Any], ...]) -> Result:
    with tempfile.TemporaryDirectory() as out:
        return run(data, Path(out), copies, model, pipeline__replicas=copies, **dict(values))


def validation(result: Result) -> list[float]:
    return [m["validation_loss"] for m in result.metrics if "validation_loss" in m]


@settings(max_examples=60)
@given(work=works(), draw=st.data())
def test_any_layout_has_the_bits_of_one_stage(data: Path, work: Any, draw: st.DataObject) -> None:
    model, copies, values = work
    ranks, layout = draw.draw(layouts(copies))
    one = trained(data, copies, model, values)
    with tempfile.TemporaryDirectory() as out:
        many = run(data, Path(out), ranks, model, **dict(values), **layout)
    assert many.losses == one.losses and len(one.losses) == 3
    assert many.tensors == one.tensors
    assert validation(many) == validation(one)


@settings(max_examples=15)
@given(work=works(), draw=st.data())
def test_a_run_goes_on_with_the_same_bits_on_any_other_layout(data: Path, work: Any, draw: st.DataObject) -> None:
    """Stopped after two steps, continued on other stages: the copies stay, because they decide the sums."""
    model, copies, values = work
    before, after = draw.draw(layouts(copies)), draw.draw(layouts(copies))
    with tempfile.TemporaryDirectory() as out:
        short = dict(values) | {"train__steps": 2}
        # the rate depends on the length of the run unless it is the same throughout
        flat = {"optimizer__warmup": 0, "optimizer__min_lr": 0.01}
        run(data, Path(out), before[0], model, **short, **before[1], **flat)
        resumed = run(data, Path(out), after[0], model, **dict(values), **after[1], **flat)
    whole = trained(data, copies, model, (*values, *flat.items()))
    assert resumed.losses == whole.losses and resumed.tensors == whole.tensors


# --- the product: every schedule on every number of ranks that it can have

PRODUCT = [
    (schedule, ranks, cut, early, recompute, replicas)
    for schedule, family in SCHEDULES.items()
    for ranks in range(2, SLOTS + 1)
    if fits(family, ranks)
    for cut in ("auto", "even")
    for early in (False, True)
    for recompute in ("none", "block")
    for replicas in (1, 2)
]


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize(("schedule", "ranks", "cut", "early", "recompute", "replicas"), PRODUCT)
def test_the_product(
    data: Path, schedule: str, ranks: int, cut: str, early: bool, recompute: str, replicas: int, model: str
) -> None:
    family = SCHEDULES[schedule]
    copies, stages = family.chains * replicas, min(family.usual * ranks, SLOTS)
    values = (("model__layers", LAYERS), ("train__batch", 16), ("train__steps", 4), ("optimizer__clip", CLIP[model]))
    one = trained(data, copies, model, values)
    norms = [m["grad_norm"] for m in one.metrics]
    assert min(norms) < CLIP[model] < max(norms)
    with tempfile.TemporaryDirectory() as out:
        many = run(
            data, Path(out), ranks * replicas, model, **dict(values), pipeline__schedule=schedule, pipeline__cut=cut,
            pipeline__replicas=replicas, pipeline__stages=stages, optimizer__early=early, train__recompute=recompute,
        )  # fmt: skip
    assert many.losses == one.losses and many.tensors == one.tensors
