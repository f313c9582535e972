"""Launches of our own products and attention: what fits a device, and what a choice of tiles may not change."""

from __future__ import annotations

import re

import numpy as np
import pytest

from hpcpipe.backends.cuda import launches_elementwise as elementwise
from hpcpipe.backends.cuda import launches_products as launches
from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launches_products import Shape, attention_form, product
from hpcpipe.backends.kernels import BY_NAME, evaluate
from hpcpipe.config import UserError
from tests.gpu.host import build

SMALLEST = 99 * 1024  # shared memory of a block on sm_86 and sm_89
DEVICE = Properties("host", (9, 0), 132, 1 << 34, 1 << 34, 227 * 1024, 13000, "")
ONE = DEVICE._replace(multiprocessors=1)  # always takes the large tile

needs_compiler = pytest.mark.skipif(
    build.compiler() is None, reason="no g++ on the PATH: kernels cannot run on the host"
)


def constants(name: str) -> dict[str, int]:
    """What the enums of a source say."""
    text = (build.SOURCES / f"{name}.cu").read_text()
    return {key: int(value) for key, value in re.findall(r"\b([A-Z]+) = (\d+)\b", text)}


def test_both_sides_count_alike() -> None:
    found = constants("linear")
    assert (found["THREADS"], found["SLAB"]) == (launches.THREADS, launches.SLAB)
    assert (found["STAGES"], found["SPAN"]) == (launches.STAGES, launches.SPAN)
    found = constants("attention")
    assert (found["THREADS"], found["PAD"]) == (launches.THREADS, launches.PAD)
    assert (32 * found["WARPS"], 16 * found["WARPS"]) == (launches.TENSOR_THREADS, launches.TENSOR_ROWS)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("passing", ["fwd", "dx_queries", "dx_keys"])
def test_every_head_width_has_a_kernel_that_fits(passing: launches.Step, half: bool) -> None:
    source = (build.SOURCES / "attention.cu").read_text()
    for d in range(1, 257):
        form = attention_form(passing, d, half)
        assert form.shared <= SMALLEST and f" {form.entry}(" in source
        assert ("tensor" in form.entry) == (half and d % 8 == 0 and d <= 128)
        assert form.entry.endswith("_h") == half
        width = int(re.findall(r"_(\d+)", form.entry)[0])
        assert d <= width and (width == 64 or d > width // 2)
    with pytest.raises(UserError, match="at most 256 channels, this model's have 257"):
        attention_form(passing, 257, half)


def test_the_scratch_that_the_table_prices_is_what_the_launches_use() -> None:
    for n, o in ((1, 7), (256, 5), (257, 64), (5000, 3)):
        slabs = launches.ceil(n, launches.SLAB)
        assert evaluate(BY_NAME["linear_dw"].device, {"n": n, "o": o, "c": 1}) == 4 * o * slabs
        assert launches.bias_gradient(0, 0, n, o, False, 0)[0].grid[1] == slabs
        for name, sums in (("layernorm_dw", 2), ("rmsnorm_dw", 1)):
            blocks = norm_blocks(n)
            assert evaluate(BY_NAME[name].device, {"n": n, "c": o}) >= 4 * sums * blocks * o
    for n in (1, 16384, 16385, 10**6, 10**9):
        assert evaluate(BY_NAME["sumsq"].device, {"n": n}) >= 8 * squares_blocks(n)


def norm_blocks(n: int) -> int:
    return elementwise.ceil_div(n, max(elementwise.SUM_ROWS, elementwise.ceil_div(n, elementwise.SUM_BLOCKS)))


def squares_blocks(n: int) -> int:
    step = elementwise.SQUARES_STEP
    least = elementwise.ceil_div(elementwise.ceil_div(n, elementwise.SQUARES_BLOCKS), step) * step
    return elementwise.ceil_div(n, max(elementwise.SQUARES_LEAST, least))


def test_a_small_product_is_cut_into_more_tiles() -> None:
    few = product("fwd", (0, 0, 0, 0, 0), Shape(512, 768, 64), True, DEVICE)
    many = product("fwd", (0, 0, 0, 0, 0), Shape(8192, 3072, 64), True, DEVICE)
    assert few.entry == "hp_linear_fwd_small_h" and few.grid == (8, 12, 1)
    assert many.entry == "hp_linear_fwd_h" and many.grid == (64, 24, 1)
    assert few.shared * 2 == many.shared == 48 * 1024
    turned = product("dw", (0, 0, 0), Shape(7, 130, 300), False, ONE)
    assert turned.grid == (2, 3, 1) and turned.shared == 0 and turned.args[-3:] == (7, 130, 300)


@needs_compiler
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", ["fwd", "dx", "dw"])
@pytest.mark.parametrize("size", [(150, 72, 136), (37, 131, 65)])
def test_the_tile_changes_no_bit(kind: launches.Pass, size: tuple[int, int, int], half: bool) -> None:
    library = build.library(build.build(build.SOURCES / "linear.cu"))
    (n, o, c), rng = size, np.random.default_rng(5)
    rows, columns = {"fwd": (n, o), "dx": (n, c), "dw": (o, c)}[kind]
    shapes = {"fwd": [(n, c), (o, c), (o,), (n, o)], "dx": [(n, o), (o, c)], "dw": [(n, o), (n, c)]}[kind]
    given = [aligned(rng.standard_normal(shape).astype(np.float32), half) for shape in shapes]
    found = []
    for device in (DEVICE, ONE):
        result = aligned(np.ones((rows, columns), np.float32), half and kind != "dw")
        launch = product(kind, [a.ctypes.data for a in (result, *given)], Shape(n, o, c), half, device)
        library.run(launch.entry, launch.grid, launch.block, launch.args, launch.shared, 11)
        found.append((launch.entry, result.tobytes()))
    (small, first), (large, second) = found
    assert "small" in small and "small" not in large
    assert first == second and len(set(first)) > 100


@needs_compiler
@pytest.mark.parametrize("half", [False, True])
def test_what_comes_later_changes_no_bit_of_what_was(half: bool) -> None:
    t, h, k, d = 150, 2, 1, 64
    library = build.library(build.build(build.SOURCES / "attention.cu"))
    rng = np.random.default_rng(6)
    one = rng.standard_normal((t, (h + 2 * k) * d)).astype(np.float32)
    other = one.copy()
    other[100:] = rng.standard_normal((t - 100, (h + 2 * k) * d)) * 3
    qkv = aligned(np.concatenate([one, other, one]), half)
    y, lse = aligned(np.zeros((3 * t, h * d), np.float32), half), aligned(np.zeros((3 * t, h), np.float32), False)
    form = attention_form("fwd", d, half)
    args = (y.ctypes.data, lse.ctypes.data, qkv.ctypes.data, t, h, k, d)
    library.run(form.entry, (3 * h, -(-t // form.rows), 1), (form.threads, 1, 1), args, form.shared)
    for result in (y, lse):
        assert result[:100].tobytes() == result[t : t + 100].tobytes()
        assert result[100:t].tobytes() != result[t + 100 : 2 * t].tobytes()
        assert result[:t].tobytes() == result[2 * t :].tobytes()


def aligned(values: np.ndarray, half: bool) -> np.ndarray:
    """A copy at an address of 64 bytes; the upper halves of the numbers where these are asked for."""
    if half:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    room = np.empty(values.nbytes + 64, np.uint8)
    copy = room[-room.ctypes.data % 64 :][: values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy
