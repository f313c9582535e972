"""A small training state, saved in any division over shards: what the checkpoint tests share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpipe.checkpoint import write
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError

SHAPES = {
    "embed.weight": (37, 8),
    "layer.0.norm1.weight": (8,),
    "layer.0.mlp.up.weight": (24, 8),
    "head.weight": (37, 8),
}
State = dict[tuple[str, str], np.ndarray]
Divide = Callable[[State], list[list[write.Piece]]]


def state(seed: int, scale: int = 1) -> State:
    """Random float32 values by (kind, name); ``scale`` multiplies the rows."""
    rng = np.random.default_rng(seed)
    shapes = {n: (scale * s[0], *s[1:]) for n, s in SHAPES.items()}
    return {(kind, n): rng.standard_normal(s, dtype=np.float32) for n, s in shapes.items() for kind in KINDS}


def piece(key: tuple[str, str], array: np.ndarray, start: tuple[int, ...], extent: tuple[int, ...]) -> write.Piece:
    """The box ``start``, ``extent`` of a whole tensor."""
    box = tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))
    return write.Piece(key[1], key[0], array.shape, start, array[box])


def by_tensor(shards: int) -> Divide:
    """Whole tensors dealt out in turn, as pipeline stages would hold them."""

    def divide(values: State) -> list[list[write.Piece]]:
        pieces = [piece(key, a, (0,) * a.ndim, a.shape) for key, a in values.items()]
        return [pieces[i::shards] for i in range(shards)]

    return divide


def by_axis(shards: int, axis: int) -> Divide:
    """Every tensor cut along an axis (its last, if it has fewer), as tensor parallelism or ZeRO would."""

    def cut(key: tuple[str, str], a: np.ndarray, i: int) -> write.Piece | None:
        along = min(axis, a.ndim - 1)
        low, high = a.shape[along] * i // shards, a.shape[along] * (i + 1) // shards
        start = tuple(low if d == along else 0 for d in range(a.ndim))
        extent = tuple(high - low if d == along else n for d, n in enumerate(a.shape))
        return piece(key, a, start, extent) if high > low else None

    return lambda values: [[p for k, a in values.items() if (p := cut(k, a, i))] for i in range(shards)]


def save(out: Path, step: int, values: State, divide: Divide | None = None, **attributes: Any) -> Path:
    """What a training run does: all shards, commit; what was begun is discarded when something fails."""
    folder = write.step_folder(out, step)
    try:
        parts = enumerate((divide or by_tensor(2))(values))
        records = [write.write_shard(folder, i, pieces) for i, pieces in parts]
        write.commit(folder, records, {"step": step, "loss": 2.5, "tokens": 1000 * step, **attributes})
    except UserError:
        write.discard(folder)
        raise
    return folder


@pytest.fixture(scope="module", autouse=True)
def unsynced():
    """For tests in which no power fails: a sync takes most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        yield


def load(checkpoint: Checkpoint) -> State:
    return {(kind, name): checkpoint.read(kind, name) for kind, name in checkpoint.layout}


def same(a: State, b: State) -> bool:
    """Equal keys and equal bits."""
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)
