"""P ranks as threads of one process: the link of tests, and of a run that is alone.

It is as strict as MPI may be: a send ends only when the receiver has posted and the bytes are copied, so a schedule
that deadlocks under rendezvous deadlocks here, at every message size. When one rank fails, all that wait are released.
"""

from __future__ import annotations

import pickle
import platform
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from hpcpipe.comm.link import Link, raise_agreed

T = TypeVar("T")


class Released(Exception):
    """Raised in a rank that waits for one that failed; the failure itself is what the job reports."""


class Deadlock(Exception):
    """Every rank that still runs waits; the message says for what."""


class LocalWorld:
    """``size`` ranks that share this process. ``links[r]`` is rank r's."""

    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.failure: BaseException | None = None
        self.running = size
        self._waiting: dict[int, tuple[str, Callable[[], bool]]] = {}
        self._rooms: dict[tuple[Any, ...], _Room] = {}
        everybody = _Room(tuple(range(size)))
        self.links = [LocalLink(self, everybody, rank) for rank in range(size)]

    def run(self, fn: Callable[[Link], T]) -> list[T]:
        """Calls fn(link) on every rank and returns the results in rank order, or raises the first rank's exception."""
        if len(self.links) == 1:
            return [fn(self.links[0])]
        results: list[Any] = [None] * len(self.links)

        def rank(link: LocalLink) -> None:
            try:
                results[link.rank] = fn(link)
            except BaseException as error:
                self.fail(error)
            with self.changed:
                self.running -= 1
                self._expect_progress()

        self.running = len(self.links)
        threads = [threading.Thread(target=rank, args=(link,), daemon=True) for link in self.links]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C reaches only this thread
            self.fail(error)
            for thread in threads:
                thread.join()
        if self.failure is not None:
            raise self.failure
        return results

    def fail(self, error: BaseException) -> None:
        """Keeps the first error and releases everybody who waits."""
        with self.changed:
            self.failure = self.failure or error
            self.changed.notify_all()

    def until(self, rank: int, what: object, condition: Callable[[], bool]) -> None:
        """Waits, with the lock held, for a condition or a failure."""
        while not condition():
            self.check()
            self._waiting[rank] = str(what), condition
            self._expect_progress()
            self.check()
            self.changed.wait()
            self._waiting.pop(rank)

    def _expect_progress(self) -> None:
        """Fails a world in which every rank that still runs waits for something that nobody will do."""
        stuck = len(self._waiting) == self.running > 0 and not any(met() for _, met in self._waiting.values())
        if stuck and self.failure is None:
            told = "; ".join(f"rank {rank} waits for {what}" for rank, (what, _) in sorted(self._waiting.items()))
            self.fail(Deadlock(f"nobody can go on: {told}"))

    def check(self) -> None:
        if self.failure is not None:
            raise Released("another rank failed")

    def room(self, key: tuple[Any, ...], members: tuple[int, ...]) -> _Room:
        """The room that all who name it share."""
        with self.changed:
            return self._rooms.setdefault((*key, members), _Room(members))


class _Room:
    """What the ranks of one link share: posted messages by (source, destination, tag), and the table they meet at."""

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.sends: dict[tuple[int, int, int], deque[LocalChannel]] = {}
        self.receives: dict[tuple[int, int, int], deque[LocalChannel]] = {}
        self.sums: dict[int, dict[int, list[float]]] = {}
        self.table: list[Any] = [None] * len(members)
        self.arrived = self.meetings = 0
        self.result: list[Any] = []


class LocalChannel:
    """Half of a message. Both halves end when the second one is posted, which copies."""

    def __init__(self, link: LocalLink, sends: bool, key: tuple[int, int, int], buffer: Any) -> None:
        self.link, self.key, self.bytes, self.pending = link, key, _bytes(buffer), False
        mine, others = (link.room.sends, link.room.receives) if sends else (link.room.receives, link.room.sends)
        with link.world.changed:
            self.mine, self.others = mine.setdefault(key, deque()), others.setdefault(key, deque())
        self.sends = sends

    def start(self) -> None:
        world = self.link.world
        with world.changed:
            world.check()
            if self.pending:
                raise RuntimeError(f"{self} was started again before it was done")
            if not self.others:
                self.pending = True
                self.mine.append(self)
                return
            other = self.others.popleft()
            source, target = (self, other) if self.sends else (other, self)
            if len(source.bytes) != len(target.bytes):
                raise ValueError(f"{source} has {len(source.bytes)} bytes, {target} expects {len(target.bytes)}")
            target.bytes[:] = source.bytes
            other.pending = False
            world.changed.notify_all()

    def wait(self) -> None:
        if self.pending:
            with self.link.world.changed:
                self.link.world.until(self.link.world_rank, self, lambda: not self.pending)

    def done(self) -> bool:
        if self.pending:
            self.link.world.check()
        return not self.pending

    def __repr__(self) -> str:
        source, target, tag = self.key
        return f"{'send' if self.sends else 'receive'} {source} -> {target} (tag {tag})"


class LocalSum:
    """The ranks' k-th sums meet by their number; each leaves a copy of its terms and adds up when all have come."""

    def __init__(self, link: LocalLink, array: Any) -> None:
        self.link, self.array, world = link, array, link.world
        self.number = link.sums = link.sums + 1
        with world.changed:
            world.check()
            self.terms = link.room.sums.setdefault(self.number, {})
            self.terms[link.rank] = array.tolist()
            world.changed.notify_all()

    def wait(self) -> None:
        link, world = self.link, self.link.world
        with world.changed:
            world.until(link.world_rank, f"sum {self.number}", lambda: len(self.terms) == link.size)
            link.room.sums.pop(self.number, None)
        for i, terms in enumerate(zip(*(self.terms[rank] for rank in range(link.size)), strict=True)):
            self.array[i] = sum(terms)


class LocalLink:
    """One rank's end."""

    def __init__(self, world: LocalWorld, room: _Room, rank: int) -> None:
        self.world, self.room, self.rank, self.size = world, room, rank, len(room.members)
        self.world_rank = room.members[rank]  # groups name their members by their rank in the world
        self.hostname = platform.node()
        self._groups: dict[tuple[int, ...], int] = {}
        self.sums = 0

    def sender(self, peer: int, tag: int, buffer: Any) -> LocalChannel:
        return LocalChannel(self, True, (self.rank, self._peer(peer), tag), buffer)

    def receiver(self, peer: int, tag: int, buffer: Any) -> LocalChannel:
        return LocalChannel(self, False, (self._peer(peer), self.rank, tag), buffer)

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        pair = self.receiver(peer, -1, recv), self.sender(peer, -1, send)
        for channel in pair:
            channel.start()
        for channel in pair:
            channel.wait()

    def progress(self) -> None:
        self.world.check()

    def allreduce(self, array: Any) -> None:
        self.start_allreduce(array).wait()

    def start_allreduce(self, array: Any) -> LocalSum:
        return LocalSum(self, _bytes(array).cast("d"))

    def alltoall(self, send: Any, recv: Any) -> None:
        into, n = _bytes(recv), self._chunk(send, recv)
        for source, theirs in enumerate(self._meet(_bytes(send))):
            into[source * n : (source + 1) * n] = theirs[self.rank * n : (self.rank + 1) * n]
        self.barrier()

    def allgather(self, send: Any, recv: Any) -> None:
        into = _bytes(recv)
        n = self._chunk(recv, recv)
        mine = into[self.rank * n : (self.rank + 1) * n] if send is None else _bytes(send)
        for source, theirs in enumerate(self._meet(mine)):
            if send is not None or source != self.rank:
                into[source * n : (source + 1) * n] = theirs
        self.barrier()

    def gather(self, value: T, root: int = 0) -> list[T] | None:
        values = self._meet(pickle.dumps(value))
        return [pickle.loads(v) for v in values] if self.rank == root else None

    def bcast(self, value: T, root: int = 0) -> T:
        mine = pickle.dumps(value) if self.rank == root else b""
        received: T = pickle.loads(self._meet(mine)[root])
        return received

    def barrier(self) -> None:
        self._meet(None)

    def group(self, ranks: Sequence[int]) -> LocalLink | None:
        members = tuple(self.room.members[r] for r in ranks)
        if self.world_rank not in members:
            return None
        turn = self._groups[members] = self._groups.get(members, 0) + 1  # members call it equally often
        room = self.world.room((id(self.room), turn), members)
        return LocalLink(self.world, room, members.index(self.world_rank))

    def agree(self, error: str | None) -> None:
        raise_agreed(self._meet(error))

    def abort(self, message: str) -> NoReturn:
        print(f"rank {self.rank}: {message}\n", end="", file=sys.stderr, flush=True)
        ended = SystemExit(1)
        self.world.fail(ended)
        raise ended

    def node_ranks(self) -> tuple[int, int]:
        return self.rank, self.size

    def close(self) -> None:
        self.barrier()

    def _peer(self, peer: int) -> int:
        if not 0 <= peer < self.size:
            raise ValueError(f"rank {peer} does not exist: there are {self.size}")
        return peer

    def _chunk(self, send: Any, recv: Any) -> int:
        """Bytes per rank."""
        total = len(_bytes(send))
        if total != len(_bytes(recv)) or total % self.size:
            raise ValueError(f"buffers of {total} and {len(_bytes(recv))} bytes are not {self.size} equal chunks")
        return total // self.size

    def _meet(self, value: Any) -> list[Any]:
        """Everybody's value, when everybody has brought one."""
        room, world = self.room, self.world
        with world.changed:
            world.check()
            room.table[self.rank] = value
            room.arrived += 1
            meeting = room.meetings
            if room.arrived == self.size:
                room.result, room.arrived, room.meetings = list(room.table), 0, meeting + 1
                world.changed.notify_all()
            world.until(self.world_rank, f"collective {meeting} of {self.size} ranks", lambda: room.meetings != meeting)
            return room.result


def _bytes(buffer: Any) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(bytearray())
