"""The kernels of native/cuda against the definitions, without a GPU: compiled for the host, run in several orders.

Every row that has a launcher is tried on the case table, in both compute types: values, the borders of every buffer and
of the scratch, and the same bits in whatever order threads and blocks run. The table's largest cases take long where a
fiber is a thread; others of their kind stand for them (LONG).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import pytest

from hpcpipe.backends.cuda import launches_elementwise, launches_products
from hpcpipe.backends.kernels import BY_NAME
from tests.gpu.host import build
from tests.gpu.kernel_calls import HALF_STEP, LAUNCHERS, TYPES, compare, compiled, execute, prepared, rounded
from tests.kernels.cases import CASES, TOLERANCE, Env, inputs_of, label, reference, sizes, widened

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no g++: kernels of native/cuda cannot be tried without a GPU"
)

# What a fiber for a thread makes long, in operations on tiles of TILE; and what stands for the cases beyond.
LONG, TILE = 2.5e7, 64
STANDINS: dict[str, list[Env]] = {
    "linear": [
        {"n": 260, "o": 140, "c": 72},
        {"n": 65, "o": 600, "c": 70, "around": True},
        {"n": 20, "o": 30, "c": 1600, "around": True},
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


def cases() -> list[tuple[str, Env]]:
    """The case table, with stand-ins for what takes long."""
    shorter = [case for case in CASES if burden(*case) <= LONG]
    standins = [(name, env) for name in BY_NAME for env in STANDINS.get(name.split("_")[0], [])]
    return [*shorter, *standins, *MORE]


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


def typed(chosen: Sequence[tuple[str, Env]]) -> list[tuple[tuple[str, Env], bool]]:
    """Each case in float32, and in bfloat16 where its row has arguments of the compute type."""
    by_type = {name: any(a.type == "a" for a in BY_NAME[name].buffers) for name in BY_NAME}
    return [(case, half) for case in chosen for half in (False, True) if not half or by_type[case[0]]]


def identity(value: tuple[str, Env] | bool) -> str:
    return label(value) if isinstance(value, tuple) else ("float32", "bfloat16")[value]


@pytest.fixture(scope="module")
def entries() -> dict[str, build.Library]:
    return compiled()


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
    assert LAUNCHERS.keys() == BY_NAME.keys()
    assert not launches_elementwise.LAUNCHERS.keys() & launches_products.LAUNCHERS.keys()


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
    kind = TYPES["h" if half else "r"]
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


def test_the_size_of_a_block_of_tokens_decides_no_loss_and_no_input_gradient(entries: dict[str, build.Library]) -> None:
    found = []
    for r in (1, 7, 50):
        env = {"n": 50, "v": 37, "c": 20, "r": r, "scale": 0.5, "on": 1}
        values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
        found.append(execute(entries, "linearcrossentropy_fwd", env, values))
    for name in ("loss", "nll", "dx"):
        assert len({f[name].tobytes() for f in found}) == 1


def test_targets_outside_the_vocabulary_become_nan(entries: dict[str, build.Library]) -> None:
    env = {"n": 2, "v": 3, "c": 1, "r": 2, "scale": 1.0, "on": 1}
    values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
    values["targets"][...] = [0, 3]
    found = execute(entries, "linearcrossentropy_fwd", env, values)
    np.testing.assert_array_equal(np.isnan(found["nll"]), [False, True])
    np.testing.assert_array_equal(np.isnan(found["dx"][:, 0]), [False, True])
    assert np.isnan(found["loss"][0])
