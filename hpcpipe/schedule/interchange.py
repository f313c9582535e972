"""Schedules as files: our own text form, and the CSV that ``torch.distributed.pipelining`` loads and dumps.

There a row is a rank and a cell an action: ``2F0`` is F2.0, ``1I3`` is B1.3, ``0W2`` is W0.2, ``1B3`` a full backward,
B1.3 and then W1.3; ``(0F1;3B0)OVERLAP_F_B`` is its parts in that order, an empty cell an idle step. Messages are
checked and dropped, because lowering makes them anew; what concerns sharded parameters (UNSHARD, RESHARD, REDUCE_GRAD)
is dropped. Nothing is put into another order and nothing is proven here: that is what ``replay.validate`` is for.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from hpcpipe.schedule.engine import Costs
from hpcpipe.schedule.op import Kind, Op, Schedule, ScheduleError
from hpcpipe.schedule.replay import replay

# Their word for a pass -> ours. The same letter is not the same pass: their B is both halves, their I is our B.
PASSES: dict[str, tuple[Kind, ...]] = {"F": ("F",), "I": ("B",), "B": ("B", "W"), "W": ("W",)}
ONWARD = {"F": 1, "B": -1}  # where the result of a pass goes, in stages; that of W stays

# Six digits at most: a longer number is a slip, and would make the list of what is missing endless.
_ACTION = re.compile(r"([0-9]{1,6})(F|I|B|W|SEND_F|RECV_F|SEND_B|RECV_B)([0-9]{1,6})")
_SHARDING = re.compile(r"[0-9]+(UNSHARD|RESHARD|REDUCE_GRAD)[0-9]*")
_OVERLAP = re.compile(r"\((.+)\)OVERLAP_F_B")

Key = tuple[str, int, int]  # (our or their word, stage, microbatch)


class Action(NamedTuple):
    """One action and where it stands: its cell, and its place among the actions of the rank."""

    word: str
    stage: int
    micro: int
    rank: int
    cell: int
    place: int

    def __str__(self) -> str:
        return f"rank {self.rank}, cell {self.cell} ({self.stage}{self.word}{self.micro})"


def load(path: str) -> Schedule:
    """Reads a file in either form; one that starts with ``schedule `` is ours. Raises ScheduleError with the path."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ScheduleError(f"{path} is not UTF-8 text; a schedule is a text or a CSV file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ScheduleError(f"{path} cannot be read ({reason}); name a file that holds a schedule") from None
    try:
        if text.startswith("schedule "):
            return Schedule.parse(text)
        return read(text, "_".join(Path(path).stem.split()))
    except (ScheduleError, ValueError) as error:  # the latter for a number of thousands of digits
        raise ScheduleError(f"{path}: {error}") from None


def read(text: str, name: str) -> Schedule:
    """The schedule of a CSV, with or without its messages; ranks and cells are counted from 0.

    Raises ScheduleError for a cell that cannot be read, a stage on two ranks, a stage or microbatch that is left out,
    a rank without work, and a message that is missing, in the wrong place, or of no use.
    """
    rows = [list(_actions(name, rank, row)) for rank, row in enumerate(_table(name, text))]
    passes = [[action for action in row if action.word in PASSES] for row in rows]
    for rank, row in enumerate(passes):
        if not row:
            raise ScheduleError(f"{name}: rank {rank} computes nothing; each row is a rank and needs an F, I, B or W")
    placement = _placement(name, passes)
    micros = _count(name, "microbatch", {action.micro for row in passes for action in row})
    _check_messages(name, rows, placement)
    ops = (tuple(Op(kind, a.stage, a.micro) for a in row for kind in PASSES[a.word]) for row in passes)
    return Schedule(name, tuple(ops), placement, micros)


def write(schedule: Schedule, communication: bool = False) -> str:
    """The CSV of a schedule: what their loader calls ``compute_only``, or ``compute_comms`` with the messages.

    A W right after its B is written as one full backward, which they run faster and do with other schedules of theirs.
    REDUCE_GRAD is not written: their simulator refuses it, and their ``compute_only`` loader puts it in. Raises
    ScheduleError for several chains, and with messages when the schedule cannot come to its end.
    """
    if schedule.chains > 1:
        raise ScheduleError(f"{schedule.name}: the CSV has no way to say that there are {schedule.chains} chains")
    rows = [list(_cells(row)) for row in schedule.rows]
    lines = _with_messages(schedule, rows) if communication else [[text for _, text in row] for row in rows]
    return "".join(",".join(line) + "\n" for line in lines)


# --- reading


def _table(name: str, text: str) -> list[list[str]]:
    """The cells as text; lines at the end that hold nothing are not ranks."""
    reader = csv.reader(StringIO(text.rstrip(), newline=""), strict=True)
    try:
        rows = [[cell.strip() for cell in row] for row in reader]
    except csv.Error as error:
        raise ScheduleError(f"{name}: line {reader.line_num} is not CSV ({error}); write one row per rank") from None
    if not rows:
        raise ScheduleError(f"{name}: there is nothing in it; write one row per rank, such as 0F0,0B0")
    return rows


def _actions(name: str, rank: int, row: Sequence[str]) -> Iterator[Action]:
    """The passes and messages of one row, parts of an overlap one by one."""
    place = 0
    for cell, text in enumerate(row):
        overlap = _OVERLAP.fullmatch(text)
        for part in overlap[1].split(";") if overlap else [text] if text else []:
            if match := _ACTION.fullmatch(part.strip()):
                yield Action(match[2], int(match[1]), int(match[3]), rank, cell, place)
                place += 1
            elif not _SHARDING.fullmatch(part.strip()):
                raise ScheduleError(
                    f"{name}: rank {rank}, cell {cell} reads {text[:40]!r}, which is no action; "
                    "write stage, action and microbatch, as in 2F0, 1I3, 0W2, 1B3 or 0SEND_F2"
                )


def _placement(name: str, rows: Sequence[Sequence[Action]]) -> tuple[int, ...]:
    """The rank of each stage."""
    first: dict[int, Action] = {}
    for row in rows:
        for action in row:
            home = first.setdefault(action.stage, action)
            if home.rank != action.rank:
                raise ScheduleError(f"{name}: {action} stands on another rank than {home}; a stage lives on one rank")
    return tuple(first[stage].rank for stage in range(_count(name, "stage", set(first))))


def _count(name: str, what: str, numbers: set[int]) -> int:
    """How many there are; every number from 0 on must appear."""
    missing = next((n for n in range(len(numbers)) if n not in numbers), None)
    if missing is not None:
        raise ScheduleError(
            f"{name}: {what} {missing} is nowhere, although {what} {max(numbers)} is; number them from 0 without gaps"
        )
    return len(numbers)


def _check_messages(name: str, rows: Sequence[Sequence[Action]], placement: Sequence[int]) -> None:
    """Where a file has messages, it has each one that a pass between two ranks needs, in its place, and no other."""
    passes: dict[Key, Action] = {}
    messages: dict[Key, Action] = {}
    for action in (action for row in rows for action in row):
        if action.word not in PASSES and (action.word, action.stage, action.micro) in messages:
            raise ScheduleError(f"{name}: {action} stands there a second time")
        for kind in PASSES.get(action.word, (action.word,)):
            found = passes if action.word in PASSES else messages
            found.setdefault((kind, action.stage, action.micro), action)
    needed = set()
    for (kind, stage, micro), action in passes.items() if messages else ():
        to = stage + ONWARD.get(kind, 0)
        if 0 <= to < len(placement) and placement[to] != placement[stage]:
            send, recv = (f"SEND_{kind}", stage, micro), (f"RECV_{kind}", to, micro)
            needed |= {send, recv}
            _check_order(name, action, messages, send, f"stage {to} is on rank {placement[to]}", after=True)
            if (kind, to, micro) in passes:
                reason = f"stage {stage} is on rank {placement[stage]}"
                _check_order(name, passes[kind, to, micro], messages, recv, reason, after=False)
    for key, message in messages.items():
        if key not in needed:
            raise ScheduleError(f"{name}: {message} moves nothing: no pass on another rank gives or takes it")


def _check_order(name: str, it: Action, messages: Mapping[Key, Action], key: Key, why: str, after: bool) -> None:
    """The message ``key`` stands on the rank of the pass ``it``, on the right side of it."""
    message = messages.get(key)
    if message is not None and message.rank == it.rank and (message.place > it.place) == after:
        return
    word, stage, micro = key
    side, where = "after" if after else "before", f"it is at {message}" if message else "there is none"
    raise ScheduleError(f"{name}: {it} needs {stage}{word}{micro} {side} it, because {why}; {where}")


# --- writing


def _cells(row: Sequence[Op]) -> Iterator[tuple[Op, str]]:
    """What the row reads in their words, each cell with its first op."""
    for before, op, after in zip((None, *row), row, (*row[1:], None), strict=False):
        kind, stage, micro = op
        if kind == "W" and before == Op("B", stage, micro):
            continue
        word = kind if kind != "B" else "B" if after == Op("W", stage, micro) else "I"
        yield op, f"{stage}{word}{micro}"


def _with_messages(schedule: Schedule, rows: Sequence[Sequence[tuple[Op, str]]]) -> list[list[str]]:
    """The cells with a SEND right after what it sends and, at the same time, the RECV on the other rank.

    In the order of one valid run, so each rank posts its receives in the order in which the other one sends, and
    nothing in that order waits for anything behind it.
    """
    texts = {op: text for row in rows for op, text in row}
    lines: list[list[str]] = [[] for _ in rows]
    placement, run = schedule.placement, replay(schedule, Costs.unit(schedule.stages))
    for event in sorted(run.events, key=lambda event: event.start):
        (kind, stage, micro), to = event.op, event.op.stage + ONWARD.get(event.op.kind, 0)
        lines[event.rank] += [texts[event.op]] if event.op in texts else []
        if 0 <= to < len(placement) and placement[to] != event.rank:
            lines[event.rank].append(f"{stage}SEND_{kind}{micro}")
            lines[placement[to]].append(f"{to}RECV_{kind}{micro}")
    return lines
