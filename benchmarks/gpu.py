"""One GPU: builds, checks and times everything, and says which aims are met.

    python -m benchmarks.gpu [--quick] [--json FILE] [--only PART] [--minutes M] [--rehearse]

Each part is a process of its own with a time limit; one that fails is reported and the others go on. Tables are written
to benchmarks/results/gpu-DEVICE.txt and .json after each part; what an earlier run measured on a device of that name
stays until it is measured again. Nothing is downloaded. ``--rehearse`` runs the whole script where there is no GPU, on
the emulator of the tests, with toy shapes: it proves the script and prints no result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, strftime
from typing import Any

from benchmarks import gpu_aims
from benchmarks.gpu_parts import PARTS, QUICK, ROOT, Part, Task, selected
from benchmarks.worker import die_with_parent
from hpcpipe.config import UserError

RESULTS = ROOT / "benchmarks" / "results"
SCARCE = 15.0  # seconds left in which no part is begun


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every part ran, else 1."""
    args = arguments(argv)
    if args.run:
        return child(args)
    parts = selected(PARTS, args.only or (QUICK if args.quick else ()))
    report = Report(args.rehearse, args.json)
    end = monotonic() + 60 * args.minutes
    for part in parts:
        left = end - monotonic()
        if left < SCARCE:
            report.failed(part, f"not run: {args.minutes:g} minutes are over; `--only {part.name}` runs it alone")
            continue
        run(part, min(part.limit, left), args, report)
        if part.name == "device" and "device" not in report.values:
            print(f"benchmarks.gpu: {report.failures['device']}", file=sys.stderr)
            return 1
        report.write()
    report.close()
    return 1 if report.failures else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"fewer rounds, and only {', '.join(QUICK)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes everything that was measured there as well")
    parser.add_argument(
        "--only", action="append", metavar="PART", help=f"may be given again; {', '.join(p.name for p in PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything; default 9.5")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, toy shapes, no numbers")
    peer = "jax or torch with an interpreter that has it; default: this one or .venv-peers"
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=peer)
    for hidden in ("--run", "--answer", "--known"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=float, default=0.0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        selected(PARTS, args.only or ())
    except ValueError as error:
        parser.error(str(error))
    if args.minutes <= 0 or not all(re.fullmatch(r"(jax|torch)=.+", peer) for peer in args.peer):
        parser.error("--minutes is above 0, and --peer is jax=PYTHON or torch=PYTHON")
    return args


class Report:
    """What was found so far, printed as it comes and written after each part."""

    def __init__(self, toy: bool, json_file: Path | None, results: Path = RESULTS) -> None:
        self.toy, self.json_file, self.results = toy, json_file, results
        self.found: dict[str, Any] = {}  # part -> date, values, lines
        self.failures: dict[str, str] = {}
        if toy:
            print("REHEARSAL on host memory posing as a GPU: nothing here is a result", flush=True)

    @property
    def values(self) -> dict[str, Any]:
        """Part -> what it found."""
        return {name: part["values"] for name, part in self.found.items()}

    @property
    def stem(self) -> Path:
        return self.results / f"gpu-{slug(self.values['device']['name'])}"

    def done(self, part: Part, values: dict[str, Any], lines: Sequence[str], seconds: float) -> None:
        """A part that came to its end."""
        head = f"== {part.name}: {part.what}" + ("" if self.toy else f" ({strftime('%Y-%m-%d')}, {seconds:.0f} s)")
        self.found[part.name] = {"date": strftime("%Y-%m-%d"), "values": values, "lines": [head, *lines]}
        print("\n".join(["", head, *lines]), flush=True)
        if part.name == "device" and not self.toy:
            self._remember()

    def _remember(self) -> None:
        """What earlier runs found on a device of this name."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            earlier = json.loads(self.stem.with_suffix(".json").read_text(encoding="utf-8"))["parts"]
            self.found = {**earlier, **self.found}

    def failed(self, part: Part, why: str) -> None:
        """A part that did not; what it found earlier no longer holds."""
        self.failures[part.name] = why
        self.found.pop(part.name, None)
        if part.name != "device":
            print(f"\n== {part.name}: FAILED: {why}", flush=True)

    def write(self) -> None:
        """Both files; a rehearsal leaves only what ``--json`` asks for."""
        aims = gpu_aims.judged({} if self.toy else self.values)
        told = {"rehearsal": self.toy, "parts": self.found, "failures": self.failures}
        text = json.dumps({**told, "aims": [aim._asdict() for aim in aims]}, indent=1) + "\n"
        if self.json_file:
            self.json_file.write_text(text, encoding="utf-8")
        if not self.toy:
            ordered = [part.name for part in PARTS if part.name in self.found]
            lines = [line for name in ordered for line in (*self.found[name]["lines"], "")]
            lines += [f"{name}: FAILED: {why}" for name, why in self.failures.items()]
            self.stem.with_suffix(".json").write_text(text, encoding="utf-8")
            self.stem.with_suffix(".txt").write_text(
                "\n".join([*lines, *gpu_aims.table(aims)]) + "\n", encoding="utf-8"
            )

    def close(self) -> None:
        """The table of aims."""
        print("\n".join(["", "== aims", *gpu_aims.table(gpu_aims.judged({} if self.toy else self.values))]))
        if self.failures:
            print(f"\nnot to their end: {', '.join(self.failures)}")
        self.write()


def slug(name: str) -> str:
    """A device's name as part of a file's: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")


def run(part: Part, limit: float, args: argparse.Namespace, report: Report) -> None:
    """One part in a process of its own, which ends with all that it started."""
    begin = monotonic()
    with tempfile.TemporaryDirectory(prefix="hpcpipe-gpu-") as folder:
        known, answer, log = (Path(folder) / name for name in ("known.json", "answer.json", "log"))
        known.write_text(json.dumps(report.values), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.gpu", "--run", part.name, "--answer", str(answer)]
        command += ["--known", str(known), "--limit", str(limit), *(f"--peer={peer}" for peer in args.peer)]
        command += [flag for flag, on in (("--quick", args.quick), ("--rehearse", args.rehearse)) if on]
        with log.open("wb") as out:
            process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            report.failed(part, f"not done within {limit:.0f} s")
            return
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if answer.exists():
            found = json.loads(answer.read_text(encoding="utf-8"))
            report.done(part, found["values"], found["lines"], monotonic() - begin)
            return
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        report.failed(part, said[-1])


def child(args: argparse.Namespace) -> int:
    """The life of one part: reads what is known, works, writes its answer."""
    die_with_parent()
    part = next(part for part in PARTS if part.name == args.run)
    found: Mapping[str, Any] = json.loads(Path(args.known).read_text(encoding="utf-8"))
    peers = dict(peer.split("=", 1) for peer in args.peer) or None
    with ExitStack() as around:
        if args.rehearse:
            from tests.gpu.host_run import gpus

            around.enter_context(gpus(1))
        try:
            values, lines = part.work(Task(found, args.limit, args.quick, args.rehearse, peers))
        except UserError as error:  # the parent shows the last line
            print(error, file=sys.stderr)
            return 1
    Path(args.answer).write_text(json.dumps({"values": values, "lines": lines}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
