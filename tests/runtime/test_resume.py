"""What a run does where a checkpoint was and can no longer be seen: it never begins anew in silence."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcpipe import resume
from hpcpipe.checkpoint import read
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import UserError
from small_run import run, write_tokens
from tests.runtime.checkpoint_state import save, state


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


def test_a_lost_master_does_not_start_a_run_anew(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, often = tmp_path / "run", {"checkpoint__every": 2, "checkpoint__keep": 1}
    whole = run(data, out, 2, train__steps=4, **often)
    (out / "step_00000004/master.h5").rename(tmp_path / "master.h5")
    with pytest.raises(UserError, match=r"step_00000004 was saved .* put master.h5 back, or move step_00000004 away"):
        run(data, out, 2, train__steps=4, **often)
    assert sorted(f.name for f in out.glob("step_*/*")) == ["shard_0000.h5", "shard_0001.h5"]
    (tmp_path / "master.h5").rename(out / "step_00000004/master.h5")
    assert run(data, out, 2, train__steps=4, **often).tensors == whole.tensors
    (out / "step_00000004").rename(tmp_path / "away")
    capfd.readouterr()
    assert run(data, out, 2, train__steps=4, **often).tensors == whole.tensors
    assert "NOT" not in capfd.readouterr().out


def test_a_lost_master_behind_a_good_checkpoint_is_told(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, often = tmp_path / "run", {"checkpoint__every": 2, "checkpoint__keep": 2}
    whole = run(data, out, 2, train__steps=4, **often)
    (out / "step_00000004/master.h5").unlink()
    assert run(data, out, 2, train__steps=4, **often).tensors == whole.tensors
    assert "step_00000004 is passed over: its master.h5 is lost" in capfd.readouterr().out


def test_a_first_save_that_was_killed_is_told_and_the_run_begins(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All shards have their names and there is no master: that happens, and nothing was ever saved."""
    out, often = tmp_path / "run", {"checkpoint__every": 2, "checkpoint__keep": 2}
    whole = run(data, out, 2, train__steps=2, **often)
    (out / "step_00000002/master.h5").unlink()
    (out / read.NOTE).unlink()
    assert run(data, out, 2, train__steps=2, **often).tensors == whole.tensors
    assert "step_00000002 is passed over: it has shards but no master.h5" in capfd.readouterr().out


def test_a_note_on_what_was_moved_away_does_not_hinder_a_new_run(data: Path, tmp_path: Path) -> None:
    """Begun anew, killed between the shards of its first save and the master: there was none."""
    out, often = tmp_path / "run", {"checkpoint__every": 2, "checkpoint__keep": 2}
    run(data, out, 1, train__steps=2, **often)
    shutil.move(out / "step_00000002", tmp_path / "away")
    run(data, out, 1, train__steps=1, checkpoint__every=2)
    assert read.noted(out) == "step_00000001"
    shutil.rmtree(out / "step_00000001")
    assert LocalWorld(2).run(lambda link: resume.find(out, link)) == [(None, [])] * 2
    assert read.noted(out) == ""


@pytest.mark.parametrize("what", ["", "step_00000002"])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    save(tmp_path, 2, state(2))
    whole = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self == tmp_path / what:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"cannot be read \(Input/output error\), so nobody knows"):
        LocalWorld(2).run(lambda link: resume.find(tmp_path, link))
