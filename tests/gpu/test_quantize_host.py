"""The quantizers of native/cuda/quantize.cu, run on the host, against their definition: every byte that they write."""

from __future__ import annotations

import secrets

import numpy as np
import pytest

from hpcpipe.backends.cuda.launches_quantize import Narrow, layout, quantize
from hpcpipe.backends.cuda.recipes import (
    E2M1,
    E4M3,
    FORMATS,
    RECIPES,
    Granularity,
    Operand,
    code_bytes,
    laid,
    packed,
    scale_bytes,
)
from hpcpipe.backends.cuda.recipes import quantize as definition
from tests.gpu.host import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no g++ on the PATH: kernels cannot run on the host")

KINDS: list[tuple[str, Granularity]] = [
    *((format, kind) for format in ("e4m3", "e5m2") for kind in ("tensor", "rows", "blocks", "mx")),
    ("e2m1", "nv"),
]
SHAPES = [(1, 1), (3, 37), (128, 128), (129, 40), (40, 257), (200, 520), (300, 96)]
PATTERN, AROUND = 0xA5, 256


@pytest.fixture(scope="module")
def library() -> build.Library:
    return build.library(build.build(build.SOURCES / "quantize.cu"))


def halves(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16 numbers, which x are already."""
    return (np.ascontiguousarray(x).view(np.uint32) >> 16).astype(np.uint16)


def inputs(n: int, c: int, seed: int) -> np.ndarray:
    """Numbers that are bfloat16: of many sizes, with whole groups of zeros and both zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, c)) * 2.0 ** rng.integers(-12, 4, (n, c // 16 + 1)).repeat(16, axis=1)[:, :c]
    x[rng.random((n, c)) < 0.05] = 0
    x[::5, : c // 2] = -0.0
    x[-1, 1:] = 1e-39  # subnormal: counts as zero
    return (np.float32(x).view(np.uint32) & 0xFFFF0000).view(np.float32)


def execute(
    library: build.Library, x: np.ndarray, operand: Operand, half: bool, order: int = build.FORWARD, **copies: bool
) -> tuple[np.ndarray, Narrow, int]:
    """The memory that a quantizer has written, where things lie in it, and where it begins."""
    n, c = x.shape
    source = np.ascontiguousarray(halves(x) if half else x)
    aligned = np.zeros(source.nbytes + 64, np.uint8)
    start = -aligned.ctypes.data % 64
    aligned[start : start + source.nbytes] = source.reshape(-1).view(np.uint8)
    size = layout(n, c, operand, 0, **copies)[1]
    memory = np.full(size + 3 * AROUND, PATTERN, np.uint8)
    base = memory.ctypes.data + AROUND + -memory.ctypes.data % AROUND
    to, _ = layout(n, c, operand, base, **copies)
    for launch in quantize(aligned.ctypes.data + start, n, c, half, operand, to):
        library.run(launch.entry, launch.grid, launch.block, launch.args, launch.shared, order)
    return memory, to, memory.ctypes.data


def compare(memory: np.ndarray, begins: int, at: tuple[int, int], x: np.ndarray, operand: Operand) -> np.ndarray:
    """Codes and scales of one direction, and which bytes of the memory they are."""
    format, granularity = FORMATS[operand.format], operand.granularity
    want, seen = definition(x, format, granularity), np.zeros(memory.size, bool)
    codes = packed(want.codes) if format is E2M1 else want.codes
    for address, value in zip(at, (codes, laid(want.scales, granularity)), strict=True):
        if address:
            span = slice(address - begins, address - begins + value.nbytes)
            seen[span] = True
            np.testing.assert_array_equal(memory[span], np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    return seen


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("n", "c"), SHAPES)
@pytest.mark.parametrize(("format", "granularity"), KINDS)
def test_every_byte_is_the_definitions(
    library: build.Library, format: str, granularity: Granularity, n: int, c: int, half: bool
) -> None:
    seed, operand = secrets.randbits(32), Operand(format, granularity)
    x = inputs(n, c, seed)
    memory, to, begins = execute(library, x, operand, half, along=True, across=True)
    told = f"inputs of seed {seed}"
    seen = compare(memory, begins, (to.codes, to.scales), x, operand)
    seen |= compare(memory, begins, (to.codes_t, to.scales_t), np.ascontiguousarray(x.T), operand)
    if to.whole:
        want = definition(x, FORMATS[format], granularity)
        whole = want.scales[0] if granularity == "tensor" else want.whole
        assert memory[to.whole - begins :][:4].view(np.float32)[0] == whole, told
        assert memory[to.amax - begins :][:4].view(np.float32)[0] == np.abs(x).max(), told
        seen[to.amax - begins : to.work - begins + 4096] = True
    assert (memory[~seen] == PATTERN).all(), f"something else was written, {told}"
    again, other, start = execute(library, x, operand, half, 2 + seed % 1000, along=True, across=True)
    for place, twin, nbytes in (
        (to.codes, other.codes, code_bytes(n, c, FORMATS[format])),
        (to.scales, other.scales, scale_bytes(n, c, granularity)),
    ):
        if place:
            same = memory[place - begins :][:nbytes].tobytes() == again[twin - start :][:nbytes].tobytes()
            assert same, f"other bytes in another order of threads, {told}"


@pytest.mark.parametrize(("format", "granularity"), KINDS)
def test_one_direction_alone(library: build.Library, format: str, granularity: Granularity) -> None:
    x, operand = inputs(130, 70, 3), Operand(format, granularity)
    memory, to, begins = execute(library, x, operand, True, along=False, across=True)
    assert to.codes == 0 == to.scales
    assert compare(memory, begins, (to.codes_t, to.scales_t), np.ascontiguousarray(x.T), operand).any()
    memory, to, begins = execute(library, x, operand, True)
    assert to.codes_t == 0 == to.scales_t
    assert compare(memory, begins, (to.codes, to.scales), x, operand).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("format", "granularity"), KINDS)
def test_what_is_no_number_is_not_hidden(
    library: build.Library, format: str, granularity: Granularity, bad: float
) -> None:
    x, operand = inputs(20, 150, 4), Operand(format, granularity)
    x[3, 141] = bad
    memory, to, begins = execute(library, x, operand, False)
    want = definition(x, FORMATS[format], granularity)
    codes = packed(want.codes) if granularity == "nv" else want.codes
    np.testing.assert_array_equal(memory[to.codes - begins :][: codes.size], codes.reshape(-1))
    if granularity in ("mx", "nv"):
        scales = laid(want.scales, granularity)
        np.testing.assert_array_equal(memory[to.scales - begins :][: scales.size], scales)
    elif granularity != "tensor":
        scales = laid(want.scales, granularity)
        found = memory[to.scales - begins :][: scales.nbytes].view(np.float32)
        np.testing.assert_array_equal(found, scales)
        assert not np.isfinite(found).all()
    if to.whole:
        assert not np.isfinite(memory[to.whole - begins :][:4].view(np.float32)[0])


def test_all_floats_near_the_codes(library: build.Library) -> None:
    """Midpoints and their neighbours: amax is the largest number of the format, so that nothing is scaled."""
    for name in ("e4m3", "e5m2"):
        format = FORMATS[name]
        value = np.unique(np.abs(np.arange(0, format.top + 1, dtype=np.uint8).astype(np.int64)))
        exact = np.sort(np.unique(np.float32([_meaning(int(v), format.mantissa, format.exponent) for v in value])))
        middle = (exact[1:] + exact[:-1]) / 2
        x = np.concatenate([exact, middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
        x = np.concatenate([x, -x])[None, :]
        memory, to, begins = execute(library, x, Operand(name, "tensor"), False)
        want = definition(x, format, "tensor").codes
        np.testing.assert_array_equal(memory[to.codes - begins :][: want.size], want[0])


def _meaning(code: int, mantissa: int, exponent: int) -> float:
    field, digits, bias = code >> mantissa, code & (2**mantissa - 1), 2 ** (exponent - 1) - 1
    return (2**mantissa * (field > 0) + digits) * 2.0 ** (max(field, 1) - bias - mantissa)


def test_what_no_kernel_makes_is_refused() -> None:
    for operand in (RECIPES["nvfp4"].dx[0], RECIPES["nvfp4"].dw[1]):
        with pytest.raises(ValueError, match="no kernel makes"):
            quantize(0, 128, 128, True, operand, Narrow())
    with pytest.raises(ValueError, match="e2m1 and scales of mx"):
        quantize(0, 128, 128, True, Operand("e2m1", "mx"), Narrow())
    assert layout(4, 8, Operand("e4m3", "rows"), 1024)[0] == Narrow(codes=1024, scales=1024 + 256)
    assert E4M3.largest == 448
