"""The launches of the kernels that memory limits, without a device: whom each thread works for, and with what room."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import pytest

from hpcpipe.backends.cuda import launches_elementwise as launches
from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.launch import Launch, Site
from hpcpipe.backends.kernels import BY_NAME, evaluate, shape_of
from hpcpipe.backends.null import Call, Tensor
from tests.kernels.cases import FAMILIES

HOPPER = Properties("H100", (9, 0), 132, 80 << 30, 79 << 30, 232448, 13000, "0000:19:00.0")
BLACKWELL = HOPPER._replace(name="GB300", capability=(10, 3), multiprocessors=152)
SOURCES = Path(__file__).resolve().parents[2] / "native" / "cuda"
WORK = 1 << 40
FLAT = ("gelu_fwd", "gelu_dx", "add_fwd", "dropout_fwd", "narrow", "widen", "halve", "accumulate", "adamw_step",
        "adamw_try", "adamw_keep")  # fmt: skip
SCALARS = {"eps": 1e-5, "theta": 1e4, "decay": 0.1, "p": 0.1, "salt": 3}


def site(name: str, half: bool = False, device: Properties = HOPPER, **env: float) -> Site:
    """A call whose buffers lie at 1000, 2000, ... in the table's order; optional ones are absent."""
    row = BY_NAME[name]
    env = SCALARS | env
    tensors = [
        None if a.optional else Tensor(i, shape_of(a, env), "h" if a.type == "a" and half else a.type)
        for i, a in enumerate(row.buffers)
    ]
    at = {a.name: 0 if a.optional else 1000 * (i + 1) for i, a in enumerate(row.buffers)}
    ints = tuple(int(env[d]) for d in row.dims + row.ints)
    call = Call(name, tuple(tensors), ints, tuple(float(env[r]) for r in row.reals))
    return Site(call, at, half, WORK, device)


def launched(name: str, half: bool = False, device: Properties = HOPPER, **env: float) -> list[Launch]:
    return list(launches.LAUNCHERS[name](site(name, half, device, **env)))


def threads(launch: Launch) -> int:
    return math.prod(launch.block)


EVERY = [(name, env) for name in launches.LAUNCHERS for env in FAMILIES[name.split("_")[0]]]


def bound_of(entry: str) -> tuple[str, int]:
    """The source of an entry and the largest block it is compiled for."""
    row = entry.removeprefix("hp_").removesuffix("_h")
    for source in SOURCES.glob("*.cu"):
        text = source.read_text()
        names = dict(re.findall(r"#define (\w+) (\d+)", text))
        found = re.search(rf"HP_ENTRY\({row}, (\w+)", text)
        found = found or re.search(rf"__launch_bounds__\((\d+)\)\s+{re.escape(entry)}\(", text)
        if found:
            return source.name, int(names.get(found[1], found[1]))
    raise AssertionError(f"no source has {entry}")


@pytest.mark.parametrize("half", [False, True])
def test_a_device_takes_every_launch(half: bool) -> None:
    for name, env in EVERY:
        row = BY_NAME[name]
        letters = {key: env[key] for key in row.dims + row.ints}
        for launch in launched(name, half, **letters):
            _, most = bound_of(launch.entry)
            assert 32 <= threads(launch) <= most and threads(launch) % 32 == 0
            assert min(launch.grid) >= 1 and max(launch.grid[1:]) <= 65535
            assert launch.shared <= HOPPER.shared


def test_only_rows_with_the_compute_type_have_two_entries() -> None:
    for name, env in EVERY:
        row = BY_NAME[name]
        typed = any(a.type == "a" for a in row.buffers)
        first = launched(name, True, **{key: env[key] for key in row.dims + row.ints})[0]
        assert first.entry.endswith("_h") == typed


@pytest.mark.parametrize("name", FLAT)
def test_elements_share_few_waves_of_blocks(name: str) -> None:
    resident = 2048 // 256 * HOPPER.multiprocessors
    (small,) = launched(name, n=3, c=5)
    (large,) = launched(name, n=1 << 30, c=64)
    assert small.grid == (1, 1, 1) and large.grid == (2 * resident, 1, 1)
    assert small.args == site(name, n=3, c=5).args
    elements = 1 << 20
    blocks = {half: launched(name, half, n=elements, c=1)[0].grid[0] for half in (False, True)}
    wide = {half: elements / blocks[half] / 256 for half in (False, True)}
    if any(a.type == "a" for a in BY_NAME[name].buffers):  # 16 bytes a thread
        assert wide == {False: 4, True: 8}
    else:
        assert wide[False] == wide[True]


@pytest.mark.parametrize("name", ["layernorm_fwd", "rmsnorm_fwd", "layernorm_dx", "rmsnorm_dx"])
def test_a_row_of_a_norm_has_whole_warps_and_a_block_whole_rows(name: str) -> None:
    held = 4 if name.endswith("fwd") else 2
    for half in (False, True):
        for c in (1, 37, 256, 768, 4096, 4100, 8192, 32768, 100000):
            (launch,) = launched(name, half, n=8192, c=c)
            along, rows, _ = launch.block
            pieces = -(-c // (8 if half else 4))
            assert along % 32 == 0 and (along == 1024 or along * held >= pieces)
            assert along == 32 or along // 2 * held < pieces  # no more threads than needed
            assert threads(launch) >= 256 and (rows == 1 or threads(launch) == 256)


def test_sums_over_rows_are_cut_by_sizes_alone_and_fit_their_scratch() -> None:
    for name, kinds in (("layernorm_dw", 2), ("rmsnorm_dw", 1)):
        for n, c in ((1, 1), (31, 7), (33, 100), (4096, 768), (4097, 33), (100000, 4096)):
            for half in (False, True):
                both = [launched(name, half, device, n=n, c=c) for device in (HOPPER, BLACKWELL)]
                assert both[0] == both[1]
                blocks, total = both[0]
                *_, tokens, columns, rows, work = blocks.args
                assert (tokens, columns, work) == (n, c, WORK) and total.args[-1] == WORK
                assert (blocks.grid[1] - 1) * rows < n <= blocks.grid[1] * rows  # none is empty, none is left out
                assert blocks.grid[0] * 32 * (8 if half else 4) >= c and total.grid == (-(-c // 32), kinds, 1)
                assert total.args[kinds : kinds + 2] == (c, blocks.grid[1])
                assert 4 * kinds * blocks.grid[1] * c <= scratch(name, n=n, c=c)


def test_squares_are_cut_by_their_number_alone_and_fit_their_scratch() -> None:
    for n in (1, 16384, 16385, 1 << 24, (1 << 24) + 1, 3_000_000_001):
        blocks, total = launched("sumsq", n=n)
        assert [blocks, total] == launched("sumsq", device=BLACKWELL, n=n)
        count, size = blocks.grid[0], int(blocks.args[2])
        assert size % 4096 == 0 and (count - 1) * size < n <= count * size and count <= 1024
        assert 8 * count <= scratch("sumsq", n=n)
        assert total.args == (1000, count, WORK) and total.grid == (1, 1, 1)


def scratch(name: str, **env: int) -> int:
    """What the table says that a row needs on a GPU."""
    assert BY_NAME[name].device, f"the table gives {name} no scratch on a GPU"
    return evaluate(BY_NAME[name].device, env)


def test_a_position_turns_all_heads_by_angles_from_one_ratio() -> None:
    for d, half, along, heads in ((128, True, 8, 32), (128, False, 16, 16), (2, False, 1, 128), (300, True, 32, 8)):
        (launch,) = launched("rope_fwd", half, n=8192, t=4096, h=32, k=8, d=d, theta=5e5)
        assert launch.block == (along, heads, 1) and launch.shared == 16 * (d // 2)
        assert struct.unpack("<d", struct.pack("<q", launch.args[-1])) == (5e5 ** (-2 / d),)
    (few,) = launched("rope_dx", n=3, t=3, h=1, k=1, d=2)
    assert few.block == (1, 32, 1) and few.grid == (3, 1, 1)


def test_every_token_has_a_block_for_its_embedding() -> None:
    for half, slabs in ((False, 8), (True, 4)):
        (launch,) = launched("embedding_dw", half, n=300, v=50257, c=4096)
        assert launch.grid == (300, slabs, 1) and launch.block == (128, 1, 1)


def test_an_absent_argument_is_the_address_0() -> None:
    (launch,) = launched("adamw_step", n=100)
    assert launch.args == (1000, 2000, 3000, 4000, 0, 6000, 100, 0.1)
    (launch,) = launched("layernorm_dx", n=2, c=64)
    assert launch.args == (1000, 2000, 3000, 4000, 5000, 6000, 0, 2, 64)
