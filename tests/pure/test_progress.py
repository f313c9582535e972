"""What a run tells: metrics that programs can read, a live line where there is a terminal, a record of a good end."""

from __future__ import annotations

import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hpcpipe import progress
from hpcpipe.config import UserError
from hpcpipe.progress import RECENT, Progress, clock, duration

STEP = {"loss": 3.25, "grad_norm": 0.5, "lr": 1e-3, "bubble": 0.25}
KEYS = ["step", "loss", "grad_norm", "lr", "bubble", "tokens", "seconds", "tokens_per_s", "flops_per_s", "peak_share"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK", raising=False)


def told(out: Path, steps: int = 100, every: int = 10, **settings: Any) -> Progress:
    return Progress(out, steps, flops=4e9, tokens=1000, peak=1e10, every=every, **settings)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


# --- metrics


def test_a_step_is_one_object_with_all_its_numbers(tmp_path: Path) -> None:
    p = told(tmp_path)
    p.step(1, 0.5, STEP)
    p.step(2, 0.25, STEP | {"loss": 3.0})
    assert all(list(line) == KEYS for line in lines(tmp_path))
    assert lines(tmp_path)[1] == {
        "step": 2, "loss": 3.0, "grad_norm": 0.5, "lr": 1e-3, "bubble": 0.25, "tokens": 2000, "seconds": 0.25,
        "tokens_per_s": 4000.0, "flops_per_s": 1.6e10, "peak_share": 1.6,
    }  # fmt: skip


def test_numbers_come_back_exactly(tmp_path: Path) -> None:
    loss = 0.1 + 0.2
    told(tmp_path).step(1, 1 / 3, STEP | {"loss": loss})
    assert lines(tmp_path)[0]["loss"] == loss and lines(tmp_path)[0]["seconds"] == 1 / 3


def test_a_validation_loss_has_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told(tmp_path).evaluated(40, 2.5)
    assert lines(tmp_path) == [{"step": 40, "validation_loss": 2.5}]
    assert capsys.readouterr().out == "step     40  validation loss 2.5000\n"


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    """A run that is killed keeps what it told."""
    p = told(tmp_path)
    for step in range(1, 4):
        p.step(step, 1.0, STEP)
        assert [line["step"] for line in lines(tmp_path)] == list(range(1, step + 1))


def test_a_resumed_run_goes_on_after_its_step(tmp_path: Path) -> None:
    p = told(tmp_path)
    for step in range(1, 6):
        p.step(step, 1.0, STEP)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while it wrote
    again = told(tmp_path, resumed=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    again.step(4, 1.0, STEP)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_new_run_begins_an_empty_record(tmp_path: Path) -> None:
    told(tmp_path).step(1, 1.0, STEP)
    told(tmp_path)
    assert lines(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No such file or directory\)"):
        told(tmp_path / "missing")


def test_a_full_disk_costs_lines_and_is_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    p = told(tmp_path, every=1)
    p.file = Full()
    for step in range(1, 4):
        p.step(step, 1.0, STEP)
    out = capsys.readouterr().out
    assert out.count("cannot be written (No space left on device); the run goes on without it") == 1
    assert out.count("loss  3.2500") == 3


# --- where the time went

PARTS = {
    "compute": 0.3,
    "exposed": 0.04,
    "warmup": 0.03,
    "steady": 0.02,
    "cooldown": 0.05,
    "optimizer": 0.05,
    "other": 0.01,
}
ACCOUNTED = STEP | {
    "predicted_bubble": 0.125, "predicted_seconds": 0.4, "ideal_seconds": 0.35, "parts": PARTS,
    "worst_wait": {"rank": 3, "op": "F2.7", "seconds": 0.0125},
}  # fmt: skip


def test_an_accounted_step_is_written_with_its_parts(tmp_path: Path) -> None:
    told(tmp_path).step(1, 0.5, ACCOUNTED)
    assert list(lines(tmp_path)[0]) == [*KEYS[:5], *list(ACCOUNTED)[4:], *KEYS[5:]]
    assert lines(tmp_path)[0]["parts"] == PARTS and list(lines(tmp_path)[0]["parts"]) == list(PARTS)
    assert lines(tmp_path)[0]["worst_wait"] == {"rank": 3, "op": "F2.7", "seconds": 0.0125}


def test_the_account_is_of_the_last_steps(tmp_path: Path) -> None:
    """Medians of what is compared, the worst of the waits, shares of all the time."""
    p = told(tmp_path)
    for step in range(1, 8):  # the first ones, which are slow, are forgotten by the end
        p.step(step, 50.0, ACCOUNTED | {"bubble": 0.9, "worst_wait": {"rank": 0, "op": "B0.0", "seconds": 9.0}})
    for i in range(RECENT):
        waited = {"rank": i, "op": f"F1.{i}", "seconds": 1e-3 * (20 if i == 17 else 1)}
        p.step(8 + i, 0.5 if i else 0.9, ACCOUNTED | {"worst_wait": waited})
    comparison, shares = p.account()
    assert comparison == (
        "a step: predicted 400.0 ms, measured 500.0 ms (+25.0%), ideal 350.0 ms, bubble 25.0% (predicted 12.5%); "
        "worst wait: rank 17 for F1.17, 20.0 ms"
    )
    whole = 0.5 * (RECENT - 1) + 0.9
    assert shares == "its time: " + ", ".join(f"{name} {RECENT * s / whole:.1%}" for name, s in PARTS.items())


def test_there_is_no_account_of_what_was_not_accounted_for(tmp_path: Path) -> None:
    p = told(tmp_path)
    assert list(p.account()) == []
    p.step(1, 0.5, STEP)
    assert list(p.account()) == []
    alone = {key: value for key, value in ACCOUNTED.items() if key != "worst_wait"}  # a rank that waits for nobody
    p.step(2, 0.5, alone)
    assert "worst wait" not in next(p.account())


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0 us"), (25.4e-6, "25 us"), (0.001, "1.0 ms"), (0.4567, "456.7 ms"), (61.234, "61.23 s")],
)
def test_duration(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


# --- the completion record


def test_the_record_of_a_good_end(tmp_path: Path) -> None:
    p = told(tmp_path)
    p.done({"steps": 100, "loss": 1.5, "plan": "abc"})
    assert json.loads((tmp_path / "done.json").read_text()) == {"steps": 100, "loss": 1.5, "plan": "abc"}
    assert sorted(f.name for f in tmp_path.iterdir()) == ["done.json", "metrics.jsonl"]
    assert p.file.closed


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_record_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    p, seen = told(tmp_path), list[bool]()

    def fail(*_: object) -> None:
        seen.append((tmp_path / "done.json").exists())
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os if where == "fsync" else Path, where, fail)
    with pytest.raises(OSError, match="broken"):
        p.done({"steps": 100})
    assert seen == [False] and not (tmp_path / "done.json").exists()


def test_the_record_is_safe_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, order = told(tmp_path), list[str]()
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    p.done({"steps": 1})
    assert order == ["fsync", "replace"]


# --- for people


def test_without_a_terminal_there_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    p = told(tmp_path, steps=25, every=10)
    assert p.terminal is None
    p.say("hello")
    for step in range(1, 26):
        p.step(step, 0.5, STEP)
    out = capsys.readouterr().out
    assert "\r" not in out
    assert out.splitlines()[0] == "hello"
    assert re.findall(r"^step +(\d+)/25 ", out, re.MULTILINE) == ["1", "10", "20", "25"]
    assert out.splitlines()[2] == (
        "step     10/25  loss  3.2500  norm    0.500      2,000 tokens/s     8.0 GFLOP/s ( 80% of peak)  "
        "bubble  25%  0:08 left"
    )
    assert out.splitlines()[-1].endswith(" 0:00 left")


def test_a_slow_run_shows_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    p = told(tmp_path, every=1000)
    for step in range(1, 5):
        now[0] += 6.0
        p.step(step, 6.0, STEP)
    assert capsys.readouterr().out.count("\n") == 4


def test_a_terminal_has_one_live_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "terminal", lambda: screen)
    p = told(tmp_path, steps=3, every=1)
    p.step(1, 1.0, STEP)
    p.step(2, 1.0, STEP)
    assert capsys.readouterr().out == ""
    first, second = screen.getvalue().split("\r")[1:]
    assert first.startswith("step      1/3") and second.startswith("step      2/3")
    p.say("a line that stays")
    assert screen.getvalue().endswith("\r" + " " * len(second) + "\r")  # the live line is wiped before it
    p.step(3, 1.0, STEP)
    kept = capsys.readouterr().out.splitlines()
    assert kept[0] == "a line that stays"
    assert kept[1].startswith("step      3/3") and len(kept) == 2  # the last one stays


def test_a_shorter_live_line_covers_a_longer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "terminal", lambda: screen)
    p = told(tmp_path)
    p._show("a long line", keep=False)
    p._show("short", keep=False)
    assert screen.getvalue() == "\ra long line\rshort      "


def test_a_terminal_is_one_that_somebody_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress.sys, "stdout", screen := Screen())
    assert progress.terminal() is screen
    monkeypatch.setattr(progress.sys, "stdout", io.StringIO())
    assert progress.terminal() is None
    # Under Open MPI every rank has a terminal of its own; the launcher's output is what counts.
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setattr(progress.sys, "stdout", Screen())
    monkeypatch.setattr(Path, "readlink", lambda self: tmp_path / "slurm.out")
    assert progress.terminal() is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (-3, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (605, "10:05"), (3599.6, "1:00:00"), (3661, "1:01:01"),
     (360000, "100:00:00")],
)  # fmt: skip
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
