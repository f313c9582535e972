"""Whole runs whose products and attention are done by libraries, on devices and libraries that are not there.

What one call of a library does is tried elsewhere; here they stand in recorded passes, in graphs, on every rank: pairs
are fused in some places only, algorithms are agreed on, and a layout must not change a bit.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cuda import opening
from hpcpipe.backends.cuda.fused_attention import FusedAttention
from hpcpipe.backends.cuda.products import Products
from hpcpipe.config import UserError
from tests.gpu.fake_libraries import FakeCublasLt, FakeCudnn
from tests.gpu.host import build
from tests.gpu.host_driver import HOPPER
from tests.gpu.host_run import gpu_run, gpus
from tests.small_run import Result, run, write_tokens

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++: kernels are compiled for the host with it")

SHORT = {"train__steps": 3, "train__batch": 4, "train__microbatch": 1, "train__compute": "bfloat16"}
# Heads of 8 channels, which cuDNN takes.
HEADS: dict[str, dict[str, int]] = {
    "gpt2": {"model__heads": 3},
    "llama": {"model__heads": 3, "model__kv_heads": 1},
}
ALGORITHMS = [(1, 0, 0), (4, 2, 4096), (3, 2, 4096)]  # three whose sums go in three orders
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (2, {"pipeline__schedule": "zb_h1"}),
    (3, {"pipeline__schedule": "1f1b"}),
    (4, {"pipeline__replicas": 2}),
]


class Libraries:
    """The fakes of every rank, for ``gpus``; ``slow``: by rank, which algorithms take long there."""

    def __init__(self, cache: Path, slow: tuple[dict[int, int], ...] = ({},), tune: str = "off") -> None:
        self.cache, self.slow, self.tune = cache, slow, tune
        self.products: list[Products] = []
        self.attention: list[FusedAttention] = []
        self.lt: list[FakeCublasLt] = []

    def __call__(self, driver: Any, launchers: Any, backend: Any, compute: str) -> list[Any]:
        lt = FakeCublasLt(driver)
        lt.algorithms, lt.slow = ALGORITHMS, self.slow[len(self.lt) % len(self.slow)]
        environment = {"XDG_CACHE_HOME": str(self.cache / str(len(self.lt))), "HPCPIPE_TUNE": self.tune}
        self.lt.append(lt)
        self.products.append(opening.products(driver, lt, launchers, backend, compute, environment, 1 << 16))
        self.attention.append(FusedAttention(driver, FakeCudnn(driver)))
        return [self.products[-1], self.attention[-1]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def go(
    data: Path, out: Path, libraries: Libraries, ranks: int = 1, model: str = "gpt2", seed: int = 0, **settings: Any
) -> Result:
    with gpus(ranks, seed, libraries):
        return run(data, out, ranks, model, device__backend="cuda", **{**SHORT, **HEADS[model], **settings})


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_libraries_learn_what_our_own_kernels_learn(data: Path, tmp_path: Path, model: str) -> None:
    libraries = Libraries(tmp_path / "cache")
    with_them = go(data, tmp_path / "with", libraries, 1, model)
    without = gpu_run(data, tmp_path / "without", 1, model, **SHORT, **HEADS[model])
    np.testing.assert_allclose(with_them.losses, without.losses, rtol=2e-3)
    epilogues = {call["epilogue"] for call in libraries.lt[0].calls}
    assert epilogues == ({"GELU_AUX_BIAS", "DGELU", "BIAS", "DEFAULT"} if model == "gpt2" else {"DEFAULT"})
    assert [line[:22] for line in libraries.attention[0].chosen()] == ["attention: cuDNN 92800"]
    assert set(libraries.attention[0].cudnn.executed) == {"forward", "backward"}


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Result]:
    """Runs of a whole model on one device, by the number of its copies."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        copies: go(data, folder / str(copies), Libraries(folder), copies, pipeline__replicas=copies)
        for copies in (1, 2)
    }


@pytest.mark.parametrize(("ranks", "change"), LAYOUTS)
def test_a_layout_changes_no_bit(data: Path, tmp_path: Path, alone: Any, ranks: int, change: dict[str, Any]) -> None:
    few = alone[change.get("pipeline__replicas", 1)]
    many = go(data, tmp_path / "many", Libraries(tmp_path), ranks, seed=1, **change)
    assert (many.losses, many.tensors) == (few.losses, few.tensors)


def test_ranks_that_measure_differently_run_the_same(data: Path, tmp_path: Path) -> None:
    """Two replicas of a model, on devices that find different algorithms fastest; and the same run when it goes on."""
    slow = {0: 40, 2: 40}, {0: 40, 1: 40}
    libraries = Libraries(tmp_path / "cache", slow, "on")
    go(data, tmp_path / "run", libraries, 2, pipeline__replicas=2)
    first, second = (products.table() for products in libraries.products)
    assert len(first) > 10 and first == second
    assert all(products.tuner.timed > 10 for products in libraries.products)
    # Elsewhere, without what was measured before: the run's folder says what it began with.
    later = Libraries(tmp_path / "another", slow[::-1], "on")
    go(data, tmp_path / "run", later, 2, pipeline__replicas=2, train__steps=5)
    assert all(products.table() == first for products in later.products)
    # And where only the cache is left, the settled choice is in it, not each rank's own.
    for number in range(2):
        kept = Libraries(tmp_path / f"kept{number}", slow, "on")
        shutil.copytree(tmp_path / "cache" / str(number), tmp_path / f"kept{number}" / "0")
        shutil.copytree(tmp_path / "cache" / str(number), tmp_path / f"kept{number}" / "1")
        go(data, tmp_path / f"run{number}", kept, 2, pipeline__replicas=2)
        assert all(products.table() == first and not products.tuner.timed for products in kept.products)


# Sizes that all recipes take; the first and the last of three blocks stay in bfloat16.
WIDE = {
    "model__layers": 3, "model__width": 32, "model__heads": 4, "train__length": 16, "train__microbatch": 2,
}  # fmt: skip
BLACKWELL = HOPPER._replace(capability=(10, 0))


@pytest.mark.parametrize(
    ("recipe", "device"),
    [
        ("fp8", HOPPER),
        pytest.param("fp8_block", HOPPER, marks=pytest.mark.long),
        pytest.param("mxfp8", BLACKWELL, marks=pytest.mark.long),
    ],
)
def test_a_recipe_learns_what_bfloat16_learns(data: Path, tmp_path: Path, recipe: str, device: Any) -> None:
    settings = {**SHORT, **WIDE, "device__backend": "cuda"}
    found = {}
    for compute, ranks in (("bfloat16", 1), (recipe, 1), (recipe, 2)):
        libraries = Libraries(tmp_path)
        with gpus(ranks, 5, libraries, properties=device):
            found[compute, ranks] = run(
                data, tmp_path / f"{compute}{ranks}", ranks, "gpt2", **settings | {"train__compute": compute}
            )
        narrow = [key for products in libraries.products for key in products.table() if "e4m3" in key]
        assert bool(narrow) == (compute == recipe)
    plain, one, two = found.values()
    assert one.losses != plain.losses
    np.testing.assert_allclose(one.losses, plain.losses, rtol=2e-2)
    assert (two.losses, two.tensors) == (one.losses, one.tensors)


def test_a_recipe_that_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    settings = {**SHORT, **WIDE, "device__backend": "cuda"}
    with gpus(1, 0, Libraries(tmp_path)), pytest.raises(UserError, match=r"mxfp8 need a device of .* 10\.0 or later"):
        run(data, tmp_path / "a", 1, "gpt2", **settings | {"train__compute": "mxfp8"})
    with gpus(1), pytest.raises(UserError, match=r"train\.compute = fp8 needs cuBLASLt"):
        run(data, tmp_path / "b", 1, "gpt2", **settings | {"train__compute": "fp8"})
    with pytest.raises(UserError, match=r"train\.compute is fp8, which device\.backend = cpu does not multiply"):
        run(data, tmp_path / "c", 1, "gpt2", train__compute="fp8")
