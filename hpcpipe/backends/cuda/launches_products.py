"""Launches of our own products and attention: what runs where no library takes the call, and what a library leaves.

In: a ``Site``. Out: launches of native/cuda/linear.cu, attention.cu and loss.cu. ``product`` and ``bias_gradient`` are
also the steps that other launchers mix with a library's. Which tile is taken changes no bit of a result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launch, Launcher, Site, Size
from hpcpipe.config import UserError

Pass = Literal["fwd", "dx", "dw"]

THREADS = 256
TILE, SMALL_TILE = 128, 64  # of a product
STAGES, SPAN = 3, 32  # of a product in bfloat16: panels in flight, and their depth
SLAB = 256  # rows that one block of a column sum takes
TENSOR_THREADS, TENSOR_ROWS = 128, 64  # of attention on the tensor cores


def ceil(a: int, b: int) -> int:
    return -(-a // b)


def suffix(half: bool) -> str:
    return "_h" if half else ""


# ---- products --------------------------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Tokens, channels out and in of a linear map."""

    n: int
    o: int
    c: int


def product(kind: Pass, at: Sequence[int], shape: Shape, half: bool, device: Properties) -> Launch:
    """One pass of a linear map; ``at``: addresses in the table's order, without db.

    fwd: y x w b z (b and z may be 0);  dx: dx dy w;  dw: dw dy x (accumulates).
    """
    n, o, c = shape
    rows, columns = {"fwd": (n, o), "dx": (n, c), "dw": (o, c)}[kind]
    small = ceil(rows, TILE) * ceil(columns, TILE) < device.multiprocessors
    tile = SMALL_TILE if small else TILE
    entry = f"hp_linear_{kind}{'_small' if small else ''}{suffix(half)}"
    shared = STAGES * 2 * tile * SPAN * 2 if half else 0
    return Launch(entry, (ceil(rows, tile), ceil(columns, tile), 1), (THREADS, 1, 1), (*at, n, o, c), shared)


def bias_gradient(db: int, dy: int, n: int, o: int, half: bool, work: int) -> tuple[Launch, ...]:
    """db[o] += Σ_n dy, in two steps of a fixed order through ``work``: a row of o sums for each slab."""
    width = 64 if half else 32
    block = (THREADS, 1, 1)
    return (
        Launch(f"hp_linear_dw_slabs{suffix(half)}", (ceil(o, width), ceil(n, SLAB), 1), block, (dy, n, o, work)),
        Launch("hp_linear_dw_bias", (ceil(o, THREADS), 1, 1), block, (db, n, o, work)),
    )


def _shape(site: Site) -> Shape:
    return Shape(site.size["n"], site.size["o"], site.size["c"])


def _linear_fwd(site: Site) -> Sequence[Launch]:
    at = tuple(site.at[name] for name in ("y", "x", "w", "b", "z"))
    return (product("fwd", at, _shape(site), site.half, site.device),)


def _linear_dx(site: Site) -> Sequence[Launch]:
    at = tuple(site.at[name] for name in ("dx", "dy", "w"))
    return (product("dx", at, _shape(site), site.half, site.device),)


def _linear_dw(site: Site) -> Sequence[Launch]:
    shape, at = _shape(site), site.at
    launches = (product("dw", (at["dw"], at["dy"], at["x"]), shape, site.half, site.device),)
    if not at["db"]:
        return launches
    return launches + bias_gradient(at["db"], at["dy"], shape.n, shape.o, site.half, site.work)


# ---- the end of a model ----------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Some of the tokens whose logits exist at a time: the first, and how many."""

    first: int
    rows: int


def token_blocks(site: Site) -> tuple[Block, ...]:
    """The blocks of ``r`` tokens that linearcrossentropy_fwd goes through, in their order."""
    n, r = site.size["n"], site.size["r"]
    return tuple(Block(first, min(r, n - first)) for first in range(0, n, r))


def loss_rows(site: Site, block: Block) -> Launch:
    """The block's logits become nll and, where they lie, their gradient; a thread has 8 logits or more."""
    at, v = site.at, site.size["v"]
    args = (at["nll"], at["logits"], at["targets"], at["key"], block.first, v, site.reals["scale"])
    threads = min(1024, 32 * ceil(v, 256))
    return Launch(f"hp_linearcrossentropy_rows{suffix(site.half)}", (block.rows, 1, 1), (threads, 1, 1), args)


def loss_total(site: Site) -> Launch:
    """loss = Σ nll in float64."""
    args = (site.at["loss"], site.at["nll"], site.size["n"])
    return Launch("hp_linearcrossentropy_total", (1, 1, 1), (THREADS, 1, 1), args)


def _linearcrossentropy_fwd(site: Site) -> Sequence[Launch]:
    at, c, v = site.at, site.size["c"], site.size["v"]
    width = 2 if site.half else 4
    launches: list[Launch] = []
    for block in token_blocks(site):
        shape, here = Shape(block.rows, v, c), width * block.first * c
        x, dx, logits = at["x"] + here, at["dx"] + here, at["logits"]
        launches += [
            product("fwd", (logits, x, at["w"], 0, 0), shape, site.half, site.device),
            loss_rows(site, block),
            product("dx", (dx, logits, at["w"]), shape, site.half, site.device),
            product("dw", (at["dw"], logits, x), shape, site.half, site.device),
        ]
    return [*launches, loss_total(site)]


# ---- attention -------------------------------------------------------------------------------------------------------

# Head widths that kernels are compiled for -> rows of a tile: forward, backward.
SIMT_ROWS = {64: (64, 64), 128: (64, 32), 256: (32, 16)}
# On the tensor cores: head width -> queries of a stage in the pass over blocks of keys.
TENSOR_QUERIES = {64: 64, 128: 32}
PAD = 4

Step = Literal["fwd", "dx_queries", "dx_keys"]


class Form(NamedTuple):
    """The entry that a call takes, and the rows of its tiles, its threads and bytes of shared memory."""

    entry: str
    rows: int
    threads: int
    shared: int


def _simt(passing: Step, width: int, half: bool) -> Form:
    forward = passing == "fwd"
    rows = SIMT_ROWS[width][0 if forward else 1]
    tiles = 2 if forward else 4
    shared = 4 * (tiles * rows * (width + PAD) + rows * (rows + PAD))
    return Form(f"hp_attention_{passing}_{width}{suffix(half)}", rows, THREADS, shared)


def _tensor(passing: Step, width: int) -> Form:
    tile = 2 * TENSOR_ROWS * width
    queries = TENSOR_QUERIES[width]
    shared = {"fwd": 5 * tile, "dx_queries": 6 * tile, "dx_keys": 2 * tile + 4 * 2 * queries * width + 4 * 4 * queries}
    return Form(f"hp_attention_{passing}_tensor_{width}_h", TENSOR_ROWS, TENSOR_THREADS, shared[passing])


def attention_form(passing: Step, d: int, half: bool) -> Form:
    """Tensor cores for bfloat16 heads whose rows are whole 16 bytes, or else float32 arithmetic."""
    if d > max(SIMT_ROWS):
        raise UserError(
            f"attention on a GPU takes heads of at most {max(SIMT_ROWS)} channels, this model's have {d}: "
            'give it more heads or run it with device.backend = "cpu"'
        )
    if half and d % 8 == 0 and d <= max(TENSOR_QUERIES):
        return _tensor(passing, next(width for width in TENSOR_QUERIES if d <= width))
    return _simt(passing, next(width for width in SIMT_ROWS if d <= width), half)


def _launch(form: Form, heads: int, t: int, args: tuple[int, ...]) -> Launch:
    grid: Size = (heads, ceil(t, form.rows), 1)
    return Launch(form.entry, grid, (form.threads, 1, 1), args, form.shared)


def _attention_fwd(site: Site) -> Sequence[Launch]:
    n, t, h, k, d = (site.size[name] for name in ("n", "t", "h", "k", "d"))
    args = (site.at["y"], site.at["lse"], site.at["qkv"], t, h, k, d)
    return (_launch(attention_form("fwd", d, site.half), n // t * h, t, args),)


def _attention_dx(site: Site) -> Sequence[Launch]:
    n, t, h, k, d = (site.size[name] for name in ("n", "t", "h", "k", "d"))
    at = site.at
    delta = Launch(
        f"hp_attention_dx_delta{suffix(site.half)}",
        (ceil(n * h, THREADS // 32), 1, 1),
        (THREADS, 1, 1),
        (at["dy"], at["y"], n, h, d, site.work),
    )
    args = (at["dqkv"], at["dy"], at["lse"], at["qkv"], t, h, k, d, site.work)
    return (
        delta,
        _launch(attention_form("dx_queries", d, site.half), n // t * h, t, args),
        _launch(attention_form("dx_keys", d, site.half), n // t * k, t, args),
    )


LAUNCHERS: dict[str, Launcher] = {
    "linear_fwd": _linear_fwd,
    "linear_dx": _linear_dx,
    "linear_dw": _linear_dw,
    "linearcrossentropy_fwd": _linearcrossentropy_fwd,
    "attention_fwd": _attention_fwd,
    "attention_dx": _attention_dx,
}
