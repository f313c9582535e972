"""The real program under real MPIs: the same bits as in one process, and every kind of bad end in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from small_run import MODELS, Result, collect, run, run_toml, write_tokens
from tests.mpi import launch

pytestmark = pytest.mark.mpi
MPIS = pytest.mark.parametrize("which", [launch.first, launch.second], ids=["first", "mpich"])
PROGRAM = ("-m", "hpcpipe", "train")
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def ones(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each model trained in one process."""
    folder = tmp_path_factory.mktemp("one")
    return {model: run(data, folder / model, 1, model, train__steps=STEPS) for model in MODELS}


def write_run(data: Path, folder: Path, model: str = "llama", **settings: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_text(run_toml(data, folder / "out", model, **settings), encoding="utf-8")
    return str(folder / "run.toml")


def ended_well(done: launch.Done, folder: Path) -> Result:
    assert done.status == 0, done.out
    assert (folder / "out/done.json").exists(), done.out
    return collect(folder / "out")


def ended_in(done: launch.Done, *words: str) -> None:
    """The job failed with a sentence that has these words, and without a traceback."""
    assert done.status != 0, done.out
    assert "Traceback" not in done.out, done.out
    for word in words:
        assert word in done.out, done.out


@MPIS
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("ranks", "schedule", "cut"), [(2, "1f1b", "auto"), (3, "gpipe", [1, 1, 2]), (4, "1f1b", "even")]
)
def test_ranks_give_the_bits_of_one_process(
    which, model: str, ranks: int, schedule: str, cut: object, ones: dict[str, Result], data: Path, tmp_path: Path
) -> None:
    config = write_run(data, tmp_path, model, train__steps=STEPS, pipeline__schedule=schedule, pipeline__cut=cut)
    many = ended_well(launch.run(which(), ranks, (*PROGRAM, config), timeout=120), tmp_path)
    assert many.losses == ones[model].losses
    assert many.tensors == ones[model].tensors


DEEP = {"model__layers": 6, "train__batch": 16, "train__steps": 8, "optimizer__clip": 0.9}


@pytest.fixture(scope="module")
def deep(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Result]:
    """A deeper model, trained by one process for each of its copies; some steps are clipped and some are not."""
    folder = tmp_path_factory.mktemp("deep")

    @cache
    def one(model: str, copies: int) -> Result:
        found = run(data, folder / f"{model}{copies}", copies, model, pipeline__replicas=copies, **DEEP)
        norms = [m["grad_norm"] for m in found.metrics]
        assert min(norms) < DEEP["optimizer__clip"] < max(norms)
        return found

    return one


@MPIS
@pytest.mark.parametrize("model", ["llama", "untied"])
@pytest.mark.parametrize(
    ("ranks", "schedule", "early"),
    [
        (2, "interleaved", False), (4, "interleaved", True), (2, "zb_v", True), (4, "zb_v", True),
        (2, "dualpipe", True), (4, "dualpipe", False),
    ],
)  # fmt: skip
def test_other_schedules_give_the_bits_of_one_process(
    which, model: str, ranks: int, schedule: str, early: bool, deep: Callable[[str, int], Result], data: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    one = deep(model, 2 if schedule == "dualpipe" else 1)
    config = write_run(data, tmp_path, model, pipeline__schedule=schedule, optimizer__early=early, **DEEP)
    many = ended_well(launch.run(which(), ranks, (*PROGRAM, config), timeout=120), tmp_path)
    assert many.losses == one.losses and many.tensors == one.tensors
    assert [m["grad_norm"] for m in many.metrics] == [m["grad_norm"] for m in one.metrics]


@MPIS
def test_bidirectional_pipelines_times_data_parallel(which, data: Path, tmp_path: Path) -> None:
    settings = DEEP | {"pipeline__replicas": 2, "pipeline__schedule": "dualpipe", "optimizer__early": True}
    many = ended_well(launch.run(which(), 4, (*PROGRAM, write_run(data, tmp_path, **settings)), timeout=120), tmp_path)
    one = run(data, tmp_path / "one", 4, "llama", **DEEP, pipeline__replicas=4)
    assert many.losses == one.losses and many.tensors == one.tensors


def test_over_tcp_the_bits_are_the_same(ones: dict[str, Result], data: Path, tmp_path: Path) -> None:
    here = launch.first()
    options = ("--mca", "btl", "self,tcp") if here.is_open_mpi else ()
    config = write_run(data, tmp_path, "gpt2", train__steps=STEPS)
    many = ended_well(launch.run(here, 4, (*PROGRAM, config), options, timeout=120), tmp_path)
    assert many.losses == ones["gpt2"].losses and many.tensors == ones["gpt2"].tensors


@MPIS
def test_pipeline_times_data_parallel(which, data: Path, tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        config = write_run(data, tmp_path / name, "gpt2", train__steps=5, pipeline__replicas=2)
        results.append(ended_well(launch.run(which(), 4, (*PROGRAM, config), timeout=120), tmp_path / name))
    one = run(data, tmp_path / "one", 1, "gpt2", train__steps=5)
    local = run(data, tmp_path / "local", 4, "gpt2", train__steps=5, pipeline__replicas=2)
    assert results[0].losses == results[1].losses == local.losses
    assert results[0].tensors == results[1].tensors == local.tensors
    assert results[0].losses == pytest.approx(one.losses, rel=2e-6)


@MPIS
def test_copies_that_divide_the_moments(which, data: Path, tmp_path: Path) -> None:
    """The bits of copies that hold all; every rank writes its share, and a run without shares goes on from these."""
    settings = DEEP | {"pipeline__replicas": 2, "optimizer__early": True}
    one = run(data, tmp_path / "one", 2, "llama", **DEEP, pipeline__replicas=2)
    config = write_run(data, tmp_path, **settings, optimizer__shard=True, checkpoint__every=4, checkpoint__keep=0)
    many = ended_well(launch.run(which(), 4, (*PROGRAM, config), timeout=120), tmp_path)
    assert many.losses == one.losses and many.tensors == one.tensors
    assert any(m.get("voided") for m in many.metrics)
    newest = tmp_path / f"out/step_{DEEP['train__steps']:08d}"
    assert len(list(newest.glob("shard_*.h5"))) == 4
    newest.rename(tmp_path / "newest")
    config = write_run(data, tmp_path, **settings)
    again = ended_well(launch.run(which(), 2, (*PROGRAM, config), timeout=120), tmp_path)
    assert again.losses[-4:] == one.losses[-4:] and again.tensors == one.tensors


@MPIS
def test_resume_on_another_number_of_ranks(which, ones: dict[str, Result], data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path, "llama", train__steps=STEPS, checkpoint__every=7, checkpoint__keep=0)
    ended_well(launch.run(which(), 3, (*PROGRAM, config), timeout=120), tmp_path)
    for folder in ("step_00000014", "step_00000020"):
        (tmp_path / "out" / folder / "master.h5").unlink()
    again = ended_well(launch.run(which(), 2, (*PROGRAM, config), timeout=120), tmp_path)
    assert again.losses == ones["llama"].losses
    assert again.tensors == ones["llama"].tensors


# --- bad ends


def test_what_is_wrong_with_a_config_is_said_once(data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path)
    cases = {
        "train.stepz=3": ("unknown key train.stepz", "did you mean train.steps?"),
        "train.steps=many": ("expected a whole number",),
        "pipeline.replicas=2": ("3 ranks cannot be laid out",),
        "pipeline.cut=[1,1]": ("2 stages", "3 ranks"),
        "pipeline.cut=[1,1,1]": ("must list 3 numbers", "sum to 4 slots"),
        "pipeline.schedule=1f1": ("pipeline.schedule is 1f1", "did you mean 1f1b?"),
        "pipeline.schedule=dualpipe": ("which 3 ranks cannot", "use 4 or 2"),
        "model.heads=5": ("does not divide",),
        "model.layers=0": ("model.layers must be 1 or more",),
        "data.path=nowhere": ("nowhere does not exist", "hpcpipe prepare"),
    }
    for override, words in cases.items():
        done = launch.run(launch.first(), 3, (*PROGRAM, config, "--set", override))
        ended_in(done, *words)
        assert done.out.count(words[0]) == 1, done.out


def test_more_stages_than_slots(data: Path, tmp_path: Path) -> None:
    done = launch.run(launch.first(), 5, (*PROGRAM, write_run(data, tmp_path)))
    ended_in(done, "5 stages for a model of 4 slots")


def test_ranks_with_different_configs(data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path)
    here = launch.first()
    program = (str(here.python), *PROGRAM, config)
    other = ("--set", "optimizer.lr=0.5")
    command = [str(here.mpirun), "-n", "1", *program, ":", "-n", "1", *program, *other]
    ended_in(launch.finish(launch.spawn(command)), "rank 1 was started with another config than rank 0")


@MPIS
def test_truncated_tokens(which, tmp_path: Path) -> None:
    data = write_tokens(tmp_path / "tokens")
    with (data / "train.bin").open("r+b") as file:
        file.truncate(1001)
    ended_in(launch.run(which(), 2, (*PROGRAM, write_run(data, tmp_path))), "train.bin")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path, train__steps=4, checkpoint__every=2)
    ended_well(launch.run(launch.first(), 2, (*PROGRAM, config)), tmp_path)
    shard = next((tmp_path / "out/step_00000004").glob("shard_0001*.h5"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    done = launch.run(launch.first(), 2, (*PROGRAM, config, "--set", "train.steps=6"))
    ended_well(done, tmp_path)
    assert "step_00000004 is passed over" in done.out and "resumed from" in done.out and "step_00000002" in done.out


@MPIS
def test_a_rank_that_dies_ends_the_job(which, data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path, train__steps=100000)
    process = launch.start(which(), 3, (*PROGRAM, config))
    _until_step(process, tmp_path, 5)
    victims = launch.ranks(process, PROGRAM)
    os.kill(victims[-1], signal.SIGKILL)
    done = launch.finish(process, timeout=30)
    assert done.status != 0 and not (tmp_path / "out/done.json").exists()


@MPIS
def test_a_rank_that_stands_still_is_named(which, data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path, train__steps=100000, pipeline__timeout=5)
    process = launch.start(which(), 3, (*PROGRAM, config))
    _until_step(process, tmp_path, 5)
    ranks = launch.ranks(process, PROGRAM)
    os.kill(ranks[1], signal.SIGSTOP)
    try:
        done = launch.finish(process, timeout=60)
    finally:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
    ended_in(done, "has waited", " for ", "the job ends")


@MPIS
def test_evaluation_with_replicas(which, data: Path, tmp_path: Path) -> None:
    settings = {"train__steps": 4, "eval__every": 2, "eval__microbatches": 6, "pipeline__replicas": 3}
    config = write_run(data, tmp_path, "gpt2", **settings)
    many = ended_well(launch.run(which(), 6, (*PROGRAM, config), timeout=120), tmp_path)
    local = run(data, tmp_path / "local", 6, "gpt2", **settings)
    one = run(data, tmp_path / "one", 1, "gpt2", **(settings | {"pipeline__replicas": 1}))
    found = [[m["validation_loss"] for m in r.metrics if "validation_loss" in m] for r in (many, local, one)]
    assert found[0] == found[1] and len(found[0]) == 3
    assert found[0] == pytest.approx(found[2], rel=2e-6)


@MPIS
@pytest.mark.parametrize(
    ("number", "layout"),
    [
        (signal.SIGINT, {}),
        (signal.SIGUSR1, {}),
        (signal.SIGUSR1, {"pipeline__schedule": "zb_v", "optimizer__early": True}),
    ],
    ids=["SIGINT", "SIGUSR1", "SIGUSR1 early"],
)
def test_a_signal_saves_and_ends_the_run(
    which, number: int, layout: dict[str, object], data: Path, tmp_path: Path
) -> None:
    here, wsd = which(), {"optimizer__schedule": "wsd", "optimizer__decay_steps": 1}
    config = write_run(data, tmp_path, train__steps=100000, **wsd, **layout)
    process = launch.start(here, 2, (*PROGRAM, config))
    _until_step(process, tmp_path, 5)
    for rank in launch.ranks(process, PROGRAM):
        os.kill(rank, number)
    done = launch.finish(process, timeout=60)
    assert done.status == 0, done.out
    assert not (tmp_path / "out/done.json").exists()
    stopped = collect(tmp_path / "out")
    steps = len(stopped.losses)
    assert f"step_{steps:08d}" in done.out
    # and the next start goes on from there, with the bits of a run that was never stopped
    more = ("--set", f"train.steps={steps + 3}", "--set", "optimizer.decay_steps=1")
    on = ended_well(launch.run(here, 2, (*PROGRAM, config, *more)), tmp_path)
    whole = run(data, tmp_path / "whole", 1, "llama", train__steps=steps + 3, **wsd)
    assert on.losses == whole.losses and on.tensors == whole.tensors


def test_a_full_disk_leaves_the_previous_checkpoint(data: Path, tmp_path: Path) -> None:
    config = write_run(data, tmp_path, train__steps=2)
    ended_well(launch.run(launch.first(), 2, (*PROGRAM, config)), tmp_path)
    before = collect(tmp_path / "out")
    size = max(f.stat().st_size for f in (tmp_path / "out/step_00000002").iterdir())
    limited = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2},) * 2); "
        "sys.argv = sys.argv[:1] + sys.argv[1:]; runpy.run_module('hpcpipe', run_name='__main__')"
    )
    done = launch.run(launch.first(), 2, ("-c", limited, "train", config, "--set", "train.steps=4"))
    ended_in(done, "NOT saved", "step_00000004")
    assert not (tmp_path / "out/step_00000004").exists()
    assert collect(tmp_path / "out").tensors == before.tensors
    ended_well(launch.run(launch.first(), 2, (*PROGRAM, config, "--set", "train.steps=4")), tmp_path)


def _until_step(process: subprocess.Popen[str], folder: Path, step: int, timeout: float = 60) -> None:
    """Waits until a run has written that many steps down; a run that does not is ended."""
    metrics, end = folder / "out/metrics.jsonl", time.monotonic() + timeout
    while time.monotonic() < end:
        if (
            metrics.exists()
            and sum("loss" in json.loads(line) for line in metrics.read_text().splitlines()[:-1]) >= step
        ):
            return
        time.sleep(0.05)
    launch.end(process)
    raise AssertionError(f"no step {step} after {timeout} s")
