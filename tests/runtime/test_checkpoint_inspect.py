"""What ``inspect`` says of good, damaged and unfinished checkpoints, and that the documentation's examples run."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcpipe.checkpoint import inspect, report, write
from hpcpipe.checkpoint.inspect import describe
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import Config, UserError, to_toml
from tests.runtime.checkpoint_state import by_axis, by_tensor, save, state, unsynced  # noqa: F401

DOCUMENT = Path(__file__).parents[2] / "docs" / "checkpoint.md"


@pytest.fixture
def run(tmp_path):
    """Two checkpoints, a half-written one, metrics whose last line was cut short."""
    out = tmp_path / "run"
    for step in (20, 40):
        save(
            out, step, state(step), by_axis(2, 1), config=to_toml(Config()), schedule="F0.0 " * 1000, plan_digest="abc"
        )
    write.step_folder(out, 60).mkdir()
    lines = [
        {"step": 39, "loss": 1.25, "grad_norm": 0.5, "tokens_per_s": 123456.7},
        {"step": 40, "validation_loss": 2.5},
    ]
    (out / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + '{"step": 4')
    return out


def test_run_folder(run):
    said = describe(run)
    assert "not ended" in said
    assert "last metrics: step 40, loss 1.25, grad_norm 0.5, tokens_per_s 123,457, validation_loss 2.5" in said
    table = [line.split() for line in said.splitlines() if line.startswith("step_")]
    assert [row[0] for row in table] == ["step_00000020", "step_00000040", "step_00000060"]
    assert table[1][1:4] == ["40", "2.5", "40,000"] and table[2][1:] == ["never", "finished"]
    assert f"checkpoint {run / 'step_00000040'}" in said and "whole: every byte of 2 shards" in said
    (run / "done.json").write_text('{"steps": 40}')
    assert "ended well: steps 40" in describe(run)


def test_checkpoint_facts(run):
    folder = run / "step_00000020"
    said = describe(folder)
    elements = sum(a.size for (kind, _), a in state(20).items() if kind == "parameter")
    assert f"step 20, loss 2.5, tokens 20,000, {elements:,} parameters" in said
    assert "warmup 100" in said and "schedule     5,000 characters: F0.0 F0.0" in said and "plan_digest  abc" in said
    assert re.search(r"mlp.up.weight +\[24, 8\] +float32 +192 +p m1 m2 +2 +2\.2 KiB\n", said)
    assert len(re.findall(r"^shard_000\d\.h5 .* [0-9a-f]{32}$", said, re.M)) == 2
    assert max(map(len, said.splitlines())) < 160 and said == "\n".join(line.rstrip() for line in said.splitlines())


def test_json(run):
    found = json.loads(describe(run, json=True, stats=True))
    assert [c["name"] for c in found["run"]["checkpoints"]] == [f"step_000000{s}" for s in (20, 40, 60)]
    c = found["checkpoint"]
    assert c["step"] == 40 and c["problems"] == [] and c["attributes"]["loss"] == 2.5
    assert {t["name"]: t["shape"] for t in c["tensors"]}["head.weight"] == [37, 8]
    assert [s["good"] for s in c["shards"]] == [True, True] and c["config"]["optimizer"]["warmup"] == 100


def test_statistics(tmp_path):
    """Against numpy, for tensors longer and wider than what is read at once; NaN and Inf are counted, not averaged."""
    rng = np.random.default_rng(0)
    tall, wide = rng.standard_normal((300_000, 7), np.float32), rng.standard_normal((2, 1_500_000), np.float32)
    tall[[3, 200_000], 2], wide[1, 1_200_000] = np.nan, -np.inf
    values = {
        ("parameter", "tall"): tall,
        ("moment1", "wide"): wide,
        ("moment2", "none"): np.full(3, np.nan, np.float32),
    }
    found = json.loads(describe(save(tmp_path, 1, values, by_tensor(1)), json=True, stats=True))
    stats = {t["name"]: next(iter(t["stats"].values())) for t in found["checkpoint"]["tensors"]}
    for name, array in (("tall", tall), ("wide", wide)):
        finite = array[np.isfinite(array)].astype(np.float64)
        want = {"mean": finite.mean(), "rms": np.sqrt((finite**2).mean()), "max": np.abs(finite).max()}
        assert {k: stats[name][k] for k in want} == pytest.approx(want, rel=1e-9)
    assert [(s["nan"], s["inf"]) for s in stats.values()] == [(2, 0), (0, 1), (3, 0)]
    assert stats["none"]["mean"] is None
    said = describe(tmp_path, stats=True)
    assert re.search(r"^tall +p +[+-]\d\.\d{3}e-0\d +\d\.\d{3}e[+-]0\d +\d\.\d{3}e\+00 +nan +2 +0$", said, re.M)


@pytest.mark.parametrize("piece", [1 << 20, 100])
def test_spectral_norms_are_estimated_from_below(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(inspect, "STREAM", piece)
    rng = np.random.default_rng(1)
    line = np.outer(rng.standard_normal(30), rng.standard_normal(50)).astype(np.float32)
    noise = rng.standard_normal((80, 60)).astype(np.float32)
    matrices = {"line": line, "noise": noise, "none": np.zeros((3, 4), np.float32)}
    checkpoint = Checkpoint.open(save(tmp_path, 1, {("parameter", name): m for name, m in matrices.items()}))
    found = {name: inspect.spectral(checkpoint, name) for name in ("line", "noise", "none")}
    assert found["line"] == pytest.approx(np.linalg.norm(line, 2), rel=1e-6)
    assert 0.9 < found["noise"] / np.linalg.norm(noise, 2) < 1 + 1e-9
    assert found["none"] == 0


def test_damage_is_told_with_what_can_still_be_read(run):
    folder = run / "step_00000040"
    (folder / "shard_0001.h5").write_bytes((folder / "shard_0001.h5").read_bytes()[:-100])
    said = describe(folder, stats=True)
    assert "DAMAGED, 1 problems:" in said and "shard_0001.h5 has" in said and "whole:" not in said
    assert re.search(r"^shard_0001\.h5 .* BAD$", said, re.M) and not re.search(r"^shard_0000\.h5 .* BAD$", said, re.M)
    assert "head.weight" in said
    (folder / "master.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"master\.h5 is damaged"):
        describe(folder)
    assert re.search(r"^step_00000040 .*master\.h5 is damaged", describe(run), re.M)


def test_nothing_to_describe(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        describe(tmp_path / "absent")
    with pytest.raises(UserError, match="no finished checkpoint"):
        describe(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "no checkpoint yet" in describe(tmp_path)


def test_layers_that_are_alike_are_shown_once(tmp_path):
    shapes = {f"layer.{i}.mlp.up.weight": (6 if i == 3 else 4, 2) for i in range(6)} | {"head.weight": (5, 2)}
    values = {("parameter", n): np.zeros(s, np.float32) for n, s in shapes.items()}
    lines = describe(save(tmp_path, 1, values, by_tensor(1))).splitlines()
    tree = lines[next(i for i, line in enumerate(lines) if line.startswith("tensor ")) :]
    assert [line.split("[")[0].strip() for line in tree[1:6]] == [
        "layer",
        "0-2.mlp.up.weight",
        "3.mlp.up.weight",
        "4-5.mlp.up.weight",
        "head.weight",
    ]
    assert "3 x 8" in tree[2] and "7 tensors" in tree[6] and " 62 " in tree[6]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_size(count, text):
    assert report.size(count) == text


def test_documentation_runs(tmp_path, monkeypatch, capsys):
    """Every Python block of docs/checkpoint.md, in order, in one interpreter, beside a run folder named run."""
    save(tmp_path / "run", 20, state(20), by_axis(2, 1), config=to_toml(Config()))
    monkeypatch.chdir(tmp_path)
    # The command of the interpreter that runs this, as in an activated environment.
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(DOCUMENT), "exec"), names)
    assert "step 20" in capsys.readouterr().out
