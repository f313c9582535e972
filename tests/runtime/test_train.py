"""The same bits on every layout: 1 to 4 pipeline ranks, both schedules, even and uneven cuts, stopped and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hpcpipe.config import UserError
from small_run import MODELS, Result, run, write_tokens

STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module", params=MODELS)
def reference(
    request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Result]:
    out = tmp_path_factory.mktemp("one")
    return request.param, run(data, out, 1, request.param, train__steps=STEPS)


LAYOUTS = [
    (ranks, schedule, cut)
    for ranks, cuts in ((2, ("auto", [1, 3], [3, 1])), (3, ("even", [1, 1, 2])), (4, ("auto",)))
    for cut in cuts
    for schedule in ("gpipe", "1f1b")
] + [(1, "gpipe", "auto")]


@pytest.mark.parametrize(("ranks", "schedule", "cut"), LAYOUTS)
def test_every_layout_gives_the_same_bits(
    reference: tuple[str, Result], data: Path, tmp_path: Path, ranks: int, schedule: str, cut: object
) -> None:
    model, one = reference
    many = run(data, tmp_path, ranks, model, train__steps=STEPS, pipeline__schedule=schedule, pipeline__cut=cut)
    assert many.losses == one.losses
    assert many.tensors == one.tensors


def test_runs_repeat(reference: tuple[str, Result], data: Path, tmp_path: Path) -> None:
    model, one = reference
    again = run(data, tmp_path, 1, model, train__steps=STEPS)
    assert again.losses == one.losses and again.tensors == one.tensors


def test_threads_change_no_bit(reference: tuple[str, Result], data: Path, tmp_path: Path) -> None:
    model, one = reference
    again = run(data, tmp_path, 1, model, train__steps=STEPS, device__threads=3)
    assert again.losses == one.losses and again.tensors == one.tensors


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_resume_from_the_middle(reference: tuple[str, Result], data: Path, tmp_path: Path, ranks: int) -> None:
    model, one = reference
    run(data, tmp_path, ranks, model, train__steps=STEPS, checkpoint__every=7, checkpoint__keep=0)
    for folder in ("step_00000014", "step_00000020"):
        for file in (tmp_path / folder).iterdir():
            file.unlink()
        (tmp_path / folder).rmdir()
    again = run(data, tmp_path, 4 - ranks, model, train__steps=STEPS)
    assert again.losses == one.losses
    assert again.tensors == one.tensors


@pytest.mark.parametrize("micros", [1, 2, 3])
def test_fewer_microbatches_than_stages(data: Path, tmp_path: Path, micros: int) -> None:
    settings = {"train__batch": 2 * micros, "train__steps": 3}
    one = run(data, tmp_path / "one", 1, "gpt2", **settings)
    for schedule in ("gpipe", "1f1b"):
        many = run(data, tmp_path / schedule, 4, "gpt2", pipeline__schedule=schedule, **settings)
        assert many.losses == one.losses and many.tensors == one.tensors


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("ranks", "replicas"), [(2, 2), (4, 2), (3, 3), (6, 3)])
def test_replicas_agree_with_one_up_to_rounding(
    data: Path, tmp_path: Path, model: str, ranks: int, replicas: int
) -> None:
    one = run(data, tmp_path / "one", 1, model, train__steps=5)
    many = run(data, tmp_path / "many", ranks, model, train__steps=5, pipeline__replicas=replicas)
    again = run(data, tmp_path / "again", ranks, model, train__steps=5, pipeline__replicas=replicas)
    assert many.losses == again.losses and many.tensors == again.tensors
    assert many.losses == pytest.approx(one.losses, rel=2e-6)


@pytest.mark.parametrize(
    "settings",
    [{"model__dropout": 0.1}, {"train__recompute": "block"}, {"model__dropout": 0.2, "train__recompute": "block"}],
)
def test_dropout_and_recompute_on_every_layout(data: Path, tmp_path: Path, settings: dict[str, object]) -> None:
    one = run(data, tmp_path / "one", 1, "gpt2", train__steps=5, **settings)
    two = run(data, tmp_path / "two", 2, "gpt2", train__steps=5, **settings)
    assert two.losses == one.losses and two.tensors == one.tensors
    if "model__dropout" in settings:
        plain = run(data, tmp_path / "plain", 1, "gpt2", train__steps=5)
        assert plain.losses != one.losses


def test_recompute_changes_no_bit(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", 1, "llama", train__steps=5)
    again = run(data, tmp_path / "again", 1, "llama", train__steps=5, train__recompute="block")
    assert plain.losses == again.losses and plain.tensors == again.tensors


def test_validation_loss_is_the_same_on_every_layout(data: Path, tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2, 4):
        result = run(data, tmp_path / str(ranks), ranks, "llama", train__steps=6, eval__every=2, eval__microbatches=3)
        found.append([(m["step"], m["validation_loss"]) for m in result.metrics if "validation_loss" in m])
    assert [step for step, _ in found[0]] == [0, 2, 4, 6]
    assert found[0] == found[1] == found[2]


def test_evaluation_changes_no_bit(data: Path, tmp_path: Path) -> None:
    plain = run(data, tmp_path / "plain", 2, "gpt2", train__steps=6)
    often = run(data, tmp_path / "often", 2, "gpt2", train__steps=6, eval__every=1, eval__microbatches=5)
    assert plain.losses == often.losses and plain.tensors == often.tensors


def test_the_model_learns(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path, 1, "untied", train__steps=60, optimizer__lr=0.02)
    assert result.losses[0] == pytest.approx(math.log(61), rel=0.02)
    assert result.losses[-1] < 0.7 * result.losses[0]
    record = json.loads((tmp_path / "done.json").read_text())
    assert record["steps"] == 60


def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite.*lower optimizer\.lr"):
        run(data, tmp_path, 2, "llama", train__steps=30, optimizer__lr=1e18, optimizer__clip=0.0)


def test_another_model_in_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, 1, "llama", train__steps=1)
    with pytest.raises(UserError, match=r"another model|embed\.weight"):
        run(data, tmp_path, 1, "llama", train__steps=2, model__vocab=80)
