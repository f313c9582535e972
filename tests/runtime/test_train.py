"""The same bits on every layout: 1 to 4 pipeline ranks, every schedule, even and uneven cuts, stopped and resumed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe import train
from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.config import UserError
from hpcpipe.schedule.families import SCHEDULES
from hpcpipe.steps import Steps
from small_run import MODELS, Result, run, write_tokens

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def no_measurement() -> Iterator[None]:
    """The peak of the products is told, not used; measuring it takes longer than a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuBackend, "matmul_peak", lambda self, seconds: 1e11)
        yield


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


# --- every schedule, with and without updates on a guess

CLIP = 0.9  # of the norms below some are above, some below
DEEP = {"model__layers": 4, "train__steps": 6, "optimizer__clip": CLIP}  # six slots
SHAPES: dict[str, tuple[tuple[int, dict[str, Any]], ...]] = {
    "gpipe": ((2, {"stages": 4}), (3, {"cut": [1, 4, 1]})),
    "1f1b": ((2, {"stages": 5}), (4, {"cut": [2, 1, 2, 1]})),
    "interleaved": ((2, {"cut": [1, 2, 2, 1]}), (3, {"cut": "even"}), (2, {"stages": 6, "group": 3})),
    "zb_h1": ((3, {"cut": [1, 4, 1]}), (2, {"stages": 3})),
    "zb_h2": ((4, {}), (2, {"cut": [4, 2]})),
    "zb_v": ((2, {"cut": [1, 2, 2, 1]}), (3, {})),
    "v_half": ((2, {"cut": [2, 1, 1, 2]}), (3, {"cut": "even"})),
    "v_min": ((2, {"cut": "even"}), (3, {})),
    "dualpipe_v": ((2, {"cut": [3, 1, 1, 1]}), (3, {})),
    "dualpipe": ((2, {"cut": [2, 4]}), (4, {"cut": "even"})),
}


class Deep:
    """Runs of a deeper model; ``one`` is what one process a copy of the model makes of it."""

    def __init__(self, data: Path, folder: Path) -> None:
        self.data, self.folder, self.runs = data, folder, 0
        self.one: Callable[[str, int], Result] = cache(self._one)

    def _one(self, model: str, copies: int) -> Result:
        found = self.run(copies, model, pipeline__replicas=copies, optimizer__early=False)
        norms = [m["grad_norm"] for m in found.metrics]
        assert min(norms) < CLIP < max(norms)
        return found

    def run(self, ranks: int, model: str, out: Path | None = None, **settings: Any) -> Result:
        self.runs += 1
        return run(self.data, out or self.folder / str(self.runs), ranks, model, **(DEEP | settings))


@pytest.fixture(scope="module")
def deep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    return Deep(data, tmp_path_factory.mktemp("deep"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Steps]:
    """The steps of every rank of the runs of a test."""
    found: list[Steps] = []

    def steps(job: Any) -> Steps:
        found.append(Steps(job))
        return found[-1]

    monkeypatch.setattr(train, "Steps", steps)
    return found


def same_bits(many: Result, one: Result) -> None:
    assert many.losses == one.losses
    assert [m["grad_norm"] for m in many.metrics] == [m["grad_norm"] for m in one.metrics]
    assert many.tensors == one.tensors


def wrong_guesses(found: Result) -> int:
    """Steps that clipped after one that did not: only then was the update guessed, and only then is a guess wrong."""
    clipped = [m["grad_norm"] > CLIP for m in found.metrics]
    wrong = sum(now and not before for before, now in pairwise(clipped))
    assert wrong > 0, "no guess of this run is wrong: the norms are on one side of the limit"
    return wrong


def test_every_schedule_has_its_shapes() -> None:
    assert set(SHAPES) == set(SCHEDULES)


def schedule_cases() -> Iterator[tuple[str, int, dict[str, Any], str, bool]]:
    """Of every schedule both models, each with and without guesses, over its two shapes."""
    for schedule, shapes in SHAPES.items():
        for i, (ranks, layout) in enumerate(shapes):
            yield schedule, ranks, layout, "llama", i % 2 == 0
            yield schedule, ranks, layout, "untied", i % 2 == 1


@pytest.mark.parametrize(("schedule", "ranks", "layout", "model", "early"), list(schedule_cases()), ids=str)
def test_every_schedule_gives_the_same_bits(
    deep: Deep, made: list[Steps], schedule: str, ranks: int, layout: dict[str, Any], model: str, early: bool
) -> None:
    """With a norm that is above the limit in some steps: there, and only there, a guess is wrong on all ranks."""
    one = deep.one(model, SCHEDULES[schedule].chains)
    made.clear()
    settings = {f"pipeline__{key}": value for key, value in layout.items()}
    many = deep.run(ranks, model, pipeline__schedule=schedule, optimizer__early=early, **settings)
    same_bits(many, one)
    assert {steps.job.plan.early for steps in made} == {early} and len(made) == ranks
    assert {steps.voided for steps in made} == {wrong_guesses(many) if early else 0}


@pytest.mark.parametrize(
    ("schedule", "ranks", "settings", "model"),
    [
        ("zb_v", 2, {"train__recompute": "block"}, "untied"),
        ("dualpipe_v", 2, {"train__recompute": "block"}, "llama"),
        ("dualpipe", 2, {"train__recompute": "block"}, "untied"),
        ("dualpipe", 4, {"train__recompute": "block"}, "llama"),
        ("zb_h2", 3, {"pipeline__replicas": 2}, "llama"),
        ("interleaved", 2, {"pipeline__replicas": 2, "pipeline__cut": [1, 2, 2, 1]}, "untied"),
        ("zb_v", 2, {"pipeline__replicas": 2, "train__recompute": "block", "device__threads": 2}, "llama"),
    ],
)
def test_schedules_with_recompute_and_replicas(
    deep: Deep, made: list[Steps], schedule: str, ranks: int, settings: dict[str, Any], model: str
) -> None:
    replicas = settings.get("pipeline__replicas", 1)
    one = deep.one(model, SCHEDULES[schedule].chains * replicas)
    made.clear()
    many = deep.run(ranks * replicas, model, pipeline__schedule=schedule, optimizer__early=True, **settings)
    same_bits(many, one)
    assert {steps.voided for steps in made} == {wrong_guesses(many)}


@pytest.mark.parametrize("model", ["llama", "untied"])
def test_two_bidirectional_pipelines_are_four_copies(deep: Deep, model: str) -> None:
    settings = {"train__batch": 16, "train__steps": 5}
    one = deep.run(4, model, pipeline__replicas=4, **settings)
    many = deep.run(4, model, pipeline__replicas=2, pipeline__schedule="dualpipe", optimizer__early=True, **settings)
    same_bits(many, one)


@pytest.mark.parametrize(
    ("schedule", "model"), [("interleaved", "untied"), ("zb_h2", "gpt2"), ("zb_v", "gpt2"), ("dualpipe", "untied")]
)
def test_dropout_and_evaluation_on_other_schedules(deep: Deep, schedule: str, model: str) -> None:
    """A look at the model in the middle must find the last update final."""
    settings = {"model__dropout": 0.1, "eval__every": 3, "eval__microbatches": 4, "train__steps": 7}
    chains = SCHEDULES[schedule].chains
    one = deep.run(chains, model, pipeline__replicas=chains, **settings)
    many = deep.run(2, model, pipeline__schedule=schedule, optimizer__early=True, **settings)
    assert many.losses == one.losses and many.tensors == one.tensors
    losses = [[(m["step"], m["validation_loss"]) for m in r.metrics if "validation_loss" in m] for r in (many, one)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [0, 3, 6, 7]


@pytest.mark.parametrize(
    ("copies", "before", "after", "model"),
    [
        (1, ("zb_v", 2, True), ("interleaved", 3, False), "llama"),
        (1, ("1f1b", 4, False), ("zb_h2", 3, True), "untied"),
        (1, ("v_min", 3, True), ("gpipe", 1, True), "untied"),
        (2, ("dualpipe", 4, True), ("dualpipe", 2, False), "llama"),
        (2, ("dualpipe", 2, True), ("1f1b", 4, False), "untied"),  # copies that shared ranks, then replicas
        (2, ("zb_v", 4, False), ("dualpipe", 4, True), "llama"),
    ],
)
def test_resume_on_another_schedule(
    deep: Deep,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    copies: int,
    before: tuple[str, int, bool],
    after: tuple[str, int, bool],
    model: str,
) -> None:
    """A checkpoint in the middle, with an update that may be a guess by then, and another layout that goes on."""
    one = deep.one(model, copies)

    def part(schedule: str, ranks: int, early: bool) -> Result:
        replicas = copies // SCHEDULES[schedule].chains
        return deep.run(
            ranks, model, tmp_path, pipeline__schedule=schedule, pipeline__replicas=replicas, optimizer__early=early,
            checkpoint__every=2, checkpoint__keep=0,
        )  # fmt: skip

    same_bits(part(*before), one)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"step_{step:08}")
    capsys.readouterr()
    again = part(*after)
    assert again.losses == one.losses and again.tensors == one.tensors
    told = capsys.readouterr().out
    assert "resumed from" in told and "at step 2\n" in told and "changed since" not in told


def test_another_number_of_copies_is_told(deep: Deep, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep.run(2, "llama", tmp_path, train__steps=2)
    capsys.readouterr()
    deep.run(2, "llama", tmp_path, train__steps=2, pipeline__schedule="dualpipe")
    assert "; the number of replicas changed since: the result will be another" in capsys.readouterr().out


def test_a_schedule_from_a_file(deep: Deep, made: list[Steps], tmp_path: Path) -> None:
    """What a run writes into its checkpoint is a schedule that another run can be given."""
    one = deep.one("untied", 1)
    made.clear()
    deep.run(3, "untied", pipeline__schedule="zb_v", train__steps=1)
    written = str(made[0].job.plan.schedule)
    (tmp_path / "mine.txt").write_text(written, encoding="utf-8")
    many = deep.run(3, "untied", pipeline__schedule=f"file:{tmp_path / 'mine.txt'}")
    assert str(made[-1].job.plan.schedule) == written
    same_bits(many, one)


def test_a_step_says_where_its_time_went(deep: Deep) -> None:
    for early in (False, True):
        found = deep.run(3, "untied", pipeline__schedule="zb_h1", optimizer__early=early)
        for m in found.metrics:
            parts: Any = m["parts"]
            assert list(parts) == ["compute", "exposed", "warmup", "steady", "cooldown", "optimizer", "other"]
            assert min(parts.values()) >= 0 and parts["compute"] > 0 and m["seconds"] > 0
            assert 0 <= m["bubble"] < 1 and 0 < m["predicted_bubble"] < 1
            assert m["predicted_seconds"] > m["ideal_seconds"] > 0
            worst: Any = m["worst_wait"]
            assert 0 <= worst["rank"] < 3 and worst["op"][0] in "FB" and worst["seconds"] > 0


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


@pytest.mark.parametrize(
    ("ranks", "model", "settings", "layout"),
    [
        (1, "gpt2", {}, {"pipeline__schedule": "gpipe"}),
        (2, "gpt2", {}, {}),
        (2, "gpt2", {}, {"pipeline__schedule": "zb_v"}),
        (4, "gpt2", {"model__dropout": 0.1}, {}),
        (3, "llama", {"train__recompute": "block"}, {}),
    ],
)
def test_activations_in_half_the_bytes_have_the_same_bits_on_every_layout(
    data: Path, tmp_path: Path, ranks: int, model: str, settings: dict[str, object], layout: dict[str, object]
) -> None:
    kept = {"train__activations": "bfloat16", "train__steps": 5, **settings}
    one = run(data, tmp_path / "one", 1, model, **kept)
    many = run(data, tmp_path / "many", ranks, model, **kept, **layout)
    assert many.losses == one.losses and many.tensors == one.tensors


def test_activations_in_half_the_bytes_learn_as_well(data: Path, tmp_path: Path) -> None:
    whole, half = (
        run(data, tmp_path / kind, 1, "llama", train__steps=40, train__activations=kind).losses
        for kind in ("float32", "bfloat16")
    )
    assert whole != half and whole[-1] < whole[0] - 0.5
    np.testing.assert_allclose(half, whole, rtol=0.01)


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


@pytest.mark.parametrize("early", [False, True])
def test_a_loss_that_is_not_finite_ends_the_run_with_a_sentence(data: Path, tmp_path: Path, early: bool) -> None:
    settings = {"optimizer__lr": 1e18, "optimizer__clip": 0.0, "optimizer__early": early}
    with pytest.raises(UserError, match=r"not finite.*lower optimizer\.lr") as caught:
        run(data, tmp_path, 2, "llama", train__steps=30, **settings)
    told = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert f"step {len(told) + 1}: loss" in str(caught.value) and told == list(range(1, len(told) + 1))


def test_another_model_in_the_same_folder_is_refused(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path, 1, "llama", train__steps=1)
    with pytest.raises(UserError, match=r"another model|embed\.weight"):
        run(data, tmp_path, 1, "llama", train__steps=2, model__vocab=80)
