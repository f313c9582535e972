"""What a run tells: a live line for people, JSON lines for programs, a completion record when it ended well.

Only rank 0 writes. ``metrics.jsonl`` gets one object per step; ``done.json`` exists if and only if the run ended well,
because a launcher's exit status can be 0 after a node was lost.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import IO, Any

from hpcpipe.config import UserError

METRICS, DONE = "metrics.jsonl", "done.json"
RECENT = 64  # steps that the account at the end looks back on


def _continued(file: Path, resumed: int) -> IO[str]:
    """The metrics file, open for appending after its line of step ``resumed``; a torn last line is dropped too."""
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= resumed and resumed:
                kept.append(line + "\n")
    part = file.with_suffix(".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(file)
    return file.open("a", encoding="utf-8")


class Progress:
    """The record of one run in ``out``.

    ``flops`` and ``tokens`` are per step, ``peak`` the machine's matrix-product FLOP/s.
    """

    def __init__(
        self, out: Path, steps: int, flops: float, tokens: int, peak: float, every: int, resumed: int = 0
    ) -> None:
        """``resumed`` is the step that the run goes on from: lines of later ones, which will be run again, are dropped.

        Raises UserError where the folder cannot be written.
        """
        self.out, self.steps, self.flops, self.tokens, self.peak, self.every = out, steps, flops, tokens, peak, every
        try:
            self.file = _continued(out / METRICS, resumed)
        except OSError as error:
            raise UserError(f"out: {out / METRICS} cannot be written ({error.strerror}); make room") from None
        self.lost = False
        self.terminal = terminal()
        self.rate = 0.0  # seconds per step, averaged
        self.shown = -math.inf
        self.width = 0
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def step(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """A finished step, the ``step``-th from 1: ``values`` holds loss, grad_norm, lr, bubble and what else is known:
        ``parts`` of its time, what was predicted, the ``worst_wait``.
        """
        self.rate = seconds if not self.rate else 0.9 * self.rate + 0.1 * seconds
        self.recent.append({**values, "seconds": seconds})
        self._write(
            {
                "step": step,
                **values,
                "tokens": step * self.tokens,
                "seconds": seconds,
                "tokens_per_s": self.tokens / seconds,
                "flops_per_s": self.flops / seconds,
                "peak_share": self.flops / seconds / self.peak,
            }
        )
        last = step == self.steps
        if step % self.every == 0 or last or step == 1 or time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            self._show(self._line(step, values), keep=last)

    def evaluated(self, step: int, loss: float) -> None:
        """A validation loss after ``step`` steps."""
        self._write({"step": step, "validation_loss": loss})
        self.say(f"step {step:>6}  validation loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self._show(text, keep=True)

    def done(self, record: dict[str, Any]) -> None:
        """Writes the completion record: the run ended well."""
        with suppress(OSError):  # what could not be written has been told
            self.file.close()
        part = self.out / f"{DONE}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.out / DONE)

    def account(self) -> Iterator[str]:
        """Where the time of the last steps went, beside what was predicted; nothing where no step was accounted for."""
        found = [values for values in self.recent if "parts" in values]
        if not found:
            return
        middle = {key: median(v[key] for v in found) for key in ("seconds", "predicted_seconds", "bubble")}
        predicted, measured = middle["predicted_seconds"], middle["seconds"]
        line = (
            f"a step: predicted {duration(predicted)}, measured {duration(measured)} "
            f"({measured / predicted - 1:+.1%}), ideal {duration(found[-1]['ideal_seconds'])}, "
            f"bubble {middle['bubble']:.1%} (predicted {found[-1]['predicted_bubble']:.1%})"
        )
        waits = [v["worst_wait"] for v in found if "worst_wait" in v]
        if waits:
            worst = max(waits, key=lambda wait: float(wait["seconds"]))
            line += f"; worst wait: rank {worst['rank']} for {worst['op']}, {duration(worst['seconds'])}"
        yield line
        whole = sum(v["seconds"] for v in found)
        shares = {name: sum(v["parts"][name] for v in found) / whole for name in found[0]["parts"]}
        if voided := found[-1].get("voided", 0):
            yield f"{voided} step{'s' * (voided > 1)} done again: the update was made on a guess, and then clipped"
        yield "its time: " + ", ".join(f"{name} {share:.1%}" for name, share in shares.items())

    def _line(self, step: int, values: dict[str, Any]) -> str:
        left = (self.steps - step) * self.rate
        return (
            f"step {step:>6}/{self.steps}  loss {values['loss']:7.4f}  norm {values['grad_norm']:8.3f}  "
            f"{self.tokens / self.rate:9,.0f} tokens/s  {self.flops / self.rate / 1e9:6.1f} GFLOP/s "
            f"({self.flops / self.rate / self.peak:4.0%} of peak)  bubble {values['bubble']:4.0%}  {clock(left)} left"
        )

    def _write(self, record: dict[str, Any]) -> None:
        """A line of metrics; a full disk costs the line, not the run."""
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            if not self.lost:
                self.say(f"out: {self.out / METRICS} cannot be written ({error.strerror}); the run goes on without it")
            self.lost = True

    def _show(self, text: str, keep: bool) -> None:
        """A line that stays goes to stdout; the live line is overwritten in place, or a line too where it cannot be."""
        if self.terminal is not None:
            self.terminal.write("\r" + ("" if keep else text).ljust(self.width) + ("\r" if keep else ""))
            self.terminal.flush()
            self.width = 0 if keep else len(text)
        if keep or self.terminal is None:
            print(text, flush=True)


def terminal() -> IO[str] | None:
    """Where a line can be overwritten: the terminal that a person looks at, or None.

    Open MPI gives every rank a pseudo-terminal, also when its own output goes to a file, and holds back what has no
    newline; so under it the launcher's stdout (rank 0 is its child) is looked at, and the terminal is written to
    directly.
    """
    if "OMPI_COMM_WORLD_RANK" not in os.environ:
        return sys.stdout if sys.stdout.isatty() else None
    try:
        shown = str(Path(f"/proc/{os.getppid()}/fd/1").readlink())
        return Path("/dev/tty").open("w", encoding="utf-8") if shown.startswith(("/dev/pts/", "/dev/tty")) else None
    except OSError:
        return None


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{1e3 * seconds:.1f} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.0f} us"
    )


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    s = max(0, round(seconds))
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"
