"""A checkpoint in one plain file, and beside another one."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcpipe.__main__ import main
from hpcpipe.checkpoint import inspect
from hpcpipe.checkpoint.compare import compare
from hpcpipe.checkpoint.layout import path
from hpcpipe.checkpoint.merge import merge
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError
from tests.runtime.checkpoint_state import by_axis, save, state


@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_a_merged_file_holds_everything_and_needs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    monkeypatch.setattr(inspect, "STREAM", piece)
    values = state(3)
    folder = save(tmp_path / "run", 20, values, by_axis(3, 0), loss=1.5)
    assert merge(str(tmp_path / "run"), str(tmp_path / "one.h5")) == folder
    for file in folder.iterdir():
        file.unlink()
    with h5py.File(tmp_path / "one.h5") as f:
        for (kind, name), value in values.items():
            dataset = f[path(kind, name)]
            assert not dataset.is_virtual and dataset.attrs["name"] == name
            assert dataset[()].tobytes() == value.tobytes()
        assert f.attrs["step"] == 20 and f.attrs["loss"] == 1.5 and "one file" in f.attrs["about"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.h5", "run"]


def test_what_is_damaged_or_there_is_not_merged(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 20, state(3))
    (tmp_path / "there.h5").touch()
    with pytest.raises(UserError, match=r"there.h5 is there already; choose another name"):
        merge(str(folder), str(tmp_path / "there.h5"))
    with pytest.raises(UserError, match=r"cannot be written .*; nothing of it is left"):
        merge(str(folder), str(tmp_path / "none" / "one.h5"))
    shard = next(folder.glob("shard_*"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"is not merged: .* is damaged in bytes"):
        merge(str(folder), str(tmp_path / "one.h5"))
    assert not (tmp_path / "one.h5").exists()


@pytest.mark.parametrize("piece", [1 << 20, 5])
def test_a_change_is_measured_whatever_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(inspect, "STREAM", piece)
    before = state(3)
    after = {key: value.copy() for key, value in before.items()}
    names = [name for kind, name in before if kind == "parameter"]
    moved = after["parameter", names[0]]
    moved *= np.float32(1.5)
    one, two = save(tmp_path / "a", 20, before, by_axis(2, 0)), save(tmp_path / "b", 40, after)
    found = json.loads(compare(str(one), str(two), json=True))
    rows = {row["name"]: row for row in found["tensors"]}
    difference = moved.astype(float) - before["parameter", names[0]].astype(float)
    assert not found["equal"] and rows.keys() == set(names)
    assert rows[names[0]]["relative"] == pytest.approx(0.5, rel=1e-6)
    assert rows[names[0]]["max"] == pytest.approx(np.abs(difference).max())
    assert rows[names[0]]["rms"] == pytest.approx(np.sqrt((difference**2).mean()))
    assert all(rows[name]["equal"] and rows[name]["relative"] == 0 for name in names[1:])
    assert json.loads(compare(str(one), str(save(tmp_path / "c", 60, before)), json=True))["equal"]


def test_tensors_of_one_side_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = {("parameter", "a"): np.ones((2, 3), np.float32), ("parameter", "b"): np.ones(4, np.float32)}
    two = {("parameter", "a"): np.ones((3, 2), np.float32), ("parameter", "c"): np.full(4, np.nan, np.float32)}
    folders = [save(tmp_path / str(i), 1, values) for i, values in enumerate((one, two))]
    assert main(["inspect", str(folders[0]), "--diff", str(folders[1])]) == 0
    text = capsys.readouterr().out
    assert "only in the first: b" in text and "only in the second: c" in text and "of another shape: a" in text
    assert text.endswith("not equal\n")
    assert main(["inspect", str(folders[0]), "--diff", str(folders[0])]) == 0
    assert capsys.readouterr().out.endswith("the parameters are equal, byte for byte\n")
    other = save(tmp_path / "2", 1, {**one, ("parameter", "b"): np.full(4, np.nan, np.float32)})
    assert main(["inspect", str(folders[0]), "--diff", str(other)]) == 0
    assert "not finite" in capsys.readouterr().out
    assert Checkpoint.open(other).step == 1
