"""What only a GPU can show, asked of one: `make test-gpu`. Most of it is asked of the emulator, too, on every machine.

Kernels and libraries against the definitions, whole runs against the CPU's and against each other bit for bit, and the
sanitizers. Without a device the tests marked gpu are skipped, and say so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cuda import fused_attention, opening, products_cublaslt
from hpcpipe.backends.kernels import BY_NAME
from hpcpipe.config import UserError
from tests.gpu.host import build
from tests.gpu.kernel_calls import HALF_STEP, compare, prepared, tried
from tests.gpu.machines import OnDevice, World, without_a_device
from tests.gpu.test_kernels_host import MORE, identity, typed
from tests.kernels.cases import CASES, Env, label, reference, sizes
from tests.small_run import run, write_tokens

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"train__steps": 2, "train__batch": 2, "train__microbatch": 1}
# One call of each kind, none of them large: for graphs, for the sanitizers, for the emulator.
FEW = [
    next(case for case in CASES if case[0] == name and case[1].get("n", 0) > 5) for name in BY_NAME if name != "rope_dx"
]
PRODUCTS = ("linear_fwd", "linear_dx", "linear_dw", "linearcrossentropy_fwd")
ON_HOST = pytest.param(
    False, id="host", marks=pytest.mark.skipif(build.compiler() is None, reason="needs g++ for the emulator")
)
ON_GPU = pytest.param(True, id="gpu", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=[ON_HOST, ON_GPU])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


@pytest.fixture(scope="module")
def gpu() -> World:
    return World(True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def held(machine: OnDevice, case: tuple[str, Env], half: bool) -> None:
    """A call with fresh numbers against its definition."""
    (name, env), seed = case, secrets.randbits(32)
    values = prepared(name, env, np.random.default_rng(seed), half)
    found, want = tried(machine, name, env, values, half), reference(name, env, values)
    compare(name, found, want, sizes(name, env, values, want, seed), half, f"inputs of seed {seed}")


# ---- kernels


@pytest.fixture(scope="module")
def own(gpu: World) -> OnDevice:
    return OnDevice(gpu.backend("bfloat16"))


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "half"), typed([*CASES, *MORE]), ids=identity)
def test_values(own: OnDevice, case: tuple[str, Env], half: bool) -> None:
    held(own, case, half)


@pytest.fixture(scope="module")
def few(world: World) -> tuple[OnDevice, OnDevice, OnDevice]:
    """Launched one by one, in a graph, in a graph that is replayed."""
    backend = world.backend("bfloat16")
    return OnDevice(backend, captured=False), OnDevice(backend), OnDevice(backend, replays=2)


@pytest.mark.parametrize(("case", "half"), typed(FEW), ids=identity)
def test_a_graph_replays_the_bits_of_its_launches(few: Any, case: tuple[str, Env], half: bool) -> None:
    name, env = case
    values = prepared(name, env, np.random.default_rng(5), half)
    launched, *graphs = ({k: v.tobytes() for k, v in tried(m, name, env, values, half).items()} for m in few)
    assert graphs == [launched, launched]


# ---- libraries


@pytest.fixture(scope="module")
def library(gpu: World) -> OnDevice:
    if products_cublaslt.bindings() is None:
        pytest.skip("cuBLASLt cannot be loaded through nvmath-python: its products are not tried")
    return OnDevice(gpu.backend("bfloat16", libraries=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "half"), typed([case for case in CASES if case[0] in PRODUCTS]), ids=identity)
def test_values_of_cublaslt(library: OnDevice, case: tuple[str, Env], half: bool) -> None:
    held(library, case, half)


@pytest.mark.gpu
def test_cublaslt_takes_ordinary_products(library: OnDevice) -> None:
    before = library.taken
    held(library, ("linear_fwd", {"n": 768, "o": 128, "c": 128}), True)
    assert library.taken == before + 1


@pytest.mark.gpu
@pytest.mark.parametrize("env", [
    {"n": 600, "t": 300, "h": 6, "k": 6, "d": 64}, {"n": 260, "t": 130, "h": 8, "k": 2, "d": 16},
    {"n": 1030, "t": 1030, "h": 2, "k": 1, "d": 128},
], ids=str)  # fmt: skip
def test_values_of_cudnn(gpu: World, env: Env) -> None:
    """Both passes; the statistics go from one to the other in cuDNN's own order and are not looked at."""
    if reason := fused_attention.load()[1]:
        pytest.skip(f"cuDNN's attention is not tried: {reason}")
    machine = OnDevice(gpu.backend("bfloat16", libraries=True))
    rng = np.random.default_rng(secrets.randbits(32))
    values = prepared("attention_dx", env, rng, True)
    found = tried(machine, "attention_fwd", env, {"qkv": values["qkv"]}, True)
    want = reference("attention_fwd", env, values)
    np.testing.assert_allclose(found["y"], want["y"], rtol=HALF_STEP, atol=2.0**-6 * np.abs(want["y"]).max())
    back = tried(machine, "attention_dx", env, {**values, "y": found["y"], "lse": found["lse"]}, True)["dqkv"]
    right = reference("attention_dx", env, {**values, **want})["dqkv"]
    assert machine.taken == 2, "cuDNN did not take an ordinary attention"
    np.testing.assert_allclose(back, right, rtol=2 * HALF_STEP, atol=2.0**-5 * np.abs(right).max())


# ---- whole models


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize(("compute", "close"), [("float32", 2e-4), ("bfloat16", 5e-2)])
def test_gradients_of_a_whole_model(
    world: World, data: Path, tmp_path: Path, model: str, compute: str, close: float
) -> None:
    """After one step that clips nothing the first moment is a tenth of the gradient."""
    settings = {**SHORT, "train__steps": 1, "optimizer__clip": 0.0, "train__compute": compute}
    there = world.run(data, tmp_path / "gpu", 1, model, **settings)
    here = run(data, tmp_path / "here", 1, model, device__backend=reference_of(compute), **settings)
    np.testing.assert_allclose(there.losses, here.losses, rtol=close / 10)
    for key, values in here.tensors.items():
        want, got = (np.frombuffer(t, np.float32) for t in (values, there.tensors[key]))
        if key[0] == "moment1":
            assert want.any()
            np.testing.assert_allclose(got, want, atol=close * np.abs(want).max(), rtol=0, err_msg=str(key))


def reference_of(compute: str) -> str:
    return without_a_device() if compute == "float32" else "reference"


@pytest.mark.parametrize(("compute", "close"), [("float32", 1e-5), ("bfloat16", 2e-3)])
def test_a_run_learns_what_it_learns_elsewhere(
    world: World, data: Path, tmp_path: Path, compute: str, close: float
) -> None:
    settings = {**SHORT, "train__compute": compute}
    there = world.run(data, tmp_path / "gpu", 1, "gpt2", **settings)
    here = run(data, tmp_path / "here", 1, "gpt2", device__backend=reference_of(compute), **settings)
    np.testing.assert_allclose(there.losses, here.losses, rtol=close)
    assert there.losses[-1] != there.losses[0]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_two_ranks_share_a_device_to_the_bit(world: World, data: Path, tmp_path: Path, compute: str) -> None:
    settings = {**SHORT, "train__compute": compute, "device__transport": "staged"}
    one = world.run(data, tmp_path / "one", 1, "untied", **settings)
    two = world.run(data, tmp_path / "two", 2, "untied", seed=3, **settings)
    assert (two.losses, two.tensors) == (one.losses, one.tensors)


@pytest.mark.gpu
@pytest.mark.parametrize("change", [{}, {"pipeline__schedule": "zb_v"}, {"pipeline__replicas": 2}], ids=str)
def test_nccl_between_two_devices(gpu: World, data: Path, tmp_path: Path, change: dict[str, object]) -> None:
    """Bits of the same layout on one device, staged."""
    try:
        opening.connect(1)
    except UserError as error:
        pytest.skip(f"NCCL is not tried: {error}")
    staged = gpu.run(data, tmp_path / "staged", 2, "untied", **SHORT, **change, device__transport="staged")
    nccl = gpu.run(data, tmp_path / "nccl", 2, "untied", devices=2, **SHORT, **change, device__transport="nccl")
    assert (nccl.losses, nccl.tensors) == (staged.losses, staged.tensors)


def test_a_model_that_is_too_large_is_refused_before_step_0(world: World, data: Path, tmp_path: Path) -> None:
    with world.devices(1):
        free = opening.connect(0).properties.free
    width = 8192
    layers = 1 + free // (12 * width * width * 12)  # 12 width² parameters of at least 12 bytes each
    large = {"model__width": width, "model__ffn": 4 * width, "model__layers": int(layers), "model__heads": 64}
    with pytest.raises(UserError, match=r"rank 0 needs [\d.]+ GiB, its share of the free memory of its .* is [\d.]+"):
        world.run(data, tmp_path / "run", 1, "llama", **SHORT, **large)
    assert not list((tmp_path / "run").glob("step_*"))


# ---- the sanitizers


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str, tmp_path: Path) -> None:
    """The few calls again, each launch watched."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH: kernels are not watched")
    command = [program, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all", sys.executable]
    probe = subprocess.run(
        [*command, "-c", "import cupy; cupy.zeros(1).sum().item()"], capture_output=True, text=True, timeout=120
    )
    if probe.returncode:
        said = (probe.stdout + probe.stderr).strip().splitlines()[-1:]
        pytest.skip(f"compute-sanitizer does not work on this machine: {''.join(said)}")
    chosen = "test_a_graph_replays_the_bits_of_its_launches and gpu"
    test = [f"{Path(__file__).relative_to(ROOT)}", "-q", "-m", "gpu", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "pytest", *test], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    assert "ERROR SUMMARY: 0 errors" in report or "RACECHECK SUMMARY: 0 hazards" in report, report[-4000:]


def test_the_few_are_of_every_kind() -> None:
    assert {name for name, _ in FEW} == BY_NAME.keys() - {"rope_dx"}, [label(case) for case in FEW]
