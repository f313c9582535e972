"""Who holds a job up: what all ranks have answered, and the way from one that waits to the one that is to blame.

In: the standings of all ranks, and who is silent. Out: one sentence per waiting rank, in the schedule's language. Pure:
the same standings give every rank the same culprit.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hpcpipe.runtime.standing import LAST, Awaited, Standing, row, unseen
from hpcpipe.schedule.op import Op
from hpcpipe.schedule.program import Program

STILL = "nobody holds that up: what carries the messages stands still"
SHOWN = 4  # of a long list; the first and the last of a long chain


class Crew(NamedTuple):
    """What a rank knows of all from the start: who it is, everybody's host, the programs of a pipeline's ranks."""

    rank: int
    hosts: Sequence[str]
    programs: Sequence[Program]

    def program(self, rank: int) -> Program:
        """What a rank executes in a step; replicas do the same."""
        return self.programs[rank % len(self.programs)]

    def name(self, rank: int) -> str:
        """``rank 3 (host n1)``."""
        return f"rank {rank} (host {self.hosts[rank]})"

    def stages(self, rank: int) -> str:
        """``stage 3``, ``stages 1, 5``."""
        found = sorted({stage for _, stage, *_ in self.program(rank).instructions})
        return f"stage{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"

    def place(self, rank: int, at: str) -> str:
        """An op with what it means, ``F4.7 (stage 4, microbatch 7)``; anything else with the rank's stages."""
        if at not in row(self.program(rank)):
            return f"{at} ({self.stages(rank)})"
        op = Op.parse(at)
        return f"{at} (stage {op.stage}, microbatch {op.micro})"


@dataclass(frozen=True)
class Evidence:
    """Answers of all ranks that gave one while the others waited; seconds without one of those that are ``silent``."""

    standings: Mapping[int, Standing]
    silent: Mapping[int, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        standings = [standing.to_dict() for standing in self.standings.values()]
        return {"standings": standings, "silent": {str(rank): seconds for rank, seconds in self.silent.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Evidence:
        """The other way."""
        standings = [Standing.from_dict(standing) for standing in values["standings"]]
        return cls({s.rank: s for s in standings}, {int(rank): s for rank, s in values["silent"].items()})

    def of(self, me: Standing) -> Evidence:
        """The same, as I see it: I am awake, and where I am I know best."""
        silent = {rank: seconds for rank, seconds in self.silent.items() if rank != me.rank}
        return Evidence({**self.standings, me.rank: me}, silent)

    def chain(self, rank: int) -> list[int]:
        """From a waiting rank to whom it waits for, and so on: the shortest way to one that is silent, or else to the
        one of those that do not wait that is longest at one point. Without any it ends in a rank that it has passed (a
        circle), or in one that nobody holds up.
        """
        came: dict[int, int] = {rank: rank}
        queue, busy = [rank], list[int]()
        for at in queue:
            if at in self.silent:
                return _way(came, at)
            if self.standings[at].wait is None:
                busy.append(at)
            for other in self._held_up_by(at):
                if other not in came:
                    came[other] = at
                    queue.append(other)
        return _way(came, max(busy, key=lambda r: self.standings[r].seconds)) if busy else self._circle(rank)

    def _circle(self, rank: int) -> list[int]:
        way = [rank]
        while others := self._held_up_by(way[-1]):
            way.append(others[0])
            if way[-1] in way[:-1]:
                break
        return way

    def _held_up_by(self, rank: int) -> list[int]:
        """Whom a rank waits for in fact: not those that wait for the same, with it, nor those that are past it."""
        me = self.standings[rank]
        return [r for r in me.wait.ranks if r != rank and not self._there(r, me.turn, me.wait)] if me.wait else []

    def _there(self, rank: int, turn: int, wait: Awaited) -> bool:
        other = self.standings.get(rank)
        if other is None or rank in self.silent:
            return False
        return other.turn > turn or (other.wait is not None and other.wait.what == wait.what)

    def sentence(self, crew: Crew) -> str:
        """What the crew's own rank has to say."""
        way = self.chain(crew.rank)
        said = f"{crew.name(crew.rank)} {waited(self.standings[crew.rank])}"
        if way[-1] in way[:-1]:
            start = way.index(way[-1])
            links = [self._link(crew.name(r), r) for r in way[start:-1]]
            hops = [self._link(f"rank {r}", r) for r in way[1:start]] + [f"{', '.join(links)}, and so in a circle"]
        elif len(way) == 1:
            hops = [STILL]
        else:
            hops = [*_shortened([self._link(f"rank {r}", r) for r in way[1:-1]]), self._culprit(crew, way)]
        return f"{said}: {', '.join(hops)}"

    def _link(self, name: str, rank: int) -> str:
        wait = self.standings[rank].wait
        return f"{name} waits for {wait.what if wait else 'nothing'}"

    def _culprit(self, crew: Crew, way: Sequence[int]) -> str:
        """The end of a chain, with where it stands; and who else is silent."""
        last, name = way[-1], crew.name(way[-1])
        if last in self.silent:
            others = [crew.name(rank) for rank in self.silent if rank != last]
            return f"{name} has not answered for {self.silent[last]:.0f} s{self._known(crew, way)}{_neither(others)}"
        standing = self.standings[last]
        if standing.wait is not None:
            return f"{self._link(name, last)}, {STILL}"
        return f"{name} has been at {crew.place(last, standing.at)} for {standing.seconds:.0f} s"

    def _known(self, crew: Crew, way: Sequence[int]) -> str:
        """Of a silent rank: where it stood when it answered last, unless that is long ago, and what it owes."""
        last, standing = way[-1], self.standings.get(way[-1])
        waiting = [
            (s.turn, r != way[-2], s.wait)
            for r, s in self.standings.items()
            if r != last and s.wait and last in s.wait.ranks
        ]
        turn, _, nearest = min(waiting, key=lambda each: each[:2])
        owes = self._owes(crew, last, nearest.what, {wait.owed for its, _, wait in waiting if its == turn})
        if standing is None or standing.turn < turn:
            return f" and owes {owes}"
        stood = crew.place(last, standing.at)
        return f" and stood last at {stood}" if stood == owes else f", stood last at {stood} and owes {owes}"

    def _owes(self, crew: Crew, rank: int, what: str, owed: Container[str]) -> str:
        """The first thing that anybody waits for from a rank: it is at that or before it."""
        ops = [op for op in row(crew.program(rank)) if op in owed]
        if ops:
            return crew.place(rank, ops[0])
        if LAST in owed:
            return f"{what}: it is at {crew.place(rank, unseen(crew.program(rank)))} or later"
        return f"{what} ({crew.stages(rank)})"


def waited(standing: Standing) -> str:
    """``has waited 60 s in step 12 for F4.7 from rank 2``."""
    what = standing.wait.what if standing.wait else "nothing"
    return f"has waited {standing.seconds:.0f} s {f'in {standing.when} ' if standing.when else ''}for {what}"


def _way(came: Mapping[int, int], rank: int) -> list[int]:
    """From where the search began to a rank that it found."""
    way = [rank]
    while came[way[-1]] != way[-1]:
        way.append(came[way[-1]])
    return way[::-1]


def _shortened(hops: Sequence[str]) -> list[str]:
    if len(hops) <= 2 * SHOWN:
        return list(hops)
    return [*hops[:SHOWN], f"and so on over {len(hops) - 2 * SHOWN} ranks", *hops[-SHOWN:]]


def _neither(names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"; nor has {', '.join(names[:SHOWN])}{more}"
