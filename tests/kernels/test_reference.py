"""The reference kernels: gradients against finite differences in float64, values against the plainest code there is."""

from __future__ import annotations

import cmath
import math
from typing import Any

import numpy as np
import pytest

from hpcpipe.backends import definitions as reference
from hpcpipe.backends.definitions import FUNCTIONS
from hpcpipe.backends.kernels import BY_NAME, TABLE, evaluate
from hpcpipe.backends.null import Recorder
from hpcpipe.backends.reference import ReferenceBackend

Array = np.ndarray
STEP = 1e-5

# Odd sizes: one of everything, primes, more and fewer keys than queries allow sharing for.
CASES: list[tuple[str, dict[str, float]]] = [
    *[("linear", {"n": n, "o": o, "c": c}) for n, o, c in ((1, 1, 1), (3, 5, 7), (7, 2, 1), (2, 1, 9))],
    *[("embedding", {"n": n, "v": v, "c": c}) for n, v, c in ((1, 1, 1), (7, 5, 3), (2, 11, 4))],
    *[("position", {"n": n, "s": s, "c": c, "t": t}) for n, s, c, t in ((1, 1, 1, 1), (6, 5, 3, 3), (10, 5, 2, 5))],
    *[("layernorm", {"n": n, "c": c, "eps": 1e-5}) for n, c in ((1, 2), (5, 7), (3, 13))],
    *[("rmsnorm", {"n": n, "c": c, "eps": 1e-5}) for n, c in ((1, 1), (5, 7), (3, 13))],
    *[("gelu", {"n": n, "c": c}) for n, c in ((1, 1), (3, 7))],
    *[("swiglu", {"n": n, "f": f}) for n, f in ((1, 1), (3, 7))],
    *[
        ("rope", {"n": n, "t": t, "h": h, "k": k, "d": d, "theta": theta})
        for n, t, h, k, d, theta in ((1, 1, 1, 1, 2, 1e4), (6, 3, 3, 1, 4, 1e4), (10, 5, 4, 2, 6, 5e5))
    ],
    *[
        ("attention", {"n": n, "t": t, "h": h, "k": k, "d": d})
        for n, t, h, k, d in ((1, 1, 1, 1, 1), (6, 3, 3, 1, 2), (10, 5, 4, 2, 3), (7, 7, 2, 2, 5), (6, 2, 6, 3, 1))
    ],
]


def inputs_of(family: str, env: dict[str, float], rng: np.random.Generator) -> dict[str, Array]:
    """Random inputs of ``family``_fwd by name, without what comes around it."""
    limit = {"ids": int(env.get("v", 1))}
    return {
        a.name: rng.integers(0, limit[a.name], size=shape) if a.type == "i" else rng.standard_normal(shape)
        for a in BY_NAME[f"{family}_fwd"].ins
        if a.name != "z"
        for shape in [tuple(evaluate(s, env) for s in a.shape)]
    }


def call(name: str, values: dict[str, Array], env: dict[str, float]) -> dict[str, Array]:
    """Runs a kernel on copies of ``values`` (float64) and returns its outputs, in-out arguments among them."""
    row = BY_NAME[name]
    buffers: dict[str, Any] = {a.name: np.full(tuple(evaluate(s, env) for s in a.shape), np.nan) for a in row.outs}
    buffers |= {a.name: values[a.name].copy() if a.name in values else None for a in row.ins}
    FUNCTIONS[name](*buffers.values(), *(env[s] for s in row.ints + row.reals))
    return {a.name: buffers[a.name] for a in row.buffers if a.role != "in"}


def gradients(family: str, values: dict[str, Array], dy: Array, env: dict[str, float]) -> dict[str, Array]:
    """What the dx and dw kernels of a family say, by the name of the input; parameter gradients start at 1."""
    out = next(iter(call(f"{family}_fwd", values, env)))
    known = {**values, **call(f"{family}_fwd", values, env), "d" + out: dy}
    found: dict[str, Array] = {}
    for name in (f"{family}_dx", f"{family}_dw"):
        if name in BY_NAME:
            accumulated = (a.name for a in BY_NAME[name].ins if a.role == "inout")
            starts = {a: np.ones(values[a[1:]].shape) for a in accumulated if a not in known}
            for key, value in call(name, {**known, **starts}, env).items():
                if key == "y":  # an activation gives its output again
                    continue
                found[key[1:]] = value - 1 if key in starts else value
    return found


@pytest.mark.parametrize(
    ("family", "env"), CASES, ids=lambda v: v if isinstance(v, str) else ",".join(map(str, v.values()))
)
def test_gradients_are_the_slopes_of_the_forward_kernel(family: str, env: dict[str, float]) -> None:
    rng = np.random.default_rng(5)
    values = inputs_of(family, env, rng)
    y = next(iter(call(f"{family}_fwd", values, env).values()))
    dy = rng.standard_normal(y.shape)
    found = gradients(family, values, dy, env)
    expected = {"position": {"w"}}.get(family, {k for k, v in values.items() if v.dtype == float})
    assert found.keys() == expected
    for name, gradient in found.items():
        for i in range(values[name].size):
            ends = []
            for sign in (1, -1):
                moved = {**values, name: values[name].copy()}
                moved[name].flat[i] += sign * STEP
                ends.append(np.sum(dy * next(iter(call(f"{family}_fwd", moved, env).values()))))
            assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(gradient.flat[i], rel=1e-7, abs=1e-8), (name, i)


def test_every_kernel_with_a_twin_is_in_the_cases() -> None:
    twins = {k.name.rpartition("_")[0] for k in TABLE if k.name.endswith(("_dx", "_dw"))}
    assert twins == {family for family, _ in CASES}
    assert FUNCTIONS.keys() == BY_NAME.keys()


def test_linear_without_bias() -> None:
    rng = np.random.default_rng(0)
    x, w, dy = rng.standard_normal((4, 3)), rng.standard_normal((2, 3)), rng.standard_normal((4, 2))
    y, dw = np.empty((4, 2)), np.ones((2, 3))
    reference.linear_fwd(y, x, w, None, None)
    reference.linear_dw(dw, None, dy, x)
    np.testing.assert_allclose(y, [[sum(x[i, c] * w[o, c] for c in range(3)) for o in range(2)] for i in range(4)])
    np.testing.assert_allclose(
        dw, [[1 + sum(dy[i, o] * x[i, c] for i in range(4)) for c in range(3)] for o in range(2)]
    )


# --- values, against loops


def test_attention_is_a_softmax_over_earlier_tokens_with_shared_keys() -> None:
    env = {"n": 6, "t": 3, "h": 4, "k": 2, "d": 2}
    qkv = np.random.default_rng(1).standard_normal((6, 16))
    found = call("attention_fwd", {"qkv": qkv}, env)
    for row in range(6):
        for head in range(4):
            shared = head // 2
            q = qkv[row, head * 2 : head * 2 + 2]
            earlier = range(row // 3 * 3, row + 1)
            scores = [float(q @ qkv[j, 8 + shared * 2 : 10 + shared * 2]) / math.sqrt(2) for j in earlier]
            total = sum(math.exp(s) for s in scores)
            mix = sum(
                math.exp(s) / total * qkv[j, 12 + shared * 2 : 14 + shared * 2]
                for s, j in zip(scores, earlier, strict=True)
            )
            np.testing.assert_allclose(found["y"][row, head * 2 : head * 2 + 2], mix, rtol=1e-12)
            assert found["lse"][row, head] == pytest.approx(math.log(total), rel=1e-12)


def test_rope_turns_pairs_half_a_head_apart_and_leaves_values_alone() -> None:
    env = {"n": 6, "t": 3, "h": 2, "k": 1, "d": 4, "theta": 100.0}
    qkv = np.random.default_rng(2).standard_normal((6, 16))
    turned = call("rope_fwd", {"qkv": qkv}, env)["qkv"]
    np.testing.assert_array_equal(turned[:, 12:], qkv[:, 12:])
    for row in range(6):
        for head in range(3):
            for i in range(2):
                a, b = head * 4 + i, head * 4 + i + 2
                z = complex(qkv[row, a], qkv[row, b]) * cmath.exp(1j * (row % 3) * 100.0 ** (-2 * i / 4))
                assert (turned[row, a], turned[row, b]) == pytest.approx((z.real, z.imag), rel=1e-13)


def test_norms_and_activations_element_by_element() -> None:
    rng = np.random.default_rng(3)
    x, w, b = rng.standard_normal((2, 5)), rng.standard_normal(5), rng.standard_normal(5)
    env = {"n": 2, "c": 5, "eps": 0.1}
    layer, rms = call("layernorm_fwd", {"x": x, "w": w, "b": b}, env), call("rmsnorm_fwd", {"x": x, "w": w}, env)
    for i in range(2):
        mean = sum(x[i]) / 5
        deviation = math.sqrt(sum((v - mean) ** 2 for v in x[i]) / 5 + 0.1)
        root = math.sqrt(sum(v * v for v in x[i]) / 5 + 0.1)
        np.testing.assert_allclose(layer["y"][i], (x[i] - mean) / deviation * w + b, rtol=1e-13)
        np.testing.assert_allclose(rms["y"][i], x[i] / root * w, rtol=1e-13)
        assert (layer["mean"][i], layer["rstd"][i]) == pytest.approx((mean, 1 / deviation))
        assert rms["rstd"][i] == pytest.approx(1 / root)
    gelu = call("gelu_fwd", {"x": x}, {"n": 2, "c": 5})["y"]
    assert gelu == pytest.approx(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))), abs=1e-3)
    both = rng.standard_normal((2, 6))
    silu = both[:, :3] / (1 + np.exp(-both[:, :3]))
    np.testing.assert_allclose(call("swiglu_fwd", {"x": both}, {"n": 2, "f": 3})["y"], silu * both[:, 3:], rtol=1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swiglu_and_attention_stay_finite_for_large_values(dtype: str) -> None:
    x = np.array([[-1000.0, 1000.0, 2.0, 3.0]], dtype=dtype)
    y, dx = np.empty((1, 2), dtype), np.empty((1, 4), dtype)
    with np.errstate(over="raise", invalid="raise"):
        reference.swiglu_fwd(y, x)
        reference.swiglu_dx(dx, np.empty_like(y), np.ones((1, 2), dtype), x)
        np.testing.assert_array_equal(y, [[0, 3000]])
        np.testing.assert_array_equal(dx, [[0, 3, 0, 1000]])
        qkv, y, lse = np.full((2, 3), 100, dtype), np.empty((2, 1), dtype), np.empty((2, 1), dtype)
        reference.attention_fwd(y, lse, qkv, 2, 1, 1, 1)
    np.testing.assert_array_equal(y, [[100], [100]])


def test_crossentropy_and_both_its_gradients() -> None:
    rng = np.random.default_rng(4)
    values = {"x": rng.standard_normal((5, 3)), "w": rng.standard_normal((7, 3)), "targets": rng.integers(0, 7, 5),
              "dw": np.ones((7, 3)), "key": np.array([0, 0, 0, 1])}  # fmt: skip
    env = {"n": 5, "v": 7, "c": 3, "r": 2, "scale": 0.25}
    found = call("linearcrossentropy_fwd", values, env)
    logits = values["x"] @ values["w"].T
    for i, target in enumerate(values["targets"]):
        assert found["nll"][i] == pytest.approx(math.log(sum(math.exp(v - logits[i, target]) for v in logits[i])))
    assert found["loss"][0] == pytest.approx(sum(found["nll"]), rel=1e-15)
    for name, gradient in (("x", found["dx"]), ("w", found["dw"] - 1)):
        for i in range(values[name].size):
            ends = []
            for sign in (1, -1):
                moved = values | {name: values[name].copy()}
                moved[name].flat[i] += sign * STEP
                ends.append(call("linearcrossentropy_fwd", moved, env)["loss"][0])
            assert 0.25 * (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(gradient.flat[i], abs=1e-8)
    silent = call("linearcrossentropy_fwd", values | {"key": np.zeros(4, int)}, env)
    assert silent["loss"] == found["loss"] and (silent["dw"] == 1).all() and not silent["dx"].any()


def test_what_comes_around_is_added() -> None:
    rng = np.random.default_rng(6)
    for family, out in (("linear", "y"), ("layernorm", "dx"), ("rmsnorm", "dx")):
        env = {"n": 4, "o": 5, "c": 5, "eps": 1e-5}
        values = inputs_of(family, env, rng)
        if out == "dx":
            values |= call(f"{family}_fwd", values, env) | {"dy": rng.standard_normal((4, 5))}
        name = f"{family}_fwd" if out == "y" else f"{family}_dx"
        z = rng.standard_normal((4, 5))
        alone, both = call(name, values, env), call(name, values | {"z": z}, env)
        np.testing.assert_allclose(both[out], alone[out] + z, rtol=1e-14)


def test_the_gradient_of_an_activation_gives_the_activation_again() -> None:
    rng = np.random.default_rng(7)
    for family, env in (("gelu", {"n": 3, "c": 5}), ("swiglu", {"n": 3, "f": 5})):
        values = inputs_of(family, env, rng)
        y = call(f"{family}_fwd", values, env)["y"]
        assert (call(f"{family}_dx", values | {"dy": np.ones_like(y)}, env)["y"] == y).all()


def test_embedding_position_add_accumulate_sumsq() -> None:
    w = np.arange(12.0).reshape(4, 3)
    y = call("embedding_fwd", {"ids": np.array([3, 0, 3]), "w": w}, {"n": 3, "v": 4, "c": 3})["y"]
    np.testing.assert_array_equal(y, w[[3, 0, 3]])
    x = np.ones((4, 3))
    y = call("position_fwd", {"x": x, "w": w}, {"n": 4, "s": 4, "c": 3, "t": 2})["y"]
    np.testing.assert_array_equal(y, 1 + w[[0, 1, 0, 1]])
    np.testing.assert_array_equal(call("add_fwd", {"a": x, "b": w}, {"n": 4, "c": 3})["y"], 1 + w)
    np.testing.assert_array_equal(call("accumulate", {"acc": w, "x": 2 * w}, {"n": 4})["acc"], 3 * w)
    s = np.empty(1)
    reference.sumsq(s, np.full(1000, 1e20, np.float32))
    assert s[0] == pytest.approx(1e43, rel=1e-6)  # more than float32 holds


def test_adamw_is_the_textbook_update() -> None:
    rng = np.random.default_rng(6)
    p, gradients = rng.standard_normal(5), rng.standard_normal((3, 5))
    mine, m, v, g = p.copy(), np.zeros(5), np.zeros(5), np.empty(5)
    lr, b1, b2, eps, scale, decay = 0.1, 0.9, 0.95, 1e-8, 0.5, 0.3
    for step in range(1, 4):
        g[...] = gradients[step - 1]
        hyper = np.array([lr, b1, b2, eps, 1 - b1**step, 1 - b2**step, scale, np.nan])
        reference.adamw_step(mine, g, m, v, None, hyper, decay)
        assert not g.any()
    for i in range(5):
        value, first, second = p[i], 0.0, 0.0
        for step in range(1, 4):
            gradient = gradients[step - 1, i] * scale
            first, second = b1 * first + (1 - b1) * gradient, b2 * second + (1 - b2) * gradient**2
            value -= lr * decay * value + lr * first / (1 - b1**step) / (math.sqrt(second / (1 - b2**step)) + eps)
        assert mine[i] == pytest.approx(value, rel=1e-12)


# --- dropout


def slow_mask(key: list[int], salt: int, p: float, size: int) -> list[bool]:
    """The definition once more, one word at a time."""
    full, golden = 2**64, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % full
        z = (z ^ z >> 27) * 0x94D049BB133111EB % full
        return z ^ z >> 31

    state = golden
    for word in (key[0], key[1], key[2], salt):
        state = mix(((state ^ word % full) + golden) % full)
    return [
        mix((state + (e + 1) * golden) % full) >> 32 >= math.floor(float(np.float32(p)) * 2**32) for e in range(size)
    ]


@pytest.mark.parametrize("key", [[0, 0, 0, 1], [1, 2, 3, 1], [-5, 2**62, 7, 1]])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999])
def test_dropout_mask_is_the_stated_hash(key: list[int], p: float) -> None:
    mask = reference.dropout_mask(key, 9, p, 50)
    assert mask.tolist() == slow_mask(key, 9, p, 50)


def test_dropout_keeps_the_mean_and_drops_independently() -> None:
    # 400,000 draws: the kept share is known to 0.0007, so four of its errors are allowed.
    mask = reference.dropout_mask([3, 1, 4, 1], 5, 0.25, 400_000)
    assert abs(mask.mean() - 0.75) < 0.0028
    other = reference.dropout_mask([3, 1, 5, 1], 5, 0.25, 400_000)
    assert abs((mask & other).mean() - 0.75**2) < 0.0032 and abs((mask[1:] & mask[:-1]).mean() - 0.75**2) < 0.0032
    # The first 32 bits are pinned, so that no later change moves a run that is being resumed.
    bits = int("".join(str(int(k)) for k in reference.dropout_mask([1, 2, 3, 1], 4, 0.5, 32)), 2)
    assert bits == 0xE8A1BF95


def test_dropout_scales_what_it_keeps_and_copies_when_off() -> None:
    x = np.random.default_rng(7).standard_normal((4, 5)).astype(np.float32)
    y = np.empty_like(x)
    reference.dropout_fwd(y, x, np.array([1, 2, 3, 1]), 4, 0.25)
    mask = reference.dropout_mask([1, 2, 3, 1], 4, 0.25, 20).reshape(4, 5)
    assert 0 < mask.sum() < 20
    np.testing.assert_array_equal(y, np.where(mask, x * np.float32(1 / 0.75), 0))
    reference.dropout_fwd(y, x, np.array([1, 2, 3, 0]), 4, 0.25)
    np.testing.assert_array_equal(y, x)


# --- the backend


@pytest.mark.parametrize(("dtype", "real"), [("float32", 4), ("float64", 8)])
def test_backend_runs_a_recorded_call_in_its_arena(dtype: str, real: int) -> None:
    backend, ops = ReferenceBackend(dtype), Recorder()
    x, w = ops.tensor((3, 2)), ops.tensor((4, 2))
    y = ops.linear_fwd(x, w, None)
    places = {x.id: (0, 64), w.id: (1, 0), y.id: (1, 128)}
    memory = backend.allocate(1024)
    assert backend.real == real and backend.threads == 1
    assert memory.nbytes == 1024 and not memory.any() and memory.ctypes.data % 64 == 0
    a, b = backend.array(memory, 64, (3, 2)), backend.array(memory, 512, (4, 2))
    a[...], b[...] = np.arange(6).reshape(3, 2), np.arange(8).reshape(4, 2)
    assert a.dtype == dtype and backend.array(memory, 0, (1,), "l").dtype == np.int64
    handle = backend.compile(ops.take(), lambda t: places[t.id])
    backend.run(handle, memory, np.array([0, 512]), -1)
    np.testing.assert_array_equal(backend.array(memory, 640, (3, 4)), a @ b.T)
    # The same recording in another slot: only the base moves.
    a[...] *= 2
    backend.run(handle, memory, np.array([0, 512]), -1)
    np.testing.assert_array_equal(backend.array(memory, 640, (3, 4)), a @ b.T)


def test_backend_refuses_what_is_outside_its_memory() -> None:
    backend = ReferenceBackend()
    memory = backend.allocate(64)
    assert backend.array(memory, 60, (1,)).shape == (1,)
    for offset in (-4, 61, 64):
        with pytest.raises(IndexError):
            backend.array(memory, offset, (1,))
    with pytest.raises(ValueError, match="float16"):
        ReferenceBackend("float16")
    assert backend.matmul_peak(0.01) > 1e6
