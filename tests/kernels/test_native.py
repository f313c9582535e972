"""The native library against the definition: values, borders of every buffer, and the same bits for any team."""

from __future__ import annotations

import math
import re
import secrets
import threading
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.backends import cpu
from hpcpipe.backends.cpu import CpuBackend
from hpcpipe.backends.definitions import TYPES
from hpcpipe.backends.kernels import BY_NAME, TABLE, Kernel, bind, evaluate, prototype
from hpcpipe.backends.null import Call, Tensor
from tests.kernels.cases import (
    CASES,
    FAMILIES,
    TOLERANCE,
    Env,
    concrete,
    inputs_of,
    label,
    reference,
    shapes_of,
    sizes,
    widened,
)

ROOT = Path(__file__).resolve().parents[2]

Array = np.ndarray
CANARY, PATTERN = 64, 0xA5
HEADER = (Path(cpu.__file__).parents[2] / "native" / "include" / "hpcpipe.h").read_text()
LEVELS = cpu.runnable()


def execute(backend: CpuBackend, name: str, env: Env, values: dict[str, Array | None]) -> dict[str, Array]:
    """Runs one kernel; outputs and scratch start as NaN, and what lies around every buffer must not change."""
    row, shapes = BY_NAME[name], shapes_of(name, env)
    there = [(i, a, shapes[a.name]) for i, a in enumerate(row.buffers)]
    tensors = [None if shape is None else Tensor(i, shape, concrete(a.type)) for i, a, shape in there]
    call = Call(name, tuple(tensors), tuple(env[d] for d in row.dims + row.ints), tuple(env[r] for r in row.reals))
    places, top = {}, CANARY
    for t in filter(None, tensors):
        places[t.id] = top
        top += -(-math.prod(t.shape) * TYPES[t.type].itemsize // CANARY) * CANARY + CANARY
    handle = backend.compile([call], lambda t: (1, places[t.id]))
    base, work = 2 * CANARY, 2 * CANARY + top
    end = work + handle.work * backend.threads
    memory = backend.allocate(end + CANARY)
    memory[:] = PATTERN
    memory[work:end] = 0xFF
    views = {a.name: backend.array(memory, base + places[t.id], t.shape, t.type)
             for a, t in zip(row.buffers, tensors, strict=True) if t}  # fmt: skip
    for a in row.buffers:
        if a.name in views:
            nothing = 0xFFFF if a.type == "h" else np.nan
            views[a.name][...] = nothing if a.role in ("out", "scratch") else values[a.name]
    before = memory.copy()
    backend.run(handle, memory, np.array([0, base]), work)
    touched = [a for a in row.buffers if a.role != "in" and a.name in views]
    written = {a.name: views[a.name].copy() for a in touched if a.role != "scratch"}
    for a in touched:
        span = _span(views[a.name], memory)
        memory[span] = before[span]
    memory[work:end] = 0xFF
    np.testing.assert_array_equal(memory, before, err_msg=f"{name} wrote outside its outputs")
    return written


def _span(view: Array, memory: Array) -> slice:
    start = view.ctypes.data - memory.ctypes.data
    return slice(start, start + view.nbytes)


@pytest.fixture(scope="module", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("case", CASES, ids=label)
def test_values_and_bits(level: str, case: tuple[str, Env]) -> None:
    name, env = case
    seed = secrets.randbits(32)  # fresh numbers at every run; a failure tells which
    values = inputs_of(name, env, np.random.default_rng(seed))
    found = execute(CpuBackend(1, level), name, env, values)
    want = reference(name, env, values)
    for key, size in sizes(name, env, values, want, seed).items():
        told = f"{name}: {key}, inputs of seed {seed}"
        if want[key].dtype == np.uint16:  # halves of numbers that differ in their last bits may round to neighbours
            np.testing.assert_allclose(widened(found[key]), widened(want[key]), rtol=2**-7, err_msg=told)
            continue
        np.testing.assert_allclose(found[key] / size, want[key] / size, rtol=0, atol=TOLERANCE, err_msg=told)
    for threads in (1, 2, 3):
        again = execute(CpuBackend(threads, level), name, env, values)
        same = {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in found.items()}
        assert same, f"other bits with {threads} threads, inputs of seed {seed}"


def test_the_levels_of_this_machine_are_built() -> None:
    flags = cpu.cpu_flags()
    assert [name for name, needed in cpu.LEVELS.items() if set(needed.split()) <= flags] == LEVELS
    assert CpuBackend(1).level == LEVELS[0]


def test_the_scratch_of_a_product_is_what_its_header_says() -> None:
    """The table prices what the header lays out: both are in numbers, and C would write beyond a smaller one."""
    text = (ROOT / "native/cpu/product.h").read_text()
    deep, tall, strip, widest = (
        max(map(int, re.findall(rf"\b{name} = (\d+)", text)))
        for name in ("HP_DEEP", "HP_ROWS_AT_ONCE", "HP_STRIP", "HP_TALL")
    )
    for m, k in ((1, 1), (1000, 700), (1031, 768), (5000, 5000)):
        env = {"n": m, "c": k, "o": 7}
        needs = 4 * min(k, deep) * (min(m + widest, tall) + strip)
        assert evaluate(BY_NAME["linear_fwd"].work, env) == needs


def test_every_kernel_has_cases() -> None:
    assert {name for name, _ in CASES} == BY_NAME.keys()
    assert FAMILIES.keys() == {name.split("_")[0] for name in BY_NAME}


# --- the contract


@pytest.mark.parametrize("kernel", TABLE, ids=lambda k: k.name)
def test_header_declares_the_table(kernel: Kernel) -> None:
    assert prototype(kernel) in re.sub(r"\s+", " ", HEADER)


def test_header_declares_nothing_else() -> None:
    own = {"table_digest", "init", "threads", "dispatch", "run", "matmul_peak", "pointer"}
    assert set(re.findall(r"\bhp_(\w+)\(", HEADER)) == BY_NAME.keys() | own
    arguments = max(len(k.buffers) + len(k.dims) + len(k.ints) + len(k.reals) for k in TABLE)
    assert f"#define HP_MAX_ARGS {cpu.MAX_ARGS}\n" in HEADER
    assert arguments <= cpu.MAX_ARGS


def test_library_of_another_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "digest", lambda: "0" * 16)
    with pytest.raises(RuntimeError, match=r"another kernel table: run make build$"):
        CpuBackend(1)


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match=f"no native library is in {tmp_path}: run make build"):
        CpuBackend(1)
    with pytest.raises(RuntimeError, match=r"libhpcpipe-portable\.so is not in"):
        CpuBackend(1, "portable")


def test_missing_scratch_is_refused() -> None:
    backend, env = CpuBackend(1), {"n": 3, "t": 3, "h": 1, "k": 1, "d": 2}
    tensors = (Tensor(0, (3, 2)), Tensor(1, (3, 1)), Tensor(2, (3, 6)))
    handle = backend.compile([Call("attention_fwd", tensors, (3, 3, 1, 1, 2), ())], lambda t: (0, 64 * t.id))
    assert handle.work == evaluate(BY_NAME["attention_fwd"].work, env)
    with pytest.raises(ValueError, match="needs 73608 bytes of scratch per thread"):
        backend.run(handle, backend.allocate(1024), np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize(("h", "k", "n", "t"), [(3, 2, 4, 4), (4, 2, 5, 4)])
def test_heads_and_tokens_that_do_not_divide_are_refused(h: int, k: int, n: int, t: int) -> None:
    whole, part = ("h", "k") if h % k else ("n", "t")
    with pytest.raises(ValueError, match=f"{whole} = .* is not a multiple of {part} = "):
        bind(BY_NAME["attention_fwd"], {"qkv": (n, (h + 2 * k) * 2)}, {"t": t, "h": h, "k": k, "d": 2})


# --- what the numbers do at the edges


def test_ignored_targets_cost_nothing(level: str) -> None:
    env = {"n": 5, "v": 37, "c": 20, "r": 2, "scale": 0.5, "on": 1}
    values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
    everything = execute(CpuBackend(2, level), "linearcrossentropy_fwd", env, values)
    values["targets"][[1, 4]] = -1
    found = execute(CpuBackend(2, level), "linearcrossentropy_fwd", env, values)
    assert not found["nll"][[1, 4]].any()
    assert not found["dx"][[1, 4]].any()
    assert found["dx"][[0, 2, 3]].tobytes() == everything["dx"][[0, 2, 3]].tobytes()
    assert found["loss"][0] == found["nll"].astype(np.float64).sum()


def test_a_loss_that_nobody_trains_on_leaves_the_gradient_alone(level: str) -> None:
    env = {"n": 50, "v": 37, "c": 20, "r": 32, "scale": 0.5, "on": 0}
    values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
    silent = execute(CpuBackend(2, level), "linearcrossentropy_fwd", env, values)
    assert silent["dw"].tobytes() == values["dw"].tobytes() and not silent["dx"].any()
    values["key"][3] = 1
    trained = execute(CpuBackend(2, level), "linearcrossentropy_fwd", env, values)
    assert trained["nll"].tobytes() == silent["nll"].tobytes() and trained["loss"] == silent["loss"]
    assert (trained["dw"] != values["dw"]).any() and trained["dx"].any()


def test_the_size_of_a_block_of_tokens_decides_no_loss_and_no_input_gradient(level: str) -> None:
    found = []
    for r in (1, 7, 50):
        env = {"n": 50, "v": 37, "c": 20, "r": r, "scale": 0.5, "on": 1}
        values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
        found.append(execute(CpuBackend(2, level), "linearcrossentropy_fwd", env, values))
    for name in ("loss", "nll", "dx"):
        assert len({f[name].tobytes() for f in found}) == 1


def test_numbers_outside_the_vocabulary_become_nan(level: str) -> None:
    values = {"ids": np.array([1, 3, -1], dtype=np.int32), "w": np.ones((3, 20), dtype=np.float32)}
    found = execute(CpuBackend(1, level), "embedding_fwd", {"n": 3, "v": 3, "c": 20}, values)
    np.testing.assert_array_equal(np.isnan(found["y"]).all(axis=1), [False, True, True])
    env = {"n": 2, "v": 3, "c": 1, "r": 2, "scale": 1.0, "on": 1}
    values = inputs_of("linearcrossentropy_fwd", env, np.random.default_rng(1))
    values["targets"][...] = [0, 3]
    found = execute(CpuBackend(1, level), "linearcrossentropy_fwd", env, values)
    np.testing.assert_array_equal(np.isnan(found["nll"]), [False, True])
    assert np.isnan(found["loss"][0])


def test_halves_are_the_nearest_and_nothing_is_lost_at_the_edges(level: str) -> None:
    one = np.float32(1)
    exact = [0.0, -0.0, 1.0, -2.5, np.inf, -np.inf, 1.1754944e-38, 3.3895314e38]
    ties = [one + one * 2**-8, one + one * 3 * 2**-8, one + one * 2**-8 + one * 2**-23, 3.4e38]
    x = np.array([[*exact, *ties, np.nan]], np.float32)
    found = execute(CpuBackend(1, level), "narrow", {"n": 1, "c": x.size}, {"x": x})
    want = [*exact, 1.0, 1 + 2**-6, 1 + 2**-7, np.inf, np.nan]
    np.testing.assert_array_equal(found["x"][0], np.array(want, np.float32))
    assert np.signbit(found["x"][0, 1])
    again = execute(CpuBackend(1, level), "widen", {"n": 1, "c": x.size}, {"x": found["y"]})
    assert again["y"].tobytes() == found["x"].tobytes()
    case = {"n": 50, "c": 41}, inputs_of("narrow", {"n": 50, "c": 41}, np.random.default_rng(5))
    want = reference("narrow", *case)
    for key, value in execute(CpuBackend(2, level), "narrow", *case).items():
        np.testing.assert_array_equal(value, want[key])


@pytest.mark.parametrize("name", ["gelu_fwd", "gelu_dx", "swiglu_fwd", "swiglu_dx"])
def test_activations_over_the_whole_range(level: str, name: str) -> None:
    size = 20001
    x = np.linspace(-120, 120, size, dtype=np.float32)[:, None]
    if name.startswith("swiglu"):
        x, env = np.hstack([x, np.full_like(x, 1.5)]), {"n": size, "f": 1}
    else:
        env = {"n": size, "c": 1}
    values = {"x": x, "dy": np.ones((size, 1), dtype=np.float32)}
    for key, want in reference(name, env, values).items():
        got = execute(CpuBackend(2, level), name, env, values)[key]
        np.testing.assert_allclose(got, want, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [c for c in CASES if c[0].endswith(("_fwd", "_dx")) and c[1]["n"] in (65, 100, 260) and "salt" not in c[1]],
    ids=label,
)
def test_nan_is_never_hidden(level: str, case: tuple[str, Env]) -> None:
    name, env = case
    values = inputs_of(name, env, np.random.default_rng(2))
    key = next(a.name for a in BY_NAME[name].ins if a.type in ("r", "a") and a.name != "dw")
    values[key].flat[0] = np.nan
    found = execute(CpuBackend(1, level), name, env, values)
    assert np.isnan(found[BY_NAME[name].buffers[0].name].flat[0])


def test_subnormal_numbers_are_zero_in_every_thread_and_the_caller_keeps_its_mode(level: str) -> None:
    n = 100_003
    values = {"acc": np.full(n, 1e-40, dtype=np.float32), "x": np.full(n, 1e-40, dtype=np.float32)}
    assert not execute(CpuBackend(3, level), "accumulate", {"n": n}, values)["acc"].any()
    small = np.full(4, 1e-38, dtype=np.float32)
    assert (small * np.float32(0.01)).all()


def test_ranks_in_one_process_do_not_disturb_each_other(level: str) -> None:
    case = ("attention_dx", {"n": 260, "t": 130, "h": 8, "k": 2, "d": 16})
    values = inputs_of(*case, np.random.default_rng(3))
    alone = execute(CpuBackend(1, level), *case, values)["dqkv"].tobytes()
    backends = [CpuBackend(threads, level) for threads in (1, 2, 3)]
    found: list[bytes] = []

    def rank(backend: CpuBackend) -> None:
        for _ in range(5):
            found.append(execute(backend, *case, values)["dqkv"].tobytes())

    team = [threading.Thread(target=rank, args=(b,)) for b in backends]
    for t in team:
        t.start()
    for t in team:
        t.join()
    assert found == [alone] * 15


def test_views_stay_inside_the_arena() -> None:
    backend = CpuBackend(1)
    memory = backend.allocate(100)
    assert memory.shape == (100,)
    assert not memory.any()
    assert memory.ctypes.data % 4096 == 0
    assert backend.array(memory, 60, (2, 5), "r").nbytes == 40
    with pytest.raises(IndexError, match=r"bytes 64\.\.104 of an arena of 100"):
        backend.array(memory, 64, (2, 5), "r")


def test_matmul_peak_is_a_plausible_number() -> None:
    assert 1e8 < CpuBackend(1).matmul_peak(0.02) < 1e13
