"""Where a rank stands, in its own words, and the folder in which ranks that are stuck in MPI tell it to each other.

Only the main thread may speak MPI, so the watch threads meet in a folder of the run, on the file system that
checkpoints need anyway. A question is a file with a number, an answer repeats it: no clocks of two nodes are compared,
and who stands still is who does not answer. Nothing is written in there before somebody has waited for long.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcpipe.comm.link import Link
from hpcpipe.runtime.executor import Bound
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.program import Program

FOLDER = "standing"
LAST = "the last ops"  # what a rank owes that has not come to a sum right after its step
EVIDENCE = "evidence.json"
NUMBERED = re.compile(r"(question|rank_\d+)_(\d+)\.json")
OURS = re.compile(r"question_\d+\.json|rank_\d+_\d+\.json(\.part)?|judge|evidence\.json(\.\d+\.part)?")


class Awaited(NamedTuple):
    """What is waited for: in words, the ranks of the job whose turn it is, and the op that they owe ("" if none).

    A patient wait may last as long as all of them answer: they may be at files, and how long that takes nobody knows.
    """

    what: str
    ranks: Sequence[int]
    owed: str = ""
    patient: bool = False


class Where(NamedTuple):
    """Where a rank is: a mark that changes with every bit of progress, its turn, the op that it is at or before.

    Turns count the programs that a rank has begun, and between two of them one more: they compare ranks. ``when`` names
    the program ("" between two).
    """

    mark: Hashable
    turn: int
    at: str
    when: str
    wait: Awaited | None


class Standing(NamedTuple):
    """What a rank answers: where it is, and for how many seconds it has made no progress."""

    rank: int
    host: str
    pid: int
    answers: int
    seconds: float
    turn: int
    at: str
    when: str
    wait: Awaited | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of a range only the ends are told."""
        wait = self.wait and {**self.wait._asdict(), "ranks": _packed(self.wait.ranks)}
        return {**self._asdict(), "wait": wait}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Standing:
        """The other way; KeyError or TypeError where it is something else."""
        wait = values["wait"] and Awaited(**{**values["wait"], "ranks": _unpacked(values["wait"]["ranks"])})
        return cls(**{**values, "wait": wait})


class Whereabouts:
    """Knows where its rank stands: in one of its programs, or between two runs of them.

    ``first`` is the rank of the job that its pipeline begins with; ``mates`` has, for each of its stages of which there
    are copies, the ranks that hold them. ``step`` is the step that is being done, or the last one.
    """

    def __init__(
        self, program: Bound, evaluation: Bound | None, step: int, first: int, size: int,
        mates: Mapping[int, Sequence[int]],
    ) -> None:  # fmt: skip
        self.program, self.evaluation, self.step = program, evaluation, step
        self.first, self.size, self.mates = first, size, mates
        self._awaited: Awaited | None = None

    @contextlib.contextmanager
    def waiting(
        self, what: str, owed: str = "", ranks: Sequence[int] | None = None, patient: bool = False
    ) -> Iterator[None]:
        """Notes what is waited for that is no instruction of a program, and from whom (None: all)."""
        self._awaited = Awaited(what, range(self.size) if ranks is None else ranks, owed, patient)
        try:
            yield
        finally:
            self._awaited = None

    def only(self, peer: int) -> range:
        """A rank of the own pipeline."""
        return range(self.first + peer, self.first + peer + 1)

    def now(self) -> Where:
        """Where the rank stands, in the schedule's language."""
        awaited = self._awaited
        turn = 2 * (self.program.runs + (self.evaluation.runs if self.evaluation else 0))
        runs = (self.program, f"step {self.step}"), (self.evaluation, f"the evaluation after step {self.step}")
        for bound, when in runs:
            at = bound.at if bound else -1
            if bound is None or at < 0:
                continue
            if awaited:  # a program may ask, on its way, for what the turn before it has begun
                return Where((turn, awaited), turn - 1, bound.program.standing(at), "", awaited)
            return Where((turn, at), turn, bound.program.standing(at), when, self._inside(bound, at))
        return Where((turn, awaited), turn + 1, f"the work after step {self.step}", "", awaited)

    def _inside(self, bound: Bound, at: int) -> Awaited | None:
        """What an instruction of a program waits for."""
        kind, stage, *_ = bound.instructions[at]
        if kind == "WAIT":
            op, peer, arrives = bound.program.awaited(at)
            # What is to be taken is taken before the op that needs it begins.
            owed = op if arrives else op._replace(stage=op.stage + (1 if op.kind == "F" else -1))
            rank = self.first + peer
            what = f"{op} from rank {rank}" if arrives else f"rank {rank} to take {op}"
            return Awaited(what, self.only(peer), str(owed))
        if kind == "REDUCE" and stage in self.mates:
            before = [str(Op("W", i.stage, i.micro)) for i in bound.instructions[:at] if i[:2] == ("W", stage)]
            return Awaited(f"the gradients of the other copies of stage {stage}", self.mates[stage], before[-1])
        return None


def row(program: Program) -> list[str]:
    """The ops of a program in order."""
    found = program.instructions
    return [str(Op(i.kind, i.stage, i.micro)) for i in found if i.kind == "F" or i.kind == "B" or i.kind == "W"]


def unseen(program: Program) -> str:
    """The first op of a rank that may be unfinished when all that it had to send in a step has arrived."""
    sends = [i for i, instruction in enumerate(program.instructions) if instruction.kind == "SEND"]
    return program.standing(sends[-1] + 1 if sends else 0)


# --- the folder


class Seen(NamedTuple):
    """The newest question (0: none), the newest that each rank has answered, and whether the evidence is there."""

    question: int
    answers: dict[int, int]
    judged: bool


class Meeting:
    """The folder of one run, as one rank uses it. Everything may raise OSError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mine: list[Path] = []

    def look(self) -> Seen:
        """Reads only the listing: it says who has answered, and a network file system asks its server for it."""
        names = os.listdir(self.folder)  # noqa: PTH208 - names only, no objects
        found = [(match[1], int(match[2])) for name in names if (match := NUMBERED.fullmatch(name))]
        answers: dict[int, int] = {}
        for name, number in found:
            if name.startswith("rank_"):
                rank = int(name[len("rank_") :])
                answers[rank] = max(number, answers.get(rank, 0))
        return Seen(max((n for name, n in found if name == "question"), default=0), answers, EVIDENCE in names)

    def ask(self, number: int) -> None:
        """A question to all ranks. Two that ask at once ask the same."""
        (self.folder / f"question_{number}.json").touch()
        (self.folder / f"question_{number - 1}.json").unlink(missing_ok=True)

    def answer(self, standing: Standing) -> None:
        """Tells where I stand. The answer before stays, for those that have just seen it in the listing."""
        name = f"rank_{standing.rank}_{standing.answers}.json"
        self._write(name, "part", standing.to_dict())
        self._mine.append(self.folder / name)
        for old in self._mine[:-2]:
            old.unlink(missing_ok=True)
        del self._mine[:-2]

    def read(self, answers: Mapping[int, int]) -> dict[int, Standing]:
        """The standings in these answers, without those that cannot be read."""
        found = {}
        for rank, number in answers.items():
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                file = self.folder / f"rank_{rank}_{number}.json"
                found[rank] = Standing.from_dict(json.loads(file.read_bytes()))
        return found

    def claim(self) -> bool:
        """Whether it is mine to end the job: one rank reads all answers, the others what it makes of them."""
        try:
            (self.folder / "judge").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def publish(self, rank: int, evidence: Any) -> None:
        """Writes the evidence for all to read."""
        self._write(EVIDENCE, f"{rank}.part", evidence)

    def evidence(self) -> Any:
        """What was published."""
        return json.loads((self.folder / EVIDENCE).read_bytes())

    def remove(self) -> None:
        """Takes the folder away, and what earlier runs left beside it."""
        clear(self.folder.parent)

    def _write(self, name: str, beside: str, content: Any) -> None:
        part = self.folder / f"{name}.{beside}"
        part.write_text(json.dumps(content), encoding="utf-8")
        part.replace(self.folder / name)


def meet(out: Path, link: Link) -> Meeting | None:
    """The folder of this run, which rank 0 makes; None where there is nobody to meet, or not all can.

    Its name is new each time: what a lost node of an earlier run may still write goes nowhere.
    """
    if link.size == 1:
        return None
    folder = None
    if link.rank == 0:
        clear(out / FOLDER)
        with contextlib.suppress(OSError):
            folder = out / FOLDER / f"{time.time_ns():x}"
            folder.mkdir(parents=True)
    folder = link.bcast(folder)
    # Who does not see it could not answer, and would look like one that stands still.
    seen = link.bcast(link.gather(folder is not None and folder.is_dir()) or [])
    return Meeting(folder) if folder is not None and all(seen) else None


def clear(folder: Path) -> None:
    """Removes what is ours in the folders of all runs, and those of them that are empty then."""
    with contextlib.suppress(OSError):
        for run in list(folder.iterdir()):
            with contextlib.suppress(OSError):
                for file in [f for f in run.iterdir() if OURS.fullmatch(f.name)]:
                    file.unlink(missing_ok=True)
                run.rmdir()
        folder.rmdir()


def _packed(ranks: Sequence[int]) -> str | list[int]:
    return f"{ranks.start}:{ranks.stop}:{ranks.step}" if isinstance(ranks, range) else list(ranks)


def _unpacked(ranks: str | list[int]) -> Sequence[int]:
    return range(*map(int, ranks.split(":"))) if isinstance(ranks, str) else tuple(ranks)
