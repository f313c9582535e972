"""Saving and loading one training state: hpcpipe beside dd, torch.save, torch.distributed.checkpoint and safetensors.

    python -m benchmarks.checkpoint [--quick] [--json FILE] [--shape SHAPE…] [--rounds N] [--folder DIR] [--only PART]

All ways save the same bytes to the same disk in alternating rounds, each save with fsync, and load them again from a
cold page cache. Then a run is trained, saved and resumed: the steps' wait for a save is what the run itself says. What
is counted and how: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.contest import Failed, Process
from benchmarks.peer_checkpoint import drop, elements
from benchmarks.peer_hpcpipe import config_of, microbatch_of, write_dataset
from benchmarks.shape import Shape, arguments, parse, read, write
from benchmarks.step import PEERS, machine, progress, spread
from hpcpipe import resume
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import CheckpointConfig, Config, to_toml
from hpcpipe.job import Job

SHAPE, SMALL = "12,12,768,512,4,50304", "6,6,384,256,4,65"
WAYS = ("plain", "hpcpipe", "hpcpipe:2", "torch", "dcp", "dcp:2", "safetensors")
AIM = 0.8  # of what dd reaches
EVERY, SAVES = 2, 4  # steps between two saves of the run, and how many
SAVED = re.compile(r"saved .*: ([\d,]+) MiB in ([\d.]+) s, for which the steps waited ([\d.]+) ms")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every way ran and brought the same bytes back, else 1."""
    args = options(argv)
    report: dict[str, Any] = {"machine": machine(), "cores": len(os.sched_getaffinity(0)), "shapes": []}
    print(f"{report['machine']}, {report['cores']} cores; {args.folder} is on {filesystem(args.folder)}")
    good = True
    for shape in args.shape:
        found: dict[str, Any] = {"shape": shape._asdict(), "bytes": 4 * elements(shape)}
        report["shapes"].append(found)
        print(
            f"\n{shape}: {found['bytes'] / 2**20:,.0f} MiB of parameters and moments, {args.rounds} rounds", flush=True
        )
        with tempfile.TemporaryDirectory(prefix="hpcpipe-bench-", dir=args.folder) as folder:
            if args.only != "run":
                found["rates"] = rates(shape, args, Path(folder))
                good = good and all(way["good"] for way in found["rates"].values())
                show(found["rates"], found["bytes"])
            if args.only != "rates":
                found["run"] = run(shape, Path(folder))
                show_run(found["run"])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good else 1


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = arguments("benchmarks.checkpoint", __doc__, "a small state, three rounds", "7")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to be measured; default: here")
    parser.add_argument("--only", choices=("rates", "run"))
    parser.add_argument(
        "--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"default {' '.join(WAYS)}"
    )
    parser.add_argument("--peers-python", type=Path, default=PEERS if PEERS.exists() else Path(sys.executable))
    args = parser.parse_args(argv)
    args.shape = args.shape or [parse(SMALL if args.quick else SHAPE)]
    args.rounds = args.rounds or (3 if args.quick else 7)
    return args


def filesystem(folder: Path) -> str:
    """Its kind and device, as far as the system tells."""
    done = subprocess.run(["df", "--output=fstype,source", str(folder)], capture_output=True, text=True)
    return " ".join((done.stdout.splitlines() or ["an unknown file system"])[-1].split())


# --- rates


def rates(shape: Shape, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """way -> what its turns took; one that cannot start is left out and said."""
    found: dict[str, Any] = {}
    with state_file(shape, folder) as state, workers(shape, args, state, found) as running:
        for number in range(args.rounds):
            for name, process in running.items():
                turn(process, folder / "turn", found[name])
            progress(f"round {number + 1} of {args.rounds}")
        progress("")
    for way in found.values():
        way["good"] = "problem" not in way and all(way["equal"])
    return found


@contextmanager
def state_file(shape: Shape, folder: Path) -> Iterator[Path]:
    """Random values in memory (or, where there is no /dev/shm, in a file), shared by all workers."""
    memory = Path("/dev/shm")
    size = 4 * elements(shape)
    where = memory if memory.is_dir() and shutil.disk_usage(memory).free > 2 * size else folder
    with tempfile.NamedTemporaryFile(prefix="hpcpipe-bench-", dir=where) as file:
        rng = np.random.default_rng(1)
        for at in range(0, elements(shape), 1 << 22):
            file.write(rng.standard_normal(min(1 << 22, elements(shape) - at), np.float32).tobytes())
        file.flush()
        yield Path(file.name)


@contextmanager
def workers(shape: Shape, args: argparse.Namespace, state: Path, found: dict[str, Any]) -> Iterator[dict[str, Process]]:
    """Every way that starts, stopped; ``found`` gets its empty record."""
    running: dict[str, Process] = {}
    try:
        for way in args.ways:
            python = sys.executable if way.startswith(("plain", "hpcpipe")) else str(args.peers_python)
            command = [python, "-m", "benchmarks.peer_checkpoint", str(state), "--shape", str(shape), "--variant", way]
            found[way] = {"save": [], "load": [], "verify": [], "device_bytes": [], "equal": []}
            try:
                running[way] = Process(command, state.with_name(f"{state.name}-{way.replace(':', '-')}.log"), {})
                found[way]["about"] = running[way].ready["about"]
            except Failed as error:
                found[way]["problem"] = str(error)
                print(f"{way} is left out: {error}", flush=True)
        yield running
    finally:
        for process in running.values():
            process.end()
        for log in state.parent.glob(f"{state.name}-*.log"):
            log.unlink()


def turn(process: Process, folder: Path, record: dict[str, Any]) -> None:
    """Save, load, compare, and verify where it can; the files are gone afterwards."""

    def ask(what: str) -> dict[str, Any]:
        return process.ask({"do": what, "folder": str(folder)})

    record["save"].append(ask("save")["seconds"])
    loaded = ask("load")
    record["load"].append(loaded["seconds"])
    record["device_bytes"].append(loaded["device_bytes"])
    record["equal"].append(ask("check")["yes"])
    if process.ready["verifies"]:
        record["verify"].append(ask("verify")["seconds"])
    if "notices" not in record:
        record["notices"] = ask("hurt")["yes"]
    shutil.rmtree(folder)
    os.sync()


def show(found: dict[str, Any], size: int) -> None:
    """The table; ratios are within a round."""
    print(f"{'':<12} {'write MiB/s':>22} {'of dd %':>16} {'read MiB/s':>22} {'of dd %':>16} {'verify MiB/s':>22}  "
          "from the disk  same bytes  flipped bit")  # fmt: skip
    base = found.get("plain", {})
    for name, way in found.items():
        if not way["save"]:
            continue
        cells = [name.replace("plain", "dd").ljust(12)]
        for what in ("save", "load"):
            cells.append(spread([size / 2**20 / s for s in way[what]], ",.0f").rjust(22))
            share = [100 * dd / s for dd, s in zip(base.get(what, ()), way[what], strict=False)]
            cells.append((spread(share, ".0f") if share and way is not base else "").rjust(16))
        cells.append((spread([size / 2**20 / s for s in way["verify"]], ",.0f") if way["verify"] else "").rjust(22))
        cells.append(f"{median(way['device_bytes']) / size:14.0%}")
        cells.append(("yes" if all(way["equal"]) else "NO").rjust(11))
        cells.append(" noticed" if way["notices"] else " loaded")
        print(" ".join(cells))
    for name, way in found.items():
        print(f"  {name.replace('plain', 'dd')}: {way.get('about') or way['problem']}")
    print(f"median (least-largest); the aim is {AIM:.0%} of dd", flush=True)


# --- a run


def run(shape: Shape, folder: Path) -> dict[str, Any]:
    """Trains, saves, and resumes; what the run says of its saves, and what a resume takes."""
    job, data = folder / "job.npz", folder / "data"
    write(job, shape)
    data.mkdir()
    write_dataset(data, read(job))
    config = config_of(shape, data, microbatch_of(shape))
    config = replace(
        config, out=str(folder / "run"), train=replace(config.train, steps=EVERY * SAVES, length=shape.length),
        checkpoint=CheckpointConfig(every=EVERY, keep=2),
    )  # fmt: skip
    file = folder / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "hpcpipe", "train", str(file)], capture_output=True, text=True, timeout=3600
    )
    saves = [m.groups() for m in SAVED.finditer(done.stdout)]
    if done.returncode or len(saves) != SAVES:
        raise SystemExit(f"benchmarks.checkpoint: the run failed: {(done.stdout + done.stderr)[-800:]}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "saves": [{"seconds": float(seconds), "stall": float(wait) / 1e3} for _, seconds, wait in saves],
        "step": median(line["seconds"] for line in lines if "seconds" in line),
        "bytes": sum(s.bytes for s in Checkpoint.open(folder / "run").shards),
        "resumes": [resumed(config, folder) for _ in range(3)],
    }


def resumed(config: Config, folder: Path) -> dict[str, float]:
    """Seconds until a rank is ready to step: with the checkpoint, from a cold cache, and in a new folder; the proof."""
    proof, find = [0.0], resume.find

    def timed(*where: Any) -> Any:
        begin = time.perf_counter()
        answer = find(*where)
        proof[0] = time.perf_counter() - begin
        return answer

    def ready(config: Config) -> tuple[float, int]:
        begin = time.perf_counter()
        job = Job(config, LocalWorld(1).links[0])
        seconds = time.perf_counter() - begin
        job.release()
        return seconds, job.step

    new = replace(config, out=str(folder / "new"))
    resume.find = timed
    try:
        without, at_start = ready(new)
        drop(folder / "run")
        whole, at_end = ready(config)
    finally:
        resume.find = find
    shutil.rmtree(folder / "new")
    if (at_start, at_end) != (0, config.train.steps):
        raise SystemExit(f"benchmarks.checkpoint: resumed at step {at_end} instead of {config.train.steps}")
    return {"ready": whole, "new": without, "proof": proof[0]}


def show_run(found: dict[str, Any]) -> None:
    """A few lines."""
    saves, resumes, step = found["saves"], found["resumes"], found["step"]
    stalls = [1e3 * s["stall"] for s in saves]
    steps = median(s["stall"] for s in saves) / 0.01 / step
    print(f"a run, step {step:.3f} s, saved every {EVERY} steps: a save of {found['bytes'] / 2**20:,.0f} MiB takes "
          f"{spread([s['seconds'] for s in saves], '.2f')} s beside the steps, which wait {spread(stalls, '.0f')} ms "
          f"for it; that is 1 % of {steps:,.0f} steps")  # fmt: skip
    added = [r["ready"] - r["new"] for r in resumes]
    print(f"a resume, from a cold cache, begins {spread(added, '.2f')} s later than a new run, "
          f"{spread([r['proof'] for r in resumes], '.2f')} s of it to prove every byte", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
