"""One call of the kernel table on the kernels of native/cuda, on the host or on a device; and its results judged.

In: a row of the table, a case, inputs, a ``Machine``. Out: what the call writes there. Outputs and scratch are poisoned
before, and what lies around every buffer is watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from hpcpipe.backends.cuda import launches_elementwise, launches_products
from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launcher, Site
from hpcpipe.backends.kernels import BY_NAME, SIZES
from hpcpipe.backends.null import Call, Tensor
from tests.gpu.host import build
from tests.kernels.cases import TOLERANCE, Env, concrete, inputs_of, shapes_of, widened

Array = np.ndarray
# Few multiprocessors, so that blocks go round more than once.
DEVICE = Properties("host", (9, 0), 1, 1 << 33, 1 << 33, 232448, 13000, "0000:00:00.0")
TYPES = {"r": np.float32, "h": np.uint16, "i": np.int32, "l": np.int64, "d": np.float64}
CANARY, BEHIND, PATTERN = 64, 1 << 20, 0xA5  # bytes around buffers; behind the scratch, which is the last
HALF_STEP = 2.0**-8  # of a bfloat16, relative to the number it rounds
# Rows that round to bfloat16 on the way, too (P and dS; logits and their gradient): relative to the largest element.
ROUGH = {"attention_fwd": 2.0**-6, "attention_dx": 2.0**-5, "linearcrossentropy_fwd": 2.0**-5}
LAUNCHERS: dict[str, Launcher] = launches_elementwise.LAUNCHERS | launches_products.LAUNCHERS


def _letters(name: str, env: Env) -> dict[str, int]:
    row = BY_NAME[name]
    return {letter: env[letter] for letter in row.dims + row.ints}


def compiled() -> dict[str, build.Library]:
    """Entry -> the library it is in; a source that does not compile has none, and the rows that need it fail."""
    paths = (Path(image.removeprefix(build.MAGIC).decode()) for image, _ in build.images().values())
    libraries = [build.library(path) for path in paths]
    return {name: library for library in libraries for name in library.kernels}


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


class Machine(Protocol):
    """What can do a call: ``run`` does it with the bytes of ``image`` at an address that it gives to ``site_at``."""

    def run(self, image: Array, site_at: Callable[[int], Site]) -> None: ...


class OnHost:
    """The kernels compiled by g++, with their threads in an order."""

    def __init__(self, entries: Mapping[str, build.Library], order: int = build.FORWARD) -> None:
        self.entries, self.order = entries, order

    def run(self, image: Array, site_at: Callable[[int], Site]) -> None:
        site = site_at(image.ctypes.data)._replace(device=DEVICE)
        for entry, grid, block, args, shared in LAUNCHERS[site.call.kernel](site):
            self.entries[entry].run(entry, grid, block, args, shared, self.order)


def execute(
    entries: Mapping[str, build.Library],
    name: str,
    env: Env,
    values: Mapping[str, Array | None],
    half: bool = False,
    order: int = build.FORWARD,
) -> dict[str, Array]:
    """``tried`` on the host."""
    return tried(OnHost(entries, order), name, env, values, half)


def tried(
    machine: Machine, name: str, env: Env, values: Mapping[str, Array | None], half: bool = False
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

    def site_at(base: int) -> Site:
        at = {a.name: base + memory.at[a.name] if a.name in there else 0 for a in row.buffers}
        return Site(call, at, half, base + memory.at[""], DEVICE)

    machine.run(memory.bytes, site_at)
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
