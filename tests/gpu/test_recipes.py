"""Narrow numbers: the definition against ml_dtypes, what scales promise, and what the recipes say of themselves."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from hpcpipe.backends.cuda.recipes import (
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    GROUP,
    RECIPES,
    Format,
    Granularity,
    code_bytes,
    decode,
    dequantize,
    encode,
    exponents,
    laid,
    multiplier,
    packed,
    powers,
    quantize,
    recipe_for,
    scale_bytes,
)
from hpcpipe.config import UserError

THEIRS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
PAIRS: list[tuple[Format, Granularity]] = [
    *((f, g) for f in (E4M3, E5M2) for g in ("tensor", "rows", "blocks", "mx")),
    (E2M1, "nv"),
]


def numbers() -> np.ndarray:
    """Every exponent, many digits, and each format's codes, their midpoints and the neighbours of these."""
    rng = np.random.default_rng(0)
    wide = (rng.uniform(1, 2, 40000) * 2.0 ** rng.integers(-40, 40, 40000)).astype(np.float32)
    exact = np.concatenate([decode(np.arange(2 ** (f.bits - 1)), f) for f in FORMATS.values()])
    exact = np.unique(exact[np.isfinite(exact)])
    points = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf)), wide]
    both = np.concatenate(near)
    return np.concatenate([both, -both, np.zeros(1, np.float32), -np.zeros(1, np.float32)])


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_codes_are_the_nearest(format: Format) -> None:
    x = numbers()
    inside = x[np.abs(x) <= format.largest]
    np.testing.assert_array_equal(encode(inside, format), inside.astype(THEIRS[format.name]).view(np.uint8))
    over = x[np.abs(x) > format.largest]
    top = np.where(np.signbit(over), format.top | 1 << (format.bits - 1), format.top)
    np.testing.assert_array_equal(encode(over, format), top)
    assert list(encode(np.float32([np.inf, -np.inf, np.nan]), format)) == [
        format.top, format.top | 1 << (format.bits - 1), format.nan
    ]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda f: f.name)
def test_codes_mean_what_ml_dtypes_says(format: Format) -> None:
    codes = np.arange(2**format.bits, dtype=np.uint8)
    theirs = codes.view(THEIRS[format.name]).astype(np.float32)
    np.testing.assert_array_equal(decode(codes, format), theirs)
    assert np.nanmax(theirs[np.isfinite(theirs)]) == format.largest == decode(np.array([format.top]), format)[0]


@pytest.mark.parametrize("format", [E4M3, E5M2], ids=lambda f: f.name)
def test_a_power_of_two_is_the_least_that_fits(format: Format) -> None:
    amax = np.abs(numbers())
    amax = amax[amax > 2.0**-100]
    found = powers(exponents(amax, format))
    assert (amax <= format.largest * found).all() and (amax > format.largest * found / 2).all()
    np.testing.assert_array_equal(exponents(np.float32([0, 1e-39, np.nan, np.inf]), format), [0, 0, 255, 255])
    theirs = exponents(amax, format).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(theirs, found)


@pytest.mark.parametrize(("format", "granularity"), PAIRS, ids=lambda v: getattr(v, "name", v))
@pytest.mark.parametrize(("n", "c"), [(1, 1), (3, 300), (130, 257), (200, 64)])
def test_what_was_narrow_is_near(format: Format, granularity: Granularity, n: int, c: int) -> None:
    rng = np.random.default_rng(n)
    x = (rng.standard_normal((n, c)) * 2.0 ** rng.integers(-3, 3, (n, 1))).astype(np.float32)
    q = quantize(x, format, granularity)
    assert q.codes.shape == x.shape and q.codes.dtype == np.uint8
    error = np.abs(dequantize(q, format, granularity) - x)
    # Half a last digit of each number, or of the least that the scale of its group leaves room for.
    step = 2.0 ** -(format.mantissa + 1)
    least = np.abs(x).max() * 2.0 ** (1 - 2**format.exponent + 4) if granularity != "nv" else np.abs(x).max() / 8
    assert (error <= 1.2 * np.maximum(step * np.abs(x), least)).all()
    assert error.max() < np.abs(x).max() / 7
    if n > 100:  # a scale that is too small would saturate, one too large would use few codes
        assert len(np.unique(q.codes)) > 2 ** (format.bits - 1) / (8 if format is E5M2 else 2)


@pytest.mark.parametrize(("format", "granularity"), PAIRS, ids=lambda v: getattr(v, "name", v))
def test_zeros_stay_and_nothing_is_hidden(format: Format, granularity: Granularity) -> None:
    zeros = quantize(np.zeros((2, 40), np.float32), format, granularity)
    assert not zeros.codes.any() and not dequantize(zeros, format, granularity).any()
    x = np.ones((2, 40), np.float32)
    for bad in (np.nan, np.inf):
        x[1, 7] = bad
        assert np.isnan(dequantize(quantize(x, format, granularity), format, granularity)[1, 7])


def test_a_multiplier_has_bounds() -> None:
    found = multiplier(np.float32([0, 1e-40, 2.0**-126, 448, 896, 3.4e38]), 448.0)
    np.testing.assert_array_equal(found[:5], np.float32([1, 1, 2.0**126, 1, 0.5]))
    assert found[5] > 2.0**-126


def test_scales_lie_in_tiles_as_the_library_wants_them() -> None:
    n, groups = 300, 6
    scales = np.arange(n * groups, dtype=np.float64).reshape(n, groups) + 1
    flat = laid(scales, "mx")
    assert flat.size == 384 * 8 and (flat > 0).sum() == n * groups
    for row in (0, 1, 31, 32, 127, 128, 299):
        for k in range(groups):
            # offset of a tile, then (outer % 32) * 16 + (outer / 32) * 4 + inner, tiles of 128 x 4 in rows
            at = (row // 128 * 2 + k // 4) * 512 + row % 32 * 16 + row % 128 // 32 * 4 + k % 4
            assert flat[at] == scales[row, k]


@pytest.mark.parametrize("granularity", ["tensor", "rows", "blocks", "mx", "nv"])
@pytest.mark.parametrize(("n", "c"), [(1, 1), (129, 130), (300, 700)])
def test_bytes_are_those_that_lie_there(granularity: Granularity, n: int, c: int) -> None:
    format = E2M1 if granularity == "nv" else E4M3
    q = quantize(np.ones((n, c), np.float32), format, granularity)
    assert laid(q.scales, granularity).nbytes == scale_bytes(n, c, granularity)
    assert (packed(q.codes) if format is E2M1 else q.codes).nbytes == code_bytes(n, c, format)
    if granularity in GROUP:
        assert q.scales.shape == (n, -(-c // GROUP[granularity]))


def test_the_first_code_of_a_pair_is_low() -> None:
    np.testing.assert_array_equal(packed(np.array([[1, 2, 3]], np.uint8)), [[0x21, 0x03]])


def test_recipes_are_whole() -> None:
    for name, recipe in RECIPES.items():
        assert recipe.name == name
        for operand in (*recipe.fwd, *recipe.dx, *recipe.dw):
            assert (operand.format == "bf16") == (operand.granularity == "none")
            assert operand.format == "bf16" or (operand.format == "e2m1") == (operand.granularity == "nv")
        assert recipe.takes(96, 64, 32) and recipe.takes(97, 64, 32) == (name == "bf16")
    assert [RECIPES["fp8"].dx[0].format, RECIPES["fp8"].fwd[0].format] == ["e5m2", "e4m3"]


def test_a_device_that_cannot_is_named() -> None:
    assert recipe_for("bf16", (8, 0)).name == "bf16"
    assert recipe_for("fp8", (9, 0)).transposed and recipe_for("nvfp4", (10, 3)).scale == "e4m3"
    with pytest.raises(UserError, match=r"mxfp8 need a device of compute capability 10.0 or later, this one has 9.0: "
                       r"take bf16 or fp8 or fp8_block"):  # fmt: skip
        recipe_for("mxfp8", (9, 0))
    with pytest.raises(UserError, match=r"fp8_block need a device of compute capability 9.0, this one has 10.3"):
        recipe_for("fp8_block", (10, 3))
    with pytest.raises(UserError, match=r"no recipe 'fp6'.*take one of bf16, fp8, "):
        recipe_for("fp6", (9, 0))
