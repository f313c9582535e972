"""Messages between GPUs by NCCL. The only door for cupy besides the CUDA backend: ``library`` finds cupy.cuda.nccl.

NCCL has no tags: on a communicator the k-th send meets the k-th receive. Between two ranks messages of several tags may
be sent in one order and posted in another (all schedules with several stages per rank do so), but within one tag the
programs are proven to agree. So a **lane**, one direction of one tag between two ranks, has a communicator of its two
ranks and a stream, and whoever proved the programs free of deadlock with rendezvous messages has proven it here: the
k-th message of a lane waits for nothing but its two halves and messages of which both halves came before.

What is left that could lock up is a receive that spins while it waits. It must not take the room of the work that it
waits for: all lanes together may have a quarter of the multiprocessors, and every stream needs a hardware queue of its
own, so ``settings`` asks for all 32 before CUDA starts.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from hpcpipe.comm.lanes import Lane, NcclChannel, NcclReceiver, NcclSender, Wire, Wires
from hpcpipe.comm.link import Channel, Link
from hpcpipe.comm.over import DeviceArray, Driver, OverLink, chunk, on_device
from hpcpipe.config import UserError

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"
MOST_QUEUES, USUAL_QUEUES = 32, 8
OTHERS = 6  # streams besides the lanes: computing, reducing, reading, sums, CUDA's own, and one for a library's
CHANNELS = "NCCL_MAX_P2P_NCHANNELS"  # blocks, one per multiprocessor, that a send or receive may occupy
MOST_CHANNELS = 32
SHARE = 4  # all lanes of a rank together occupy at most 1/SHARE of its multiprocessors
PATIENCE = 2.0  # seconds that ending the communicators of a failed job may take


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to set before CUDA starts, only those that nobody has set."""
    return {} if QUEUES in environment else {QUEUES: str(MOST_QUEUES)}


def library() -> Any:
    """cupy.cuda.nccl; UserError, saying why, where there is none."""
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise UserError(f"NCCL is used through CuPy, which cannot be loaded ({reason}): install cupy-cuda13x") from None
    if not getattr(nccl, "available", False):
        raise UserError("NCCL is used through CuPy, whose build here finds no NCCL library: install nvidia-nccl-cu13")
    return nccl


class NcclLink(OverLink):
    """A link for arrays of one device that no other rank uses."""

    def __init__(self, inner: Link, driver: Driver, library: Any, period: int = 0, shared: Wires | None = None) -> None:
        """Tags that differ by a multiple of ``period`` share a lane: their programs never run at one time."""
        super().__init__(inner)
        self.driver, self.library, self._period = driver, library, period
        self._shared = shared or Wires(driver, library)
        self._channels: list[NcclChannel] = []
        self._wires: dict[Lane, Wire] = {}
        self._together: Wire | None = None  # all ranks of the link
        self._pairs: dict[int, NcclLink] = {}
        self._groups: list[NcclLink] = []

    # --- messages

    def sender(self, peer: int, tag: int, buffer: Any) -> Channel:
        if not on_device(buffer):
            return self.inner.sender(peer, tag, buffer)
        return self._channel(NcclSender(self._shared, self._lane(self.rank, peer, tag), tag, buffer))

    def receiver(self, peer: int, tag: int, buffer: Any) -> Channel:
        if not on_device(buffer):
            return self.inner.receiver(peer, tag, buffer)
        return self._channel(NcclReceiver(self._shared, self._lane(peer, self.rank, tag), tag, buffer))

    def _lane(self, source: int, target: int, tag: int) -> Lane:
        return Lane(source, target, tag % self._period if self._period else tag)

    def _channel(self, channel: NcclSender | NcclReceiver) -> Channel:
        self._channels.append(channel)
        return channel

    def connect(self) -> None:
        """Makes the communicators of the lanes whose channels there are now; before the first message. Collective.

        Which lanes exist is told by everybody, with the unique identifiers of those that it sends on. A link without
        channels is one for sums: the communicator of all its ranks is made. The link with the messages comes first:
        NCCL asks once per process how much room there is.
        """
        new = [c for c in self._channels if c.wire is None]
        lanes = {c.lane for c in new}
        ids = {lane: self._id() for lane in lanes - set(self._wires) if lane.source == self.rank}
        halves = {(c.lane, c.tag, c.array.nbytes, c.sends) for c in new}
        room = self.driver.properties.multiprocessors
        told = self.everybody((halves, ids, len(lanes | set(self._wires)), room))
        _expect_both_halves(set().union(*(each[0] for each in told)))
        most = max(each[2] for each in told)
        self.agree(self._too_many(most))
        if most:
            os.environ.setdefault(CHANNELS, str(channels(min(each[3] for each in told), most)))
        elif self.size > 1:
            self._everyone()
        found = {lane: id for each in told for lane, id in each[1].items() if self.rank in lane[:2]}
        for lane in sorted(found, key=lambda lane: lane.turn):
            what, place = f"rank {lane.source} with rank {lane.target}", int(self.rank == lane.target)
            self._wires[lane] = self._shared.wire(2, found[lane], place, what, self.driver.stream(urgent=True))
            self._shared.greet(self._wires[lane], next(c for c in new if c.lane == lane))
        for channel in new:
            channel.wire = self._wires[channel.lane]

    def _too_many(self, lanes: int) -> str | None:
        """Why the streams of this rank could hold each other up."""
        queues = os.environ.get(QUEUES, "")
        have = int(queues) if queues.isdigit() else USUAL_QUEUES
        if lanes + OTHERS <= have:
            return None
        if lanes + OTHERS <= MOST_QUEUES:
            return f"NCCL: {lanes} kinds of messages need {lanes + OTHERS} streams, CUDA has {have}: set {QUEUES}=32"
        return (
            f"NCCL: {lanes} kinds of messages of one rank need {lanes + OTHERS} streams, CUDA has at most "
            f'{MOST_QUEUES}: use fewer stages per rank, or device.transport = "staged"'
        )

    def progress(self) -> None:
        """Looks whether a communicator has failed, and leaves the rest to the device."""
        self._shared.check()
        self.inner.progress()

    # --- collectives: on a stream of their own, between what the array's stream was given and what it will be given

    def sendrecv(self, send: Any, recv: Any, peer: int) -> None:
        if not on_device(recv):
            return self.inner.sendrecv(send, recv, peer)
        if send.nbytes != recv.nbytes:
            raise ValueError(f"a swap of {send.nbytes} for {recv.nbytes} bytes")
        if peer == self.rank:
            return self.driver.copy(recv.address, send.address, send.nbytes, recv.compute)
        if peer not in self._pairs:
            pair = self.group(sorted((self.rank, peer)))
            assert pair is not None
            self._pairs[peer] = pair
        pair = self._pairs[peer]
        pair._exchange(recv, [(1 - pair.rank, send.address)], [(1 - pair.rank, recv.address)], recv.nbytes)

    def alltoall(self, send: Any, recv: Any) -> None:
        if not on_device(recv):
            return self.inner.alltoall(send, recv)
        n = chunk(send, recv, self.size)
        ranks = range(self.size)
        self._exchange(recv, [(r, send.address + r * n) for r in ranks], [(r, recv.address + r * n) for r in ranks], n)

    def allgather(self, send: Any, recv: Any) -> None:
        if not on_device(recv):
            return self.inner.allgather(send, recv)
        n = chunk(send, recv, self.size)
        mine = recv.address + self.rank * n if send is None else send.address
        wire, char = self._everyone(), self.library.NCCL_CHAR
        with self._shared.beside(recv) as stream, self._shared.speaking(f"gathering {recv.nbytes} bytes"):
            wire.communicator.allGather(mine, recv.address, n, char, stream)

    def _exchange(
        self, array: DeviceArray, sends: Sequence[tuple[int, int]], receives: Sequence[tuple[int, int]], n: int
    ) -> None:
        """``n`` bytes to and from each (rank, address), as one group: in whatever order, none waits for another."""
        communicator, char = self._everyone().communicator, self.library.NCCL_CHAR
        with self._shared.beside(array) as stream, self._shared.speaking(f"exchanging {n} bytes with each rank"):
            self.library.groupStart()
            for rank, address in sends:
                communicator.send(address, n, char, rank, stream)
            for rank, address in receives:
                communicator.recv(address, n, char, rank, stream)
            self.library.groupEnd()

    def _everyone(self) -> Wire:
        """The communicator of all ranks of this link; all of them call this at the same point."""
        if self._together is None:
            id = self.inner.bcast(self._id() if self.rank == 0 else None)
            self._together = self._shared.wire(self.size, id, self.rank, f"{self.size} ranks", self._shared.sums)
        return self._together

    def _id(self) -> Any:
        with self._shared.speaking("making a unique identifier"):
            return self.library.get_unique_id()

    # --- the link as a whole

    def group(self, ranks: Sequence[int]) -> NcclLink | None:
        inner = self.inner.group(ranks)
        if inner is None:
            return None
        self._groups.append(NcclLink(inner, self.driver, self.library, self._period, self._shared))
        return self._groups[-1]

    def abort(self, message: str) -> NoReturn:
        """Ends what spins on the devices as well, as far as it can be ended soon."""
        ending = threading.Thread(target=self._shared.abort, daemon=True)
        ending.start()
        ending.join(PATIENCE)
        self.inner.abort(message)

    def close(self) -> None:
        self._release()
        self.inner.close()

    def _release(self) -> None:
        for group in self._groups:
            group._release()
        quiet = all(channel.done() for channel in self._channels) and self._shared.quiet()
        for wire in (*self._wires.values(), *([self._together] if self._together else [])):
            self._shared.end(wire, quiet)
        self._channels, self._wires, self._together = [], {}, None
        self._pairs, self._groups = {}, []


def channels(multiprocessors: int, lanes: int) -> int:
    """Blocks per send or receive, a power of two as NCCL has them: all lanes leave room for what they wait for."""
    most = min(max(multiprocessors // (SHARE * lanes), 1), MOST_CHANNELS)
    return 1 << (most.bit_length() - 1)


def _expect_both_halves(halves: set[tuple[Lane, int, int, bool]]) -> None:
    """Every message has its other half, of the same size; ValueError, the same on all ranks."""
    for lane, tag, nbytes, sends in sorted(halves):
        if (lane, tag, nbytes, not sends) not in halves:
            does, other = ("sends", "does not expect") if sends else ("expects", "does not send")
            one, two = lane[:2] if sends else (lane.target, lane.source)
            raise ValueError(f"rank {one} {does} messages of {nbytes} bytes (tag {tag}), rank {two} {other} them")
