"""Products by cuBLASLt, tried on a library and a device that pose in host memory.

Every row goes through the real code: descriptors, leading dimensions, epilogues, the capture, and comes out as numbers,
which are held against the definitions; the fake refuses what the documentation of the real library refuses. What only
the real bindings can say, whether each name and number is theirs, is asked where they are installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cuda import products_cublaslt, products_tune
from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launch, Site
from hpcpipe.backends.cuda.products import Products, forward, input_gradient, narrowed
from hpcpipe.backends.cuda.products_cublaslt import MatmulStep, Pointers, Product
from hpcpipe.backends.cuda.products_narrow import FACTORS, NarrowProducts
from hpcpipe.backends.cuda.recipes import FORMATS, RECIPES, dequantize, quantize
from hpcpipe.backends.kernels import BY_NAME, SIZES
from hpcpipe.backends.null import Call, Tensor
from hpcpipe.config import UserError
from tests.gpu.fake_libraries import DTYPES, E4M3, E5M2, FakeCublasLt, gelu, gelu_slope
from tests.gpu.host import build
from tests.gpu.host_driver import HOPPER, HostDriver
from tests.gpu.kernel_calls import HALF_STEP, LAUNCHERS, TYPES, compare, prepared, rounded
from tests.kernels.cases import CASES, Env, concrete, label, reference, shapes_of, widened

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++: kernels are compiled for the host with it")

Array = np.ndarray
OFF = {"HPCPIPE_TUNE": "off"}
WORKSPACE = 1 << 20
ROWS = ("linear_fwd", "linear_dx", "linear_dw", "linearcrossentropy_fwd")
SOME = [(name, env) for name, env in CASES if name in ROWS and env["n"] * env.get("o", env.get("v", 0)) < 300_000]


class Bench:
    """A device, the fake library, and what the two make of calls at places in one piece of memory."""

    def __init__(self, environment: Mapping[str, str] = OFF, properties: Properties = HOPPER, **options: Any) -> None:
        self.driver = HostDriver(properties)
        self.lt = FakeCublasLt(self.driver)
        self.products = Products(self.driver, self.lt, LAUNCHERS, WORKSPACE, environment=environment, **options)

    def functions(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for image, entries in build.images().values():
            found |= self.driver.load(image, entries)
        return found

    def run(self, steps: Sequence[Launch | MatmulStep]) -> None:
        """Captured, then launched; a capture refuses whatever allocates or waits."""
        functions = self.functions() if any(isinstance(step, Launch) for step in steps) else {}
        stream = self.driver.stream()
        self.driver.begin_capture(stream)
        for step in steps:
            if isinstance(step, Launch):
                self.driver.launch(functions[step.entry], step.grid, step.block, step.args, step.shared, stream)
            else:
                step.enqueue(stream)
        graph = self.driver.end_capture(stream)
        self.driver.launch_graph(graph, stream)
        self.driver.synchronize(stream)

    def place(self, values: Array) -> int:
        """Memory that holds an array, aligned as an arena's tensors are."""
        address = self.driver.allocate(max(values.nbytes, 1))
        self.driver.poke(address, np.ascontiguousarray(values).tobytes())
        return address

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> Array:
        data = self.driver.peek(address, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(data, dtype).reshape(shape).copy()


def call_of(name: str, env: Env, half: bool, ids: Mapping[str, int] | None = None) -> Call:
    row, shapes = BY_NAME[name], shapes_of(name, env)
    kinds = [concrete(a.type, "h" if half else "r") for a in row.buffers]
    tensors = [
        None if (shape := shapes[a.name]) is None else Tensor((ids or {}).get(a.name, 100 + i), shape, kind)
        for i, (a, kind) in enumerate(zip(row.buffers, kinds, strict=True))
    ]
    return Call(name, tuple(tensors), tuple(env[x] for x in row.dims + row.ints), tuple(env[r] for r in row.reals))


def site_of(bench: Bench, call: Call, values: Mapping[str, Array | None], half: bool) -> Site:
    """A call with its inputs in memory, and NaN where results and scratch will be."""
    at = {}
    for a, tensor in zip(call.row.buffers, call.buffers, strict=True):
        if tensor is None:
            at[a.name] = 0
        elif values.get(a.name) is None or a.role in ("out", "scratch"):
            at[a.name] = bench.place(np.full(SIZES[tensor.type] * math.prod(tensor.shape), 0xFF, np.uint8))
        else:
            value = values[a.name]
            at[a.name] = bench.place(rounded(value) if tensor.type == "h" else value.astype(TYPES[tensor.type]))
    work = bench.place(np.full(call.scratch(True) + 1, 0xFF, np.uint8))
    return Site(call, at, half, work, bench.driver.properties)


def results(bench: Bench, site: Site) -> dict[str, Array]:
    found = {}
    for a, tensor in zip(site.call.row.buffers, site.call.buffers, strict=True):
        if tensor is not None and a.role in ("out", "inout"):
            bits = bench.read(site.at[a.name], tensor.shape, TYPES[tensor.type])
            found[a.name] = widened(bits) if tensor.type == "h" else bits
    return found


# ---- the rows


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "env"), SOME, ids=[label(case) for case in SOME])
def test_a_row_is_what_the_definition_says(name, env, half):
    bench, rng = Bench(), np.random.default_rng(3)
    values = prepared(name, env, rng, half)
    site = site_of(bench, call_of(name, env, half), values, half)
    count, steps = bench.products.take([site])
    assert count == 1
    bench.run(steps)
    want = reference(name, env, values)
    want.pop("logits", None)
    # What sums of n terms of size one are off by, in float32.
    scale = {key: float(np.abs(value).max()) + 1 for key, value in want.items()}
    compare(name, results(bench, site), want, scale, half, label((name, env)))


def test_calls_that_are_no_products_are_not_taken():
    bench = Bench()
    env = {"n": 3, "c": 8}
    values = prepared("gelu_fwd", env, np.random.default_rng(0), True)
    assert bench.products.take([site_of(bench, call_of("gelu_fwd", env, True), values, True)]) is None


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_sums_are_float32_and_tensor_cores_round_only_where_they_may(half):
    for tf32 in (False, True):
        bench, env = Bench(tf32=tf32), {"n": 5, "o": 7, "c": 8}
        for name in ROWS[:3]:
            values = prepared(name, env, np.random.default_rng(0), half)
            bench.run(bench.products.take([site_of(bench, call_of(name, env, half), values, half)])[1])
        fast = products_cublaslt.COMPUTE_32F_FAST_TF32
        plain = products_cublaslt.COMPUTE_32F
        assert {c["compute"] for c in bench.lt.calls} == {fast if tf32 and not half else plain}
        assert bench.lt.calls[-1]["D"]["type"] == products_cublaslt.TYPES["r"]  # dw


def test_what_the_library_refuses_is_left_to_our_kernels():
    bench = Bench()
    bench.lt.refuse = lambda problem: problem["beta" if "beta" in problem else "k"] == 37
    env = {"n": 5, "o": 7, "c": 37}
    for name, taken in (("linear_fwd", False), ("linear_dx", True)):  # the depth is c, then o
        values = prepared(name, env, np.random.default_rng(0), True)
        assert (bench.products.take([site_of(bench, call_of(name, env, True), values, True)]) is not None) == taken
    assert [line for line in bench.products.chosen() if "refuses" in line and "7,5,37" in line]


def test_a_loss_is_done_whole_or_not_at_all():
    bench, env = Bench(), {"n": 33, "v": 65, "c": 16, "r": 20, "scale": 0.5, "on": 1}
    bench.lt.refuse = lambda problem: problem["D"]["type"] == 0 and problem["k"] == 13  # dw of the last block
    values = prepared("linearcrossentropy_fwd", env, np.random.default_rng(0), True)
    assert bench.products.take([site_of(bench, call_of("linearcrossentropy_fwd", env, True), values, True)]) is None


def test_equal_products_share_a_plan_wherever_they_are():
    bench, env = Bench(), {"n": 5, "o": 8, "c": 8}
    values = [prepared("linear_fwd", env, np.random.default_rng(seed), True) for seed in range(3)]
    sites = [site_of(bench, call_of("linear_fwd", env, True), v, True) for v in values]
    steps = [bench.products.take([site])[1][0] for site in sites]
    assert len({id(step.plan) for step in steps}) == 1 and bench.lt.heuristics == 1
    bench.run(steps)
    for site, given in zip(sites, values, strict=True):
        want = reference("linear_fwd", env, given)["y"]
        np.testing.assert_allclose(results(bench, site)["y"], want, rtol=HALF_STEP, atol=1e-5)


def test_addresses_that_are_less_aligned_are_another_product():
    bench = Bench()
    x, w, y = (bench.place(np.ones(64, np.float32)) for _ in range(3))
    product = forward(2, 3, 4, "r")
    first, second = (bench.products.product(product, Pointers(w, x + off, y)) for off in (0, 4))
    assert (first.plan.product.align, second.plan.product.align) == ((16, 16, 16), (16, 4, 16))
    with pytest.raises(ValueError, match="aligned"):
        MatmulStep(bench.products.library, first.plan, Pointers(w, x + 4, y))
    assert {o["MIN_ALIGNMENT_B_BYTES"] for o in bench.lt.wishes} == {16, 4}


def test_everything_is_given_back():
    bench, env = Bench(), {"n": 5, "o": 7, "c": 8}
    used = bench.driver.memory.used
    for name in ROWS[:3]:
        values = prepared(name, env, np.random.default_rng(0), True)
        bench.products.take([site_of(bench, call_of(name, env, True), values, True)])
    kept = bench.driver.memory.used - used
    bench.products.close()
    assert bench.lt.objects == {}
    assert bench.driver.memory.used == used + kept - WORKSPACE


# ---- pairs


def pair(bench: Bench, env: Env, backward: bool, half: bool = True) -> tuple[list[Site], dict[str, Array]]:
    """linear_fwd and the gelu_fwd of its y, or linear_dx and the gelu_dx of its dx; and the numbers in them."""
    names = ("linear_dx", "gelu_dx") if backward else ("linear_fwd", "gelu_fwd")
    made, given = ("dx", "dy") if backward else ("y", "x")
    rng = np.random.default_rng(5)
    inner = {"n": env["n"], "c": env["c" if backward else "o"]}
    values = {name: prepared(name, e, rng, half) for name, e in zip(names, (env, inner), strict=True)}
    first = site_of(bench, call_of(names[0], env, half, {made: 1}), values[names[0]], half)
    second = site_of(bench, call_of(names[1], inner, half, {given: 1}), values[names[1]], half)
    return [first, second._replace(at={**second.at, given: first.at[made]})], {**values[names[1]], **values[names[0]]}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 8, 3), (33, 64, 40), (5, 24, 7)])
def test_a_product_and_the_gelu_of_it_are_one(size, bias):
    bench = Bench()
    env = {**dict(zip("noc", size, strict=True)), "bias": bias}
    sites, values = pair(bench, env, backward=False)
    count, steps = bench.products.take(sites)
    assert (count, len(steps)) == (2, 1)
    bench.run(steps)
    u = reference("linear_fwd", env, values)["y"]
    atol = HALF_STEP * np.abs(u).max()
    np.testing.assert_allclose(results(bench, sites[0])["y"], u, rtol=HALF_STEP, atol=atol / 100)
    np.testing.assert_allclose(results(bench, sites[1])["y"], gelu(u), rtol=HALF_STEP, atol=atol / 100)
    assert [c["epilogue"] for c in bench.lt.calls] == ["GELU_AUX_BIAS" if bias else "GELU_AUX"]


@pytest.mark.parametrize("size", [(1, 3, 8), (33, 40, 64), (5, 7, 24)])
def test_a_gradient_through_a_gelu_is_one(size):
    bench = Bench(temporary=lambda tensor: tensor.id == 1)
    env = dict(zip("noc", size, strict=True))
    sites, values = pair(bench, env, backward=True)
    count, steps = bench.products.take(sites)
    assert count == 2
    bench.run(steps)
    da, u = reference("linear_dx", env, values)["dx"], values["x"].astype(np.float64)
    found, want = results(bench, sites[1]), da * gelu_slope(u)
    np.testing.assert_allclose(found["dx"], want, rtol=HALF_STEP, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(found["y"], gelu(u), rtol=HALF_STEP, atol=1e-5)
    assert np.isnan(results(bench, sites[0])["dx"]).all()  # nobody reads it, nobody wrote it


@pytest.mark.parametrize(
    ("env", "backward", "options"),
    [
        ({"n": 4, "o": 12, "c": 3}, False, {}),  # what is beside the result lies in eights
        ({"n": 4, "o": 8, "c": 3, "around": True}, False, {}),  # a sum that the activation is not of alone
        ({"n": 4, "o": 8, "c": 3}, False, {"fuse": False}),
        ({"n": 4, "o": 3, "c": 8}, True, {}),  # somebody else may read dx
        ({"n": 4, "o": 3, "c": 12}, True, {"temporary": lambda tensor: True}),
    ],
)
def test_some_pairs_stay_two(env, backward, options):
    bench = Bench(**options)
    sites, _ = pair(bench, env, backward)
    count, steps = bench.products.take(sites)
    assert (count, len(steps)) == (1, 1)


def test_float32_pairs_stay_two_and_so_does_an_activation_of_something_else():
    bench, env = Bench(), {"n": 4, "o": 8, "c": 3}
    sites, _ = pair(bench, env, backward=False, half=False)
    assert bench.products.take(sites)[0] == 1
    sites, _ = pair(bench, env, backward=False)
    x = sites[1].call.buffers[1]._replace(id=77)
    other = sites[1]._replace(call=sites[1].call._replace(buffers=(sites[1].call.buffers[0], x)))
    assert bench.products.take([sites[0], other])[0] == 1


def test_a_pair_that_the_library_refuses_is_two_calls():
    bench = Bench()
    bench.lt.refuse = lambda problem: "GELU" in problem["epilogue"]
    sites, _ = pair(bench, {"n": 4, "o": 8, "c": 3}, backward=False)
    count, steps = bench.products.take(sites)
    assert (count, steps[0].plan.product.epilogue) == (1, "BIAS")


# ---- narrow types


@pytest.mark.parametrize(("left", "right"), [("e4m3", "e4m3"), ("e4m3", "e5m2"), ("e5m2", "e4m3")])
@pytest.mark.parametrize("result", ["h", "r"])
@pytest.mark.parametrize("device_alpha", [False, True])
def test_fp8_with_scales_of_whole_tensors(left, right, result, device_alpha):
    bench, rng = Bench(), np.random.default_rng(2)
    m, n, k = 32, 48, 64
    a = rng.standard_normal((m, k)).astype(DTYPES[products_cublaslt.TYPES[left]])
    b = rng.standard_normal((n, k)).astype(DTYPES[products_cublaslt.TYPES[right]])
    c = rng.standard_normal((n, m)).astype(np.float32)
    product = Product("tn", m, n, k, (k, k, m), (left, right, result), beta=int(result == "r"))
    product = product._replace(scales=("SCALAR_32F", "SCALAR_32F"), device_alpha=device_alpha)
    d = bench.place(c)
    scales = [bench.place(np.array([s], np.float32)) for s in (0.25, 3.0, 2.0)]
    at = Pointers(bench.place(a), bench.place(b), d, a_scale=scales[0], b_scale=scales[1])
    if device_alpha:
        at = at._replace(alpha=scales[2])
    bench.run([bench.products.product(product, at)])
    want = (b.astype(np.float64) @ a.astype(np.float64).T) * 0.75 * (2 if device_alpha else 1)
    if result == "r":
        np.testing.assert_allclose(bench.read(d, (n, m), np.float32), want + c, rtol=1e-5, atol=1e-5)
    else:
        found = widened(bench.read(d, (n, m), np.uint16))
        np.testing.assert_allclose(found, want, rtol=HALF_STEP, atol=1e-6)


@pytest.mark.parametrize(
    "product",
    [
        Product("nn", 32, 48, 64, (32, 64, 32), ("e4m3", "e4m3", "h"), scales=("SCALAR_32F", "SCALAR_32F")),
        Product("tn", 32, 48, 24, (24, 24, 32), ("e4m3", "e4m3", "h"), scales=("SCALAR_32F", "SCALAR_32F")),
        Product("tn", 32, 48, 64, (64, 64, 32), ("e5m2", "e5m2", "h"), scales=("SCALAR_32F", "SCALAR_32F")),
        Product("tn", 32, 48, 64, (64, 64, 32), ("e4m3", "e4m3", "h")),
        Product("tn", 32, 48, 64, (64, 64, 32), ("h", "h", "h"), scales=("SCALAR_32F", "SCALAR_32F")),
        Product("tn", 32, 48, 64, (64, 64, 32), ("h", "r", "r")),
    ],
    ids=["not along the depth", "depth of 24", "e5m2 twice", "no scales", "scales of bfloat16", "types that differ"],
)
def test_what_has_no_product_is_refused(product):
    bench = Bench()
    at = Pointers(*(bench.place(np.zeros(1 << 14, np.uint8)) for _ in range(3)))
    if product.scales[0]:
        at = at._replace(a_scale=bench.place(np.ones(1, np.float32)), b_scale=bench.place(np.ones(1, np.float32)))
    assert bench.products.product(product, at) is None


def copies(bench: Bench, site: Site, product: Product, at: Pointers) -> tuple[list[Launch], Product, Pointers]:
    """Narrow copies of a call's operands, made here and now, transposed where a product needs that."""
    names = {"linear_fwd": ("w", "x"), "linear_dx": ("w", "dy"), "linear_dw": ("x", "dy")}[site.call.kernel]
    shapes = {a.name: t.shape for a, t in zip(site.call.row.buffers, site.call.buffers, strict=True) if t is not None}
    types = tuple("e5m2" if name == "dy" else "e4m3" for name in names)
    places = []
    for name, type, op, across in zip(names, types, product.ops, "tn", strict=True):
        wide = widened(bench.read(site.at[name], shapes[name], np.uint16)) * 8
        narrow = wide.astype(DTYPES[products_cublaslt.TYPES[type]])
        places.append(bench.place(narrow if op == across else narrow.T.copy()))
    scale = bench.place(np.array([1 / 8], np.float32))
    small = narrowed(product, types, ("SCALAR_32F", "SCALAR_32F"))
    return [], small, at._replace(a=places[0], b=places[1], a_scale=scale, b_scale=scale)


@pytest.mark.parametrize("name", ROWS[:3])
@pytest.mark.parametrize("size", [(16, 32, 48), (48, 16, 32), (5, 32, 48)])
def test_linear_rows_by_way_of_fp8(name, size):
    bench = Bench()
    bench.products.narrow = lambda site, product, at: copies(bench, site, product, at)
    env = dict(zip("noc", size, strict=True))
    values = prepared(name, env, np.random.default_rng(0), True)
    site = site_of(bench, call_of(name, env, True), values, True)
    steps = bench.products.take([site])[1]
    bench.run(steps)
    narrow = bench.lt.calls[0]["A"]["type"] == E4M3
    assert narrow == (size[0] % 16 == 0)  # 5 tokens are no product in FP8, and stay in bfloat16
    want, found = reference(name, env, values), results(bench, site)
    for key, value in want.items():
        off = np.abs(found[key] - value).max() / np.abs(value).max()
        assert off < (0.1 if narrow and key != "db" else 0.01)
        if narrow and key != "db":
            assert off > 0.005  # it is not the wide product


@pytest.mark.parametrize("name", ROWS[:3])
@pytest.mark.parametrize("recipe", ["fp8", "fp8_block", "mxfp8"])
@pytest.mark.parametrize("size", [(32, 64, 96), (192, 160, 288)])
def test_linear_rows_by_recipes(name, recipe, size):
    """Against the definition of the numbers: what is multiplied is, to the bit, what recipes.py says."""
    bench, env = Bench(), dict(zip("noc", size, strict=True))
    made = NarrowProducts(bench.driver, RECIPES[recipe])
    bench.products.narrow = made
    values = prepared(name, env, np.random.default_rng(0), True)
    site = site_of(bench, call_of(name, env, True), values, True)
    bench.run(bench.products.take([site])[1])
    assert bench.lt.calls[0]["A"]["type"] == E4M3
    given = dict(values)
    for (key, across), operand in zip(FACTORS[name], made._operands(name), strict=True):
        format = FORMATS[operand.format]
        x = values[key].T if across else values[key]
        read = dequantize(quantize(x, format, operand.granularity), format, operand.granularity)
        given[key] = read.T if across else read
    found = results(bench, site)
    for key, want in reference(name, env, given).items():
        want = reference(name, env, values)[key] if key == "db" else want
        rtol = 1e-5 if name == "linear_dw" else HALF_STEP
        np.testing.assert_allclose(found[key], want, rtol=rtol, atol=1e-5 * np.abs(want).max(), err_msg=key)
    used = bench.driver.memory.used
    made.close()
    assert bench.driver.memory.used < used


def test_narrow_copies_share_their_memory_and_some_products_stay_wide():
    bench = Bench()
    made = NarrowProducts(bench.driver, RECIPES["fp8"], stays=lambda site: site.size["o"] == 48)
    bench.products.narrow = made
    for o, narrow in ((32, True), (40, False), (48, False), (64, True), (32, True)):
        env = {"n": 16, "o": o, "c": 16}
        values = prepared("linear_fwd", env, np.random.default_rng(0), True)
        site = site_of(bench, call_of("linear_fwd", env, True), values, True)
        steps = bench.products.take([site])[1]
        assert (len(steps) > 1) == narrow
        assert (steps[-1].plan.product.types[0] == "e4m3") == narrow
    assert len(made._rooms) == 2
    values = prepared("linear_fwd", env, np.random.default_rng(0), False)
    assert len(bench.products.take([site_of(bench, call_of("linear_fwd", env, False), values, False)])[1]) == 1


def test_a_recipe_without_kernels_is_refused():
    with pytest.raises(UserError, match=r"nvfp4 need .* no kernels"):
        NarrowProducts(HostDriver(), RECIPES["nvfp4"])


def test_the_fake_knows_the_narrow_types():
    assert (products_cublaslt.TYPES["e4m3"], products_cublaslt.TYPES["e5m2"]) == (E4M3, E5M2)


# ---- tuning


def tuned(tmp_path: Any, slow: Mapping[int, int], **options: Any) -> tuple[Bench, MatmulStep]:
    """A bench that times, and a step of it; ``slow`` are the algorithms that take longer, by how much."""
    bench = Bench({"XDG_CACHE_HOME": str(tmp_path)}, **options)
    bench.lt.algorithms = [(1, 0, 0), (4, 2, 4096), (4, 1, 64), (1, 0, 1 << 40), (2, 4, 64), (1, 0, 128)]
    bench.lt.slow = dict(slow)
    return bench, step_of(bench)


def step_of(bench: Bench, n: int = 6) -> MatmulStep:
    x, w, y = (bench.place(np.ones(400, np.float32)) for _ in range(3))
    return bench.products.product(forward(n, 3, 4, "r"), Pointers(w, x, y))


def number(step: MatmulStep) -> int:
    return int(np.frombuffer(step.plan.choice.algorithm, np.uint64)[1])


def cache_file(tmp_path: Any) -> Any:
    (path,) = (tmp_path / "hpcpipe").iterdir()
    return path


@pytest.mark.parametrize(("slow", "fastest"), [({1: 40, 5: 40}, 0), ({0: 40, 5: 40}, 1), ({0: 40, 1: 40}, 5)])
def test_the_fastest_of_those_whose_bits_never_change_is_kept(tmp_path, slow, fastest):
    bench, step = tuned(tmp_path, slow)  # 2 adds pieces in the result, 3 has no room, 4 rounds pieces
    assert number(step) == fastest
    assert {c["algorithm"] for c in bench.lt.calls} == {0, 1, 5}
    rooms = {c["workspace"] for c in bench.lt.calls}  # products of another stream may be at work in the one of these
    bench.run([step])
    assert bench.lt.calls[-1]["algorithm"] == fastest
    assert bench.lt.calls[-1]["workspace"] not in rooms


def test_scratch_of_the_timing_is_given_back(tmp_path):
    bench = Bench({"XDG_CACHE_HOME": str(tmp_path)})
    before = bench.driver.memory.used
    for product in (forward(6, 3, 4, "r"), input_gradient(6, 3, 8, "h")._replace(epilogue="DGELU")):
        held = [bench.place(np.ones(400, np.float32)) for _ in range(4)]
        bench.products.product(product, Pointers(*held[:3], aux=held[3] if product.epilogue == "DGELU" else 0))
        for address in held:
            bench.driver.release(address)
    bench.driver.drain()
    assert bench.products.tuner.timed == 2
    assert bench.driver.memory.used == before


def test_without_room_for_scratch_the_first_proposal_stays(tmp_path):
    bench = Bench({"XDG_CACHE_HOME": str(tmp_path)})
    at = Pointers(*(bench.place(np.ones(400, np.float32)) for _ in range(3)))
    bench.driver.memory.limit = bench.driver.memory.used
    step = bench.products.product(forward(6, 3, 4, "r"), at)
    assert (number(step), bench.products.tuner.timed) == (0, 0)


def test_tuning_can_be_left_out(tmp_path):
    bench = Bench({"XDG_CACHE_HOME": str(tmp_path), "HPCPIPE_TUNE": "off"})
    bench.lt.slow = {0: 40}
    assert number(step_of(bench)) == 0
    assert bench.lt.calls == [] and not (tmp_path / "hpcpipe").exists()
    with pytest.raises(UserError, match="HPCPIPE_TUNE"):
        Bench({"HPCPIPE_TUNE": "quickly"})


def test_a_later_run_finds_what_an_earlier_one_measured(tmp_path):
    tuned(tmp_path, {0: 40, 5: 40})
    bench, step = tuned(tmp_path, {1: 40})  # measured again, it would be another one
    assert number(step) == 1 and bench.products.tuner.timed == 0 and bench.lt.heuristics == 0
    assert number(step_of(bench, 7)) in (0, 5)  # another product is measured, and goes into the same file
    assert len(json.loads(cache_file(tmp_path).read_text())["choices"]) == 2
    assert [f.suffix for f in (tmp_path / "hpcpipe").iterdir()] == [".json"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: text.replace('"multiprocessors": 4', '"multiprocessors": 5'),
        lambda text: text.replace('"algorithm": "60', '"algorithm": "xx'),
        lambda text: text.replace('"algorithm": "60', '"algorithm": "'),
        lambda text: text.replace('"algorithm": "60', '"algorithm": "61'),  # not an algorithm of this library
        lambda text: text.replace('"workspace": 4096', '"workspace": 64'),  # less than it takes
    ],
    ids=[
        "half a file",
        "empty",
        "no table",
        "another device",
        "no bytes",
        "too few bytes",
        "unknown",
        "small workspace",
    ],
)
def test_a_file_that_is_not_to_be_trusted_is_as_good_as_none(tmp_path, spoil):
    tuned(tmp_path, {0: 40, 5: 40})
    path = cache_file(tmp_path)
    text = path.read_text()
    assert spoil(text) != text
    path.write_text(spoil(text))
    bench, step = tuned(tmp_path, {1: 40, 5: 40})
    assert (number(step), bench.products.tuner.timed) == (0, 1)
    assert number(tuned(tmp_path, {})[1]) == 0  # and the file is whole again


def test_devices_drivers_and_libraries_have_files_of_their_own(tmp_path):
    paths = set()
    for version, properties in (
        (130100, HOPPER),
        (130200, HOPPER),
        (130100, HOPPER._replace(name="another")),
        (130100, HOPPER._replace(driver=12090)),
    ):
        driver = HostDriver(properties)
        library = SimpleNamespace(driver=driver, version=version)
        paths.add(products_tune.Tuner(library, properties, {"XDG_CACHE_HOME": str(tmp_path)}).path)
    assert len(paths) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    _, step = tuned(tmp_path / "file", {0: 40, 5: 40})
    assert number(step) == 1


def test_ranks_run_what_one_of_them_chose(tmp_path):
    first, step = tuned(tmp_path / "a", {0: 40, 5: 40})
    other, theirs = tuned(tmp_path / "b", {1: 40, 5: 40})
    assert (number(step), number(theirs)) == (1, 0)
    table = json.loads(json.dumps(first.products.table()))
    other.products.adopt(table)
    assert number(theirs) == 1  # a plan that was there
    third = Bench({"XDG_CACHE_HOME": str(tmp_path / "c")})
    third.lt.algorithms = first.lt.algorithms
    third.products.adopt(table)
    assert number(step_of(third)) == 1 and third.lt.calls == []  # and one that comes later, unmeasured


def test_a_product_that_one_rank_is_refused_is_refused_to_all(tmp_path):
    first = Bench()
    first.lt.refuse = lambda problem: True
    assert step_of(first) is None
    other = Bench()
    other.products.adopt(first.products.table())
    assert step_of(other) is None


def test_choices_of_another_device_are_not_taken(tmp_path):
    first, _ = tuned(tmp_path / "a", {0: 40, 5: 40})
    other = Bench({"XDG_CACHE_HOME": str(tmp_path / "b")}, properties=HOPPER._replace(name="another"))
    other.lt.algorithms, other.lt.slow = first.lt.algorithms, {1: 40, 5: 40}
    both = {**first.products.table(), **other.products.table()}
    other.products.adopt(both)
    assert number(step_of(other)) == 0 and len(first.products.table().keys() | other.products.table().keys()) == 2


def test_choices_that_do_not_run_here_are_refused(tmp_path):
    first, _ = tuned(tmp_path, {0: 40, 5: 40})
    table = first.products.table()
    smaller = Bench()
    smaller.lt.refuse = lambda problem: True
    smaller.products.adopt(table)
    with pytest.raises(UserError, match="does not run here"):
        step_of(smaller)
    with pytest.raises(UserError, match="refuses the product tn 3,6,4"):
        first.products.adopt(dict.fromkeys(table))


def test_ranks_with_different_products_have_one_table(tmp_path):
    first, step = tuned(tmp_path / "a", {0: 40, 5: 40})
    other, theirs = tuned(tmp_path / "b", {1: 40, 5: 40})
    alone = step_of(other, 7)
    merged = {**other.products.table(), **first.products.table()}
    for bench in (first, other):
        bench.products.adopt(merged)
    assert (number(step), number(theirs), number(alone)) == (1, 1, 0)


def test_the_banner_says_what_was_chosen(tmp_path):
    bench, _ = tuned(tmp_path, {})
    assert bench.products.chosen() == ["products: cuBLASLt 130100, 1 shapes, 1 timed in this run"]
    bench = Bench()
    step_of(bench)
    assert bench.products.chosen() == ["products: cuBLASLt 130100, 1 shapes, the first proposal for each"]


def test_a_product_that_fails_after_all_says_so():
    bench = Bench()
    step = step_of(bench)
    bench.lt.refuse = lambda problem: True
    with pytest.raises(UserError, match="refused the product tn 3,6,4"):
        step.enqueue(bench.driver.stream())


@pytest.mark.parametrize("type", ["r", "h", "e4m3", "e5m2"])
def test_noise_is_made_of_finite_numbers(type):
    values = products_tune.noise(type, 4096).view(DTYPES[products_cublaslt.TYPES[type]]).astype(np.float32)
    assert np.isfinite(values).all() and len(np.unique(values)) > 100


# ---- the real bindings


def test_names_and_numbers_are_those_of_the_real_bindings():
    lt = pytest.importorskip("nvmath.bindings.cublasLt", reason="nvmath-python is not installed: names are not checked")
    import nvmath
    from nvmath.bindings import cublas

    for enum in ("MatmulDescAttribute", "MatmulPreferenceAttribute", "Epilogue", "MatmulAlgoConfigAttribute",
                 "ReductionScheme", "MatmulMatrixScale", "PointerMode"):  # fmt: skip
        real, fake = getattr(lt, enum), getattr(FakeCublasLt, enum)
        assert {m.name: int(m) for m in fake} == {m.name: int(real[m.name]) for m in fake}, enum
    for table, dtype in ((products_cublaslt.ATTRIBUTES, lt.get_matmul_desc_attribute_dtype),
                         (products_cublaslt.PREFERENCES, lt.get_matmul_preference_attribute_dtype)):  # fmt: skip
        enum = lt.MatmulDescAttribute if table is products_cublaslt.ATTRIBUTES else lt.MatmulPreferenceAttribute
        assert {name: np.dtype(dtype(enum[name])).name for name in table} == table
    names = {
        "r": "CUDA_R_32F",
        "h": "CUDA_R_16BF",
        "e4m3": "CUDA_R_8F_E4M3",
        "e5m2": "CUDA_R_8F_E5M2",
        "e2m1": "CUDA_R_4F_E2M1",
    }
    assert {key: int(nvmath.CudaDataType[name]) for key, name in names.items()} == products_cublaslt.TYPES
    assert int(cublas.ComputeType.COMPUTE_32F) == products_cublaslt.COMPUTE_32F
    assert int(cublas.ComputeType.COMPUTE_32F_FAST_TF32) == products_cublaslt.COMPUTE_32F_FAST_TF32
    assert {"n": int(cublas.Operation.N), "t": int(cublas.Operation.T)} == products_cublaslt.OPERATIONS
    assert lt.matmul_heuristic_result_dtype.itemsize == products_cublaslt.RESULT.itemsize
    for field in ("algo", "workspace_size", "state"):
        assert lt.matmul_heuristic_result_dtype.fields[field][1] == products_cublaslt.RESULT.fields[field][1]
    verbs = [name for name in vars(FakeCublasLt) if name.startswith(("matmul", "matrix", "create", "destroy", "get_"))]
    assert len(verbs) > 12 and all(callable(getattr(lt, name)) for name in verbs)
