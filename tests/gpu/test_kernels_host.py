"""The kernels of native/cuda against the definitions, without a GPU: compiled for the host, run in several orders.

Every row that has a launcher is tried on the case table, in both compute types: values, the borders of every buffer and
of the scratch, and the same bits in whatever order threads and blocks run. The table's largest cases take long where a
fiber is a thread; others of their kind stand for them (LONG).
"""

from __future__ import annotations

import importlib
import math
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends.cuda import launches_elementwise
from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launcher, Site
from hpcpipe.backends.kernels import BY_NAME, SIZES, TABLE
from hpcpipe.backends.null import Call, Tensor
from tests.gpu.host import build
from tests.kernels.cases import CASES, Env, concrete, inputs_of, label, reference, shapes_of, widened
from tests.kernels.test_native import TOLERANCE, sizes

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no g++: kernels of native/cuda cannot be tried without a GPU"
)

Array = np.ndarray
# Few multiprocessors, so that blocks go round more than once.
DEVICE = Properties("host", (9, 0), 1, 1 << 33, 1 << 33, 232448, 13000, "0000:00:00.0")
TYPES = {"r": np.float32, "h": np.uint16, "i": np.int32, "l": np.int64, "d": np.float64}
CANARY, BEHIND, PATTERN = 64, 1 << 20, 0xA5  # bytes around buffers; behind the scratch, which is the last
HALF_STEP = 2.0**-8  # of a bfloat16, relative to the number it rounds
# Rows that round to bfloat16 on the way, too (P and dS; logits and their gradient): relative to the largest element.
ROUGH = {"attention_fwd": 2.0**-6, "attention_dx": 2.0**-5, "linearcrossentropy_fwd": 2.0**-5}
# What a fiber for a thread makes long, in operations on tiles of TILE; and what stands for the cases beyond.
LONG, TILE = 3e7, 64
STANDINS: dict[str, list[Env]] = {
    "linear": [
        {"n": 260, "o": 140, "c": 72},
        {"n": 65, "o": 600, "c": 70, "around": True},
        {"n": 70, "o": 300, "c": 130, "bias": False, "around": True},
    ],
    "attention": [
        {"n": 6, "t": 1, "h": 3, "k": 3, "d": 7},
        {"n": 100, "t": 100, "h": 2, "k": 1, "d": 33},
        {"n": 140, "t": 70, "h": 4, "k": 1, "d": 16},
        {"n": 130, "t": 130, "h": 2, "k": 2, "d": 64},
        {"n": 70, "t": 70, "h": 2, "k": 1, "d": 128},
        {"n": 33, "t": 33, "h": 1, "k": 1, "d": 200},
    ],
    "linearcrossentropy": [{"n": 130, "v": 300, "c": 40, "r": 64, "scale": 0.125, "on": on} for on in (0, 1)]
    + [{"n": 5, "v": 1001, "c": 9, "r": 4, "scale": 0.125, "on": 1}],
}
# Rows longer than what a thread holds of them, odd ones too; tokens that come again behind a chunk of ids.
MORE: list[tuple[str, Env]] = [
    *(
        (name, {"n": 3, "c": c, "eps": 1e-5, "around": True})
        for name in ("layernorm_fwd", "layernorm_dx", "rmsnorm_fwd", "rmsnorm_dx")
        for c in (9001, 20000, 33000)
    ),
    ("layernorm_dw", {"n": 5000, "c": 5}),
    ("rmsnorm_dw", {"n": 5000, "c": 9}),
    ("embedding_dw", {"n": 2500, "v": 3, "c": 5}),
    ("embedding_dw", {"n": 40, "v": 3, "c": 1100}),
    ("position_dw", {"n": 3000, "s": 3, "c": 5, "t": 3}),
]


def launchers() -> dict[str, Launcher]:
    """Row -> launcher, of all modules of launchers that are there."""
    found = dict(launches_elementwise.LAUNCHERS)
    try:
        products: Any = importlib.import_module("hpcpipe.backends.cuda.launches_products")
    except ModuleNotFoundError:
        return found
    return found | products.LAUNCHERS


LAUNCHERS = launchers()


def cases() -> list[tuple[str, Env]]:
    """The case table, with stand-ins for what takes long."""
    shorter = [case for case in CASES if burden(*case) <= LONG]
    standins = [(name, env) for name in BY_NAME for env in STANDINS.get(name.split("_")[0], [])]
    return [case for case in (*shorter, *standins, *MORE) if case[0] in LAUNCHERS]


def burden(name: str, env: Env) -> float:
    """Operations of a case of the products and of attention, each side as long as its tiles; the others are short."""
    family, tiles = name.split("_")[0], {key: -(-size // TILE) * TILE for key, size in env.items() if key in "nocrvtd"}
    if family == "linear":
        return 2.0 * tiles["n"] * tiles["o"] * tiles["c"]
    if family == "linearcrossentropy":
        return 6.0 * -(-env["n"] // env["r"]) * tiles["r"] * tiles["v"] * tiles["c"]
    if family == "attention":
        return (5.0 if name.endswith("dx") else 2.0) * env["n"] / env["t"] * env["h"] * tiles["t"] ** 2 * tiles["d"]
    return 0.0


def _letters(name: str, env: Env) -> dict[str, int]:
    row = BY_NAME[name]
    return {letter: env[letter] for letter in row.dims + row.ints}


def typed(chosen: Sequence[tuple[str, Env]]) -> list[tuple[tuple[str, Env], bool]]:
    """Each case in float32, and in bfloat16 where its row has arguments of the compute type."""
    by_type = {name: any(a.type == "a" for a in BY_NAME[name].buffers) for name in BY_NAME}
    return [(case, half) for case in chosen for half in (False, True) if not half or by_type[case[0]]]


def identity(value: tuple[str, Env] | bool) -> str:
    return label(value) if isinstance(value, tuple) else ("float32", "bfloat16")[value]


@pytest.fixture(scope="module")
def entries() -> dict[str, build.Library]:
    """Entry -> the library it is in; a source that does not compile has none, and the rows that need it fail."""
    paths = (Path(image.removeprefix(build.MAGIC).decode()) for image, _ in build.images().values())
    libraries = [build.library(path) for path in paths]
    return {name: library for library in libraries for name in library.kernels}


# ---- running a call


def rounded(values: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    nearest = ((bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def prepared(name: str, env: Env, rng: np.random.Generator, half: bool) -> dict[str, Array | None]:
    """Inputs as the kernel takes them: of the compute type where the table says so, still as float32 numbers."""
    values = inputs_of(name, env, rng)
    if half and name == "linearcrossentropy_fwd":
        # Logits about 1: the last bit of a larger one as bfloat16 would be all of its softmax.
        values["w"] = values["w"] / np.float32(math.sqrt(env["c"]))
    for a in BY_NAME[name].ins:
        value = values[a.name]
        if half and a.type == "a" and value is not None:
            values[a.name] = widened(rounded(value))
    return values


class Memory:
    """Host memory that poses as a device's: buffers and scratch with canaries around them."""

    def __init__(self, nbytes: Mapping[str, int]) -> None:
        self.at: dict[str, int] = {}
        top = CANARY
        for name, size in nbytes.items():
            self.at[name] = top
            top += -(-size // CANARY) * CANARY + CANARY
        room = np.empty(top + BEHIND + CANARY, np.uint8)
        start = -room.ctypes.data % CANARY
        self.bytes = room[start : start + top + BEHIND]
        self.bytes[:] = PATTERN
        self.nbytes = nbytes

    def span(self, name: str) -> slice:
        return slice(self.at[name], self.at[name] + self.nbytes[name])

    def address(self, name: str) -> int:
        return self.bytes.ctypes.data + self.at[name]


def execute(
    entries: Mapping[str, build.Library],
    name: str,
    env: Env,
    values: Mapping[str, Array | None],
    half: bool = False,
    order: int = build.FORWARD,
) -> dict[str, Array]:
    """Runs one call; results by name, those of the compute type as float32.

    Outputs and scratch start as NaN, and what lies around every buffer, and every input, must not change.
    """
    row, shapes = BY_NAME[name], shapes_of(name, env)
    kinds = {a.name: concrete(a.type, "h" if half else "r") for a in row.buffers}
    there = {key: shape for key, shape in shapes.items() if shape is not None}
    tensors = tuple(
        Tensor(i, there[a.name], kinds[a.name]) if a.name in there else None for i, a in enumerate(row.buffers)
    )
    call = Call(name, tensors, tuple(_letters(name, env).values()), tuple(env[r] for r in row.reals))
    memory = Memory({key: SIZES[kinds[key]] * math.prod(s) for key, s in there.items()} | {"": call.scratch(True)})
    views = {key: memory.bytes[memory.span(key)].view(TYPES[kinds[key]]).reshape(s) for key, s in there.items()}
    memory.bytes[memory.span("")] = 0xFF
    for a in row.buffers:
        if a.name in there and a.role in ("out", "scratch"):
            memory.bytes[memory.span(a.name)] = 0xFF
        elif a.name in there:
            views[a.name][...] = rounded(values[a.name]) if a.type == "a" and half else values[a.name]
    before = memory.bytes.copy()
    at = {a.name: memory.address(a.name) if a.name in there else 0 for a in row.buffers}
    for launch in LAUNCHERS[name](Site(call, at, half, memory.address(""), DEVICE)):
        entries[launch.entry].run(launch.entry, launch.grid, launch.block, launch.args, launch.shared, order)
    touched = [a for a in row.buffers if a.role != "in" and a.name in there]
    found = {
        a.name: widened(views[a.name]) if a.type == "a" and half else views[a.name].copy()
        for a in touched
        if a.role != "scratch"
    }
    for key in (*(a.name for a in touched), ""):
        memory.bytes[memory.span(key)] = before[memory.span(key)]
    np.testing.assert_array_equal(memory.bytes, before, err_msg=f"{name} wrote outside its outputs")
    return found


def compare(
    name: str, found: Mapping[str, Array], want: Mapping[str, Array], scale: Mapping[str, float], half: bool, told: str
) -> None:
    """Results against the definition's, by the kind of each."""
    for a in BY_NAME[name].buffers:
        if a.name not in want:
            continue
        got, right, said = found[a.name], want[a.name], f"{name}: {a.name}, {told}"
        if right.dtype == np.uint16 and name in ("narrow", "halve"):
            np.testing.assert_array_equal(got, right, err_msg=said)
        elif right.dtype == np.uint16:  # halves of numbers that differ in their last bits may round to neighbours
            np.testing.assert_allclose(widened(got), widened(right), rtol=2 * HALF_STEP, err_msg=said)
        else:
            atol = scale[a.name] * (ROUGH.get(name, TOLERANCE) if half else TOLERANCE)
            rtol = HALF_STEP if half and a.type == "a" else 0
            np.testing.assert_allclose(got, right, rtol=rtol, atol=atol, err_msg=said)


# ---- values


@pytest.mark.parametrize(("case", "half"), typed(cases()), ids=identity)
def test_values_and_bits(entries: dict[str, build.Library], case: tuple[str, Env], half: bool) -> None:
    name, env = case
    seed = secrets.randbits(32)  # fresh numbers at every run; a failure tells which
    values = prepared(name, env, np.random.default_rng(seed), half)
    found = execute(entries, name, env, values, half)
    want = reference(name, env, values)
    compare(name, found, want, sizes(name, env, values, want, seed), half, f"inputs of seed {seed}")
    for order in (build.BACKWARD, 2 + seed % 1000):
        again = execute(entries, name, env, values, half, order)
        same = {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in found.items()}
        assert same, f"other bits in order {order} of the threads, inputs of seed {seed}"


def test_every_row_has_a_launcher() -> None:
    elementwise = {k.name for k in TABLE if k.name.split("_")[0] not in ("linear", "attention", "linearcrossentropy")}
    assert launches_elementwise.LAUNCHERS.keys() == elementwise
    assert LAUNCHERS.keys() <= BY_NAME.keys()


# ---- what the numbers do at the edges


NAN_CASES = [
    c for c in cases() if c[0].endswith(("_fwd", "_dx")) and c[1]["n"] in (65, 100, 260) and "salt" not in c[1]
]


@pytest.mark.parametrize(("case", "half"), typed(NAN_CASES), ids=identity)
def test_nan_is_never_hidden(entries: dict[str, build.Library], case: tuple[str, Env], half: bool) -> None:
    name, env = case
    values = prepared(name, env, np.random.default_rng(2), half)
    key = next(a.name for a in BY_NAME[name].ins if a.type in ("r", "a") and a.name != "dw")
    values[key].flat[0] = np.nan
    found = execute(entries, name, env, values, half)
    assert np.isnan(found[BY_NAME[name].buffers[0].name].flat[0])


def test_tokens_outside_the_vocabulary(entries: dict[str, build.Library]) -> None:
    ids, env = np.array([1, 3, -1], dtype=np.int32), {"n": 3, "v": 3, "c": 20}
    for half in (False, True):
        found = execute(entries, "embedding_fwd", env, {"ids": ids, "w": np.ones((3, 20), dtype=np.float32)}, half)
        np.testing.assert_array_equal(np.isnan(found["y"]).all(axis=1), [False, True, True])
        values = {"ids": ids, "dw": np.zeros((3, 20), np.float32), "dy": np.ones((3, 20), np.float32)}
        found = execute(entries, "embedding_dw", env, values, half)
        np.testing.assert_array_equal(found["dw"].sum(axis=1), [0, 20, 0])


def test_halves_are_the_nearest_and_nothing_is_lost_at_the_edges(entries: dict[str, build.Library]) -> None:
    one = np.float32(1)
    exact = [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 1.1754944e-38, 3.3895314e38]
    ties = [one + one * 2**-8, one + one * 3 * 2**-8, one + one * 2**-8 + one * 2**-23, 3.4e38]
    x = np.array([[*exact, *ties, np.nan]], np.float32)
    found = execute(entries, "narrow", {"n": 1, "c": x.size}, {"x": x})
    want = [*exact, 1.0, 1 + 2**-6, 1 + 2**-7, np.inf, np.nan]
    np.testing.assert_array_equal(found["x"][0], np.array(want, np.float32))
    assert np.signbit(found["x"][0, 1])
    again = execute(entries, "widen", {"n": 1, "c": x.size}, {"x": found["y"]})
    assert again["y"].tobytes() == found["x"].tobytes()
    halved = execute(entries, "halve", {"n": x.size}, {"x": x[0]})
    assert halved["y"].tobytes() == found["y"].tobytes()


@pytest.mark.parametrize("name", ["gelu_fwd", "gelu_dx", "swiglu_fwd", "swiglu_dx"])
def test_activations_over_the_whole_range(entries: dict[str, build.Library], name: str) -> None:
    size = 20001
    x = np.linspace(-120, 120, size, dtype=np.float32)[:, None]
    if name.startswith("swiglu"):
        x, env = np.hstack([x, np.full_like(x, 1.5)]), {"n": size, "f": 1}
    else:
        env = {"n": size, "c": 1}
    values = {"x": x, "dy": np.ones((size, 1), dtype=np.float32)}
    for key, want in reference(name, env, values).items():
        got = execute(entries, name, env, values)[key]
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("n", [5, 70001])
def test_an_update_in_two_halves_is_the_update_to_the_bit(
    entries: dict[str, build.Library], n: int, half: bool
) -> None:
    env = {"n": n, "decay": 0.1, "hyper": "warm", "half": half}
    values = inputs_of("adamw_step", env, np.random.default_rng(8))
    whole = execute(entries, "adamw_step", env, values)
    tried = execute(entries, "adamw_try", env, values)
    kept = execute(entries, "adamw_keep", env, values)
    assert tried["old"].tobytes() == values["p"].tobytes()
    for key, parts in (("p", tried), ("m", kept), ("v", kept), ("g", kept)):
        assert parts[key].tobytes() == whole[key].tobytes()
    if half:
        copy = execute(entries, "halve", {"n": n}, {"x": whole["p"]})["y"].tobytes()
        assert whole["half"].tobytes() == tried["half"].tobytes() == copy


@pytest.mark.parametrize("size", [1e20, 1e15, 1e-10, 1e-17, 1e-30])
def test_squares_that_float32_does_not_hold(entries: dict[str, build.Library], size: float) -> None:
    rng = np.random.default_rng(3)
    x = (size * rng.standard_normal(20011)).astype(np.float32)
    x[rng.integers(0, x.size, 100)] = rng.standard_normal(100)
    x[::7] = 0
    want = np.square(x, dtype=np.float64).sum()
    assert execute(entries, "sumsq", {"n": x.size}, {"x": x})["s"][0] == pytest.approx(want, rel=1e-13)
    alone = np.full(1000, size, np.float32)
    want = np.square(alone, dtype=np.float64).sum()
    assert execute(entries, "sumsq", {"n": 1000}, {"x": alone})["s"][0] == pytest.approx(want, rel=1e-13)
    x[12345] = np.nan
    assert np.isnan(execute(entries, "sumsq", {"n": x.size}, {"x": x})["s"][0])
    x[12345] = np.inf
    assert execute(entries, "sumsq", {"n": x.size}, {"x": x})["s"][0] == np.inf


# ---- the loss


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("v", "threads"), [(1, 32), (37, 32), (777, 128), (8192, 1024), (50257, 1024), (30000, 64)])
def test_logits_become_losses_and_their_gradient(
    entries: dict[str, build.Library], v: int, threads: int, half: bool
) -> None:
    rows, first, scale = 5, 2, np.float32(0.25)
    rng = np.random.default_rng(v)
    logits = (5 * rng.standard_normal((rows, v)) + 30).astype(np.float32)
    logits[3, : v // 2] = -np.inf if v > 1 else 0
    bits = rounded(logits)
    logits = widened(bits) if half else logits
    targets = np.array([*rng.integers(0, v, first + rows)], dtype=np.int32)
    targets[first + 3] = v - 1
    key, nll, place = np.array([1, 2, 3, 1]), np.full(first + rows + 1, np.nan, np.float32), np.arange(rows)
    own = targets[first:]
    wide = logits.astype(np.float64)
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    total = powers.sum(axis=1, keepdims=True)
    want = powers / total
    want[place, own] -= 1
    losses = np.log(total[:, 0]) + wide.max(axis=1) - wide[place, own]
    name = f"hp_linearcrossentropy_rows{'_h' if half else ''}"
    kind = np.uint16 if half else np.float32
    found = []
    for order in (build.FORWARD, build.BACKWARD, 77):
        room = np.full(rows * v + 64, 0x7FC1 if half else -3.0, kind)  # what is behind the rows must stay
        aligned = room[-room.ctypes.data % 64 // room.itemsize :]
        inner, behind = aligned[: rows * v].reshape(rows, v), aligned[rows * v :].copy()
        inner[...] = bits if half else logits
        at = (nll, inner, targets, key)
        args = (*(a.ctypes.data for a in at), first, v, float(scale))
        entries[name].run(name, (rows, 1, 1), (threads, 1, 1), args, 0, order)
        np.testing.assert_array_equal(aligned[rows * v :], behind)
        found.append((inner.tobytes(), nll.tobytes()))
    assert len(set(found)) == 1
    got = widened(inner) if half else inner
    np.testing.assert_allclose(got, scale * want, rtol=HALF_STEP if half else 0, atol=scale * TOLERANCE)
    np.testing.assert_allclose(nll[first : first + rows], losses, rtol=TOLERANCE, atol=TOLERANCE)
    assert np.isnan(nll[:first]).all() and np.isnan(nll[first + rows :]).all()


@pytest.mark.parametrize("n", [1, 33, 256, 5000])
def test_the_loss_is_the_sum_of_all(entries: dict[str, build.Library], n: int) -> None:
    nll = np.random.default_rng(n).exponential(size=n).astype(np.float32)
    found = set()
    for order in (build.FORWARD, build.BACKWARD, 5):
        loss = np.full(1, np.nan)
        name = "hp_linearcrossentropy_total"
        entries[name].run(name, (1, 1, 1), (256, 1, 1), (loss.ctypes.data, nll.ctypes.data, n), 0, order)
        found.add(loss[0])
    assert len(found) == 1 and found.pop() == pytest.approx(math.fsum(nll.tolist()), rel=1e-15)


needs_loss = pytest.mark.skipif("linearcrossentropy_fwd" not in LAUNCHERS, reason="launches_products is not there")


@needs_loss
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_ignored_targets_cost_nothing(entries: dict[str, build.Library], half: bool) -> None:
    name, env = "linearcrossentropy_fwd", {"n": 5, "v": 37, "c": 20, "r": 2, "scale": 0.5, "on": 1}
    values = prepared(name, env, np.random.default_rng(1), half)
    everything = execute(entries, name, env, values, half)
    values["targets"][[1, 4]] = -1
    found = execute(entries, name, env, values, half)
    assert not found["nll"][[1, 4]].any()
    assert not found["dx"][[1, 4]].any()
    assert found["dx"][[0, 2, 3]].tobytes() == everything["dx"][[0, 2, 3]].tobytes()
    assert found["loss"][0] == pytest.approx(found["nll"].astype(np.float64).sum(), rel=1e-15)


@needs_loss
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_loss_that_nobody_trains_on_leaves_the_gradient_alone(entries: dict[str, build.Library], half: bool) -> None:
    name, env = "linearcrossentropy_fwd", {"n": 50, "v": 37, "c": 20, "r": 32, "scale": 0.5, "on": 0}
    values = prepared(name, env, np.random.default_rng(1), half)
    silent = execute(entries, name, env, values, half)
    assert silent["dw"].tobytes() == values["dw"].tobytes() and not silent["dx"].any()
    values["key"][3] = 1
    trained = execute(entries, name, env, values, half)
    assert trained["nll"].tobytes() == silent["nll"].tobytes() and trained["loss"] == silent["loss"]
    assert (trained["dw"] != values["dw"]).any() and trained["dx"].any()


@needs_loss
def test_the_size_of_a_block_of_tokens_decides_no_loss_and_no_input_gradient(entries: dict[str, build.Library]) -> None:
    found = []
    for r in (1, 7, 50):
        env = {"n": 50, "v": 37, "c": 20, "r": r, "scale": 0.5, "on": 1}
        values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
        found.append(execute(entries, "linearcrossentropy_fwd", env, values))
    for name in ("loss", "nll", "dx"):
        assert len({f[name].tobytes() for f in found}) == 1


@needs_loss
def test_targets_outside_the_vocabulary_become_nan(entries: dict[str, build.Library]) -> None:
    env = {"n": 2, "v": 3, "c": 1, "r": 2, "scale": 1.0, "on": 1}
    values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
    values["targets"][...] = [0, 3]
    found = execute(entries, "linearcrossentropy_fwd", env, values)
    np.testing.assert_array_equal(np.isnan(found["nll"]), [False, True])
    np.testing.assert_array_equal(np.isnan(found["dx"][:, 0]), [False, True])
    assert np.isnan(found["loss"][0])
