"""Second copies of shards: who makes them, when they are used, and that nothing but a good one ever is."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from hpcpipe.checkpoint import mirror, read
from hpcpipe.config import UserError, loads
from small_run import Result, run, write_tokens

SETTINGS = {"train__steps": 4, "checkpoint__every": 2, "optimizer__schedule": "wsd", "optimizer__decay_steps": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A run that has ended, and its copies beside it."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, go(data, folder, 2)


def go(data: Path, folder: Path, ranks: int) -> Result:
    place = str(folder / "{host}" / "copies")
    return run(data, folder / "out", ranks, "llama", checkpoint__mirror=place, checkpoint__keep=2, **SETTINGS)


def copies(folder: Path) -> dict[str, list[str]]:
    """Step -> files."""
    (place,) = folder.glob("*/copies/*")
    return {step.name: sorted(f.name for f in step.iterdir()) for step in sorted(place.iterdir())}


@pytest.mark.parametrize(
    ("hosts", "holders"),
    [
        ("a", [0]),
        ("aaa", [1, 2, 0]),
        ("aabb", [2, 3, 0, 1]),
        ("abab", [3, 0, 1, 2]),
        ("aabbcc", [2, 3, 4, 5, 0, 1]),
        ("aaab", [3, 3, 3, 0]),
    ],
)
def test_a_rank_of_another_node_copies(hosts: str, holders: list[int]) -> None:
    assert [mirror.holder(hosts, writer) for writer in range(len(hosts))] == holders
    if len(set(hosts)) > 1:
        assert all(hosts[holder] != hosts[writer] for writer, holder in enumerate(holders))


def test_nodes_of_one_size_copy_alike() -> None:
    hosts = [f"node{rank // 8}" for rank in range(64)]
    assert set(Counter(mirror.holder(hosts, writer) for writer in range(64)).values()) == {1}


def test_every_shard_has_a_copy_and_no_old_one_stays(whole: tuple[Path, Result], data: Path, tmp_path: Path) -> None:
    folder, _ = whole
    assert copies(folder) == {f"step_0000000{i}": ["shard_0000.h5", "shard_0001.h5"] for i in (2, 4)}
    for step in (2, 4):
        found = read.Checkpoint.open(folder / f"out/step_0000000{step}")
        (place,) = folder.glob("*/copies/*")
        for shard in found.shards:
            assert (place / found.path.name / shard.file).read_bytes() == (found.path / shard.file).read_bytes()
    go(data, tmp_path, 2)
    settings = SETTINGS | {"train__steps": 8, "checkpoint__mirror": str(tmp_path / "{host}/copies")}
    run(data, tmp_path / "out", 2, "llama", **settings | {"checkpoint__keep": 1})
    assert [f.name for f in read.complete(tmp_path / "out")] == ["step_00000008"]
    assert list(copies(tmp_path)) == ["step_00000008"]


def test_runs_with_one_folder_for_copies_leave_each_other_alone(data: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"checkpoint__mirror": str(tmp_path / "copies"), "checkpoint__keep": 1}
    for name in ("one", "other"):
        run(data, tmp_path / name, 2, "llama", **settings)
    places = [mirror.place(str(tmp_path / "copies"), "host", tmp_path / name) for name in ("one", "other")]
    assert sorted(places) == sorted((tmp_path / "copies").iterdir()) and len(set(places)) == 2
    for place in places:
        assert sorted(f.name for f in place.glob("step_00000004/*")) == ["shard_0000.h5", "shard_0001.h5"]


def test_the_copies_of_this_step_stay_though_a_listing_is_old(tmp_path: Path) -> None:
    """A node may not yet see in the run's folder what another has just made there."""
    out, place = tmp_path / "out", tmp_path / "copies"
    out.mkdir()
    for step in ("step_00000002", "step_00000004"):
        (place / step).mkdir(parents=True)
        (place / step / "shard_0000.h5").touch()
    mirror.tidy(out / "step_00000004", place)
    assert [f.name for f in place.iterdir()] == ["step_00000004"]


def damaged(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("harm", [damaged, Path.unlink])
def test_a_bad_shard_is_put_back(
    whole: tuple[Path, Result], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], ranks: int, harm
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "run")
    newest = folder / "out/step_00000004"
    before = {f.name: f.read_bytes() for f in newest.iterdir()}
    harm(newest / "shard_0001.h5")
    assert read.Checkpoint.open(newest).verify() != []
    found = go(data, folder, ranks)
    out = capfd.readouterr().out
    assert "shard_0001.h5 was bad and is again what its copy" in out and "passed over" not in out
    assert "nothing to do" in out and found.tensors == whole[1].tensors
    assert {f.name: f.read_bytes() for f in newest.iterdir()} == before


def test_a_bad_copy_is_not_used(
    whole: tuple[Path, Result], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint before it is, and the steps after that are done again."""
    folder = shutil.copytree(whole[0], tmp_path / "run")
    (place,) = folder.glob("*/copies/*")
    for step in (folder / "out/step_00000004", place / "step_00000004"):
        damaged(step / "shard_0000.h5")
    found = go(data, folder, 2)
    out = capfd.readouterr().out
    assert "step_00000004 is passed over" in out and "again what its copy" not in out
    assert found.tensors == whole[1].tensors


def test_a_lost_master_is_not_covered(
    whole: tuple[Path, Result], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole[0], tmp_path / "run")
    damaged(folder / "out/step_00000004/master.h5")
    assert go(data, folder, 2).tensors == whole[1].tensors
    assert "step_00000004 is passed over" in capfd.readouterr().out


def test_a_copy_that_fails_is_told_and_stops_nothing(
    whole: tuple[Path, Result], data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    found = run(data, tmp_path / "out", 2, "llama", checkpoint__mirror=str(tmp_path / "file" / "copies"), **SETTINGS)
    out = capfd.readouterr().out
    assert out.count("there is no second copy") == 4 and "NOT saved" not in out
    assert found.tensors == whole[1].tensors


def test_what_was_not_written_right_is_no_copy(tmp_path: Path) -> None:
    source = tmp_path / "shard_0000.h5"
    source.write_bytes(b"other bytes")
    with pytest.raises(UserError, match="has not the bytes that were written"):
        mirror.copy(source, tmp_path / "place/shard_0000.h5", "0" * 32)
    assert list((tmp_path / "place").iterdir()) == []


def test_a_copy_beside_itself_is_refused() -> None:
    with pytest.raises(UserError, match="a second copy needs a folder of its own"):
        loads('out = "run"\n[checkpoint]\nmirror = "run"\n')
