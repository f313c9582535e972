"""The launches of the kernels that memory limits: element by element, row by row, and the sums over rows.

In: a ``Site``, a call of the table at its addresses. Out: its launches, with grids of a few waves of blocks. Where a
sum is cut into blocks, their number follows from the sizes alone: another device gives the same bits. Entries and what
they expect of a block are in native/cuda (activation, norm, embedding, rope and optimizer).
"""

from __future__ import annotations

import struct

from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launch, Launcher, Site, Size

THREADS = 256  # of a block where nothing else decides
WARP, LARGEST = 32, 1024
WAVES = 2
RESIDENT = 2048  # threads that a multiprocessor holds at once
HELD_FWD, HELD_DX = 4, 2  # 16-byte pieces of a row that a thread keeps, see norm.cu
SUM_ROWS, SUM_BLOCKS, SUM_WARPS = 32, 128, 8  # of the sums over rows: rows at least, blocks at most, warps of a block
GATHER = 128  # threads of embedding_dw
SQUARES_STEP, SQUARES_LEAST, SQUARES_BLOCKS = 4096, 16384, 1024  # of sumsq: numbers at a time and a block, blocks


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two from n on, between two others."""
    return min(most, max(least, 1 << max(n - 1, 0).bit_length()))


def pieces(elements: int, half: bool) -> int:
    """16-byte pieces of a row of the compute type."""
    return ceil_div(elements, 8 if half else 4)


def waves(blocks: int, threads: int, device: Properties) -> int:
    """The grid for so many blocks of work: no more than a few waves, and blocks then go round."""
    return max(1, min(blocks, device.multiprocessors * WAVES * RESIDENT // threads))


def flat(entry: str, site: Site, elements: int, wide: int) -> list[Launch]:
    """Elements alone, ``wide`` of them a thread."""
    blocks = waves(ceil_div(elements, wide * THREADS), THREADS, site.device)
    return [Launch(entry, (blocks, 1, 1), (THREADS, 1, 1), site.args)]


def by_rows(site: Site, rows: int, columns: int) -> list[Launch]:
    """Rows, each by as many threads as it has pieces, up to a block."""
    along = power_of_two(pieces(columns, site.half), 1, THREADS)
    grid = waves(ceil_div(rows, THREADS // along), THREADS, site.device)
    return [Launch(site.entry, (grid, 1, 1), (along, THREADS // along, 1), site.args)]


def activation(site: Site) -> list[Launch]:
    """gelu, add, dropout."""
    return flat(site.entry, site, site.size["n"] * site.size["c"], 8 if site.half else 4)


def conversion(site: Site) -> list[Launch]:
    """narrow, widen, halve: their types do not depend on the compute type."""
    return flat(f"hp_{site.call.kernel}", site, site.size["n"] * site.size.get("c", 1), 8)


def optimizer(site: Site) -> list[Launch]:
    """accumulate, adamw: all float32."""
    return flat(f"hp_{site.call.kernel}", site, site.size["n"], 4)


def swiglu(site: Site) -> list[Launch]:
    return by_rows(site, site.size["n"], site.size["f"])


def token_rows(site: Site) -> list[Launch]:
    """embedding_fwd, position_fwd."""
    return by_rows(site, site.size["n"], site.size["c"])


def position_dw(site: Site) -> list[Launch]:
    return by_rows(site, min(site.size["t"], site.size["n"]), site.size["c"])


def embedding_dw(site: Site) -> list[Launch]:
    """A block for each token and slab of columns."""
    slabs = ceil_div(pieces(site.size["c"], site.half), GATHER)
    return [Launch(site.entry, (site.size["n"], slabs, 1), (GATHER, 1, 1), site.args)]


def _norm(site: Site, held: int) -> list[Launch]:
    along = power_of_two(ceil_div(pieces(site.size["c"], site.half), held), WARP, LARGEST)
    rows = max(1, THREADS // along)
    grid = waves(ceil_div(site.size["n"], rows), along * rows, site.device)
    return [Launch(site.entry, (grid, 1, 1), (along, rows, 1), site.args)]


def norm_fwd(site: Site) -> list[Launch]:
    return _norm(site, HELD_FWD)


def norm_dx(site: Site) -> list[Launch]:
    return _norm(site, HELD_DX)


def norm_dw(site: Site) -> list[Launch]:
    """Blocks of rows and columns into ``work``, then each column's blocks onto dw and db."""
    n, c = site.size["n"], site.size["c"]
    given = [site.at[a.name] for a in site.call.row.buffers if a.role == "in"]
    sums = [site.at[a.name] for a in site.call.row.buffers if a.role == "inout"]
    rows = max(SUM_ROWS, ceil_div(n, SUM_BLOCKS))
    blocks, suffix = ceil_div(n, rows), "_h" if site.half else ""
    across, block = ceil_div(pieces(c, site.half), WARP), (WARP, SUM_WARPS, 1)
    first = Launch(f"hp_{site.call.kernel}_blocks{suffix}", (across, blocks, 1), block, (*given, n, c, rows, site.work))
    total = Launch(
        f"hp_{site.call.kernel}_total", (ceil_div(c, WARP), len(sums), 1), block, (*sums, c, blocks, site.work)
    )
    return [first, total]


def rope(site: Site) -> list[Launch]:
    """A block for each position: all heads of all its sequences. One argument more than the table: theta^(-2/d)."""
    n, t, h, k, d = (site.size[name] for name in ("n", "t", "h", "k", "d"))
    half = d // 2
    ratio: int = struct.unpack("<q", struct.pack("<d", site.reals["theta"] ** (-2.0 / d)))[0]
    along = power_of_two(pieces(half, site.half), 1, THREADS)
    heads = power_of_two(ceil_div(n, t) * (h + k), max(1, WARP // along), THREADS // along)
    grid: Size = (waves(min(t, n), along * heads, site.device), 1, 1)
    return [Launch(site.entry, grid, (along, heads, 1), (*site.args, ratio), 16 * half)]


def sumsq(site: Site) -> list[Launch]:
    n = site.size["n"]
    size = max(SQUARES_LEAST, ceil_div(ceil_div(n, SQUARES_BLOCKS), SQUARES_STEP) * SQUARES_STEP)
    blocks, block = ceil_div(n, size), (THREADS, 1, 1)
    return [
        Launch("hp_sumsq_blocks", (blocks, 1, 1), block, (site.at["x"], n, size, site.work)),
        Launch("hp_sumsq_total", (1, 1, 1), block, (site.at["s"], blocks, site.work)),
    ]


# Row of the table -> its launcher.
LAUNCHERS: dict[str, Launcher] = {
    "embedding_fwd": token_rows, "embedding_dw": embedding_dw, "position_fwd": token_rows,
    "position_dw": position_dw, "layernorm_fwd": norm_fwd, "layernorm_dx": norm_dx, "layernorm_dw": norm_dw,
    "rmsnorm_fwd": norm_fwd, "rmsnorm_dx": norm_dx, "rmsnorm_dw": norm_dw, "gelu_fwd": activation,
    "gelu_dx": activation, "swiglu_fwd": swiglu, "swiglu_dx": swiglu, "rope_fwd": rope, "rope_dx": rope,
    "add_fwd": activation, "dropout_fwd": activation, "narrow": conversion, "widen": conversion,
    "halve": conversion, "accumulate": optimizer, "sumsq": sumsq, "adamw_step": optimizer,
    "adamw_try": optimizer, "adamw_keep": optimizer,
}  # fmt: skip
