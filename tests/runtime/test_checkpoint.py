"""What is saved is what is read: by any division, by slice, by name, and by plain h5py as whole tensors."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcpipe.checkpoint import layout, master, write
from hpcpipe.checkpoint.headers import Headers
from hpcpipe.checkpoint.layout import KINDS, Part
from hpcpipe.checkpoint.read import Checkpoint, complete, newest_good
from hpcpipe.config import UserError
from tests.runtime.checkpoint_state import SHAPES, by_axis, by_tensor, load, piece, same, save, state, unsynced  # noqa: F401

DIVISIONS = {
    "one shard": by_tensor(1),
    "stages": by_tensor(3),
    "rows": by_axis(4, 0),
    "columns": by_axis(2, 1),
    "more shards than rows": by_axis(11, 0),
}


@pytest.mark.parametrize("divide", DIVISIONS.values(), ids=DIVISIONS.keys())
def test_round_trip(tmp_path, divide):
    values = state(1)
    folder = save(tmp_path, 20, values, divide, config='out = "x"\n', schedule="F0.0 " * 50_000)
    for path in (tmp_path, folder, folder / "master.h5"):
        found = Checkpoint.open(path)
        assert found.path == folder and found.step == 20 and found.verify() == []
    assert same(load(found), values)
    assert found.tensors == {name: (shape, np.dtype("float32")) for name, shape in SHAPES.items()}
    assert found.attributes["schedule"] == "F0.0 " * 50_000 and found.attributes["loss"] == 2.5
    assert found.attributes["version.h5py"] == h5py.__version__


@st.composite
def boxes(draw, shape):
    """A random partition of ``shape`` into boxes, by cutting again and again."""
    todo, done = [((0,) * len(shape), shape)], []
    while todo:
        start, extent = todo.pop()
        axis = draw(st.integers(0, len(shape) - 1))
        if extent[axis] == 1 or len(done) + len(todo) > 8 or not draw(st.booleans()):
            done.append((start, extent))
            continue
        at = draw(st.integers(1, extent[axis] - 1))
        low = tuple(at if d == axis else n for d, n in enumerate(extent))
        high = tuple(n - at if d == axis else n for d, n in enumerate(extent))
        todo += [(start, low), (tuple(s + at if d == axis else s for d, s in enumerate(start)), high)]
    return done


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple))
def test_any_division_any_slice(tmp_path_factory, data, shape):
    """Each element comes from where it lies, whatever the boxes; a whole read takes each byte of the shards once."""
    array = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    shards: list[list[write.Piece]] = [[], [], []]
    for start, extent in data.draw(boxes(shape)):
        shards[data.draw(st.integers(0, 2))].append(piece(("parameter", "a.b"), array, start, extent))
    folder = tmp_path_factory.mktemp("run") / "step_00000001"
    write.commit(folder, [write.write_shard(folder, i, pieces) for i, pieces in enumerate(shards)], {})
    found = Checkpoint.open(folder)
    assert found.verify() == [] and found.step == 1
    ends = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    box = tuple(slice(*e) for e in ends)[: data.draw(st.integers(0, len(shape)))]
    np.testing.assert_array_equal(found.read("parameter", "a.b", slices=box), array[box])
    wide = np.zeros((*shape, 2))[..., 0]  # wider type, holes between the elements
    assert found.read("parameter", "a.b", wide) is wide
    np.testing.assert_array_equal(wide, array)
    with h5py.File(folder / "master.h5", locking=False) as f:
        np.testing.assert_array_equal(f["parameters/a/b"][box], array[box])


def test_each_byte_is_read_once(tmp_path, monkeypatch):
    """Saved by columns on two, loaded by rows on three: together they read the state's bytes, no more."""
    values = state(2)
    found = Checkpoint.open(save(tmp_path, 1, values, by_axis(2, 1)))
    count, preadv = 0, os.preadv

    def counting(*args):
        nonlocal count
        got = preadv(*args)
        count += got
        return got

    monkeypatch.setattr(os, "preadv", counting)
    for (kind, name), array in values.items():
        cuts = [array.shape[0] * i // 3 for i in range(4)]
        for low, high in itertools.pairwise(cuts):
            out = np.empty_like(array[low:high])
            found.read(kind, name, out, (slice(low, high),))
            np.testing.assert_array_equal(out, array[low:high])
    assert count == sum(a.nbytes for a in values.values())


def test_large_tensor_over_many_blocks(tmp_path):
    array = np.arange(3_000_001, dtype=np.float32)
    pieces = [
        piece(("parameter", "w"), array, (0,), (2_000_000,)),
        piece(("parameter", "w"), array, (2_000_000,), (1_000_001,)),
    ]
    folder = tmp_path / "step_00000001"
    record = write.write_shard(folder, 0, iter(pieces))
    write.commit(folder, [record], {})
    found = Checkpoint.open(folder)
    assert len(record["blocks"]) == -(-record["bytes"] // 2**20) == 12
    assert found.verify() == [] and same(load(found), {("parameter", "w"): array})


def test_plain_h5py_sees_whole_tensors_wherever_the_folder_goes(tmp_path, monkeypatch):
    values = state(3)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(save(tmp_path / "run", 20, values, by_axis(2, 1)), moved)
    shutil.rmtree(tmp_path / "run")
    decoys = tmp_path / "decoys"
    decoys.mkdir()
    for name in ("shard_0000.h5", "shard_0001.h5"):
        (decoys / name).write_bytes(b"not this one")
    monkeypatch.chdir(decoys)
    with h5py.File(moved / "master.h5") as f:
        for (kind, name), array in values.items():
            dataset = f[f"{KINDS[kind]}/{name.replace('.', '/')}"]
            assert dataset.shape == array.shape and dataset.dtype == np.float32 and dataset.attrs["name"] == name
            np.testing.assert_array_equal(dataset[()], array)
        assert f.attrs["step"] == 20 and "nats per token" in f.attrs["about"]
    monkeypatch.chdir(tmp_path)  # HDF5 looks for a missing source in the working directory, too
    (moved / "shard_0001.h5").unlink()
    with h5py.File(moved / "master.h5") as f:
        seen = f["parameters/embed/weight"][()]
    np.testing.assert_array_equal(seen[:, :4], values["parameter", "embed.weight"][:, :4])
    assert np.isnan(seen[:, 4:]).all()


def test_shards_are_hdf5_files_of_their_own(tmp_path):
    values = state(4)
    folder = save(tmp_path, 1, values, by_tensor(2))
    seen = {}
    for shard in Checkpoint.open(folder).shards:
        with h5py.File(folder / shard.file) as f:
            f.visititems(
                lambda _, d: seen.update({(d.attrs["kind"], d.attrs["name"]): d[()]}) if hasattr(d, "shape") else None
            )
    assert same(seen, values)


@pytest.mark.skipif(not shutil.which("h5dump"), reason="hdf5-tools is not installed")
def test_h5dump_reads_the_master(tmp_path):
    folder = save(tmp_path, 1, state(5))
    command = ["h5dump", "-d", "/parameters/layer/0/norm1/weight", str(folder / "master.h5")]
    assert "H5T_IEEE_F32LE" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_same_state_same_bytes(tmp_path):
    first, second = (save(tmp_path / name, 1, state(6)) for name in "ab")
    assert [s.digest for s in Checkpoint.open(first).shards] == [s.digest for s in Checkpoint.open(second).shards]
    assert (first / "shard_0000.h5").read_bytes() == (second / "shard_0000.h5").read_bytes()


@given(st.lists(st.tuples(st.integers(0, 20_000), st.binary(min_size=1, max_size=9_000)), max_size=12))
def test_headers_are_a_file(writes):
    """Reads give what was written last, zeros elsewhere; ``written`` gives exactly the written bytes."""
    file, want, mask = Headers(), bytearray(32_768), bytearray(32_768)
    for offset, data in writes:
        file.seek(offset)
        assert file.write(data) == len(data) and file.tell() == offset + len(data)
        want[offset : offset + len(data)] = data
        mask[offset : offset + len(data)] = b"\1" * len(data)
    assert file.size == max((o + len(d) for o, d in writes), default=0) == file.seek(0, os.SEEK_END)
    file.seek(5)
    got = bytearray(b"?" * 32_763)
    assert file.readinto(got) == len(got) and got == want[5:]
    copy = bytearray(32_768)
    for offset, data in file.written():
        assert all(mask[offset : offset + len(data)])
        copy[offset : offset + len(data)] = data
    assert copy == want and sum(len(d) for _, d in file.written()) == sum(mask)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "uint8", ">f4"])
def test_other_dtypes(tmp_path, dtype):
    array = np.arange(12).reshape(3, 4).astype(dtype)
    folder = save(tmp_path, 1, {("parameter", "w"): array}, by_axis(2, 0))
    got = Checkpoint.open(folder).read("parameter", "w")
    assert got.dtype == array.dtype.newbyteorder("<")
    np.testing.assert_array_equal(got, array)


def test_newest_is_last_and_unfinished_is_none(tmp_path):
    assert complete(tmp_path / "absent") == [] and newest_good(tmp_path) == (None, [])
    save(tmp_path, 100, state(1))
    save(tmp_path, 20, state(2))
    write.write_shard(write.step_folder(tmp_path, 300), 0, by_tensor(1)(state(3))[0])
    assert [f.name for f in complete(tmp_path)] == ["step_00000020", "step_00000100"]
    found, warnings = newest_good(tmp_path)
    assert found and found.step == 100 and same(load(found), state(1))
    assert len(warnings) == 1 and "step_00000300" in warnings[0] and "never finished" in warnings[0]


def test_wrong_questions_get_sentences(tmp_path):
    folder = save(tmp_path, 20, state(1))
    found = Checkpoint.open(folder)
    with pytest.raises(UserError, match="has no parameter nobody"):
        found.read("parameter", "nobody")
    with pytest.raises(ValueError, match="out is"):
        found.read("parameter", "head.weight", np.empty((37, 7), np.float32))
    with pytest.raises(ValueError, match="out is"):  # narrower: resuming would lose bits
        found.read("parameter", "head.weight", np.empty((37, 8), np.float16))
    with pytest.raises(ValueError, match="step other than 1"):
        found.read("parameter", "head.weight", slices=(slice(0, 9, 2),))
    for path, reason in ((tmp_path / "absent", "does not exist"), (Path(__file__).parent, "no finished checkpoint")):
        with pytest.raises(UserError, match=reason):
            Checkpoint.open(path)
    (folder / "master.h5").unlink()
    with pytest.raises(UserError, match="never finished"):
        Checkpoint.open(folder)


def entry(shard: int, start: tuple[int, ...], extent: tuple[int, ...]) -> Part:
    return Part(shard, start, extent, "parameters/w", 0, 0)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([entry(0, (0, 0), (4, 6))], ""),
        ([entry(0, (0, 0), (4, 3)), entry(1, (0, 3), (4, 3))], ""),
        ([entry(0, (0, 0), (4, 3)), entry(1, (0, 3), (3, 3))], "3 of its 24 elements are in no shard"),
        ([entry(0, (0, 0), (4, 6)), entry(1, (3, 5), (1, 1))], r"\[3:4, 5:6\] of 1 overlap"),
        ([entry(0, (0, 0), (4, 6)), entry(1, (0, 0), (4, 6))], "overlap"),
        ([entry(0, (0, 0), (2, 6)), entry(1, (1, 0), (2, 6))], "overlap"),
        ([entry(0, (0, 1), (4, 6))], "not a box inside"),
        ([entry(0, (-1, 0), (5, 6))], "not a box inside"),
        ([entry(0, (0,), (24,))], "not a box inside"),
        ([], "24 of its 24 elements"),
    ],
)
def test_coverage(parts, reason):
    wrong = layout.problems({("parameter", "w"): layout.Tensor((4, 6), "<f4", tuple(parts))})
    if not reason:
        assert wrong == []
    else:
        with pytest.raises(UserError, match=reason):
            raise UserError(*wrong)


def test_incomplete_or_disagreeing_shards_are_not_committed(tmp_path):
    folder, values = tmp_path / "step_00000001", state(1)
    pieces = by_tensor(1)(values)[0]
    record = write.write_shard(folder, 0, pieces)
    short = {**record, "entries": [{**e, "shape": [e["shape"][0] + 1, *e["shape"][1:]]} for e in record["entries"]]}
    with pytest.raises(UserError, match="in no shard"):
        write.commit(folder, [short], {})
    assert not folder.exists()
    record = write.write_shard(folder, 0, pieces)
    with pytest.raises(UserError, match="all ranks must save the same model"):
        write.commit(folder, [record, short], {})
    assert not folder.exists()
    record = write.write_shard(folder, 0, pieces)
    with (folder / record["file"]).open("ab") as f:
        f.write(b"x")
    with pytest.raises(UserError, match="another job"):
        write.commit(folder, [record], {})


@pytest.mark.parametrize("name", ["", "a..b", "a/b", "a b", ".a", "a@1"])
def test_names_that_nobody_could_find_are_refused(tmp_path, name):
    with pytest.raises(UserError, match="cannot name a tensor"):
        save(tmp_path, 1, {("parameter", name): np.zeros(3, np.float32)})
    assert list(tmp_path.rglob("*")) == []


def test_name_inside_a_name(tmp_path):
    for names in (("a", "a.b"), ("a.b", "a")):
        with pytest.raises(UserError, match=r"a\.b|parameters/a"):
            save(tmp_path, 1, {("parameter", n): np.zeros(3, np.float32) for n in names}, by_tensor(1))
        with pytest.raises(UserError, match=r"a\.b|parameters/a"):
            save(tmp_path, 1, {("parameter", n): np.zeros(3, np.float32) for n in names}, by_tensor(2))
    assert list(tmp_path.rglob("*")) == []


def test_master_says_the_same_twice():
    data = master.to_bytes([], {"step": 3, "text": "ü\n", "loss": float("nan")})
    found = master.from_bytes(data)
    assert found.attributes["step"] == 3 and found.attributes["text"] == "ü\n" and np.isnan(found.attributes["loss"])
    assert found.shards == () and found.layout == {}
