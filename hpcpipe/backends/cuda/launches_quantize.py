"""Launches of native/cuda/quantize.cu: a matrix of the compute type in narrow numbers, in both of its directions.

In: addresses, sizes and what a recipe says of the operand. Out: launches, ready to be put before a product. What they
write is defined, to the bit, in recipes.py.
"""

from __future__ import annotations

from typing import NamedTuple

from hpcpipe.backends.cuda.launch import Launch
from hpcpipe.backends.cuda.recipes import E2M1, E4M3, E5M2, FORMATS, Granularity, Operand, code_bytes, scale_bytes

THREADS, TILE = 256, 128
BLOCKS = 1024  # of the first step of a maximum, at most
LINE = 256  # bytes: everything in a layout begins at a multiple, as cuBLASLt likes it


class Narrow(NamedTuple):
    """Where a matrix goes: codes and scales of [n, c] and, transposed, of [c, n]; 0 for what nobody needs.

    ``amax`` and ``whole``: room for a float32 each, where the scale is one of all (tensor) or has such a part (nv):
    with ``tensor``, ``whole`` is the scale. ``work``: WORK bytes for the maximum.
    """

    codes: int = 0
    scales: int = 0
    codes_t: int = 0
    scales_t: int = 0
    amax: int = 0
    whole: int = 0
    work: int = 0


WORK = 4 * BLOCKS


def _up(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE


def layout(
    n: int, c: int, operand: Operand, start: int, along: bool = True, across: bool = False
) -> tuple[Narrow, int]:
    """Addresses from ``start`` on, and the bytes they take in all; ``across``: the transposed copy, too."""
    format, at, places = FORMATS[operand.format], start, []
    for wanted, rows, columns in ((along, n, c), (across, c, n)):
        for nbytes in (code_bytes(rows, columns, format), _own_scales(rows, columns, operand.granularity)):
            places.append(at if wanted and nbytes else 0)
            at += _up(nbytes) if wanted else 0
    if operand.granularity not in ("tensor", "nv"):
        return Narrow(*places), at - start
    whole = Narrow(*places)._replace(amax=at, whole=at + 4, work=at + LINE)
    return whole, whole.work + _up(WORK) - start


def _own_scales(n: int, c: int, granularity: Granularity) -> int:
    """Bytes of the scales that belong to a direction: one of all is in ``whole``."""
    return 0 if granularity == "tensor" else scale_bytes(n, c, granularity)


def amax(to: int, x: int, count: int, half: bool, work: int) -> tuple[Launch, ...]:
    """The largest |x| of ``count`` numbers, as a float32."""
    elements = 8 if half else 4
    blocks = max(1, min(BLOCKS, -(-count // (THREADS * elements * 4))))
    block = (THREADS, 1, 1)
    return (
        Launch(f"hp_quantize_amax_blocks{'_h' if half else ''}", (blocks, 1, 1), block, (x, count, work)),
        Launch("hp_quantize_amax_total", (1, 1, 1), block, (to, blocks, work)),
    )


def quantize(x: int, n: int, c: int, half: bool, operand: Operand, to: Narrow) -> tuple[Launch, ...]:
    """x[n,c] in narrow numbers where ``to`` has places for them; rounded to nearest."""
    if operand.rounding != "nearest" or operand.hadamard or operand.granularity == "none":
        raise ValueError(f"no kernel makes {operand}")
    format = FORMATS[operand.format]
    if (format is E2M1) != (operand.granularity == "nv"):
        raise ValueError(f"{format.name} and scales of {operand.granularity} do not go together")
    launches: tuple[Launch, ...] = ()
    if operand.granularity in ("tensor", "nv"):
        largest = format.largest * (E4M3.largest if operand.granularity == "nv" else 1)
        scale = Launch("hp_quantize_scale", (1, 1, 1), (32, 1, 1), (to.whole, to.amax, largest))
        launches = (*amax(to.amax, x, n * c, half, to.work), scale)
    entry = f"hp_quantize_{operand.granularity}{'_h' if half else ''}"
    grid = (-(-c // TILE), -(-n // TILE), 1)
    args = (to.codes, to.scales, to.codes_t, to.scales_t, x, to.amax, n, c, int(format is E5M2))
    return (*launches, Launch(entry, grid, (THREADS, 1, 1), args, 4 * TILE * (TILE + 1)))
