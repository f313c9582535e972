"""The set-up: what is done again, what is not, and what the launcher passes on. Nothing here needs a network."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

CI = Path(__file__).resolve().parents[2] / ".ci"


@pytest.fixture
def bootstrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """bootstrap.py, at home in an empty folder."""
    spec = importlib.util.spec_from_file_location("bootstrap", CI / "bootstrap.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LOG", tmp_path / "build" / "setup.log")
    return module


def made(bootstrap: ModuleType, path: Path, done: list[str]):
    """An environment whose one step notes that it ran and leaves a python."""

    def work() -> None:
        done.append("step")
        (path / "bin").mkdir(exist_ok=True)
        (path / "bin" / "python").touch()

    env = bootstrap.Environment(path)
    env.step("step", "key 1", "a step", work)
    return env


def test_a_step_is_done_once_for_the_same_inputs(bootstrap, tmp_path):
    done: list[str] = []
    made(bootstrap, tmp_path / "venv", done)
    env = made(bootstrap, tmp_path / "venv", done)
    assert done == ["step"]
    env.step("step", "key 2", "a step", done.append, "again")
    assert done == ["step", "again"]


def test_a_killed_step_makes_everything_again(bootstrap, tmp_path):
    done: list[str] = []
    env = made(bootstrap, tmp_path / "venv", done)

    def killed() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        env.step("more", "key", "a step", killed)
    made(bootstrap, tmp_path / "venv", done)
    assert done == ["step", "step"]


def test_a_failed_step_is_tried_again_alone(bootstrap, tmp_path):
    done: list[str] = []
    env = made(bootstrap, tmp_path / "venv", done)
    with pytest.raises(bootstrap.SetupError, match="no network"):
        env.step("more", "key", "a step", bootstrap.run, ["false"], "no network")
    env = made(bootstrap, tmp_path / "venv", done)
    env.step("more", "key", "a step", done.append, "more")
    assert done == ["step", "more"]


def test_a_moved_environment_is_made_again(bootstrap, tmp_path):
    done: list[str] = []
    made(bootstrap, tmp_path / "venv", done)
    (tmp_path / "venv").rename(tmp_path / "moved")
    made(bootstrap, tmp_path / "moved", done)
    assert done == ["step", "step"]


def test_an_environment_of_the_users_own_is_left_alone(bootstrap, tmp_path):
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    with pytest.raises(bootstrap.SetupError, match="make did not make it"):
        bootstrap.Environment(tmp_path / "venv")
    assert (tmp_path / "venv" / "bin").is_dir()


def test_a_failure_shows_the_sentence_of_setup_py_and_keeps_the_rest_in_the_log(bootstrap):
    script = "print('noise'); print('   hpcpipe: no C compiler is on the PATH.'); raise SystemExit(1)"
    with pytest.raises(bootstrap.SetupError) as error:
        bootstrap.run([sys.executable, "-c", script], "something else")
    assert str(error.value) == "setup: no C compiler is on the PATH."
    assert "noise" in bootstrap.LOG.read_text()


def test_the_digest_follows_the_content_of_a_folder(bootstrap, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "a.c").write_text("1")
    first = bootstrap.digest(tmp_path / "native", "cc")
    assert bootstrap.digest(tmp_path / "native", "gcc") != first
    (tmp_path / "native" / "a.c").write_text("2")
    assert bootstrap.digest(tmp_path / "native", "cc") != first


def test_a_site_mpi_whose_module_is_not_loaded_is_not_replaced(bootstrap, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    mpirun = tmp_path / "bin" / "mpirun"
    env = made(bootstrap, tmp_path / "venv", [])
    assert bootstrap.choose_mpi(env) == "wheel"
    env.note(mpi=str(mpirun))
    assert bootstrap.choose_mpi(env) == "wheel"  # it is gone for good
    mpirun.parent.mkdir()
    mpirun.touch(0o755)
    with pytest.raises(bootstrap.SetupError, match="not on the PATH now"):
        bootstrap.choose_mpi(env)
    monkeypatch.setenv("PATH", str(mpirun.parent))
    assert bootstrap.choose_mpi(env) == str(mpirun)


MPIRUN = """#!/bin/bash
for signal in INT TERM USR1; do trap "echo $signal >> heard; [ $signal = USR1 ] || exit 9" $signal; done
printf '%s\\n' "$@" > args; env > environment
touch started
while [ -e hold ]; do sleep 0.02; done
exit 5
"""


@pytest.fixture
def launch(tmp_path: Path):
    """Starts launch.py with a stand-in mpirun that notes the signals it hears and runs while `hold` exists."""
    (tmp_path / "mpirun").write_text(MPIRUN)
    (tmp_path / "mpirun").chmod(0o755)

    def start(*words: str, **variables: str) -> subprocess.Popen[bytes]:
        env = {"PATH": os.environ["PATH"], **variables}
        command = [sys.executable, "-IS", str(CI / "launch.py"), str(tmp_path / "mpirun"), *words]
        process = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.DEVNULL)
        wait_for(tmp_path / "started")
        return process

    return start


def wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + 30
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_launcher_passes_words_status_and_variables(launch, tmp_path):
    assert launch("-n", "2", "a program", PRTE_MCA_hwloc_default_binding_policy="core").wait(30) == 5
    assert (tmp_path / "args").read_text().splitlines() == ["-n", "2", "a program"]
    seen = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert seen["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert seen["OMPI_ALLOW_RUN_AS_ROOT"] == seen["OMPI_MCA_rmaps_base_oversubscribe"] == "1"
    assert seen["PRTE_MCA_hwloc_default_binding_policy"] == "core"  # the user's own


def test_the_launcher_leaves_the_number_of_ranks_to_a_scheduler(launch, tmp_path):
    assert launch(SLURM_JOB_ID="7").wait(30) == 5
    assert "oversubscribe" not in (tmp_path / "environment").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_asks_to_save_the_second_ends(launch, tmp_path, number):
    (tmp_path / "hold").touch()
    process = launch()
    process.send_signal(number)
    wait_for(tmp_path / "heard", "USR1\n")
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(30) == 9
    assert (tmp_path / "heard").read_text() == "USR1\nTERM\n"


def test_killing_the_launcher_ends_the_job(launch, tmp_path):
    (tmp_path / "hold").touch()
    process = launch()
    process.kill()
    process.wait(30)
    wait_for(tmp_path / "heard", "TERM\n")
