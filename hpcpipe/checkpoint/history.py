"""How a run went, by its checkpoints: what each holds and whether it is whole, and how each parameter moved.

In: a run folder. Every byte of every checkpoint is read and summed first; then each whole one beside the one before it,
a few MiB at a time. One that is not whole is told, with what is wrong, and passed over, and so is
one that a run removes meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hpcpipe.checkpoint import histogram, inspect, master, read, report
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.config import UserError

KIND = "parameter"
GONE = "it was removed while it was read (the run goes on)"
COLUMNS = 6  # checkpoints beside one another in the text; all are in the JSON


class Sums(NamedTuple):
    """Of one tensor in one checkpoint: its elements, their squares, and what they moved from the checkpoint before."""

    elements: int = 0
    square: float = 0.0
    before: float = 0.0  # the squares of those elements in the checkpoint before
    moved: float = 0.0  # the squares of the differences
    compared: bool = False

    def plus(self, other: Sums) -> Sums:
        """Both together; compared where one of them is."""
        return Sums(
            self.elements + other.elements,
            self.square + other.square,
            self.before + other.before,
            self.moved + other.moved,
            self.compared or other.compared,
        )

    @property
    def rms(self) -> float | None:
        """None for nothing."""
        return math.sqrt(self.square / self.elements) if self.elements else None

    @property
    def change(self) -> float | None:
        """The rms of the difference over the rms before; None where nothing is compared."""
        if not self.compared:
            return None
        return math.sqrt(self.moved / self.before) if self.before > 0 else 0.0 if self.moved == 0 else math.inf


def facts(path: Path | str, only: str = "") -> dict[str, Any]:
    """``checkpoints``, all of them by step, and ``tensors``, each with a value for each whole checkpoint.

    ``rms`` is that of a tensor; ``change`` is the rms of the difference to the whole checkpoint before over the rms
    there, None for the first one and where the tensor was not there or had another shape. ``only`` is a pattern of
    names. UserError for a folder that is no run's.
    """
    folder = Path(path)
    if not read.step_folders(folder):
        raise UserError(f"inspect: {folder} has no checkpoints; the history is that of a run folder")
    rows, good = [], []
    committed = read.complete(folder)
    for each in read.step_folders(folder):
        row, checkpoint = _row(each)
        if each in committed and not (each / master.FILE).exists():
            row, checkpoint = {**row, "problem": GONE}, None
        rows.append(row)
        good += [checkpoint] if checkpoint is not None else []
    names = list(dict.fromkeys(name for c in good for name in histogram.named(c, only) if name in c.tensors))
    good, columns = _columns(good, names)
    sums = {name: [column[i] for column in columns] for i, name in enumerate(names)}
    left = [c.path.name for c in good]
    for row in rows:
        if row["problem"] is None and row["name"] not in left:
            row["problem"] = GONE
    total = [sum_of(column) for column in zip(*sums.values(), strict=True)]
    return {
        "path": str(folder),
        "checkpoints": rows,
        "steps": [c.step for c in good],
        "all": _course(total),
        "tensors": [{"name": name, **_course(row)} for name, row in sums.items()],
    }


def _columns(good: Sequence[Checkpoint], names: Sequence[str]) -> tuple[list[Checkpoint], list[list[Sums]]]:
    """The checkpoints that are still there when it is their turn, and for each of them the sums of all names."""
    left: list[Checkpoint] = []
    columns: list[list[Sums]] = []
    before: Checkpoint | None = None
    for after in good:
        column = None
        while column is None:
            try:
                column = [_sums(before, after, name) for name in names]
            except UserError:
                if before is not None and _removed(before):
                    before = None
                elif _removed(after):
                    break
                else:
                    raise
        if column is not None:
            left, columns, before = [*left, after], [*columns, column], after
    return left, columns


def _removed(checkpoint: Checkpoint) -> bool:
    return not (checkpoint.path / master.FILE).exists()


def sum_of(parts: Iterable[Sums]) -> Sums:
    """All of them as if they were one tensor."""
    found = Sums()
    for part in parts:
        found = found.plus(part)
    return found


def newest_whole(found: Mapping[str, Any]) -> Path:
    """The folder of the newest checkpoint in the facts of which every byte is right; UserError where there is none."""
    good = [row["name"] for row in found["checkpoints"] if row["problem"] is None]
    if not good:
        raise UserError(f"inspect: no checkpoint in {found['path']} is whole: {found['checkpoints'][-1]['problem']}")
    return Path(found["path"]) / good[-1]


def _row(folder: Path) -> tuple[dict[str, Any], Checkpoint | None]:
    """What one checkpoint says of itself, and the checkpoint if every byte of it is right."""
    row: dict[str, Any] = {"name": folder.name, "step": read.number(folder)}
    row |= dict.fromkeys(("tokens", "loss", "created", "bytes", "shards"))
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        return {**row, "problem": str(error)}, None
    row |= {"step": checkpoint.step} | {key: checkpoint.attributes.get(key) for key in ("tokens", "loss", "created")}
    row |= {"bytes": sum(s.bytes for s in checkpoint.shards), "shards": len(checkpoint.shards)}
    wrong = checkpoint.verify()
    return {**row, "problem": wrong[0] if wrong else None}, None if wrong else checkpoint


def _sums(before: Checkpoint | None, after: Checkpoint, name: str) -> Sums:
    """One parameter in ``after``, piece by piece; beside ``before`` where it has the same shape there."""
    if name not in after.tensors:
        return Sums()
    same = before is not None and name in before.tensors and before.tensors[name][0] == after.tensors[name][0]
    others = inspect.stream(before, KIND, name) if same and before is not None else None
    found = Sums(compared=same)
    for _, values in inspect.stream(after, KIND, name):
        new = values.astype(np.float64).ravel()
        old = new if others is None else next(others)[1].astype(np.float64).ravel()
        moved = new - old
        found = found.plus(Sums(new.size, float(new @ new), float(old @ old) if same else 0.0, float(moved @ moved)))
    return found


def _course(sums: Sequence[Sums]) -> dict[str, Any]:
    return {"rms": [each.rms for each in sums], "change": [each.change for each in sums]}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The table of checkpoints, then each parameter's rms and changes at the newest of them."""
    rows = [["checkpoint", "step", "tokens", "loss", "size", "saved", ""]]
    for c in found["checkpoints"]:
        told = [report.number(c[key]) for key in ("step", "tokens", "loss")]
        held = "" if c["bytes"] is None else report.size(c["bytes"])
        rows.append([c["name"], *told, held, c["created"] or "", c["problem"] or "whole"])
    yield f"history of {found['path']}"
    yield ""
    yield from report.table(rows, "<>>>><<")
    if not found["steps"]:
        return
    yield ""
    steps = found["steps"]
    yield f"rms of each parameter, and its change from one whole checkpoint to the next{_left(steps)}"
    ends = sorted({0, len(steps) - 1})
    moves = range(1, len(steps))[-COLUMNS:]
    table = [["parameter", *(f"rms {steps[i]}" for i in ends), *(f"to {steps[i]}" for i in moves)]]
    for row in ({"name": "all together", **found["all"]}, *found["tensors"]):
        told = [report.number(row["rms"][i]) for i in ends]
        table.append([row["name"], *told, *(_percent(row["change"][i]) for i in moves)])
    yield from report.table(table, "<" + ">" * (len(table[0]) - 1))


def _left(steps: Sequence[int]) -> str:
    more = len(steps) - 1 > COLUMNS
    return f"; the last {COLUMNS} of {len(steps) - 1}, --json has all" if more else ""


def _percent(change: float | None) -> str:
    return "" if change is None else f"{100 * change:.3g} %" if math.isfinite(change) else "not finite"
