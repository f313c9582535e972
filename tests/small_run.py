"""A run small enough for a test: random tokens on disk, a model of a few thousand parameters, P ranks as threads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcpipe.checkpoint import read
from hpcpipe.comm.link import Link
from hpcpipe.comm.local import LocalWorld
from hpcpipe.config import loads
from hpcpipe.data import MANIFEST, Split, crc32, manifest
from hpcpipe.train import train

VOCAB = 61
MODELS = {
    "gpt2": 'family = "gpt2"\nlayers = 2\nheads = 2\nwidth = 24\ncontext = 16',
    "llama": 'family = "llama"\nlayers = 2\nheads = 4\nkv_heads = 2\nwidth = 24\nffn = 40\ncontext = 16\ntied = true',
    "untied": 'family = "llama"\nlayers = 2\nheads = 4\nkv_heads = 1\nwidth = 24\nffn = 40\ncontext = 16\ntied = false',
}


def write_tokens(folder: Path, train_tokens: int = 4000, val_tokens: int = 600, vocab: int = VOCAB) -> Path:
    """A prepared folder of random tokens with some structure (so that a model can learn something)."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    splits = {}
    for name, count in (("train", train_tokens), ("val", val_tokens)):
        tokens = np.cumsum(rng.integers(0, 4, count)) % vocab
        file = folder / f"{name}.bin"
        tokens.astype("<u2").tofile(file)
        splits[name] = Split(file.name, count, 1, crc32(file))
    (folder / MANIFEST).write_text(manifest("uint16", vocab, 0, splits, {}), encoding="utf-8")
    return folder


def run_toml(data: Path, out: Path, model: str = "llama", **settings: object) -> str:
    """The TOML of a small run; ``settings`` are section__key=value."""
    tables: dict[str, dict[str, object]] = {
        "train": {"steps": 4, "batch": 12, "microbatch": 2, "length": 16},
        "optimizer": {"lr": 0.01, "warmup": 1},
        "device": {"threads": 1},
    }
    for key, value in settings.items():
        section, _, leaf = key.partition("__")
        tables.setdefault(section, {})[leaf] = value
    shape = tables.pop("model", {})
    lines = [f"out = {json.dumps(str(out))}", "seed = 11", "[model]"]
    lines += [line for line in MODELS[model].splitlines() if line.partition(" = ")[0] not in shape]
    lines += [f"{key} = {json.dumps(value)}" for key, value in shape.items()]
    lines += ["[data]", f"path = {json.dumps(str(data))}"]
    for section, values in tables.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Result:
    """What a finished run left behind."""

    losses: list[float]
    tensors: dict[tuple[str, str], bytes]
    metrics: list[dict[str, float]]


def collect(out: Path) -> Result:
    """Losses from the metrics file, every tensor of the newest checkpoint as bytes."""
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    checkpoint = read.Checkpoint.open(out)
    kinds = ("parameter", "moment1", "moment2")
    tensors = {(k, n): checkpoint.read(k, n).tobytes() for k in kinds for n in checkpoint.tensors}
    return Result([m["loss"] for m in metrics if "loss" in m], tensors, metrics)


def run(data: Path, out: Path, ranks: int = 1, model: str = "llama", **settings: object) -> Result:
    """Trains on ``ranks`` ranks in this process."""
    config = loads(run_toml(data, out, model, **settings))

    def rank(link: Link) -> None:
        train(config, link)

    LocalWorld(ranks).run(rank)
    return collect(out)
