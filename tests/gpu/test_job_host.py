"""Whole runs on devices that are not there: the job, its streams and its messages, in whatever order is legal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpcpipe.config import UserError
from hpcpipe.predict import open_predictor
from tests.gpu.host import build
from tests.gpu.host_driver import HOPPER
from tests.gpu.host_run import gpu_run, gpus
from tests.small_run import run, write_tokens

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no g++: kernels of native/cuda cannot be tried without a GPU"
)

SHORT = {"train__steps": 3, "train__batch": 4, "train__microbatch": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_device_learns_what_the_cpu_learns(data: Path, tmp_path: Path, model: str) -> None:
    there = gpu_run(data, tmp_path / "gpu", 1, model, **SHORT)
    here = run(data, tmp_path / "cpu", 1, model, **SHORT)
    np.testing.assert_allclose(there.losses, here.losses, rtol=1e-5)
    for key, values in here.tensors.items():
        want, got = (np.frombuffer(t, np.float32) for t in (values, there.tensors[key]))
        if key[0] == "moment1":  # AdamW turns a gradient that cancelled into a step of full size
            np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max(), err_msg=str(key))


LAYOUTS = [
    (1, 3, {}),
    (2, 1, {}),
    (2, 2, {"pipeline__schedule": "zb_h1"}),
    (2, 3, {"pipeline__schedule": "zb_v", "optimizer__early": True}),
    (2, 4, {"pipeline__schedule": "interleaved"}),
    (3, 5, {"pipeline__schedule": "1f1b", "train__recompute": "block"}),
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def alone(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory):
    settings = {**SHORT, "train__compute": request.param, "eval__every": 2, "eval__microbatches": 2}
    return settings, gpu_run(data, tmp_path_factory.mktemp("alone"), 1, "untied", **settings)


@pytest.mark.parametrize(("ranks", "seed", "change"), LAYOUTS)
def test_every_layout_and_every_legal_order_gives_the_same_bits(
    data: Path, tmp_path: Path, alone, ranks: int, seed: int, change: dict[str, object]
) -> None:
    settings, one = alone
    found = gpu_run(data, tmp_path / "run", ranks, "untied", seed, **settings, **change)
    assert found.losses == one.losses
    assert found.tensors == one.tensors


def test_copies_of_the_model_sum_in_their_order(data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "pipeline__replicas": 2}
    one = gpu_run(data, tmp_path / "a", 2, "llama", 1, **settings)
    for seed, ranks in ((2, 2), (3, 4)):
        found = gpu_run(data, tmp_path / f"b{seed}", ranks, "llama", seed, **settings)
        assert (found.losses, found.tensors) == (one.losses, one.tensors)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_copies_that_divide_the_moments_have_the_same_bits(data: Path, tmp_path: Path, compute: str) -> None:
    settings = {**SHORT, "pipeline__replicas": 2, "train__compute": compute, "optimizer__clip": 0.9}
    one = gpu_run(data, tmp_path / "whole", 2, "llama", 1, **settings)
    for seed, ranks, early in ((2, 2, False), (3, 4, True)):
        change = {"optimizer__shard": True, "optimizer__early": early, "checkpoint__every": 1}
        found = gpu_run(data, tmp_path / f"shares{seed}", ranks, "llama", seed, **settings, **change)
        assert (found.losses, found.tensors) == (one.losses, one.tensors)


def test_two_ranks_share_a_device(data: Path, tmp_path: Path) -> None:
    one = gpu_run(data, tmp_path / "one", 1, "llama", **SHORT)
    with gpus(1) as drivers:
        two = run(data, tmp_path / "two", 2, "llama", device__backend="cuda", **SHORT)
    assert len(drivers) == 2 and (two.losses, two.tensors) == (one.losses, one.tensors)


def test_bfloat16_learns_what_float32_learns_and_what_its_definition_says(data: Path, tmp_path: Path) -> None:
    whole = gpu_run(data, tmp_path / "whole", 1, "gpt2", **SHORT)
    half = gpu_run(data, tmp_path / "half", 1, "gpt2", train__compute="bfloat16", **SHORT)
    told = run(data, tmp_path / "told", 1, "gpt2", train__compute="bfloat16", device__backend="reference", **SHORT)
    assert half.losses != whole.losses
    np.testing.assert_allclose(half.losses, whole.losses, rtol=5e-3)
    np.testing.assert_allclose(half.losses, told.losses, rtol=2e-3)


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "train__compute": "bfloat16", "optimizer__schedule": "wsd", "optimizer__decay_steps": 1}
    straight = gpu_run(data, tmp_path / "straight", 1, "llama", **settings | {"train__steps": 4})
    gpu_run(data, tmp_path / "parts", 2, "llama", 1, **settings | {"train__steps": 4, "checkpoint__every": 2})
    (tmp_path / "parts" / "done.json").unlink(missing_ok=True)
    newest = sorted((tmp_path / "parts").glob("step_*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    again = gpu_run(data, tmp_path / "parts", 1, "llama", 2, **settings | {"train__steps": 4})
    assert again.losses[-2:] == straight.losses[-2:]
    assert again.tensors == straight.tensors


def test_a_device_that_fails_ends_the_job_and_leaves_its_checkpoints(data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, "train__steps": 6, "checkpoint__every": 1, "device__backend": "cuda"}
    with gpus(2) as drivers:
        whole = run(data, tmp_path / "whole", 2, "llama", **settings)
    verbs = sum(drivers[1].counts.values())
    with gpus(2, fails={1: verbs * 2 // 3}), pytest.raises(UserError, match=r"the GPU .* failed: it was told to"):
        run(data, tmp_path / "cut", 2, "llama", **settings)
    with gpus(2):
        again = run(data, tmp_path / "cut", 2, "llama", **settings)
    assert again.metrics[0]["step"] >= 1 and again.losses[-1] == whole.losses[-1]
    assert again.tensors == whole.tensors


def test_too_little_memory_is_said_before_step_0(data: Path, tmp_path: Path) -> None:
    small = HOPPER._replace(free=1 << 16)
    said = r"rank 0 needs 0\.3 GiB, its share of the free memory of its host memory posing as a GPU is"
    with gpus(1, properties=small), pytest.raises(UserError, match=said):
        run(data, tmp_path / "run", 1, "llama", device__backend="cuda", **SHORT)
    assert not list((tmp_path / "run").glob("step_*"))
    with gpus(1, limit=1 << 16), pytest.raises(UserError, match=r"GiB|MiB|bytes"):
        run(data, tmp_path / "run", 1, "llama", device__backend="cuda", **SHORT)


def test_what_is_allocated_is_what_was_planned_and_nothing_comes_later(data: Path, tmp_path: Path) -> None:
    counts = []
    for steps in (2, 5):
        with gpus(1) as drivers:
            run(data, tmp_path / str(steps), 1, "llama", device__backend="cuda", **SHORT | {"train__steps": steps})
        counts.append(drivers[0].counts)
    once = ("allocate", "pinned", "stream", "event", "load", "begin_capture", "end_capture", "launch")
    assert all(counts[0][verb] == counts[1][verb] > 0 for verb in once)
    assert counts[0]["launch_graph"] < counts[1]["launch_graph"]


def test_what_a_device_learned_is_read_without_one(data: Path, tmp_path: Path) -> None:
    gpu_run(data, tmp_path / "run", 1, "llama", train__compute="bfloat16", **SHORT)
    here, _ = open_predictor(str(tmp_path / "run"), 8)
    with gpus(1):
        there, _ = open_predictor(str(tmp_path / "run"), 8)
        assert (here.executor.backend.name, there.executor.backend.name) == ("cpu", "cuda")
        ids = np.arange(7, dtype=np.int32)
        np.testing.assert_allclose(there(ids), here(ids), atol=2e-5)
