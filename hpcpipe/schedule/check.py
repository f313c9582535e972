"""The dry run of all ranks' programs together: what is proven before anything is launched.

Messages have rendezvous semantics: a send is over only when its receive has been posted, and a WAIT blocks until its
message is over. The run follows what every slot holds, so it finds a deadlock, a message that is received as another
or not at all, and a slot that is written while its tensor is still needed or still on its way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from hpcpipe.schedule.op import ScheduleError
from hpcpipe.schedule.program import POOLS, Edge, Instruction, Program, Slot

WRITES = {"F": ("Y", "SAVED", "KEPT"), "B": ("DX", "OWED"), "W": ()}


class Tensor(NamedTuple):
    """What a slot holds: what ``stage`` made for ``micro``. An X is named as the Y it came from, a DY as the DX."""

    pool: str
    stage: int
    micro: int

    def __str__(self) -> str:
        return f"{self.pool} of stage {self.stage}, microbatch {self.micro}"


class Channel:
    """One direction of one tag between two ranks: what was sent and what was posted, matched first to first."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.posted: list[Tensor] = []

    def over(self, number: int) -> bool:
        """Whether message ``number`` has been both sent and posted."""
        return number < min(len(self.sent), len(self.posted))


def check(programs: Sequence[Program]) -> None:
    """Raises ScheduleError, in words, unless the programs come to their end together and slots hold what is read."""
    channels: dict[tuple[int, int, int], Channel] = defaultdict(Channel)
    ranks = [_Rank(program, channels) for program in programs]
    # A rank runs until it blocks; when no rank has moved, none will.
    while sum(rank.advance() for rank in ranks):
        pass
    stuck = [rank for rank in ranks if rank.at < len(rank.program.instructions)]
    if stuck:
        lines = [f"  {rank.report(ranks)}" for rank in stuck]
        raise ScheduleError("\n".join(["deadlock: no rank can go on", *lines]))
    for (source, target, tag), channel in channels.items():
        if len(channel.sent) != len(channel.posted):
            sent, posted = len(channel.sent), len(channel.posted)
            raise ScheduleError(
                f"rank {source} sends {sent} messages to rank {target} (tag {tag}), which posts {posted}"
            )
    last = max(stage for program in programs for stage, _ in program.counts)
    for rank in ranks:
        rank.finish(last)


class _Rank:
    """One rank of the dry run: where it stands, what its slots hold, which of its messages are on their way."""

    def __init__(self, program: Program, channels: dict[tuple[int, int, int], Channel]) -> None:
        self.program, self.channels, self.at = program, channels, 0
        self.holds: dict[Slot, Tensor] = {}
        self.moving: dict[Slot, tuple[Channel, int]] = {}

    def advance(self) -> bool:
        """Runs until an instruction blocks or none is left; whether it got anywhere."""
        start, instructions = self.at, self.program.instructions
        while self.at < len(instructions) and self._do(instructions[self.at]):
            self.at += 1
        return self.at > start

    def report(self, ranks: Sequence[_Rank]) -> str:
        """``rank 3 waits for F4.7 from rank 2 (rank 2 is at B3.5)``."""
        slot = self.program.instructions[self.at].slot
        peer = ranks[self.program.channel[slot].peer] if slot is not None else self
        where = peer.program.standing(peer.at)
        return (
            f"rank {self.program.rank} waits for {self.program.waiting(self.at)}"
            f" (rank {peer.program.rank} is at {where})"
        )

    def finish(self, last: int) -> None:
        """When the step ends, nothing may be on its way, and the last stage must still hold every loss."""
        if self.moving:
            raise self._error(f"ends the step with a message under way in {_words(next(iter(self.moving)))}")
        for kind, stage, micro, slots, _ in self.program.instructions:
            slot = slots[POOLS.index("Y")] if kind == "F" and stage == last else None
            if slot is not None and self.holds[slot] != (loss := _tensor("Y", last, micro)):
                raise self._error(f"ends the step without {loss}: {_words(slot)} holds {self.holds[slot]}")

    def _do(self, instruction: Instruction) -> bool:
        """Runs one instruction; False if it blocks."""
        kind, slot = instruction.kind, instruction.slot
        if kind == "REDUCE":
            return True
        if kind in WRITES:
            self._compute(instruction)
            return True
        if slot is None or slot not in self.program.channel:
            raise self._error(f"has a {kind} without an edge")
        if kind == "WAIT":
            return self._wait(slot)
        self._start(instruction, slot, self.program.channel[slot])
        return True

    def _compute(self, instruction: Instruction) -> None:
        """Every slot that is read holds this microbatch's tensor; every slot that is written is at rest."""
        kind, stage, micro = instruction.kind, instruction.stage, instruction.micro
        for pool, slot in zip(POOLS, instruction.slots, strict=True):
            if slot is None:
                continue
            self._known(slot)
            if slot in self.moving and (pool in WRITES[kind] or self.program.channel[slot].direction == "recv"):
                raise self._error(f"touches {_words(slot)} in {kind}{stage}.{micro} while its message is under way")
            tensor = _tensor(pool, stage, micro)
            if pool in WRITES[kind]:
                self.holds[slot] = tensor
            elif self.holds.get(slot) != tensor:
                held = self.holds.get(slot, "nothing")
                raise self._error(f"needs {tensor} for {kind}{stage}.{micro}, but {_words(slot)} holds {held}")

    def _start(self, instruction: Instruction, slot: Slot, edge: Edge) -> None:
        """SEND or POST: joins the queue of its channel, which must carry the same tensor on both sides."""
        here, sends = self.program.rank, instruction.kind == "SEND"
        tensor = _tensor(slot.pool, instruction.stage, instruction.micro)
        self._known(slot)
        if slot in self.moving or sends != (edge.direction == "send"):
            raise self._error(
                f"cannot {instruction.kind} {tensor} in {_words(slot)}: it is busy or of the other direction"
            )
        if sends and self.holds.get(slot) != tensor:
            raise self._error(f"sends {tensor}, but {_words(slot)} holds {self.holds.get(slot, 'nothing')}")
        channel = self.channels[(here, edge.peer, edge.tag) if sends else (edge.peer, here, edge.tag)]
        mine, theirs = (channel.sent, channel.posted) if sends else (channel.posted, channel.sent)
        if len(mine) < len(theirs) and theirs[len(mine)] != tensor:
            raise self._error(f"{instruction.kind}s {tensor}, but rank {edge.peer} means {theirs[len(mine)]}")
        self.moving[slot] = (channel, len(mine))
        mine.append(tensor)
        if not sends:
            self.holds.pop(slot, None)

    def _wait(self, slot: Slot) -> bool:
        """False while the slot's message is not over."""
        if slot not in self.moving:
            raise self._error(f"waits for {_words(slot)}, which has no message under way")
        channel, number = self.moving[slot]
        if not channel.over(number):
            return False
        del self.moving[slot]
        if self.program.channel[slot].direction == "recv":
            self.holds[slot] = channel.sent[number]
        return True

    def _known(self, slot: Slot) -> None:
        if not 0 <= slot.number < self.program.counts.get((slot.stage, slot.pool), 0):
            raise self._error(f"uses {_words(slot)}, which it does not have")

    def _error(self, what: str) -> ScheduleError:
        return ScheduleError(f"rank {self.program.rank} {what}, at instruction {self.at}")


def _tensor(pool: str, stage: int, micro: int) -> Tensor:
    """The tensor that a stage means by its pool."""
    if pool == "X":
        return Tensor("Y", stage - 1, micro)
    return Tensor("DX", stage + 1, micro) if pool == "DY" else Tensor(pool, stage, micro)


def _words(slot: Slot) -> str:
    return f"slot {slot.number} of {slot.pool} of stage {slot.stage}"
