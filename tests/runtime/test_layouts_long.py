"""Any layout, the same bits: runs of random shape against one process with the same replicas."""

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
from small_run import MODELS, Result, run, write_tokens

pytestmark = pytest.mark.long

LAYERS = 3
SLOTS = LAYERS + 2


@pytest.fixture(scope="module", autouse=True)
def no_measurement() -> Iterator[None]:
    """The peak of the products is told, not used; measuring it takes longer than a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "matmul_peak", lambda self, seconds: 1e11)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    """(stages, pipeline settings)."""
    stages = draw(st.integers(1, SLOTS))
    cut: object = draw(st.sampled_from(["auto", "even", "listed"]))
    if cut == "listed":
        edges = draw(st.sets(st.integers(1, SLOTS - 1), min_size=stages - 1, max_size=stages - 1))
        cut = [b - a for a, b in pairwise((0, *sorted(edges), SLOTS))]
    return stages, {"pipeline__cut": cut, "pipeline__schedule": draw(st.sampled_from(["1f1b", "gpipe"]))}


@st.composite
def works(draw: st.DrawFn) -> tuple[str, int, tuple[tuple[str, Any], ...]]:
    """(model, replicas, settings that decide the result)."""
    replicas, size = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    micros = draw(st.integers(1, 7))
    values: dict[str, Any] = {
        "model__layers": LAYERS,
        "pipeline__replicas": replicas,
        "train__steps": 3,
        "train__microbatch": size,
        "train__batch": size * micros * replicas,
        "train__recompute": draw(st.sampled_from(["none", "block"])),
        "model__dropout": draw(st.sampled_from([0.0, 0.1])),
        "eval__every": draw(st.sampled_from([0, 2])),
        "eval__microbatches": replicas * draw(st.integers(1, 4)),
    }
    return draw(st.sampled_from(sorted(MODELS))), replicas, tuple(values.items())


@cache
def trained(data: Path, ranks: int, model: str, values: tuple[tuple[str, Any], ...]) -> Result:
    with tempfile.TemporaryDirectory() as out:
        return run(data, Path(out), ranks, model, **dict(values))


def validation(result: Result) -> list[float]:
    return [m["validation_loss"] for m in result.metrics if "validation_loss" in m]


@settings(max_examples=60)
@given(work=works(), layout=layouts())
def test_any_layout_has_the_bits_of_one_stage(data: Path, work: Any, layout: Any) -> None:
    model, replicas, values = work
    stages, pipeline = layout
    one = trained(data, replicas, model, values)
    with tempfile.TemporaryDirectory() as out:
        many = run(data, Path(out), stages * replicas, model, **dict(values), **pipeline)
    assert many.losses == one.losses and len(one.losses) == 3
    assert many.tensors == one.tensors
    assert validation(many) == validation(one)


@settings(max_examples=15)
@given(work=works(), before=layouts(), after=layouts())
def test_a_run_goes_on_with_the_same_bits_on_any_other_layout(data: Path, work: Any, before: Any, after: Any) -> None:
    """Stopped after two steps, continued on other stages: the replicas stay, because they decide the sums."""
    model, replicas, values = work
    with tempfile.TemporaryDirectory() as out:
        short = dict(values) | {"train__steps": 2}
        # the rate depends on the length of the run unless it is the same throughout
        flat = {"optimizer__warmup": 0, "optimizer__min_lr": 0.01}
        run(data, Path(out), before[0] * replicas, model, **short, **before[1], **flat)
        resumed = run(data, Path(out), after[0] * replicas, model, **dict(values), **after[1], **flat)
    whole = trained(data, replicas, model, (*values, *flat.items()))
    assert resumed.losses == whole.losses and resumed.tensors == whole.tensors
