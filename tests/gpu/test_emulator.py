"""The emulator of kernels: what is right gives the same bytes in every order of threads, what is wrong is seen.

The kernels are those of tests/gpu/host/planted.cu, right ones and wrong ones: a test of a wrong one shows that the same
mistake in native/cuda would be seen.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.gpu.host import build
from tests.gpu.host.build import BACKWARD, FORWARD, KernelError

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++: kernels are compiled for the host with it")

PLANTED = build.HERE / "planted.cu"
ORDERS = (FORWARD, BACKWARD, 2, 3, 4)
WARP = ((1, 1, 1), (32, 1, 1))


@pytest.fixture(scope="module")
def planted():
    return build.library(build.build(PLANTED))


def bfloat16(values):
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def at(array):
    return array.ctypes.data


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [32, 96, 1024])
@pytest.mark.parametrize("half", [False, True])
def test_reductions_are_the_same_in_every_order(planted, threads, half):
    x = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    given = bfloat16(x) if half else x
    seen = set()
    for order in ORDERS:
        y = np.zeros(2, np.float32)
        name = "hp_reduced_h" if half else "hp_reduced"
        planted.run(name, (1, 1, 1), (threads, 1, 1), (at(y), at(given), x.size), 0, order)
        seen.add(y.tobytes())
    real = widened(given) if half else x
    assert len(seen) == 1
    np.testing.assert_allclose(y, [real.sum(dtype=np.float64), real.max()], rtol=1e-4, atol=1e-4)


def test_a_maximum_does_not_hide_a_nan(planted):
    x, y = np.ones(64, np.float32), np.zeros(2, np.float32)
    x[37] = np.nan
    planted.run("hp_reduced", (1, 1, 1), (64, 1, 1), (at(y), at(x), 64))
    assert np.isnan(y).all()


def results(planted, name, shape, orders, grid, block, *args, shared=0):
    seen = []
    for order in orders:
        y = np.zeros(shape, np.float32)
        planted.run(name, (grid, 1, 1), (block, 1, 1), (at(y), *args), shared, order)
        seen.append(y)
    return seen


def test_a_race_shows_as_another_result_in_another_order(planted):
    x = np.arange(64, dtype=np.float32)
    right = results(planted, "hp_reversed", 64, ORDERS, 1, 64, at(x), shared=256)
    assert all((y == x[::-1]).all() for y in right)
    racing = results(planted, "hp_reversed_racing", 64, ORDERS, 1, 64, at(x), shared=256)
    assert len({y.tobytes() for y in racing}) > 1
    assert np.isnan(racing[0]).any()  # what nobody has written yet is poison


def test_a_race_between_blocks_shows_too(planted):
    assert len({y.tobytes() for y in results(planted, "hp_blocks_racing", 6, ORDERS, 6, 32)}) > 1


def test_shared_memory_starts_poisoned_in_each_block(planted):
    (y,) = results(planted, "hp_unwritten", 3 * 64, [FORWARD], 3, 32, shared=128)
    assert np.isnan(y).all()


@pytest.mark.parametrize("order", ORDERS)
def test_a_missed_barrier_names_kernel_and_thread(planted, order):
    said = (
        r"hp_barrier_missed: thread \(\d+,0,0\) of block \(0,0,0\) waits at __syncthreads, but thread \(7,0,0\) has ret"
    )
    with pytest.raises(KernelError, match=said):
        planted.run("hp_barrier_missed", *WARP, (7,), 0, order)


def test_a_barrier_and_a_shuffle_that_wait_for_each_other(planted):
    y = np.zeros(32, np.float32)
    with pytest.raises(KernelError, match=r"hp_barrier_or_shuffle: thread .* waits at .*, but thread .* waits at"):
        planted.run("hp_barrier_or_shuffle", *WARP, (at(y), 5))


def test_a_shuffle_needs_the_lanes_of_its_mask(planted):
    y = np.zeros(40, np.float32)
    with pytest.raises(KernelError, match=r"waits at __shfl_sync, but thread \(9,0,0\) has returned"):
        planted.run("hp_shuffle_without", *WARP, (at(y), 9))
    with pytest.raises(KernelError, match=r"mask 0000ffff, which lacks its own lane 16"):
        planted.run("hp_shuffle_outside", *WARP, (at(y),), 0, FORWARD)
    with pytest.raises(KernelError, match=r"there is no lane 8"):
        planted.run("hp_shuffle_without", (1, 1, 1), (40, 1, 1), (at(y), 99))


def test_the_emulator_goes_on_after_an_error(planted):
    x = np.arange(32, dtype=np.float32)
    for _ in range(3):
        with pytest.raises(KernelError):
            planted.run("hp_barrier_missed", *WARP, (0,))
        (y,) = results(planted, "hp_shuffle_halves", 32, [BACKWARD], 1, 32, at(x))
        assert y[0] == 1


def test_a_forbidden_address_is_an_error_and_not_the_end(planted):
    with pytest.raises(KernelError, match=r"hp_add: thread \(\d+,0,0\) of block .* touched address 0x40"):
        planted.run("hp_add", (1, 1, 1), (1, 1, 1), (64, 1, 1.0))


def test_dynamic_shared_memory_has_an_end(planted):
    with pytest.raises(KernelError, match=r"something wrote byte 64 of 64 bytes of dynamic shared memory"):
        planted.run("hp_shared_overrun", (1, 1, 1), (1, 1, 1), (16,), 64)


@pytest.mark.parametrize("order", ORDERS)
def test_shuffles(planted, order):
    x, lane = np.random.default_rng(2).standard_normal(32).astype(np.float32), np.arange(32)
    (y,) = results(planted, "hp_shuffles", 128, [order], 1, 32, at(x))
    down = np.where(lane % 16 + 3 < 16, lane + 3, lane) % 32
    expected = [x[lane * 7 % 32], x[lane ^ 5], x[down], x[np.where(lane >= 9, lane - 9, lane)]]
    assert (y.reshape(4, 32) == expected).all()
    (halves,) = results(planted, "hp_shuffle_halves", 32, [order], 1, 32, at(x))
    assert (halves == x[np.where(lane < 16, lane ^ 1, lane ^ 2)]).all()


@pytest.mark.parametrize("order", ORDERS)
def test_tensor_cores_multiply(planted, order):
    rng = np.random.default_rng(3)
    a, b, d = (rng.standard_normal(s).astype(np.float32) for s in ((16, 16), (16, 8), (16, 8)))
    # Aligned as device memory is: copies of 16 bytes need it.
    room = np.zeros(1024, np.uint8)
    skip = -at(room) % 16
    a16 = room[skip : skip + 512].view(np.uint16).reshape(16, 16)
    b16 = room[skip + 512 : skip + 768].view(np.uint16).reshape(16, 8)
    a16[...], b16[...] = bfloat16(a), bfloat16(b)
    y = d.copy()
    planted.run("hp_product", *WARP, (at(y), at(a16), at(b16)), 0, order)
    np.testing.assert_allclose(y, d + widened(a16).astype(float) @ widened(b16).astype(float), rtol=1e-6, atol=1e-6)
    y = d.copy()
    planted.run("hp_product_early", *WARP, (at(y), at(a16), at(b16)), 0, order)
    assert np.isnan(y).all()  # a copy that was not waited for has not happened
    y = d.copy()
    planted.run("hp_product_tf32", *WARP, (at(y), at(a), at(b)), 0, order)
    a8 = a.reshape(32, 8)[:16]
    assert 0 < np.abs(y - (d + a8.astype(float) @ b[:8])).max() < 8e-3
    short = [((m.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32).astype(float) for m in (a8, b[:8])]
    np.testing.assert_allclose(y, d + short[0] @ short[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("n", [1, 37, 64, 1029])
@pytest.mark.parametrize("off", [0, 1])
def test_vector_access_at_any_size_and_address(planted, half, n, off):
    x = np.random.default_rng(4).standard_normal(n + 40).astype(np.float32)
    given = bfloat16(x) if half else x
    start = -at(given) % 16 // given.itemsize + off
    x, y = given[start : start + n], np.full(n + 40, 7, given.dtype)
    there = -at(y) % 16 // y.itemsize + off
    name = "hp_passed_h" if half else "hp_passed"
    planted.run(name, (1, 1, 1), (128, 1, 1), (at(y[there:]), at(x), n), 0, BACKWARD)
    assert (y[there : there + n] == x).all()
    assert (y[:there] == 7).all() and (y[there + n :] == 7).all()


def test_subnormals_are_flushed_while_a_kernel_runs_and_not_after(planted):
    y = np.full(1, 1e-39, np.float32)
    planted.run("hp_add", (1, 1, 1), (1, 1, 1), (at(y), 1, 0.0))
    assert y[0] == 0
    assert np.float32(1e-39) * np.float32(1) != 0


def test_arguments_are_counted_and_their_kinds_looked_at(planted):
    with pytest.raises(TypeError, match="hp_add takes the arguments plf, it was given iii"):
        planted.run("hp_add", *WARP, (0, 0, 1))
    with pytest.raises(TypeError, match="hp_add takes the arguments plf, it was given ii"):
        planted.run("hp_add", *WARP, (0, 0))


def test_what_does_not_compile_says_why_and_stops_nobody(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(build, "BUILT", tmp_path / "built")
    (tmp_path / "right.cu").write_text('extern "C" __global__ void hp_right(float *y) { y[0] = 1; }\n')
    (tmp_path / "wrong.cu").write_text('extern "C" __global__ void hp_wrong(float *y) { y[0] = nothing; }\n')
    (tmp_path / "type.cu").write_text('extern "C" __global__ void hp_type(float *y, int n) { y[n] = 1; }\n')
    with pytest.warns(UserWarning, match="does not compile") as warned:
        found = build.images(tmp_path)
    assert {stem: entries for stem, (_, entries) in found.items()} == {"right": ["hp_right"]}
    said = " ".join(str(w.message) for w in warned)
    assert "nothing" in said and "an entry takes addresses, int64_t and float" in said
    assert build.build(tmp_path / "right.cu") == build.build(tmp_path / "right.cu")
