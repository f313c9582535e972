"""A wish to stop that comes early is not lost, and does not kill what is about to begin."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from hpcpipe.checkpoint import read
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import loads
from hpcpipe.job import Job
from hpcpipe.train import train
from tests.small_run import run_toml, write_tokens


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_while_the_state_is_loaded_saves_after_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    data, load = write_tokens(tmp_path / "data"), Job._load

    def loading(self: Job) -> None:
        signal.raise_signal(number)
        load(self)

    monkeypatch.setattr(Job, "_load", loading)
    before = signal.getsignal(number)
    train(loads(run_toml(data, tmp_path / "run")), LocalWorld(1).links[0])
    assert [folder.name for folder in read.complete(tmp_path / "run")] == ["step_00000001"]
    assert not (tmp_path / "run" / "done.json").exists() and signal.getsignal(number) is before
