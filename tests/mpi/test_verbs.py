"""The whole story as a user types it: prepare, plan, train on two ranks, inspect, generate."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.mpi import launch

pytestmark = pytest.mark.mpi

RUN = """
out = "{out}"

[model]
preset = "llama-tiny"
layers = 2
width = 64
ffn = 128
context = 32

[data]
path = "{data}"

[train]
steps = 30
batch = 8
microbatch = 2

[optimizer]
lr = 3e-3
warmup = 3

[eval]
every = 15
microbatches = 4
"""


def hpcpipe(*words: str) -> str:
    done = subprocess.run(
        [launch.first().python, "-m", "hpcpipe", *words], cwd=launch.ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_text_to_text(tmp_path: Path) -> None:
    words = random.Random(3)
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(60):
        lines = [f"def {words.choice('abcd')}(x):\n    return x + {words.randrange(9)}\n" for _ in range(30)]
        (texts / f"{i}.py").write_text("\n".join(lines))
    data, out = tmp_path / "data", tmp_path / "run"
    assert "vocabulary 270" in hpcpipe("prepare", str(texts), "--out", str(data), "--vocab", "270")

    config = tmp_path / "run.toml"
    config.write_text(RUN.format(out=out, data=data))
    planned = hpcpipe("plan", str(config), "--ranks", "2")
    assert "2 stages x 1 replicas" in planned and "predicted bubble" in planned

    trained = launch.run(launch.first(), 2, ("-m", "hpcpipe", "train", str(config)), timeout=120)
    assert trained.status == 0 and f"saved {out}/step_00000030" in trained.out, trained.out
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in steps] == list(range(1, 31))
    assert {"grad_norm", "tokens_per_s", "flops_per_s", "bubble", "lr", "tokens"} <= steps[0].keys()
    assert {"parts", "predicted_seconds", "predicted_bubble", "worst_wait"} <= steps[0].keys()
    assert all(min(m["parts"].values()) >= 0 and m["seconds"] > 0 and m["ideal_seconds"] > 0 for m in steps)
    accounted, clocked = sum(sum(m["parts"].values()) for m in steps), sum(m["seconds"] for m in steps)
    assert accounted == pytest.approx(clocked, rel=0.25)  # steps of milliseconds on busy cores lose up to a tenth
    assert "a step: predicted " in trained.out and "its time: compute " in trained.out
    losses = [m["validation_loss"] for m in metrics if "validation_loss" in m]
    assert len(losses) == 3 and losses[-1] < losses[0] * 2 / 3
    assert json.loads((out / "done.json").read_text())["steps"] == 30

    assert "whole: every byte" in hpcpipe("inspect", str(out))
    assert json.loads(hpcpipe("inspect", str(out), "--json"))
    assert "bubble" in hpcpipe("inspect", str(out / "timeline.jsonl"))
    assert "bubble" in hpcpipe("inspect", str(out / "predicted.jsonl"))
    text = hpcpipe("generate", str(out), "--prompt", "def a(x):", "--tokens", "30")
    assert text.startswith("def a(x):") and "return" in text
    assert text == hpcpipe("generate", str(out), "--prompt", "def a(x):", "--tokens", "30")
