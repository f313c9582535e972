"""Which products are computed in which narrow numbers, as data; and the definition of these numbers in numpy.

A ``Recipe`` names formats, scales and what they need for each of the three products of a linear map. ``quantize`` and
``dequantize`` say to the bit what native/cuda/quantize.cu makes: the tests hold it against them. The sources of the
recipes: Micikevicius et al. 2022 (FP8), DeepSeek-AI 2024 (DeepSeek-V3, blocks), Mishra et al. 2025 (MXFP8), NVIDIA 2025
(pretraining in NVFP4), OCP Microscaling Formats 1.0 (E8M0); which device multiplies them: cuBLAS' documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from hpcpipe.config import UserError

Array = npt.NDArray[Any]
Granularity = Literal["none", "tensor", "rows", "blocks", "mx", "nv"]
Rounding = Literal["nearest", "stochastic"]

TINY = np.float32(2.0**-126)  # the least normal float32; what is below counts as zero
LARGEST_MULTIPLIER = np.float32(2.0**126)
TILE = 128


# ---- the formats -----------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """A sign, exponent and mantissa bits; ``largest`` number and its code, and the code of what is no number."""

    name: str
    exponent: int
    mantissa: int
    largest: float
    top: int
    nan: int  # where there is none, the largest number stands for it, as the instruction has it

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


E4M3 = Format("e4m3", 4, 3, 448.0, 0x7E, 0x7F)
E5M2 = Format("e5m2", 5, 2, 57344.0, 0x7B, 0x7F)
E2M1 = Format("e2m1", 2, 1, 6.0, 0x7, 0x7)
FORMATS = {f.name: f for f in (E4M3, E5M2, E2M1)}


def encode(x: Array, format: Format) -> Array:
    """Codes (uint8) of float32 numbers: nearest, ties to even, saturating; the sign of a zero is kept."""
    x = np.asarray(x, dtype=np.float32)
    bias, value = 2 ** (format.exponent - 1) - 1, np.abs(x).astype(np.float64)
    normal = np.maximum(np.floor(np.log2(np.maximum(value, 2.0**-200))), 1.0 - bias)  # exponent of the last digit
    normal = np.minimum(normal, 2.0**format.exponent)
    digits = np.rint(value * 2.0 ** (format.mantissa - normal))  # exact but for this rounding
    exponent = normal + bias
    with np.errstate(invalid="ignore"):
        # A full set of digits carries into the exponent by itself; without the hidden one the exponent field is 0.
        code = digits + (exponent - 1) * 2**format.mantissa
        code = np.where(np.isfinite(value), np.minimum(code, format.top), format.top).astype(np.int64)
    sign = np.signbit(x).astype(np.int64) << (format.bits - 1)
    return np.where(np.isnan(x), format.nan, code | sign).astype(np.uint8)


def decode(codes: Array, format: Format) -> Array:
    """The float32 numbers that codes mean."""
    code = np.asarray(codes).astype(np.int64)
    bias, size = 2 ** (format.exponent - 1) - 1, 2**format.mantissa
    field, digits = (code & (2 ** (format.bits - 1) - 1)) // size, (code & (size - 1)).astype(np.float64)
    value = np.where(field > 0, (1 + digits / size) * 2.0 ** (field - bias), digits / size * 2.0 ** (1 - bias))
    if format is not E2M1:
        magnitude = code & 0x7F
        value = np.where(magnitude > format.top, np.nan, value)
        value = np.where((format is E5M2) & (magnitude == format.top + 1), np.inf, value)
    return np.where(code >> (format.bits - 1) & 1, -value, value).astype(np.float32)


# ---- scales ----------------------------------------------------------------------------------------------------------

GROUP = {"rows": 128, "mx": 32, "nv": 16}  # elements of a row that share a scale


class Quantized(NamedTuple):
    """Codes uint8 [n, c] (e2m1: one in a byte here, see ``packed``) and their scales.

    tensor: float32 [1];  rows: float32 [n, groups];  blocks: float32 [ceil(n/128), ceil(c/128)];  mx: uint8 [n, groups]
    (E8M0);  nv: uint8 [n, groups] (E4M3) and ``whole``, a float32 for all.
    """

    codes: Array
    scales: Array
    whole: np.float32 = np.float32(1)


def multiplier(amax: Array, largest: float) -> Array:
    """What numbers are multiplied with so that amax becomes ``largest``; 1 for nothing but zeros."""
    amax = np.asarray(amax, dtype=np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        found = np.float32(largest) / amax
    return np.where(amax < TINY, np.float32(1), np.where(found > LARGEST_MULTIPLIER, LARGEST_MULTIPLIER, found))


def _padded(x: Array, rows: int, columns: int) -> Array:
    return np.pad(x, ((0, -len(x) % rows), (0, -x.shape[1] % columns)))


def _amax_of_groups(x: Array, size: int) -> Array:
    """[n, groups]; a NaN wins."""
    amax: Array = np.abs(_padded(x, 1, size)).reshape(len(x), -1, size).max(axis=2)
    return amax


def _spread(values: Array, size: int, x: Array) -> Array:
    """[n, groups] -> [n, c]."""
    return np.repeat(values, size, axis=1)[:, : x.shape[1]]


def exponents(amax: Array, format: Format) -> Array:
    """E8M0 bytes (exponent + 127) of the least powers of two with amax <= largest 2^e; 255 for what is no number."""
    bits = np.asarray(amax, dtype=np.float32).view(np.int32)
    field, digits = bits >> 23, bits & 0x7FFFFF
    over = digits > 0x600000  # both formats' largest number is 1.75 times a power of two
    byte = np.clip(field - round(np.log2(format.largest / 1.75)) + over, 0, 255)
    return np.where(field == 255, 255, np.where(field == 0, 0, byte)).astype(np.uint8)


def powers(bytes: Array) -> Array:
    """2^(byte - 127) in float64, a NaN for 255."""
    return np.where(bytes == 255, np.nan, 2.0 ** (bytes.astype(np.float64) - 127))


def quantize(x: Array, format: Format, granularity: Granularity) -> Quantized:
    """x [n, c], float32, in narrow numbers, scaled along its rows. Each step is one float32 operation, rounded once."""
    x = np.asarray(x, dtype=np.float32)
    x = np.where(np.abs(x) < TINY, np.copysign(np.float32(0), x), x)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        if granularity in ("mx", "nv"):
            return (_quantize_mx if granularity == "mx" else _quantize_nv)(x, format)
        if granularity == "tensor":
            factor = multiplier(np.abs(x).max(initial=0)[None, None], format.largest)
            all_factors, scales = factor, (1 / factor)[0]
        elif granularity == "rows":
            factor = multiplier(_amax_of_groups(x, TILE), format.largest)
            all_factors, scales = _spread(factor, TILE, x), 1 / factor
        else:
            padded = np.abs(_padded(x, TILE, TILE))
            tall, wide = padded.shape[0] // TILE, padded.shape[1] // TILE
            factor = multiplier(padded.reshape(tall, TILE, wide, TILE).max(axis=(1, 3)), format.largest)
            all_factors, scales = _spread(np.repeat(factor, TILE, axis=0)[: len(x)], TILE, x), 1 / factor
        return Quantized(encode(x * all_factors, format), scales)


def _quantize_mx(x: Array, format: Format) -> Quantized:
    scales = exponents(_amax_of_groups(x, 32), format)
    factor = (1 / powers(scales)).astype(np.float32)
    return Quantized(encode(x * _spread(factor, 32, x), format), scales)


def _quantize_nv(x: Array, format: Format) -> Quantized:
    whole = multiplier(np.abs(x).max(initial=0), E4M3.largest * format.largest)
    scales = encode(_amax_of_groups(x, 16) / np.float32(format.largest) * whole, E4M3)
    factor = whole / decode(scales, E4M3)
    factor = np.where(scales == 0, np.float32(0), np.where(factor > LARGEST_MULTIPLIER, LARGEST_MULTIPLIER, factor))
    return Quantized(encode(x * _spread(factor, 16, x), format), scales, np.float32(1 / whole))


def dequantize(q: Quantized, format: Format, granularity: Granularity) -> Array:
    """What codes and scales mean, in float64 [n, c]."""
    values = decode(q.codes, format).astype(np.float64)
    if granularity == "mx":
        scales = powers(q.scales)
    else:
        scales = (decode(q.scales, E4M3) if granularity == "nv" else q.scales).astype(np.float64)
    if granularity == "blocks":
        scales = np.repeat(scales, TILE, axis=0)[: len(values)]
    if granularity != "tensor":
        scales = _spread(scales, GROUP.get(granularity, TILE), values)
    with np.errstate(invalid="ignore"):
        found: Array = values * scales * float(q.whole)
    return found


# ---- how they lie in memory ------------------------------------------------------------------------------------------


def packed(codes: Array) -> Array:
    """e2m1: two codes in a byte, the first one low; rows are padded with 0."""
    even = _padded(codes, 1, 2)
    return even[:, ::2] | even[:, 1::2] << 4


def laid(scales: Array, granularity: Granularity) -> Array:
    """Scales as cuBLASLt reads them, flat.

    rows: a column of scales for each group of 128;  blocks: rows padded to a multiple of 4;  mx, nv: tiles of 128 rows
    by 4 groups, row r and group k of a tile at (r % 32) 16 + (r / 32) 4 + k, padded with 0 (cuBLAS' documentation, "1D
    block scaling factors layout").
    """
    if granularity == "rows":
        return scales.T.reshape(-1)
    if granularity == "blocks":
        return _padded(scales, 1, 4).reshape(-1)
    if granularity == "tensor":
        return scales
    tiles = _padded(scales, TILE, 4)
    tall, wide = tiles.shape[0] // TILE, tiles.shape[1] // 4
    return tiles.reshape(tall, 4, 32, wide, 4).transpose(0, 3, 2, 1, 4).reshape(-1)


def code_bytes(n: int, c: int, format: Format) -> int:
    """Bytes of the codes of [n, c]."""
    return n * (-(-c // 2) if format is E2M1 else c)


def scale_bytes(n: int, c: int, granularity: Granularity) -> int:
    """Bytes of the scales of [n, c], scaled along its rows, as they are laid."""

    def up(size: int, step: int) -> int:
        return -(-size // step)

    return {
        "none": 0,
        "tensor": 4,
        "rows": 4 * n * up(c, TILE),
        "blocks": 4 * up(n, TILE) * up(c, 4 * TILE) * 4,
        "mx": up(n, TILE) * TILE * up(c, 128) * 4,
        "nv": up(n, TILE) * TILE * up(c, 64) * 4,
    }[granularity]


# ---- the recipes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operand:
    """How one factor of a product is made narrow. ``hadamard``: size of the random rotation before it, 0 for none."""

    format: str  # of FORMATS, or "bf16": stays as it is
    granularity: Granularity
    rounding: Rounding = "nearest"
    hadamard: int = 0


BF16 = Operand("bf16", "none")


@dataclass(frozen=True)
class Recipe:
    """What the three products of a linear map multiply: fwd (x, w), dx (dy, w), dw (dy, x).

    ``transposed``: what is multiplied along its other dimension needs a second, transposed copy, scaled along that:
    w for dx, dy and x for dw. ``scale``: format of the scales. ``history``: steps whose amax a scale is made from, 0:
    that of the numbers themselves. ``kept``: linear maps that stay in bfloat16. ``multiple``: what channels, outputs
    and tokens of a map must be multiples of, or it stays in bfloat16. ``lowest``, ``highest``: compute capabilities.
    """

    name: str
    fwd: tuple[Operand, Operand]
    dx: tuple[Operand, Operand]
    dw: tuple[Operand, Operand]
    scale: str
    lowest: tuple[int, int]
    highest: tuple[int, int] | None = None
    transposed: bool = False
    history: int = 0
    kept: tuple[str, ...] = ()
    multiple: int = 1

    def takes(self, n: int, o: int, c: int) -> bool:
        """Whether a map of these sizes can be computed so."""
        return not (n % self.multiple or o % self.multiple or c % self.multiple)


def _recipe(name: str, x: Operand, w: Operand, dy: Operand, **more: Any) -> Recipe:
    """All three products with each tensor in one form."""
    return Recipe(name, (x, w), (dy, w), (dy, x), **more)


_E4M3 = {g: Operand("e4m3", g) for g in ("tensor", "rows", "blocks", "mx")}
_NV = Operand("e2m1", "nv")
_NV_GRADIENT = Operand("e2m1", "nv", rounding="stochastic")
_ENDS = ("first", "last", "head")  # the first and the last block, and what makes logits

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        _recipe("bf16", BF16, BF16, BF16, scale="none", lowest=(8, 0)),
        # Hopper multiplies FP8 only where both factors lie along the depth.
        _recipe("fp8", _E4M3["tensor"], _E4M3["tensor"], Operand("e5m2", "tensor"), scale="float32", lowest=(8, 9),
                transposed=True, kept=_ENDS, multiple=16),
        # Activations 1 x 128, weights 128 x 128, e4m3 in all directions; in dw both factors are 1 x 128, along tokens.
        _recipe("fp8_block", _E4M3["rows"], _E4M3["blocks"], _E4M3["rows"], scale="float32", lowest=(9, 0),
                highest=(9, 0), transposed=True, kept=_ENDS, multiple=16),
        _recipe("mxfp8", _E4M3["mx"], _E4M3["mx"], _E4M3["mx"], scale="e8m0", lowest=(10, 0), transposed=True,
                kept=_ENDS, multiple=32),
        Recipe("nvfp4", (_NV, _NV), (_NV_GRADIENT, _NV),
               (Operand("e2m1", "nv", rounding="stochastic", hadamard=16), Operand("e2m1", "nv", hadamard=16)),
               scale="e4m3", lowest=(10, 0), transposed=True, kept=_ENDS, multiple=32),
    )
}  # fmt: skip


def recipe_for(name: str, capability: tuple[int, int]) -> Recipe:
    """The recipe of a name on a device of a compute capability; UserError where there is none or it cannot."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r} for products: take one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.lowest <= capability and (recipe.highest is None or capability <= recipe.highest):
        return recipe
    possible = [
        r.name for r in RECIPES.values() if r.lowest <= capability and (r.highest is None or capability <= r.highest)
    ]
    wanted = ".".join(map(str, recipe.lowest)) + ("" if recipe.highest == recipe.lowest else " or later")
    raise UserError(
        f"products in {name} need a device of compute capability {wanted}, this one has "
        f"{capability[0]}.{capability[1]}: take {' or '.join(possible) or 'another device'}"
    )
