"""What has changed between two checkpoints, tensor by tensor."""

from __future__ import annotations

import json as json_
import math
from typing import Any

import numpy as np

from hpcpipe.checkpoint import inspect, report
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError

KIND = "parameter"


def compare(path: str, other: str, json: bool = False) -> str:
    """The change of every parameter from ``path`` to ``other``, both a checkpoint or a run folder; text or JSON.

    ``relative`` is the rms of the difference over the rms of the first. Streams: a few MiB of each are held.
    """
    found = facts(Checkpoint.open(path), Checkpoint.open(other))
    return json_.dumps(found, indent=1) if json else "\n".join(_lines(found))


def facts(one: Checkpoint, two: Checkpoint) -> dict[str, Any]:
    """What ``compare`` tells, as JSON-able values; null where a number is not finite. UserError for a damaged one."""
    for checkpoint in (one, two):
        if wrong := checkpoint.verify():
            raise UserError(f"inspect: {checkpoint.path} is not compared: {wrong[0]}")
    names = list(dict.fromkeys([*one.tensors, *two.tensors]))
    shared = [n for n in names if n in one.tensors and n in two.tensors and one.tensors[n][0] == two.tensors[n][0]]
    rows = [{"name": name, **_change(one, two, name)} for name in shared]
    return {
        "from": {"path": str(one.path), "step": one.step},
        "to": {"path": str(two.path), "step": two.step},
        "equal": all(row["equal"] for row in rows) and len(shared) == len(names),
        "tensors": rows,
        "only_from": [n for n in names if n not in two.tensors],
        "only_to": [n for n in names if n not in one.tensors],
        "other_shape": [n for n in names if n in one.tensors and n in two.tensors and n not in shared],
    }


def _change(one: Checkpoint, two: Checkpoint, name: str) -> dict[str, Any]:
    moved, size, largest, count, equal = 0.0, 0.0, 0.0, 0, True
    for (_, a), (_, b) in zip(inspect.stream(one, KIND, name), inspect.stream(two, KIND, name), strict=True):
        equal = equal and a.tobytes() == b.tobytes()
        before, after = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
        difference = after - before
        moved += float(difference @ difference)
        size += float(before @ before)
        largest = max(largest, float(np.abs(difference).max(initial=0.0)))
        count += before.size
    relative = math.sqrt(moved / size) if size > 0 else 0.0 if moved == 0 else math.inf
    told = {"relative": relative, "rms": math.sqrt(moved / max(count, 1)), "max": largest}
    return {"equal": equal} | {key: value if math.isfinite(value) else None for key, value in told.items()}


def _lines(found: dict[str, Any]) -> list[str]:
    ends = [f"step {found[end]['step']} ({found[end]['path']})" for end in ("from", "to")]
    rows = [["parameter", "relative change", "rms of it", "largest"]]
    for row in found["tensors"]:
        cells = [report.number(row[key]) or "not finite" for key in ("relative", "rms", "max")]
        rows.append([row["name"], *(["="] * len(cells) if row["equal"] else cells)])
    lines = [f"from {ends[0]}", f"to   {ends[1]}", "", *report.table(rows, "<>>>")]
    apart = {"only_from": "only in the first", "only_to": "only in the second", "other_shape": "of another shape"}
    lines += [f"{what}: {', '.join(found[key])}" for key, what in apart.items() if found[key]]
    return [*lines, "", "the parameters are equal, byte for byte" if found["equal"] else "not equal"]
