"""The script that a GPU is measured with, without one: rehearsed on the emulator; its arithmetic on made-up answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu, gpu_aims, gpu_curves, gpu_kernels, gpu_parts, gpu_steps
from benchmarks.contest import Failed
from benchmarks.gpu_gaps import Gaps
from benchmarks.shape import parse, read, write
from tests.conftest import GPU
from tests.gpu.host import build

ROOT = Path(__file__).resolve().parents[2]
needs_emulator = pytest.mark.skipif(build.compiler() is None, reason="needs g++ for the emulator")


def script(*words: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@needs_emulator
@pytest.mark.long
def test_a_rehearsal_of_one_contest(tmp_path: Path) -> None:
    done = script("--rehearse", "--only", "gpt2-1.5B", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "REHEARSAL" in done.stdout and "tokens/s" in done.stdout and "not measured" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rehearsal"] and not found["failures"]
    contest = found["parts"]["gpt2-1.5B"]["values"]
    run = contest["runs"]["hpcpipe:bfloat16"]
    assert len(run["losses"]) == 5 and run["turns"] and 0 <= run["turns"][0]["idle"] < 1 and run["device_bytes"] > 0
    assert "cuBLASLt" in contest["failures"]["hpcpipe:fp8"]  # which the emulator has not
    assert {aim["verdict"] for aim in found["aims"]} == {"not measured"}
    assert not list((ROOT / "benchmarks" / "results").glob("gpu-host*"))


@pytest.mark.long
@needs_emulator
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    done = script("--rehearse", "--minutes", "14", "--json", str(tmp_path / "found.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["parts"]) == [part.name for part in gpu_parts.PARTS]
    assert found["parts"]["check"]["values"]["outcome"] == "passed"
    rows = {row["name"] for rows in found["parts"]["kernels"]["values"]["rows"].values() for row in rows}
    assert rows >= {
        "linear_dw",
        "attention_dx",
        "swiglu_dx",
        "gelu_fwd",
        "pass F",
        "pass B",
        "update of all parameters",
    }
    assert found["parts"]["curves"]["values"]["apart"]["bfloat16 beside float32"] < gpu_curves.SAME


@pytest.mark.skipif(GPU.exists(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so() -> None:
    done = script(timeout=120)
    assert done.returncode == 1 and not done.stdout.strip()
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith('benchmarks.gpu: device.backend = "cuda" needs')


# ---- parts and their limits


def test_a_part_that_takes_too_long_or_fails_is_reported(tmp_path: Path) -> None:
    report = gpu.Report(True, tmp_path / "found.json")
    part = gpu_parts.PARTS[1]
    gpu.run(part, 0.01, gpu.arguments(["--rehearse"]), report)
    assert report.failures == {"build": "not done within 0 s"}
    gpu.run(part, 60, gpu.arguments(["--rehearse"]), report)  # knows no device: the one before it is missing
    assert report.failures["build"] == "KeyError: 'device'"
    report.close()
    assert json.loads((tmp_path / "found.json").read_text())["failures"] == report.failures


def test_what_was_measured_stays_until_it_is_measured_again(tmp_path: Path) -> None:
    device, build, check = gpu_parts.PARTS[:3]
    for turn, part in enumerate((build, check, check)):
        report = gpu.Report(False, None, tmp_path)
        report.done(device, {"name": "NVIDIA H200", "turn": turn}, ["a device"], 1)
        report.done(part, {"turn": turn}, [f"{part.name} {turn}"], 1)
        report.write()
    found = json.loads((tmp_path / "gpu-h200.json").read_text())["parts"]
    assert {name: part["values"]["turn"] for name, part in found.items()} == {"device": 2, "build": 0, "check": 2}
    text = (tmp_path / "gpu-h200.txt").read_text()
    assert "build 0" in text and "check 2" in text and "check 1" not in text and "not measured" in text
    report.failed(build, "it broke")
    report.write()
    assert "build" not in json.loads((tmp_path / "gpu-h200.json").read_text())["parts"]
    assert "build: FAILED: it broke" in (tmp_path / "gpu-h200.txt").read_text()


def test_parts_are_chosen_by_name() -> None:
    assert [p.name for p in gpu_parts.selected(gpu_parts.PARTS, ["curves"])] == ["device", "curves"]
    assert len(gpu_parts.selected(gpu_parts.PARTS, [])) == len(gpu_parts.PARTS)
    assert set(gpu_parts.QUICK) <= {part.name for part in gpu_parts.PARTS}
    with pytest.raises(SystemExit):
        gpu.arguments(["--only", "gpt3"])
    with pytest.raises(SystemExit):
        gpu.arguments(["--peer", "tensorflow=python"])
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_outcomes_of_tests_are_read(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase name="a[1]"/><testcase name="b"><failure message="no"/></testcase>'
        '<testcase name="c"><skipped/></testcase><testcase name="d"><error/></testcase></testsuite></testsuites>'
    )
    assert gpu_parts._outcomes(report) == {"a[1]": "passed", "b": "failed", "c": "skipped", "d": "failed"}


# ---- the arithmetic


def test_a_job_knows_its_device_and_its_microbatches(tmp_path: Path) -> None:
    shape = parse("1,2,8,4,6,16")
    write(tmp_path / "job.npz", shape, device="cuda", microbatch=2)
    job = read(tmp_path / "job.npz")
    assert (job.device, job.microbatch, job.pieces) == ("cuda", 2, 3)
    write(tmp_path / "job.npz", shape)
    assert (read(tmp_path / "job.npz").device, read(tmp_path / "job.npz").pieces) == ("cpu", 1)
    with pytest.raises(ValueError, match="6 sequences are not a whole number of microbatches of 4"):
        write(tmp_path / "job.npz", shape, microbatch=4)


def answers(*seconds: float, **more: float) -> list[dict[str, float]]:
    return [{"seconds": s, "steps": 2, "loss": 1.0, **more} for s in seconds]


def contest() -> dict[str, Any]:
    """Ours takes 1 and 2 s for two steps of 100 tokens, the peer 2 and 2, FP8 0.5 and 1."""
    losses = [4.0, 3.9, 3.8, 3.7, 3.6]
    runs = {
        gpu_steps.OURS: {"losses": losses, "turns": answers(1.0, 2.0, idle=0.02, device_bytes=2.0**30)},
        "hpcpipe:fp8": {"losses": [x * 1.001 for x in losses], "turns": answers(0.5, 1.0, idle=0.05)},
        "torch:compile": {"losses": [x * 1.1 for x in losses], "turns": answers(2.0, 2.0)},
    }
    shape = parse("2,4,32,16,4,64")
    made = {"runs": runs, "tokens": 100, "flops": 1e3, "failures": {"jax:unroll-dpa-gather": "none"}}
    made |= {"shape": shape._asdict(), "microbatch": 2, "groups": [list(runs)]}
    gpu_steps.judge(made, {"peak": 1e4})
    return made


def test_rates_ratios_and_shares() -> None:
    runs = contest()["runs"]
    ours, narrow, peer = runs.values()
    assert ours["tokens_per_second"] == [200, 100] and peer["ratio"] == [2.0, 1.0]
    assert narrow["ratio"] == [0.5, 0.5] and ours["mfu"] == [pytest.approx(0.2), pytest.approx(0.1)]
    assert ours["agrees"] and narrow["agrees"] and not peer["agrees"]


def test_aims_are_judged_by_what_was_measured() -> None:
    found = {"gpt2-1.5B": contest()}
    found["gpt2-1.5B"]["runs"]["jax:scan-dpa-gather"] = {"ratio": [1.3, 1.1, 1.25], "agrees": True}
    verdicts = {aim.what: (aim.measured, aim.verdict) for aim in gpu_aims.judged(found)}
    assert verdicts["FP8 beside bfloat16, GPT-2 1.5B, tokens/s"] == ("2.00", "met")
    assert verdicts["tokens/s beside JAX, GPT-2 1.5B"] == ("1.25", "met")
    assert verdicts["tokens/s beside PyTorch, GPT-2 1.5B"] == ("", "not measured")  # it trained another model
    assert verdicts["% of the dense bfloat16 peak, GPT-2 1.5B"] == ("15.0", "not met")
    assert verdicts["% of a step without work on the stream, GPT-2 1.5B"] == ("2.0", "met")
    assert verdicts["% of a step without work on the stream, GPT-2 124M"][1] == "not measured"


def test_aims_of_tests_and_kernels() -> None:
    def verdict(found: dict[str, Any], what: str) -> str:
        return next(aim.verdict for aim in gpu_aims.judged(found) if what in aim.what)

    same = {f"{gpu_aims.SAME_BITS}[gpu-{kind}]": "passed" for kind in ("float32", "bfloat16")}
    assert verdict({"check": {"tests": same}}, "bits of one") == "met"
    assert verdict({"check": {"tests": same | {"other": "failed"}}}, "failed tests") == "not met"
    half = same | {f"{gpu_aims.SAME_BITS}[gpu-bfloat16]": "failed"}
    assert verdict({"check": {"tests": half}}, "bits of one") == "not met"
    assert verdict({"check": {"tests": dict.fromkeys(same, "skipped")}}, "bits of one") == "not measured"
    assert verdict({"check": {"tests": dict.fromkeys(same, "skipped")}}, "failed tests") == "not measured"
    row = {"name": "gelu_fwd", "bytes": 1 << 26, "calls": 4, "seconds": 1.0, "copy": 0.9}
    rows = [row, {**row, "name": "linear_fwd", "copy": 0.1}, {**row, "bytes": 1 << 20, "calls": 999, "copy": 0.1}]
    rows.append({**row, "calls": 1, "copy": 0.1})  # from a cache
    assert verdict({"kernels": {"rows": {"gpt2": rows}}}, "slowest kernel") == "met"
    assert verdict({"kernels": {"rows": {"gpt2": [*rows, {**row, "copy": 0.8}]}}}, "slowest kernel") == "not met"
    assert verdict({"sanitizer": {"outcome": "skipped"}}, "sanitizer") == "not measured"
    assert verdict({"curves": {"apart": {"bfloat16 beside float32": float("nan")}}}, "bfloat16 beside") == "not met"


def test_curves_are_compared_by_their_means() -> None:
    wide = np.linspace(4, 2, 100)
    assert gpu_curves.difference(list(wide), list(wide)) == 0
    assert gpu_curves.difference(list(wide * 1.02), list(wide)) == pytest.approx(0.02)
    assert np.isnan(gpu_curves.difference([float("nan"), *wide[1:]], list(wide)))


class Worker:
    """A contestant that answers at once, or fails in its third turn."""

    ready = {"losses": [1.0] * 5, "about": "it"}
    started: list[str] = []
    here: set[str] = set()
    most = 0

    def __init__(self, name: str) -> None:
        self.name, self.patience, self.asked = name, 0.0, 0
        self.here.add(name)
        Worker.most = max(Worker.most, len(self.here))

    def ask(self, request: dict[str, int]) -> dict[str, float]:
        self.asked += 1
        if "torch" in self.name and self.asked == 3:
            raise Failed("it fell over")
        return {"seconds": 0.5 * request["steps"], "loss": 1.0, "step": 1}

    def end(self) -> None:
        self.here.discard(self.name)


def test_contestants_that_do_not_fit_together_play_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "start", lambda player, *_, **__: Worker(player.name))
    peers = {"jax": "python", "torch": "python"}
    needed = gpu_steps.needed(gpu_steps.TOYS["gpt2-1.5B"])
    for fitting, groups in ((4.5, 1), (3.5, 2), (2.2, 2), (0.1, 4)):
        Worker.most = 0
        device = {"free": fitting * needed / gpu_steps.ROOM, "peak": None}
        found = gpu_steps.contest("gpt2-1.5B", 3, peers, device, 600, toy=True)
        assert len(found["groups"]) == groups and Worker.most == max(map(len, found["groups"])) and not Worker.here
        assert found["failures"] == {"torch:compile": "while it was timed: it fell over"}
        turns = {name: len(run["turns"]) for name, run in found["runs"].items()}
        assert turns == {gpu_steps.OURS: 3, "jax:unroll-dpa-gather": 3, "torch:compile": 1, "hpcpipe:fp8": 3}
        assert found["runs"][gpu_steps.OURS]["turns"][0]["steps"] == 2  # of half a second each
    late = gpu_steps.contest("gpt2-1.5B", 3, peers, {"free": 1e12, "peak": None}, 0.5, toy=True)
    assert not late["runs"] and set(late["failures"].values()) == {"no time was left to start it"}


def test_who_plays_on_which_shape() -> None:
    case = gpu_steps.CASES["gpt2-1.5B"]
    assert 28e9 < gpu_steps.needed(case) < 80e9
    names = [c.name for c in gpu_steps.contestants(case, {"jax": "python", "torch": "python"})]
    assert names == [gpu_steps.OURS, "jax:scan-dpa-gather", "torch:compile", "hpcpipe:fp8"]
    assert [c.name for c in gpu_steps.contestants(gpu_steps.CASES["gpt2-124M"], {})] == [gpu_steps.OURS]


def test_tables_have_numbers_only_where_they_mean_something() -> None:
    made = contest()
    for run in made["runs"].values():
        run["about"] = "it"
    text = "\n".join(gpu_steps.table("gpt2-1.5B", made, False))
    assert "1.50 (1.00-2.00)" in text and "NO" in text and "jax:unroll-dpa-gather is left out: none" in text
    assert "1.50" not in "\n".join(gpu_steps.table("gpt2-1.5B", made, True))
    row = {"name": "gelu_fwd", "sizes": "n=1", "calls": 2, "seconds": 1e-3, "bytes": 1e9, "flops": 1e9, "copy": 8e-4}
    assert " 80%" in gpu_kernels._line(row, 1e13, False) and "10.0%" in gpu_kernels._line(row, 1e13, False)
    assert "80%" not in gpu_kernels._line(row, 1e13, True)


class Clock:
    """A backend whose events are readings of a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.driver = SimpleNamespace(seconds=lambda a, b: b[0] - a[0])

    def event(self) -> list[float]:
        return [0.0]

    def record(self, event: list[float]) -> None:
        event[0] = self.now

    def settle(self) -> None: ...


def test_gaps_are_what_no_event_pair_covers() -> None:
    clock = Clock()
    passes = {0: ([0.0], [0.0]), 1: ([0.0], [0.0])}

    def wait(seconds: float) -> None:
        clock.now += seconds

    optimizer = SimpleNamespace(squares=lambda into: wait(1), update=lambda *_: wait(2))
    marks = SimpleNamespace(marks=SimpleNamespace(_events=passes))
    gaps = Gaps(SimpleNamespace(backend=clock, optimizer=optimizer, program=marks))

    def run(first: int, count: int) -> list[float]:
        assert count == 1
        for begin, end in passes.values():
            clock.record(begin)
            wait(3)
            clock.record(end)
            wait(0.25)
        optimizer.squares(None)
        wait(0.5)
        optimizer.update(0, 0.0, 1.0)
        return [float(first)]

    assert gaps.timed(run)(4, 3) == [4.0, 5.0, 6.0]
    assert gaps.idle == pytest.approx(1 / 10)  # 9 of 10 seconds of each step
    assert gaps.timed(run)(7, 1) == [7.0] and gaps.idle == pytest.approx(1 / 10)
