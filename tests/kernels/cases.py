"""The case table: per kernel family, the shapes it is tried on, and inputs that make sense for a kernel and a shape.

Shapes are chosen to break things: one of everything, primes, nothing a multiple of 16, a sequence one longer than a
block of queries, one head, many query heads on one key head; and one or two large enough that every thread gets work.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcpipe.backends.definitions import FUNCTIONS
from hpcpipe.backends.kernels import BY_NAME, TABLE, evaluate

Array = np.ndarray
Env = dict[str, Any]
# Relative to ``sizes``; a product of depth 600 has lost about four bits of float32's 24.
TOLERANCE = 1e-5
LAST_BIT = 2.0**-24

HYPER = {
    "warm": (3e-4, 0.9, 0.95, 1e-8, 1 - 0.9**3, 1 - 0.95**3, 0.25, 0),
    "late": (1e-3, 0.9, 0.999, 1e-8, 1, 1, 1, 0),
}


def _rows(letters: str, *rows: tuple[float, ...], **fixed: Any) -> list[Env]:
    return [{**dict(zip(letters.split(), row, strict=True)), **fixed} for row in rows]


_MATRIX = _rows("n c", (1, 1), (1, 37), (53, 1), (3, 7), (65, 33), (7, 1000), (301, 127), (64, 768))
_ATTENTION = _rows(
    "n t h k d",
    (1, 1, 1, 1, 1), (7, 7, 1, 1, 4), (6, 3, 3, 1, 2), (65, 65, 2, 2, 8), (128, 64, 4, 4, 32), (10, 5, 6, 3, 5),
    (260, 130, 8, 2, 16), (193, 193, 4, 1, 33), (64, 1, 3, 3, 7), (600, 300, 6, 6, 64), (1030, 1030, 2, 1, 128),
)  # fmt: skip

FAMILIES: dict[str, list[Env]] = {
    "linear": [
        *_rows("n o c", (1, 1, 1), (1, 65, 33), (65, 1, 7), (33, 65, 1), (3, 5, 7), (100, 65, 128), (129, 384, 100),
               (768, 128, 128), (130, 1100, 70), (600, 70, 600), (1300, 520, 64), (1100, 1040, 800), (70, 1, 1),
               (1, 1, 70)),
        *_rows("n o c", (5, 3, 9), (200, 130, 100), bias=False),
        *_rows("n o c", (5, 3, 9), (130, 1100, 70), (70, 40, 1600), around=True),
        *_rows("n o c", (3, 7, 5), (130, 96, 800), bias=False, around=True),
    ],
    "embedding": _rows("n v c", (1, 1, 1), (7, 5, 3), (2, 1100, 4), (301, 65, 127), (300, 3, 1)),
    "position": _rows("n s c t", (1, 1, 1, 1), (6, 5, 3, 3), (10, 5, 2, 5), (260, 140, 129, 130), (300, 1, 77, 1)),
    "layernorm": [{**e, "eps": 1e-5, "around": around} for e in _MATRIX if e["c"] > 1 for around in (False, True)],
    "rmsnorm": [{**e, "eps": 1e-5, "around": around} for e in _MATRIX for around in (False, True)],
    "gelu": _MATRIX,
    "swiglu": _rows("n f", (1, 1), (1, 37), (53, 1), (65, 33), (7, 1000), (301, 127)),
    "rope": _rows("n t h k d", (1, 1, 1, 1, 2), (6, 3, 3, 1, 4), (130, 65, 4, 2, 6), (260, 130, 8, 2, 64),
                  (7, 7, 1, 1, 300), (70000, 70000, 1, 1, 2), theta=1e4)
            + _rows("n t h k d", (300, 300, 2, 1, 128), theta=5e5),
    "attention": _ATTENTION,
    "add": _MATRIX,
    "dropout": [{**e, "salt": salt, "p": p, "on": on} for e in _MATRIX[3:7]
                for salt, p, on in ((3, 0.1, 1), (-5, 0.5, 1), (0, 0.0, 1), (2**62, 0.9, 1), (3, 0.1, 0))],
    "linearcrossentropy": [
        *_rows("n v c r", (1, 1, 1, 1), (1, 65, 33, 1), (33, 2, 5, 33), (100, 65, 48, 100), (7, 8192, 9, 4),
               (301, 777, 40, 128), (130, 1100, 800, 65), scale=0.125, on=1),
        *_rows("n v c r", (33, 2, 5, 33), (301, 777, 40, 128), scale=0.125, on=0),
    ],
    "narrow": _MATRIX,
    "halve": _rows("n", (1,), (37,), (2049,), (100003,)),
    "widen": _MATRIX,
    "accumulate": _rows("n", (1,), (37,), (2049,), (100003,)),
    "sumsq": _rows("n", (1,), (37,), (2049,), (100003,), (1200007,)),
    "adamw": [{"n": n, "decay": decay, "hyper": h, "half": half} for half in (True, False)
              for n, decay in ((1, 0.1), (37, 0.0), (2049, 0.1), (100003, 0.1)) for h in HYPER],
}  # fmt: skip

CASES: list[tuple[str, Env]] = [(kernel.name, env) for kernel in TABLE for env in FAMILIES[kernel.name.split("_")[0]]]


def shapes_of(name: str, env: Env) -> dict[str, tuple[int, ...] | None]:
    """The shape of every buffer of a kernel; None for one that this case leaves out."""
    bias = env.get("bias", True)
    there = {"half": env.get("half", False), "z": env.get("around", False), "b": bias, "db": bias}
    return {
        a.name: None if a.optional and not there[a.name] else tuple(evaluate(s, env) for s in a.shape)
        for a in BY_NAME[name].buffers
    }


def inputs_of(name: str, env: Env, rng: np.random.Generator) -> dict[str, Array | None]:
    """Random inputs of a kernel by name, float32 reals; what a forward kernel hands to its backward is its own."""
    shapes = shapes_of(name, env)
    values: dict[str, Array | None] = {}
    for a in BY_NAME[name].ins:
        shape = shapes[a.name]
        if shape is None:
            values[a.name] = None
        elif a.name in ("ids", "targets"):
            values[a.name] = rng.integers(0, env["v"], size=shape, dtype=np.int32)
        elif a.name == "key":
            values[a.name] = np.array([rng.integers(-(2**63), 2**63 - 1), 12, -7, env["on"]], dtype=np.int64)
        elif a.type == "h":
            values[a.name] = (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif a.name == "hyper":
            values[a.name] = np.array(HYPER[env["hyper"]], dtype=np.float64)
        else:
            values[a.name] = rng.standard_normal(shape).astype(np.float32)
    if name.startswith("adamw"):
        values["v"] = np.square(values["v"])
    saved = [a.name for a in BY_NAME[name].ins if a.name in ("mean", "rstd", "lse", "y")]
    if saved:
        forward = BY_NAME[name.rpartition("_")[0] + "_fwd"]
        # dw kernels do not receive the parameters, and what they do receive does not depend on them.
        given = {a.name: values.get(a.name, np.ones(shape_of_arg)) for a in forward.ins
                 for shape_of_arg in [tuple(evaluate(s, env) for s in a.shape)]}  # fmt: skip
        found = reference(forward.name, {**env, "eps": env.get("eps", 0.0)}, given)
        values |= {s: found[s].astype(np.float32) for s in saved}
    return values


def reference(name: str, env: Env, values: dict[str, Array | None]) -> dict[str, Array]:
    """What the definition says in float64: outputs and in-out arguments by name. ``values`` stay as they are."""
    row = BY_NAME[name]
    buffers: dict[str, Array | None] = {}
    for a, shape in zip(row.buffers, shapes_of(name, env).values(), strict=True):
        given = values.get(a.name)
        if a.role in ("out", "scratch"):
            buffers[a.name] = np.full(shape, np.nan)
        else:
            real = given is not None and a.type in ("r", "a")
            buffers[a.name] = None if given is None else given.astype(np.float64) if real else given.copy()
    FUNCTIONS[name](*buffers.values(), *(env[s] for s in row.ints + row.reals))
    return {a.name: b for a in row.buffers if a.role in ("out", "inout") and (b := buffers[a.name]) is not None}


def sizes(name: str, env: Env, values: dict[str, Array | None], want: dict[str, Array], seed: int) -> dict[str, float]:
    """What an error is measured against, per result: its largest element, or the terms that cancelled in it.

    A sum may come out much smaller than its terms, and only these bound the error. How large they are is asked of the
    definition: how far the result moves when every real input moves by a float32's last bit, in units of that bit.
    """
    rng = np.random.default_rng(seed)
    found = {key: max(float(np.abs(array).max()), 1e-30) for key, array in want.items()}
    # The fewer the elements, the likelier that one draw moves none of them.
    for _ in range(2 if sum(map(np.size, want.values())) > 1000 else 16):
        moved = {
            key: array * (1 + LAST_BIT * rng.uniform(-1.0, 1.0, array.shape))
            for key, array in values.items()
            if array is not None and array.dtype == np.float32
        }
        for key, other in reference(name, env, values | moved).items():
            found[key] = max(found[key], float(np.abs(other - want[key]).max()) / LAST_BIT)
    return found


def concrete(type: str, compute: str = "r") -> str:
    """The element type of an argument where the compute type is ``compute``."""
    return compute if type == "a" else type


def widened(half: Array) -> Array:
    """The float32 numbers whose upper halves these are."""
    return (half.astype(np.uint32) << 16).view(np.float32)


def label(case: tuple[str, Env]) -> str:
    """A readable test id."""
    return f"{case[0]}-" + ",".join(f"{k}{v}" for k, v in case[1].items())
