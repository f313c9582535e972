"""``train --profile`` on devices that are not there: the device's times in the trace, and ranges for profilers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from time import perf_counter

import pytest

from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import loads
from hpcpipe.train import train
from tests.gpu.host import build
from tests.gpu.host_driver import HostDriver
from tests.gpu.host_run import gpu_run, gpus
from tests.small_run import Result, collect, run_toml, write_tokens
from tests.trace_file import hold_to_the_step

pytestmark = pytest.mark.skipif(
    build.compiler() is None, reason="no g++: kernels of native/cuda cannot be tried without a GPU"
)

STEPS, MICROS = 3, 4
SHORT = {"train__steps": STEPS, "train__batch": MICROS, "train__microbatch": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("data"))


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices whose time is that of the machine, so that what one sends is there before another has it."""
    monkeypatch.setattr(
        HostDriver, "_clock", property(lambda self: perf_counter(), lambda self, time: None), raising=False
    )


def profiled(data: Path, out: Path, ranks: int, **settings: object) -> tuple[Result, list[HostDriver]]:
    """The run with a trace of its last step, and the drivers of its devices."""
    config = loads(run_toml(data, out, **settings, **SHORT, device__backend="cuda"))

    def rank(link: Link) -> None:
        train(config, link, "")

    with gpus(ranks) as drivers:
        LocalWorld(ranks).run(rank)
    return collect(out), drivers


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("ranks", "settings"), [(2, {}), (4, {"pipeline__replicas": 2}), (2, {"pipeline__schedule": "zb_v"})]
)
def test_the_trace_of_a_device(data: Path, tmp_path: Path, ranks: int, settings: dict[str, object]) -> None:
    found, drivers = profiled(data, tmp_path / "run", ranks, **settings)
    plain = gpu_run(data, tmp_path / "plain", ranks, **settings, **SHORT)
    assert (found.losses, found.tensors) == (plain.losses, plain.tensors)
    slices = hold_to_the_step(tmp_path / "run" / "trace.json", tmp_path / "run")
    reduced = [e for e in slices.get("reduce", []) if e["name"].startswith("reduce stage")]
    assert len(reduced) == (2 if "pipeline__replicas" in settings else 0)
    # The stream of reductions takes its time beside the ops; the host's clock would have said none.
    assert all(e["dur"] > 0 for e in reduced)
    assert all(driver.counts["push_range"] == driver.counts["pop_range"] > 0 for driver in drivers)


def test_a_range_for_every_pass_that_is_launched(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[tuple[int, str]] = Counter()
    push = HostDriver.push_range

    def noted(self: HostDriver, name: str) -> None:
        opened[id(self), name] += 1
        assert self.ranges == []  # passes are not in one another
        push(self, name)

    monkeypatch.setattr(HostDriver, "push_range", noted)
    _, drivers = profiled(data, tmp_path / "run", 2, model="untied")
    for number, driver in enumerate(drivers):
        own = {name: times for (who, name), times in opened.items() if who == id(driver)}
        stage = {name.split(".")[0][1:] for name in own}
        assert len(stage) == 1, number
        # The first stage sends no gradient on: its B does what W would do. The rehearsal tries microbatch 0, too.
        kinds = "FB" if stage == {"0"} else "FBW"
        assert set(own) == {f"{kind}{s}.{m}" for kind in kinds for s in stage for m in range(MICROS)}
        assert all(times == STEPS for name, times in own.items() if not name.endswith(".0"))
