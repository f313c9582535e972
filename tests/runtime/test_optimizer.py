"""AdamW, clipping and the learning rate, against an implementation of their own in float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.reference import ReferenceBackend
from hpcpipe.config import OptimizerConfig, TrainConfig
from hpcpipe.planner.plan import Plan
from hpcpipe.runtime.executor import Executor
from hpcpipe.runtime.optimizer import AdamW, learning_rate
from small_plan import executor_of, planned

# --- the learning rate


def rates(steps: int, **settings: Any) -> list[float]:
    return [learning_rate(i, OptimizerConfig(**settings), TrainConfig(steps=steps)) for i in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    found = rates(50, lr=0.8, schedule=schedule, warmup=8, decay_steps=10)
    assert found[:8] == pytest.approx([0.1 * (i + 1) for i in range(8)])
    assert found[7] == found[8] == max(found) == 0.8


@pytest.mark.parametrize("steps", [2, 10, 77, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("settings", [{"schedule": "cosine"}, {"schedule": "wsd", "decay_steps": 1},
                                      {"schedule": "wsd", "decay_steps": 4}], ids=str)  # fmt: skip
def test_the_last_step_has_exactly_the_least_rate(settings: dict[str, Any], warmup: int, steps: int) -> None:
    if warmup + settings.get("decay_steps", 1) < steps - 1:
        assert rates(steps, lr=3e-4, min_lr=7e-6, warmup=warmup, **settings)[-1] == 7e-6
        assert rates(steps, lr=3e-4, warmup=warmup, **settings)[-1] == 0.0


def test_cosine_is_half_a_period() -> None:
    found = rates(101, lr=1.0, min_lr=0.2, warmup=0)
    assert found == pytest.approx([0.6 + 0.4 * math.cos(math.pi * i / 100) for i in range(101)])
    assert found[0] == 1.0 and found[50] == pytest.approx(0.6)
    assert all(a > b for a, b in pairwise(found))


def test_wsd_is_stable_and_then_linear() -> None:
    found = rates(60, lr=1.0, min_lr=0.1, schedule="wsd", warmup=10, decay_steps=20)
    assert set(found[9:40]) == {1.0}
    assert found[40] < 1.0
    slopes = [a - b for a, b in pairwise(found[40:])]
    assert slopes == pytest.approx([slopes[0]] * 19) and slopes[0] > 0
    assert found[-1] == 0.1


def test_a_decay_of_one_step_is_the_last_step() -> None:
    found = rates(10, lr=1.0, min_lr=0.5, schedule="wsd", warmup=2, decay_steps=1)
    assert found == [0.5, *[1.0] * 8, 0.5]


def test_one_step_after_the_warm_up_is_a_rate() -> None:
    for schedule in ("cosine", "wsd"):
        for warmup in (0, 1, 3, 4):
            found = rates(4, lr=1.0, schedule=schedule, warmup=warmup, decay_steps=1)
            assert all(0.0 <= rate <= 1.0 for rate in found)
        assert rates(4, lr=1.0, schedule=schedule, warmup=4, decay_steps=1) == [0.25, 0.5, 0.75, 1.0]


# --- the update

SETTINGS = {"lr": 0.01, "beta1": 0.8, "beta2": 0.97, "eps": 1e-6, "weight_decay": 0.3, "clip": 0.0}
BACKENDS = {
    "float64": (lambda: ReferenceBackend("float64"), 1e-12),
    "float32": (lambda: ReferenceBackend("float32"), 3e-6),
    "cpu": (lambda: CpuBackend(2), 3e-6),
}


class Alone:
    """One pipeline rank with an optimizer; ``grad["name"]`` and so on are live views."""

    def __init__(self, p: Plan, rank: int = 0, backend: Any = None, **settings: Any) -> None:
        self.plan, self.backend = p, backend or ReferenceBackend("float64")
        self.params = p.ranks[rank].params
        self.executor: Executor = executor_of(p, rank, self.backend)
        self.config = OptimizerConfig(**(SETTINGS | settings))
        self.optimizer = AdamW(self.executor, self.params, self.config, p.names)
        self.names = [name for name in self.params.owned if name not in p.ties]
        self.param, self.moment1, self.moment2 = (self.views(r) for r in ("PARAM", "MOMENT1", "MOMENT2"))
        self.grad = self.views("GRAD")

    def views(self, region: str) -> dict[str, np.ndarray]:
        offsets = self.params.grad if region == "GRAD" else self.params.param
        real, shapes = self.backend.real, self.params.shapes
        return {name: self.executor.array(region, real * at, shapes[name]) for name, at in offsets.items()}

    def fill(self, views: dict[str, np.ndarray], rng: np.random.Generator, size: float = 1.0) -> None:
        for name in self.params.owned:
            views[name][...] = size * rng.standard_normal(views[name].shape)

    def squares(self) -> np.ndarray:
        into = np.zeros(len(self.plan.names))
        self.optimizer.squares(into)
        return into


def alone(backend: str = "float64", model: str = "gpt2", early: bool = False, **settings: Any) -> Alone:
    made = BACKENDS[backend][0]()
    return Alone(planned(model, 1, made.threads, made.real, optimizer__early=early), 0, made, **settings)


def textbook(p: np.ndarray, m: np.ndarray, v: np.ndarray, g: np.ndarray, t: int, lr: float, decay: float) -> tuple:
    """Algorithm 2 of Loshchilov & Hutter 2019, for step t = 1, 2, …, the decay multiplied by the rate."""
    m = SETTINGS["beta1"] * m + (1 - SETTINGS["beta1"]) * g
    v = SETTINGS["beta2"] * v + (1 - SETTINGS["beta2"]) * g**2
    mean, variance = m / (1 - SETTINGS["beta1"] ** t), v / (1 - SETTINGS["beta2"] ** t)
    return p - lr * (mean / (np.sqrt(variance) + SETTINGS["eps"]) + decay * p), m, v


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_several_steps_of_adamw(backend: str, clip: float) -> None:
    rig, rng, tolerance = alone(backend, clip=clip), np.random.default_rng(5), BACKENDS[backend][1]
    rig.fill(rig.param, rng)
    state = {n: (rig.param[n].astype(np.float64), *np.zeros((2, *rig.param[n].shape))) for n in rig.names}
    for step in range(7):
        rig.fill(rig.grad, rng, size=10.0 ** (-step))
        grads = {n: rig.grad[n].astype(np.float64) for n in rig.names}
        norm, scale = rig.optimizer.scale(rig.squares())
        expected = math.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        assert norm == pytest.approx(expected, rel=1e-13)
        assert scale == (clip / norm if 0 < clip < norm else 1.0)
        lr = 0.01 / (step + 1)
        rig.optimizer.update(step, lr, scale)
        for n in rig.names:
            decay = SETTINGS["weight_decay"] if rig.params.decay[n] else 0.0
            state[n] = textbook(*state[n], grads[n] * scale, step + 1, lr, decay)
            for found, want in zip((rig.param[n], rig.moment1[n], rig.moment2[n]), state[n], strict=True):
                np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance * np.abs(want).max(), err_msg=n)
            assert not rig.grad[n].any()


def test_only_matrices_decay() -> None:
    rig = alone(model="gpt2")
    for name in rig.names:
        rig.param[name][...] = 2.0
    rig.optimizer.update(0, 0.1, 1.0)
    kept = {name for name in rig.names if (rig.param[name] == 2.0).all()}
    assert kept == {name for name in rig.names if name.endswith(".bias") or ".norm" in name}
    for name in set(rig.names) - kept:
        np.testing.assert_allclose(rig.param[name], 2.0 * (1 - 0.1 * 0.3), rtol=1e-15)
    no_decay = alone(model="gpt2", weight_decay=0.0)
    for name in no_decay.names:
        no_decay.param[name][...] = 2.0
    no_decay.optimizer.update(0, 0.1, 1.0)
    assert all((no_decay.param[name] == 2.0).all() for name in no_decay.names)


@pytest.mark.parametrize("backend", ["float64", "cpu"])
def test_clipping_scales_exactly(backend: str) -> None:
    """A clipped gradient and one that had that size from the start give the same bits, where the factor is exact."""
    clipped, small = alone(backend, clip=1.0), alone(backend, clip=0.0)
    for rig, size in ((clipped, 8.0), (small, 1.0)):
        rig.fill(rig.param, np.random.default_rng(1))
        rig.fill(rig.grad, np.random.default_rng(2))
        for name in rig.names:
            rig.grad[name] *= size
    norm, _ = clipped.optimizer.scale(clipped.squares())
    clipped.optimizer.config = OptimizerConfig(**(SETTINGS | {"clip": norm / 8}))
    assert clipped.optimizer.scale(clipped.squares()) == (norm, 0.125)
    assert small.optimizer.scale(small.squares()) == (norm / 8, 1.0)
    clipped.optimizer.update(0, 0.1, 0.125)
    small.optimizer.update(0, 0.1, 1.0)
    for name in clipped.names:
        assert clipped.param[name].tobytes() == small.param[name].tobytes()
        assert clipped.moment1[name].tobytes() == small.moment1[name].tobytes()


def test_the_clipped_norm_is_the_limit() -> None:
    rig = alone(clip=0.25)
    rig.fill(rig.grad, np.random.default_rng(3))
    norm, scale = rig.optimizer.scale(rig.squares())
    assert norm * scale == pytest.approx(0.25, rel=1e-15)
    assert rig.optimizer.scale(rig.squares() * 0) == (0.0, 1.0)


def test_a_norm_at_the_limit_is_left_alone() -> None:
    rig = alone(clip=5.0)
    squares = np.zeros(len(rig.plan.names))
    squares[:2] = 9.0, 16.0
    assert rig.optimizer.scale(squares) == (5.0, 1.0)
    squares[2] = 1e-9
    assert rig.optimizer.scale(squares)[1] < 1.0


def test_a_norm_that_is_not_finite_is_told() -> None:
    rig = alone(clip=1.0)
    rig.grad["embed.weight"][0, 0] = np.nan
    assert math.isnan(rig.optimizer.scale(rig.squares())[0])
    rig.grad["embed.weight"][0, 0] = np.inf
    assert rig.optimizer.scale(rig.squares())[0] == math.inf


@pytest.mark.parametrize("model", ["gpt2", "llama", "untied"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_norm_has_the_same_bits_on_every_layout(model: str, ranks: int) -> None:
    """Every term comes from one rank, whatever the layout; a tied copy adds nothing of its own."""
    cpu = CpuBackend(1)
    one, p = Alone(planned(model, 1), 0, cpu), planned(model, ranks)
    many = [Alone(p, i, cpu) for i in range(ranks)]
    values = {n: np.random.default_rng(i).standard_normal(one.grad[n].shape) for i, n in enumerate(one.names)}
    for rig in (one, *many):
        for name in rig.names:
            rig.grad[name][...] = values[name]
        for copy, owner in rig.params.tied.items():
            if copy in rig.params.owned:  # both ends hold the same sum by then
                rig.grad[copy][...] = values[owner]
    squares = [rig.squares() for rig in many]
    assert all(sum(row[i] != 0 for row in squares) == 1 for i in range(len(p.names)))
    assert sum(squares).tolist() == one.squares().tolist()
    exact = math.sqrt(math.fsum(float((np.float32(v).astype(np.float64) ** 2).sum()) for v in values.values()))
    assert one.optimizer.scale(one.squares())[0] == pytest.approx(exact, rel=1e-14)


def test_both_ends_of_a_tie_stay_equal() -> None:
    cpu = CpuBackend(1)
    p = planned("llama", 2)
    ends = [Alone(p, i, cpu) for i in range(2)]
    for step in range(3):
        for rig, name in zip(ends, ("embed.weight", "head.weight"), strict=True):
            if step == 0:
                rig.param[name][...] = np.random.default_rng(9).standard_normal(rig.param[name].shape)
            rig.grad[name][...] = np.random.default_rng(step).standard_normal(rig.param[name].shape)
            rig.optimizer.update(step, 0.1, 0.5)
    for region in ("param", "moment1", "moment2"):
        assert getattr(ends[0], region)["embed.weight"].tobytes() == getattr(ends[1], region)["head.weight"].tobytes()


def test_padding_between_tensors_stays_zero() -> None:
    """The update runs over whole groups: what lies between tensors must not grow into a number."""
    rig = alone("cpu")
    rng = np.random.default_rng(0)
    rig.fill(rig.param, rng)
    for step in range(3):
        rig.fill(rig.grad, rng)
        rig.optimizer.update(step, 0.1, 1.0)
    for region in ("PARAM", "MOMENT1", "MOMENT2"):
        flat = rig.executor.array(region, 0, (rig.params.size,))
        inside = np.zeros(rig.params.size, bool)
        for name in rig.params.owned:
            at = rig.params.param[name]
            inside[at : at + math.prod(rig.params.shapes[name])] = True
        assert not inside.all() and not flat[~inside].any()


# --- the update on a guess


def everything(rig: Alone) -> dict[str, bytes]:
    """All values that a step may change, with what lies between them."""
    sizes = {
        "PARAM": rig.params.size,
        "GRAD": rig.params.grad_size,
        "MOMENT1": rig.params.size,
        "MOMENT2": rig.params.size,
    }
    return {region: rig.executor.array(region, 0, (size,)).tobytes() for region, size in sizes.items()}


def twins(backend: str, model: str, **settings: Any) -> tuple[Alone, Alone]:
    """Two that hold the same values; the second one may guess."""
    pair = alone(backend, model, **settings), alone(backend, model, early=True, **settings)
    for rig in pair:
        rng = np.random.default_rng(12)
        rig.fill(rig.param, rng)
        rig.fill(rig.moment1, rng)
        rig.fill(rig.moment2, rng)
        for name in rig.names:
            np.abs(rig.moment2[name], out=rig.moment2[name])
    assert everything(pair[0]) == everything(pair[1])
    return pair


@pytest.mark.parametrize("model", ["gpt2", "llama", "untied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guess_that_is_kept_is_the_update(backend: str, model: str) -> None:
    whole, halves = twins(backend, model)
    for step in range(4):
        for rig in (whole, halves):
            rig.fill(rig.grad, np.random.default_rng(step), size=10.0 ** (-step))
        before = everything(halves)
        whole.optimizer.update(step, 0.01 / (step + 1), 1.0)
        halves.optimizer.guess(step, 0.01 / (step + 1))
        guessed = everything(halves)
        assert guessed["PARAM"] == everything(whole)["PARAM"] != before["PARAM"]  # the values are there at once
        assert {r: b for r, b in guessed.items() if r != "PARAM"} == {r: b for r, b in before.items() if r != "PARAM"}
        halves.optimizer.keep()
        assert everything(halves) == everything(whole)


@pytest.mark.parametrize("model", ["gpt2", "llama", "untied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guess_that_is_taken_back_has_left_nothing(backend: str, model: str) -> None:
    whole, halves = twins(backend, model)
    for step in range(4):
        for rig in (whole, halves):
            rig.fill(rig.grad, np.random.default_rng(step), size=10.0 ** (3 * step))
        before = everything(halves)
        halves.optimizer.guess(step, 0.1)
        assert everything(halves) != before
        halves.optimizer.take_back()
        assert everything(halves) == before
        for rig in (whole, halves):
            rig.optimizer.update(step, 0.1, 0.3)  # what the step then does
        assert everything(halves) == everything(whole)


def test_a_guess_of_infinite_values_can_be_taken_back() -> None:
    rig = alone("cpu", early=True)
    rig.fill(rig.param, np.random.default_rng(1))
    for name, bad in zip(rig.names, (np.nan, np.inf, -np.inf), strict=False):
        rig.grad[name].flat[0] = bad
    before = everything(rig)
    rig.optimizer.guess(0, 0.1)
    rig.optimizer.take_back()
    assert everything(rig) == before


def test_only_who_may_guess_has_room_for_it() -> None:
    plain, early = alone("cpu"), alone("cpu", early=True)
    assert plain.executor.memory.resident["BEFORE"][1] == 0
    assert early.executor.memory.resident["BEFORE"][1] == early.executor.memory.resident["PARAM"][1] > 0


def test_squares_are_told_by_those_who_count() -> None:
    """Every copy of the model holds a gradient; of each tensor one rank tells."""
    rig = alone("cpu")
    rig.fill(rig.grad, np.random.default_rng(4))
    counted = rig.names[1::2]
    some = AdamW(rig.executor, rig.params, rig.config, rig.plan.names, counted)
    into = np.full(len(rig.plan.names), -1.0)
    some.squares(into)
    every = rig.squares()
    assert {n for i, n in enumerate(rig.plan.names) if into[i] != -1} == set(counted)
    assert all(into[i] == every[i] for i, n in enumerate(rig.plan.names) if n in counted)
