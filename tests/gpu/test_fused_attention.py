"""Attention by cuDNN, tried on a library and a device that pose in host memory: both passes against the definitions.

The fake reads and writes through the strides that it is given, so packed queries, keys and values, shared heads and the
layout of the statistics are real here; which shapes the real library takes is only asked of it where it is installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cuda import fused_attention
from hpcpipe.backends.cuda.fused_attention import FusedAttention, Shape
from tests.gpu.fake_libraries import FakeCudnn
from tests.gpu.host import build
from tests.gpu.host_driver import HostDriver
from tests.gpu.kernel_calls import HALF_STEP, prepared
from tests.gpu.test_products import Bench, call_of, results, site_of
from tests.kernels.cases import CASES, label, reference, widened

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++: kernels are compiled for the host with it")

SOME = [case for case in CASES if case[0] == "attention_fwd" and case[1]["d"] % 8 == 0 and case[1]["n"] < 700]
SOME += [("attention_fwd", {"n": 12, "t": 4, "h": 6, "k": 2, "d": 24})]
BUILDING = ("build_operation_graph", "create_execution_plans", "check_support", "build_plans")
ENV = {"n": 12, "t": 4, "h": 6, "k": 2, "d": 24}


class Attention(Bench):
    """A device and a fake cuDNN."""

    def __init__(self, limit: int = fused_attention.LIMIT, **options: Any) -> None:
        self.driver = HostDriver()
        self.cudnn = FakeCudnn(self.driver, **options)
        self.attention = FusedAttention(self.driver, self.cudnn, limit=limit)

    def site(self, name: str, env: dict[str, int], half: bool = True) -> tuple[Any, dict[str, Any]]:
        values = prepared(name, env, np.random.default_rng(7), half)
        return site_of(self, call_of(name, env, half), values, half), values


@pytest.mark.parametrize("case", SOME, ids=[label(case) for case in SOME])
def test_both_passes_are_what_the_definition_says(case):
    env = case[1]
    bench = Attention()
    first, values = bench.site("attention_fwd", env)
    second, gradients = bench.site("attention_dx", env)
    # What the backward pass reads is what the forward pass left, statistics in cuDNN's own order among it.
    second = second._replace(at={**second.at, **{name: first.at[name] for name in ("qkv", "y", "lse")}})
    (count, steps), (other, more) = bench.attention.take([first, second]), bench.attention.take([second])
    assert (count, other) == (1, 1)
    bench.run([*steps, *more])
    want = reference("attention_fwd", env, values)
    y = results(bench, first)["y"]
    np.testing.assert_allclose(y, want["y"], rtol=HALF_STEP, atol=1e-6)
    b, t, h = env["n"] // env["t"], env["t"], env["h"]
    lse = bench.read(first.at["lse"], (b, h, t), np.float32)
    np.testing.assert_allclose(lse.transpose(0, 2, 1).reshape(-1, h), want["lse"], rtol=1e-5, atol=1e-5)
    given = {"qkv": values["qkv"], "dy": gradients["dy"], "y": y, "lse": want["lse"].astype(np.float32)}
    right = reference("attention_dx", env, given)["dqkv"]
    found = results(bench, second)["dqkv"]
    np.testing.assert_allclose(found, right, rtol=HALF_STEP, atol=1e-4 * np.abs(right).max())
    assert bench.cudnn.executed == ["forward", "backward"]


def test_a_shape_is_planned_once():
    bench = Attention()
    for _ in range(3):
        for name in ("attention_fwd", "attention_dx"):
            assert bench.attention.take([bench.site(name, ENV)[0]]) is not None
    assert bench.cudnn.graphs == 2
    (line,) = bench.attention.chosen()
    assert line == "attention: cuDNN 92800 for 3 x 4 tokens, 6 heads on 2, 24 wide; 0.0 MiB of workspace"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"d": 20}, "multiples of 8"),
        ({"d": 264}, "multiples of 8 channels, at most 256"),
        ({"d": 136}, "hidden_dim should be at most 128 and a multiple of 8)"),
        ({"t": 1}, "s_q = s_kv = 1"),  # the backward pass alone is refused: the forward pass must not be cuDNN's either
    ],
)
def test_what_cudnn_refuses_in_one_pass_it_does_in_none(change, why):
    bench, env = Attention(), {**ENV, **change}
    for name in ("attention_fwd", "attention_dx"):
        assert bench.attention.take([bench.site(name, env)[0]]) is None
    (line,) = bench.attention.chosen()
    assert "our own kernels for" in line and why in line


def test_float32_and_other_kernels_are_not_taken():
    bench = Attention()
    assert bench.attention.take([bench.site("attention_fwd", ENV, half=False)[0]]) is None
    assert bench.attention.take([bench.site("gelu_fwd", {"n": 3, "c": 8})[0]]) is None
    assert bench.cudnn.graphs == 0


def test_workspace_is_shared_bounded_and_given_back():
    bench = Attention()
    before = bench.driver.memory.used
    steps = []
    for t, size in ((4, 4096), (2, 8192), (6, 100)):
        bench.cudnn.workspaces["backward"] = size
        site, _ = bench.site("attention_dx", {**ENV, "t": t})
        steps += bench.attention.take([site])[1]
    rooms = [step.workspace for step in steps]
    assert rooms[0] != rooms[1] == rooms[2]
    sites = bench.driver.memory.used
    bench.attention.close()
    assert sites - bench.driver.memory.used == 4096 + 8192 and bench.cudnn.handles == {}
    assert before < sites
    small = Attention(limit=4095)
    assert small.attention.take([small.site("attention_fwd", ENV)[0]]) is None
    assert "workspace of 0 MiB is more" in small.attention.chosen()[0]


def test_a_missing_library_says_why():
    driver = HostDriver()
    attention = FusedAttention(driver, None, "the package nvidia-cudnn-frontend is not installed")
    bench = Attention()
    assert attention.take([bench.site("attention_fwd", ENV)[0]]) is None
    assert attention.chosen() == ["attention: our own kernels; the package nvidia-cudnn-frontend is not installed"]
    broken = Attention(starts=False)
    assert broken.attention.take([broken.site("attention_fwd", ENV)[0]]) is None
    assert "cudnnHandle Create failed)" in broken.attention.chosen()[0]
    broken.attention.close()


def test_addresses_that_cudnn_cannot_use_are_an_error_here():
    bench = Attention()
    site, _ = bench.site("attention_fwd", ENV)
    with pytest.raises(ValueError, match="lse are not aligned"):
        bench.attention.take([site._replace(at={**site.at, "lse": site.at["lse"] + 4})])


def test_columns_of_a_packed_row_start_where_the_table_says():
    shape = Shape(2, 5, 4, 2, 8)
    layout = fused_attention.tensors(shape)
    bench = Attention()
    env = {"n": 10, "t": 5, "h": 4, "k": 2, "d": 8}
    site, values = bench.site("attention_fwd", env)
    at = fused_attention.addresses(site)
    row = widened(bench.read(site.at["qkv"], (10, 64), np.uint16))
    for name, start, heads in (("q", 0, 4), ("k", 32, 2), ("v", 48, 2)):
        size, stride = layout[name]
        assert (at[name] - site.at["qkv"], size, stride) == (2 * start, (2, heads, 5, 8), (320, 8, 64, 1))
    np.testing.assert_array_equal(row, values["qkv"])


# ---- the real frontend


def test_the_real_frontend_takes_these_graphs():
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed: its graphs are not tried")
    try:
        cudnn.backend_version()
    except RuntimeError as error:
        pytest.skip(f"cuDNN itself is not installed ({error}): its graphs are not tried")
    for name in ("create_handle", "destroy_handle", "set_stream", "cudnnGraphNotSupportedError"):
        assert callable(getattr(cudnn, name))
    assert cudnn.heur_mode.A is not None
    attention = FusedAttention.__new__(FusedAttention)
    attention.cudnn, attention.handle = cudnn, None
    for shape in (Shape(2, 128, 4, 2, 64), Shape(1, 1030, 8, 8, 128)):
        for graph in (attention._forward(shape), attention._backward(shape)):
            graph.validate()
            for verb in (*BUILDING, "execute", "get_workspace_size"):
                assert callable(getattr(graph, verb))
