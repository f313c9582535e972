"""A device that is not there: ``HostDriver`` is a ``Driver`` over host memory that keeps to CUDA's promises, no more.

Nothing that a stream is given is done before somebody waits or asks; then ready work of all streams is done in an order
that a seed chooses among those that events allow, kernels of native/cuda among it (tests/gpu/host compiles them). So
work that is ordered by luck on a GPU is out of order here under some seed. ``call`` puts a Python function on a stream:
a library's fake works there, when its turn comes.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcpipe.backends.cuda.cupy_driver import failure, out_of_memory
from hpcpipe.backends.cuda.driver import Bytes, Properties
from hpcpipe.config import UserError
from tests.gpu.host import build
from tests.gpu.host.memory import Memory
from tests.gpu.host.work import Action, Capture, CaptureError, Event, Graph, Mark, Record, Stream, Wait, Work, heads

Size = tuple[int, int, int]

HOPPER = Properties(
    name="host memory posing as a GPU",
    capability=(9, 0),
    multiprocessors=4,  # few, so that grids sized by it stay small
    memory=1 << 36,
    free=1 << 36,
    shared=232448,
    driver=13000,
    bus="0000:00:00.0",
)
WEIGHTS = (1.0, 1.0, 1000.0)  # of streams: sometimes one always goes first
SPARE = 3  # pieces of work that asking for an event may set off


class Function(NamedTuple):
    library: build.Library
    name: str


class HostDriver:
    """See ``Driver`` for the verbs. ``counts`` has how often each was asked for.

    ``limit``: bytes of memory there are; ``locked``: the host faults where it touches device memory itself; ``order``:
    of threads in kernels (build.FORWARD, BACKWARD, a seed), None for one drawn per launch; ``peers``: a list that all
    drivers of one world share, so that one that waits lets the others' work go on; ``patience``: seconds without any
    progress after which waiting is an error.
    """

    def __init__(
        self,
        properties: Properties = HOPPER,
        seed: int = 0,
        limit: int | None = None,
        locked: bool = False,
        order: int | None = None,
        peers: list[HostDriver] | None = None,
        patience: float = 20.0,
    ) -> None:
        self.properties, self.order, self.patience = properties, order, patience
        self.counts: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.failure: Exception | None = None
        self.memory = Memory(properties.free if limit is None else limit, locked)
        self._streams: list[Stream] = []
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._clock = 0.0
        self._fail_in = 0
        self._peers = [] if peers is None else peers
        self._peers.append(self)

    # ---- what only tests ask for

    def fail_at(self, n: int) -> None:
        """The n-th verb from now (1: the next) finds the device failed, and so do all after it."""
        self._fail_in = n

    def call(self, function: Callable[[], Any], stream: Stream, what: str = "a function") -> None:
        """The function runs when the stream gets there, again in each replay if it is captured.

        It may return False, which means "not yet": other streams go on, and it is asked again.
        """
        with self._verb("call"):
            stream.give(Action(what, function))

    def peek(self, address: int, nbytes: int) -> bytes:
        """What memory holds now; nothing is waited for."""
        with self._lock, self.memory.open():
            self.memory.check(address, nbytes)
            return ctypes.string_at(address, nbytes)

    def poke(self, address: int, data: bytes) -> None:
        """Writes memory now."""
        with self._lock, self.memory.open():
            self.memory.check(address, len(data))
            ctypes.memmove(address, data, len(data))

    @property
    def pending(self) -> int:
        """Pieces of work that streams have been given and that are not done."""
        return sum(len(stream.queue) for stream in self._streams)

    def drain(self) -> None:
        """All that streams have been given is done afterwards."""
        self._until(lambda: not self.pending, "all its streams")

    # ---- memory

    def allocate(self, nbytes: int) -> int:
        with self._verb("allocate", capturing=False):
            free = self.memory.limit - self.memory.used
            if nbytes > free:
                raise UserError(out_of_memory(nbytes, free, self.properties))
            return self.memory.allocate(nbytes)

    def release(self, address: int) -> None:
        with self._lock:
            self.counts["release"] += 1
            self.memory.release(address)
            self._reap()

    def room(self) -> int:
        with self._verb("room"):
            return self.memory.limit - self.memory.used

    def pinned(self, nbytes: int) -> Bytes:
        with self._verb("pinned", capturing=False):
            return self.memory.pinned(nbytes)

    # ---- streams and events

    def stream(self, urgent: bool = False) -> Stream:
        with self._verb("stream"):
            self._streams.append(Stream(len(self._streams), self._random.choice(WEIGHTS) * (4 if urgent else 1)))
            return self._streams[-1]

    def event(self, timing: bool = False) -> Event:
        with self._verb("event"):
            return Event(timing)

    def record(self, event: Event, stream: Stream) -> None:
        with self._verb("record"):
            event.recorded, event.mark = True, Mark(capture=stream.capture)
            stream.give(Record(event.mark))

    def wait(self, stream: Stream, event: Event) -> None:
        with self._verb("wait"):
            if not event.recorded:
                return
            capture = event.mark.capture
            if capture is not stream.capture:
                if capture is None or capture.over or stream.capture is not None:
                    raise CaptureError("a stream waits for an event across the border of a capture")
                stream.capture = capture  # a capture spreads to who waits for its events
            stream.give(Wait(event.mark))

    def done(self, event: Event) -> bool:
        with self._verb("done", capturing=False):
            self._refuse_captured(event)
            for _ in range(self._random.randint(0, SPARE)):
                self._step()
            self._raise()
            return event.mark.done

    def synchronize(self, what: Stream | Event) -> None:
        with self._verb("synchronize", capturing=False):
            if isinstance(what, Event):
                self._refuse_captured(what)
                mark = what.mark
            else:
                mark = Mark()
                what.queue.append(Record(mark))
        self._until(lambda: mark.done, f"stream {what.number}" if isinstance(what, Stream) else "an event")

    def seconds(self, first: Event, second: Event) -> float:
        with self._verb("seconds"):
            for event in (first, second):
                self._refuse_captured(event)
                if not (event.timing and event.mark.done and event.mark.time):
                    raise RuntimeError("seconds between events: both must be made with timing, recorded and done")
            return second.mark.time - first.mark.time

    def _refuse_captured(self, event: Event) -> None:
        if event.mark.capture is not None:
            raise CaptureError("the host asks for an event that was recorded in a capture")

    # ---- work

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        with self._verb("copy"):
            self._touch(to, nbytes)
            self._touch(source, nbytes)
            stream.give(Action(f"a copy of {nbytes} bytes", lambda: self._copied(to, source, nbytes)))

    def _copied(self, to: int, source: int, nbytes: int) -> None:
        self._touch(to, nbytes)
        self._touch(source, nbytes)
        ctypes.memmove(to, source, nbytes)

    def fill(self, to: int, byte: int, nbytes: int, stream: Stream) -> None:
        with self._verb("fill"):
            self._touch(to, nbytes)
            stream.give(Action(f"a fill of {nbytes} bytes", lambda: self._filled(to, byte, nbytes)))

    def _filled(self, to: int, byte: int, nbytes: int) -> None:
        self._touch(to, nbytes)
        ctypes.memset(to, byte, nbytes)

    def _touch(self, address: int, nbytes: int) -> None:
        if nbytes:
            self.memory.check(address, nbytes)

    def load(self, image: bytes, entries: Sequence[str]) -> dict[str, Function]:
        with self._verb("load", capturing=False):
            if not image.startswith(build.MAGIC):
                raise RuntimeError("HostDriver.load takes an image of tests.gpu.host.build, no cubin")
            library = build.library(Path(image.removeprefix(build.MAGIC).decode()))
            missing = [entry for entry in entries if entry not in library.kernels]
            if missing:
                raise RuntimeError(f"{library.path.name} has no {', '.join(missing)}")
            return {entry: Function(library, entry) for entry in entries}

    def launch(
        self,
        function: Function,
        grid: Size,
        block: Size,
        args: Sequence[int | float],
        shared: int,
        stream: Stream,
    ) -> None:
        with self._verb("launch"):
            library, name = function
            self._check_geometry(name, grid, block, shared, library.kernels[name].bound)
            kept = tuple(args)
            library.words(name, kept)  # their number and kinds
            stream.give(Action(name, lambda: self._launched(function, grid, block, kept, shared)))

    def _launched(self, function: Function, grid: Size, block: Size, args: Sequence[int | float], shared: int) -> None:
        order = self.order
        if order is None:
            order = self._random.choice((build.FORWARD, build.BACKWARD, self._random.randrange(2, 1 << 30)))
        function.library.run(function.name, grid, block, args, shared, order)

    def _check_geometry(self, name: str, grid: Size, block: Size, shared: int, bound: int) -> None:
        x, y, z = block
        if min(*grid, *block) < 1 or grid[0] > (1 << 31) - 1 or max(grid[1:]) > 65535:
            raise RuntimeError(f"{name}: no device takes the grid {grid} of blocks {block}")
        if x * y * z > min(bound, 1024) or z > 64:
            raise RuntimeError(f"{name}: a block of {block} is more than its {bound} threads")
        if not 0 <= shared <= self.properties.shared:
            raise RuntimeError(f"{name}: {shared} bytes of shared memory, the device has {self.properties.shared}")

    # ---- captures

    def begin_capture(self, stream: Stream) -> None:
        with self._verb("begin_capture"):
            if stream.capture is not None:
                raise CaptureError("a capture begins on a stream that is being captured")
            stream.capture = Capture(stream)

    def end_capture(self, stream: Stream) -> Graph:
        with self._verb("end_capture"):
            if stream.capture is None or stream.capture.origin is not stream:
                raise CaptureError("a capture ends on a stream where none began")
            return stream.capture.end()

    def launch_graph(self, graph: Graph, stream: Stream) -> None:
        with self._verb("launch_graph"):
            if stream.capture is not None:
                raise CaptureError("a graph is launched into a capture")
            stream.give(graph.run())

    # ---- profilers

    def push_range(self, name: str) -> None:
        self.counts["push_range"] += 1
        self.ranges.append(name)

    def pop_range(self) -> None:
        self.counts["pop_range"] += 1
        self.ranges.pop()

    # ---- doing it

    def _verb(self, name: str, capturing: bool = True) -> threading.RLock:  # type: ignore[valid-type]
        """Counts; raises if the device has failed, or where a capture forbids the verb. The lock, to be held."""
        with self._lock:
            self.counts[name] += 1
            if self._fail_in and self.failure is None:
                self._fail_in -= 1
                if not self._fail_in:
                    self.failure = UserError(failure(self.properties.bus, f"it was told to, at {name}"))
            self._raise()
            here = threading.get_ident()
            if not capturing and any(s.capture is not None and s.capture.thread == here for s in self._streams):
                raise CaptureError(f"{name} while a stream is being captured")
        return self._lock

    def _raise(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _until(self, reached: Callable[[], bool], what: str) -> None:
        """Does work, in the order of the seed, until something is reached."""
        moved = time.monotonic()
        while True:
            with self._lock:
                self._raise()
                if reached():
                    self._reap()
                    return
                if self._step():
                    moved = time.monotonic()
                    continue
                self._raise()
            if self._others():
                moved = time.monotonic()
            elif time.monotonic() - moved > self.patience:
                raise RuntimeError(f"the host waits for {what} in vain: {self._stuck()}")
            else:
                time.sleep(0.001)

    def _others(self) -> bool:
        """Lets the other drivers of this world go on, those that are not at it themselves."""
        moved = False
        for peer in self._peers:
            if peer is not self and peer.failure is None and peer._lock.acquire(blocking=False):
                try:
                    moved |= peer._step()
                finally:
                    peer._lock.release()
        return moved

    def _step(self) -> bool:
        """Does one piece of work; False where none can be done."""
        found = [(stream.weight, head) for stream in self._streams for head in heads(stream.queue)]
        with self.memory.open():
            while found and self.failure is None:
                (at,) = self._random.choices(range(len(found)), [weight for weight, _ in found])
                _, queue = found.pop(at)
                if self._do(queue):
                    return True
        return False

    def _do(self, queue: deque[Work]) -> bool:
        """The first piece of a queue; False where it is not to be done yet, or has failed."""
        work = queue[0]
        self._clock += self._random.uniform(1e-6, 1e-3)
        if isinstance(work, Action):
            try:
                if work.function() is False:
                    return False
            except Exception as error:
                self.failure = error
                return False
        elif isinstance(work, Record):
            work.mark.done, work.mark.time = True, self._clock
        queue.popleft()
        return True

    def _reap(self) -> None:
        if not self.pending:
            self.memory.reap()

    def _stuck(self) -> str:
        firsts = [(stream.number, stream.queue[0]) for stream in self._streams if stream.queue]
        return "; ".join(
            f"stream {number} is at {work.what if isinstance(work, Action) else type(work).__name__.lower()}"
            for number, work in firsts
        )
