"""The atoms of a pipeline step and the one rule that orders them.

An ``Op`` is one pass (F forward, B input gradient, W weight gradient) of one stage over one microbatch; a
``Schedule`` is one row of ops per rank. Everything else in this room (generation, validation, simulation, lowering,
hang reports) asks ``needs`` what an op must wait for. There is no "backward": a full backward is B followed by W.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["F", "B", "W"]
KINDS: tuple[Kind, ...] = ("F", "B", "W")

_OP = re.compile(r"([FBW])(\d+)\.(\d+)")
_HEAD = re.compile(r"schedule (\S+), (\d+) microbatches, stages on ranks ([\d ]+?)(?:, (\d+) chains)?")


class ScheduleError(Exception):
    """A schedule, or a program made from one, that cannot run; the message says where it stands and why."""


class Op(NamedTuple):
    """One pass of one stage over one microbatch, written ``F4.7`` for the forward of stage 4, microbatch 7."""

    kind: Kind
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}.{self.micro}"

    @classmethod
    def parse(cls, text: str) -> Op:
        """Reads ``F4.7``; anything else raises ScheduleError."""
        match = _OP.fullmatch(text)
        if match is None:
            raise ScheduleError(f"{text!r} is not an op; write one as F4.7 (F, B or W, then stage.microbatch)")
        kind: Kind = "F" if match[1] == "F" else "B" if match[1] == "B" else "W"
        return cls(kind, int(match[2]), int(match[3]))


def needs(op: Op, depth: int) -> tuple[Op, ...]:
    """What must be finished before ``op`` can start, in chains of ``depth`` stages.

    F(s,m) needs F(s-1,m);   B(s,m) needs F(s,m) and B(s+1,m);   W(s,m) needs B(s,m)
    """
    kind, stage, micro = op
    if kind == "F":
        return (Op("F", stage - 1, micro),) if stage % depth else ()
    if kind == "W":
        return (Op("B", stage, micro),)
    own = Op("F", stage, micro)
    return (own, Op("B", stage + 1, micro)) if (stage + 1) % depth else (own,)


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in which order. ``placement[stage]`` is the rank that owns the stage.

    With ``chains`` > 1 the ranks hold that many copies of the model, like replicas that share ranks: stages
    c depth, ..., c depth + depth - 1 are copy c, and each copy sees ``micros`` microbatches of its own. ``proofs`` is
    what ``replay.validate`` has found, by kinds of ops: it is not looked for twice.
    """

    name: str
    rows: tuple[tuple[Op, ...], ...]
    placement: tuple[int, ...]
    micros: int
    chains: int = 1
    proofs: dict[tuple[Kind, ...], Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def stages(self) -> int:
        return len(self.placement)

    @property
    def depth(self) -> int:
        """Stages of one copy of the model."""
        return len(self.placement) // self.chains

    @property
    def ranks(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """The text form: a heading, then one row per rank. ``parse`` reads it back."""
        where = " ".join(str(rank) for rank in self.placement)
        head = f"schedule {self.name}, {self.micros} microbatches, stages on ranks {where}"
        head += f", {self.chains} chains" if self.chains > 1 else ""
        return "\n".join([head, *(" ".join(str(op) for op in row) for row in self.rows)]) + "\n"

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Reads the text form; raises ScheduleError when the heading or an op cannot be read."""
        head, *rows = text.removesuffix("\n").split("\n")
        match = _HEAD.fullmatch(head.strip())
        if match is None:
            raise ScheduleError(f"the first line of a schedule reads {head!r}; expected what Schedule writes")
        placement = tuple(int(rank) for rank in match[3].split())
        ops = tuple(tuple(Op.parse(word) for word in row.split()) for row in rows)
        return cls(match[1], ops, placement, int(match[2]), int(match[4] or 1))

    def only(self, kind: Kind) -> Schedule:
        """The same schedule with the ops of one kind; ``only("F")`` is what an evaluation runs."""
        rows = tuple(tuple(op for op in row if op.kind == kind) for row in self.rows)
        return Schedule(self.name, rows, self.placement, self.micros, self.chains)


def boundaries(placement: Sequence[int]) -> tuple[int, ...]:
    """The stages whose output leaves their rank, in order: s such that stages s and s+1 are on two ranks."""
    return tuple(s for s in range(len(placement) - 1) if placement[s] != placement[s + 1])
