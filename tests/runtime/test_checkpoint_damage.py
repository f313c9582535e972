"""Damage of any kind is noticed and named; nothing wrong is ever read as right, and the one before is found."""

from __future__ import annotations

import random
import shutil
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.checkpoint import shard, write
from hpcpipe.checkpoint.read import Checkpoint, newest_good
from hpcpipe.config import UserError
from tests.runtime.checkpoint_state import by_axis, by_tensor, load, same, save, state, unsynced  # noqa: F401


def outcome(folder, values) -> str:
    """noticed by ``open``, ``verify`` or ``read``; "right" if nothing was noticed and the values are right."""
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        return str(error)
    problems = checkpoint.verify()
    for key, array in values.items():
        try:
            assert checkpoint.read(*key).tobytes() == array.tobytes(), "wrong values were read without a word"
        except UserError as error:
            assert problems, "read noticed what verify did not"
            assert " ".join(key) in str(error)
    return "; ".join(problems) or "right"


def test_the_damaged_tensor_and_its_bytes_are_named(tmp_path):
    values = {("parameter", f"w{i}"): np.full(600_000, i, np.float32) for i in range(4)}  # 2.3 MiB each
    folder = save(tmp_path, 1, values, by_tensor(1))
    file = folder / "shard_0000.h5"
    with h5py.File(file) as f:
        at = f["parameters/w2"].id.get_offset() + 4 * 400_000
    with file.open("r+b") as f:
        f.seek(at)
        f.write(b"\x01")
    (problem,) = Checkpoint.open(folder).verify()
    assert str(file) in problem and "parameter w2" in problem and "parameter w1" not in problem and "w3" not in problem
    low = at // shard.BLOCK * shard.BLOCK
    assert f"bytes {low} to {low + shard.BLOCK}" in problem
    assert Checkpoint.open(folder).read("parameter", "w1")[0] == 1
    with pytest.raises(UserError, match="parameter w2 has CRC"):
        Checkpoint.open(folder).read("parameter", "w2")


@pytest.mark.parametrize("name", ["shard_0001.h5", "master.h5"])
def test_cut_garbled_or_replaced_files(tmp_path, name):
    values = state(1)
    folder = save(tmp_path, 20, values)
    other = save(tmp_path / "other", 20, state(2))
    good, rng = (folder / name).read_bytes(), random.Random(3)
    lengths = [0, 1, 511, 512, 513, len(good) - 1] + [rng.randrange(len(good)) for _ in range(30)]
    bads = [good[:n] for n in lengths] + [rng.randbytes(len(good)) for _ in range(5)]
    bads += [good + b"\0", bytes(len(good)), good[:512] + good[:-512], (other / "shard_0001.h5").read_bytes(), b"hello"]
    for bad in bads:
        (folder / name).write_bytes(bad)
        assert name in outcome(folder, values)


def test_missing_shard_folder_in_its_place_and_swapped_shards(tmp_path):
    values = state(1)
    folder = save(tmp_path, 20, values, by_axis(2, 1))  # both shards have the same size
    one, two = folder / "shard_0000.h5", folder / "shard_0001.h5"
    one.rename(tmp_path / "x")
    assert "shard_0000.h5 is missing; it holds parameter embed.weight, moment1" in outcome(folder, values)
    one.mkdir()
    assert "shard_0000.h5" in outcome(folder, values)
    one.rmdir()
    two.rename(one)
    (tmp_path / "x").rename(two)
    said = outcome(folder, values)
    assert "shard_0000.h5" in said and "shard_0001.h5" in said


def test_master_of_another_step_or_version(tmp_path):
    values = state(1)
    folder, other = save(tmp_path, 20, values), save(tmp_path, 40, state(2))
    good = (folder / "master.h5").read_bytes()
    shutil.copy(other / "master.h5", folder)
    assert "shard_0000.h5 is damaged" in outcome(folder, values)
    (folder / "master.h5").write_bytes(good)
    assert outcome(folder, values) == "right"


def test_values_that_changed_while_they_were_written(tmp_path, monkeypatch):
    """What reaches the file is not what was summed in memory: the sums are those of what was meant."""
    pwrite = shard.os.pwrite

    def wrong(fd, data, offset):
        return pwrite(fd, bytes(data).replace(np.float32(7).tobytes(), np.float32(8).tobytes()), offset)

    monkeypatch.setattr(shard.os, "pwrite", wrong)
    folder = save(tmp_path, 1, {("parameter", "w"): np.full(9, 7, np.float32)}, by_tensor(1))
    (problem,) = Checkpoint.open(folder).verify()
    assert "is damaged in bytes 0 to" in problem and problem.endswith(": parameter w")
    with pytest.raises(UserError, match="has CRC"):
        Checkpoint.open(folder).read("parameter", "w")


def test_a_tensor_whose_own_sum_is_wrong(tmp_path):
    """A writer whose arithmetic fails: every block is as it was written, but the tensor is not as it was meant."""
    folder = tmp_path / "step_00000001"
    record = write.write_shard(folder, 0, by_tensor(1)({("parameter", "w"): np.full(9, 7, np.float32)})[0])
    record["entries"][0]["crc32"] ^= 1
    write.commit(folder, [record], {})
    (problem,) = Checkpoint.open(folder).verify()
    assert "other values than were meant to be written: parameter w" in problem


@settings(max_examples=60)
@given(st.lists(st.binary(max_size=3000), max_size=5), st.integers(0, 2**31))
def test_sums_of_stretches_make_the_sum_of_all(stretches, size):
    crc = 0
    for stretch in stretches:
        crc = shard.combined(crc, zlib.crc32(stretch), len(stretch))
    assert crc == zlib.crc32(b"".join(stretches))
    once = shard.combined(crc, 0, size)  # x^(8 size) is a product of powers: in two parts it must be the same
    assert shard.combined(shard.combined(crc, 0, size // 3), 0, size - size // 3) == once


def test_blocks_are_summed_from_what_was_written(tmp_path):
    """In any order, with holes, across blocks; and what is written twice is not summed by guess."""
    rng, sums, file = random.Random(8), shard.Sums(), tmp_path / "file"
    want, at, stretches = bytearray(3 * shard.BLOCK + 12_345), 77, []
    while at < len(want):
        size = min(rng.choice([1, 100, 300_000, 2_000_000]), len(want) - at)
        stretches.append((at, rng.randbytes(size)))
        want[at : at + size] = stretches[-1][1]
        at += size + rng.choice([0, 5, 4096])
    rng.shuffle(stretches)
    with file.open("w+b") as f:
        for offset, data in stretches:
            assert shard.write_at(f.fileno(), memoryview(data), offset, sums) == zlib.crc32(data)
        f.truncate(len(want))
    assert file.read_bytes() == want
    assert sums.blocks(len(want)) == [zlib.crc32(want[i : i + shard.BLOCK]) for i in range(0, len(want), shard.BLOCK)]
    sums.add(stretches[0][0], 1, 0)
    with pytest.raises(ValueError, match="was written twice"):
        sums.blocks(len(want))


def test_newest_good_falls_back_and_says_so(tmp_path):
    for step in (20, 40, 60):
        save(tmp_path, step, state(step))
    (write.step_folder(tmp_path, 60) / "master.h5").write_bytes(b"")
    file = write.step_folder(tmp_path, 40) / "shard_0001.h5"
    bad = bytearray(file.read_bytes())
    bad[-3] ^= 16
    file.write_bytes(bad)
    found, warnings = newest_good(tmp_path)
    assert found and found.step == 20 and same(load(found), state(20))
    assert ["step_00000060" in w or "step_00000040" in w for w in warnings] == [True, True]
    assert "shard_0001.h5 is damaged in bytes" in warnings[1]
    shutil.rmtree(write.step_folder(tmp_path, 20))
    assert newest_good(tmp_path)[0] is None


def test_ranks_can_share_the_proof(tmp_path):
    folder = save(tmp_path, 20, state(1), by_tensor(3))
    (folder / "shard_0001.h5").unlink()
    found = Checkpoint.open(folder)
    assert [len(found.verify([i])) for i in range(3)] == [0, 1, 0]
    assert len(found.verify(deep=False)) == 1
