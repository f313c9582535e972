"""``make demo``: the main job on real input, with nothing but the commands that a user types.

Prepares Python's own standard library, trains a small Llama through two pipeline ranks for about 75 seconds, looks at
the checkpoint and lets the model write code. Each command is printed before it runs. The number of steps is what this
machine can do in the time: a few steps are timed first.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("build/demo")
LEAST = 400  # steps, also where they take longer than asked for: fewer do not show that the model learns
RUN = """\
# A small Llama on Python's standard library. Every key: docs/config.md
out = "build/demo/run"
seed = 1

[model]
family = "llama"
layers = 4
heads = 4
kv_heads = 2
width = 128
ffn = 384
context = 256
tied = true

[data]
path = "build/demo/data"

[train]
steps = {steps}
batch = 8
microbatch = 2
log_every = 20

[optimizer]
lr = 2e-3
min_lr = 2e-4
warmup = {warmup}

[eval]
every = {every}
microbatches = 32

[checkpoint]
every = {save}
"""


def main() -> int:
    """Runs the demo; 0 when the validation loss fell by at least a third."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--seconds", type=float, default=75, help="training time to aim at")
    args.add_argument("--ranks", type=int, default=2)
    options = args.parse_args()
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    FOLDER.mkdir(parents=True, exist_ok=True)
    data, run = FOLDER / "data", FOLDER / "run"
    if not (data / "dataset.json").exists():
        call("hpcpipe prepare python-stdlib", "--out", str(data), "--vocab", "2048")
    mpirun = f"mpirun -n {options.ranks} hpcpipe train"
    steps = calibrate(mpirun, options.seconds)
    config = FOLDER / "run.toml"
    config.write_text(RUN.format(steps=steps, warmup=max(1, steps // 20), every=-(-steps // 4), save=-(-steps // 2)))
    shutil.rmtree(run, ignore_errors=True)
    call(f"hpcpipe plan {config}", "--ranks", str(options.ranks))
    call(mpirun, str(config))
    call(f"hpcpipe inspect {run}")
    call(f"hpcpipe report {run}")
    call(f"hpcpipe generate {run}", "--prompt", "def read(self, ", "--tokens", "160")
    return verdict(run)


def calibrate(mpirun: str, seconds: float) -> int:
    """Steps that take about ``seconds`` here, from the median of a few timed ones."""
    trial, config = FOLDER / "trial", FOLDER / "trial.toml"
    shutil.rmtree(trial, ignore_errors=True)
    config.write_text(RUN.format(steps=12, warmup=1, every=12, save=12))
    print(f"$ {mpirun} {config}   # 12 steps, to see how fast this machine is", flush=True)
    command = [*shlex.split(mpirun), str(config), "--set", f"out={trial}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr + done.stdout)
    lines = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    timed = sorted(line["seconds"] for line in lines if "seconds" in line)
    shutil.rmtree(trial)
    return max(LEAST, round(seconds / timed[len(timed) // 2]))


def call(command: str, *arguments: str) -> None:
    """Prints a command as a user would type it, runs it, and ends the demo if it fails."""
    words = [*shlex.split(command), *arguments]
    print(f"\n$ {shlex.join(words)}", flush=True)
    status = subprocess.run(words, check=False).returncode
    if status:
        sys.exit(f"demo: `{shlex.join(words)}` ended with status {status}")


def verdict(run: Path) -> int:
    """Says how far the validation loss fell."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    ended = (run / "done.json").exists()
    print(f"\nvalidation loss {losses[0]:.3f} -> {losses[-1]:.3f} ({losses[-1] / losses[0] - 1:+.0%}); files in {run}")
    return 0 if ended and losses[-1] <= losses[0] * 2 / 3 else 1


if __name__ == "__main__":
    sys.exit(main())
