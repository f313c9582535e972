"""What is in a checkpoint or a run folder, and is it whole: facts as a plain dictionary, then text or JSON.

Streams: tensors are read a few MiB at a time, so a checkpoint larger than memory is fine.
"""

from __future__ import annotations

import json as json_
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from hpcpipe.checkpoint import read, report
from hpcpipe.checkpoint.layout import KINDS
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError, loads

STREAM = 1 << 20  # elements looked at together
TURNS = 16  # of the power iteration for a spectral norm
TAIL = 1 << 16  # bytes of the metrics file in which its last lines are looked for


def describe(path: Path | str, json: bool = False, stats: bool = False) -> str:
    """A checkpoint or a run folder in words, or as a JSON object; ``stats`` adds mean, rms, ... of every tensor.

    A damaged checkpoint is described as far as it can be read, with its problems; UserError if nothing can be read.
    """
    found = facts(Path(path), stats)
    if json:
        return json_.dumps(finite(found), indent=1, allow_nan=False)
    return report.text(found)


def facts(path: Path, stats: bool = False) -> dict[str, Any]:
    """Everything ``describe`` tells, as JSON-able values (and NaN or Inf where a number is)."""
    run = not ((path / "master.h5").is_file() or path.name == "master.h5") and _is_run(path)
    found: dict[str, Any] = {"run": _run(path) if run else None, "checkpoint": None}
    if run and not found["run"]["checkpoints"]:
        return found
    try:
        found["checkpoint"] = _checkpoint(Checkpoint.open(path), stats)
    except UserError:
        if not run:
            raise
    return found


def _is_run(path: Path) -> bool:
    return bool(read.step_folders(path)) or (path / "metrics.jsonl").is_file()


def _run(path: Path) -> dict[str, Any]:
    """The run folder: its checkpoints (sizes compared, bytes not summed), its last metrics, its completion record."""
    folders = read.step_folders(path)
    finished = set(read.complete(path))
    checkpoints = [_brief(f) if f in finished else {"name": f.name, "problem": "never finished"} for f in folders]
    return {
        "path": str(path),
        "checkpoints": checkpoints,
        "metrics": _metrics(path / "metrics.jsonl"),
        "done": _done(path),
    }


def _brief(folder: Path) -> dict[str, Any]:
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        return {"name": folder.name, "problem": str(error)}
    wrong = checkpoint.verify(deep=False)
    return {
        "name": folder.name,
        "step": checkpoint.step,
        "loss": checkpoint.attributes.get("loss"),
        "tokens": checkpoint.attributes.get("tokens"),
        "bytes": sum(s.bytes for s in checkpoint.shards),
        "shards": len(checkpoint.shards),
        "created": checkpoint.attributes.get("created"),
        "problem": wrong[0] if wrong else None,
    }


def _metrics(file: Path) -> dict[str, Any]:
    """The newest value of every key that ``metrics.jsonl`` has near its end; a line cut short by a crash is skipped."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - TAIL))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    newest: dict[str, Any] = {}
    for line in lines:
        try:
            record = json_.loads(line)
        except ValueError:
            continue
        newest |= record if isinstance(record, dict) else {}
    return newest


def _done(path: Path) -> dict[str, Any] | None:
    try:
        record = json_.loads((path / "done.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else {}


def _checkpoint(checkpoint: Checkpoint, stats: bool) -> dict[str, Any]:
    problems = checkpoint.verify()
    by_file: dict[int, set[tuple[str, str]]] = {}
    for key, tensor in checkpoint.layout.items():
        for part in tensor.parts:
            by_file.setdefault(part.shard, set()).add(key)
    shards = [{**s._asdict(), "tensors": len(by_file.get(i, ()))} for i, s in enumerate(checkpoint.shards)]
    for row in shards:
        del row["blocks"]
        row["good"] = not any(f"{checkpoint.path / row['file']}" in p for p in problems)
    tensors = [_tensor(checkpoint, name, stats) for name in dict.fromkeys(name for _, name in checkpoint.layout)]
    return {
        "path": str(checkpoint.path),
        "step": checkpoint.step,
        "attributes": dict(checkpoint.attributes),
        "config": _config(str(checkpoint.attributes.get("config", ""))),
        "parameters": sum(math.prod(t["shape"]) for t in tensors if "parameter" in t["kinds"]),
        "bytes": sum(s.bytes for s in checkpoint.shards),
        "tensors": tensors,
        "shards": shards,
        "problems": problems,
    }


def _tensor(checkpoint: Checkpoint, name: str, stats: bool) -> dict[str, Any]:
    """One name: shape and dtype of its first kind, the bytes and boxes of all of them."""
    kinds = [k for k in KINDS if (k, name) in checkpoint.layout]
    all_kinds = [checkpoint.layout[k, name] for k in kinds]
    row: dict[str, Any] = {
        "name": name,
        "shape": list(all_kinds[0].shape),
        "dtype": np.dtype(all_kinds[0].dtype).name,
        "kinds": kinds,
        "bytes": sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in all_kinds),
        "parts": len(all_kinds[0].parts),
    }
    if stats:
        row["stats"] = {kind: _stats(checkpoint, kind, name) for kind in kinds}
        if "parameter" in kinds and len(row["shape"]) == 2 and "problem" not in row["stats"]["parameter"]:
            row["stats"]["parameter"]["spectral"] = spectral(checkpoint, name)
    return row


def _stats(checkpoint: Checkpoint, kind: str, name: str) -> dict[str, Any]:
    """mean, rms and largest |value| of the finite elements, and how many are NaN or infinite."""
    count, total, square, largest, nan, inf = 0, 0.0, 0.0, 0.0, 0, 0
    try:
        for _, values in stream(checkpoint, kind, name):
            block = values.ravel()
            finite = block[np.isfinite(block)].astype(np.float64)
            nan += int(np.isnan(block).sum())
            inf += int(np.isinf(block).sum())
            count += finite.size
            total += float(finite.sum())
            square += float(finite @ finite)
            largest = max(largest, float(np.abs(finite).max(initial=0.0)))
    except UserError as error:
        return {"problem": str(error)}
    mean, rms = (total / count, math.sqrt(square / count)) if count else (math.nan, math.nan)
    return {"mean": mean, "rms": rms, "max": largest, "nan": nan, "inf": inf}


def spectral(checkpoint: Checkpoint, name: str) -> float:
    """The largest singular value of a matrix, from below: TURNS turns of the power iteration, each one pass over it."""
    rows, columns = checkpoint.layout["parameter", name].shape
    v, size, step = np.random.default_rng(0).standard_normal(columns), 0.0, max(1, STREAM // columns)
    for _ in range(TURNS):
        v = v / (float(np.linalg.norm(v)) or 1.0)
        product = np.zeros(columns)
        for first in range(0, rows, step):
            block = checkpoint.read("parameter", name, slices=(slice(first, first + step),)).astype(np.float64)
            product += block.T @ (block @ v)
        v, size = product, float(np.linalg.norm(product))
    return math.sqrt(size)


def stream(checkpoint: Checkpoint, kind: str, name: str) -> Iterator[tuple[tuple[slice, ...], np.ndarray[Any, Any]]]:
    """(where, values) of a tensor in pieces of about STREAM elements: some rows, or some columns of one long row."""
    shape = checkpoint.layout[kind, name].shape
    row = math.prod(shape[1:])
    rows, columns = max(1, STREAM // row), max(1, STREAM // max(1, row // shape[1])) if len(shape) > 1 else 1
    for first in range(0, shape[0], rows):
        boxes: list[tuple[slice, ...]] = [(slice(first, first + rows),)]
        if row > STREAM:
            boxes = [(*boxes[0], slice(column, column + columns)) for column in range(0, shape[1], columns)]
        for box in boxes:
            yield box, checkpoint.read(kind, name, slices=box)


def _config(text: str) -> dict[str, Any]:
    """The run's config as nested dictionaries; empty when there is none or this version does not know its keys."""
    try:
        return asdict(loads(text)) if text else {}
    except UserError:
        return {}


def finite(value: Any) -> Any:
    """JSON knows no NaN and no Inf: null instead."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
