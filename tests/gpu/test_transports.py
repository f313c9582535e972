"""The links for device memory: every byte as over the host's link, whatever a device does first, and no wait too few.

Devices and NCCL pose in host memory (fake_nccl.py); the walk of walk.py stands for the executor. The last tests run
real MPI between processes, with device memory that is host memory.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from hpcpipe.comm import nccl
from hpcpipe.comm.aware import AwareLink, support
from hpcpipe.comm.device import choose
from hpcpipe.comm.lanes import Lane
from hpcpipe.comm.link import JobError
from hpcpipe.comm.local import LocalWorld
from hpcpipe.comm.nccl import NcclLink
from hpcpipe.comm.over import on_device
from hpcpipe.comm.staged import StagedLink
from hpcpipe.config import UserError
from tests.gpu.fake_nccl import DeviceArray, Library, Net
from tests.gpu.host_driver import HOPPER, HostDriver
from tests.gpu.walk import PERIOD, Device, Log, drawn, expected, walk
from tests.mpi import launch
from tests.mpi.link_checks import CHECKS

KINDS = ("staged", "nccl", "aware")
PIECE = 256  # bytes in which collectives are staged
OWN_GPUS = ("node1 0000:19:00.0", "node1 0000:3b:00.0", "node2 0000:19:00.0", "node2 0000:3b:00.0")


@pytest.fixture(autouse=True)
def queues(monkeypatch):
    """What ``settings`` sets; and what ``connect`` sets is forgotten."""
    monkeypatch.setenv(nccl.QUEUES, "32")
    monkeypatch.setenv(nccl.CHANNELS, "1")
    monkeypatch.delenv(nccl.CHANNELS)


class Addressed:
    """An MPI that takes device memory: its calls read and write it at once, whatever streams are at."""

    def __init__(self, link: Any) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._link, name)
        if name not in ("sender", "receiver", "sendrecv", "alltoall", "allgather", "group"):
            return found

        def call(*args: Any) -> Any:
            made = found(*(a.view if on_device(a) else a for a in args))
            return Addressed(made) if name == "group" and made is not None else made

        return call


class Ranks:
    """A world of ranks with a device each, and the link of a kind over every rank's own."""

    def __init__(self, size: int, kind: str, seed: int = 0, broken: str = "", **options: Any) -> None:
        self.world, self.kind, self.broken = LocalWorld(size), kind, broken
        self.drivers: list[HostDriver] = []
        for rank in range(size):
            HostDriver(seed=seed * size + rank, peers=self.drivers, **{"patience": 5.0, **options})
        net = Net(self.world)
        self.libraries = [Library(net, rank, driver) for rank, driver in enumerate(self.drivers)]

    def link(self, inner: Any) -> Any:
        driver: Any = self.drivers[inner.rank]
        if self.broken:
            driver = Broken(driver, self.broken)
        if self.kind == "nccl":
            return NcclLink(inner, driver, self.libraries[inner.rank], PERIOD)
        return StagedLink(inner, driver, PIECE) if self.kind == "staged" else AwareLink(Addressed(inner), driver)

    def run(self, rank: Any) -> list[Any]:
        """Calls rank(link, driver) on every rank."""
        return self.world.run(lambda inner: rank(self.link(inner), self.drivers[inner.rank]))


class Broken:
    """A driver with a verb that does nothing, and where it is asked says yes."""

    def __init__(self, driver: Any, verb: str) -> None:
        self._driver, self._verb = driver, verb

    def __getattr__(self, name: str) -> Any:
        return (lambda *args: True) if name == self._verb else getattr(self._driver, name)


def walked(kind: str, seed: int, late: bool, programs: Any, evaluations: Any, broken: str = "") -> list[Log]:
    ranks = Ranks(len(programs), kind, seed, broken=broken)
    return ranks.run(lambda link, d: walk(link, Device(d), programs, evaluations, late, kind == "staged"))


# ---- the executor's walk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_is_as_over_the_hosts_link(kind, seed):
    programs, evaluations = drawn(seed)
    wanted = expected(programs, evaluations)
    for order in range(2):
        assert walked(kind, 100 * seed + order, bool(order), programs, evaluations) == wanted


def test_the_walks_have_all_kinds_of_schedules():
    """At least one in which a rank has several stages, so that an edge has several tags, posted in another order."""
    mixed = 0
    for seed in range(8):
        programs, _ = drawn(seed)
        for source in range(len(programs)):
            for target in range(len(programs)):
                sent, posted = _tags(programs[source], "SEND", target), _tags(programs[target], "POST", source)
                assert sorted(sent) == sorted(posted)
                mixed += sent != posted
    assert mixed


def _tags(program: Any, kind: str, peer: int) -> list[int]:
    edges = [(i.slot, program.channel[i.slot[:2]]) for i in program.instructions if i.kind == kind]
    return [edge.tag for _, edge in edges if edge.peer == peer]


@pytest.mark.parametrize(
    ("kind", "verb"), [("staged", "wait"), ("staged", "done"), ("nccl", "wait"), ("aware", "done")]
)
def test_a_wait_left_out_shows(kind, verb):
    """Without the waits that links ask a device for, the walk finds other bytes: so it would find one too few."""
    differ = 0
    for seed in range(3):
        programs, evaluations = drawn(seed)
        try:
            differ += walked(kind, seed, True, programs, evaluations, verb) != expected(programs, evaluations)
        except (RuntimeError, AssertionError):
            differ += 1
    assert differ


def test_posts_in_another_order_than_sends_show():
    """NCCL matches by order alone; here two messages of one tag are posted in the wrong order."""
    programs, evaluations = drawn(3, 2)
    wanted = expected(programs, evaluations)
    mine, kept = programs[1], programs[1].instructions
    posts = [at for at, i in enumerate(kept) if i.kind == "POST"]
    same = [at for at in posts if kept[at].slot[:2] == kept[posts[0]].slot[:2]]
    a, b = next((a, b) for a, b in pairwise(same) if b == a + 1 and kept[a].slot != kept[b].slot)
    table = mine.table.copy()
    table[[a, b]] = table[[b, a]]
    programs[1] = replace(mine, table=table)
    assert walked("nccl", 0, False, programs, evaluations) != wanted


# ---- single messages -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_leaves_when_it_is_made_and_not_when_the_device_is_idle(kind):
    def rank(link: Any, driver: Any) -> None:
        compute = driver.stream()
        array = DeviceArray(driver, 64, compute)
        if link.rank == 0:
            channel, gate = link.sender(1, 0, array), []
            link.connect()
            driver.call(lambda: array.view[:].fill(7), compute)
            channel.ready()
            driver.call(lambda: bool(gate), compute, "the next op")
            channel.start()
            link.barrier()  # the other rank has it
            assert not gate and compute.queue
            gate.append(1)
            channel.wait()
        else:
            channel, got = link.receiver(0, 0, array), []
            link.connect()
            channel.start()
            channel.wait()
            driver.call(lambda: got.append(array.view[:56].copy()), compute)
            driver.synchronize(compute)
            assert (got[0] == 7).all()
            link.barrier()

    Ranks(2, kind).run(rank)


def test_the_host_waits_for_no_message_of_nccl():
    def rank(link: Any, driver: Any) -> None:
        array = DeviceArray(driver, 64, driver.stream())
        channel = (link.sender if link.rank == 0 else link.receiver)(1 - link.rank, 0, array)
        channel.wait()  # not started: at once
        link.connect()
        if link.rank == 1:
            channel.start()
            channel.wait()
            assert not channel.done()
        link.barrier()
        if link.rank == 0:
            channel.start()
        driver.synchronize(array.compute)
        link.barrier()
        assert link.rank == 0 or channel.done()

    Ranks(2, "nccl").run(rank)


def test_lanes_of_a_chain_are_made_two_by_two():
    """All ranks make them in one order, in which the last pair does not come after all others."""
    lanes = sorted((Lane(r + a, r + 1 - a, t) for r in range(7) for a in (0, 1) for t in (0, 1)), key=lambda x: x.turn)
    free, depth = dict.fromkeys(range(8), 0), 0
    for lane in lanes:
        depth = max(free[lane.source], free[lane.target]) + 1
        free[lane.source] = free[lane.target] = depth
    assert max(free.values()) == 8  # four lanes of each of the two neighbours


def test_tags_of_programs_that_never_run_at_one_time_share_a_lane():
    ranks = Ranks(3, "nccl")

    def rank(link: Any, driver: Any) -> None:
        for peer in {(link.rank + 1) % 3, (link.rank - 1) % 3}:
            for tag in (0, 1, PERIOD, PERIOD + 1):
                link.sender(peer, tag, DeviceArray(driver, 64, driver.stream()))
                link.receiver(peer, tag, DeviceArray(driver, 64, driver.stream()))
        link.connect()
        link.connect()  # nothing is new

    ranks.run(rank)
    assert [len(library.communicators) for library in ranks.libraries] == [8] * 3  # two peers, two tags, both ways


def test_a_channel_must_be_connected_and_have_another_end():
    def early(link: Any, driver: Any) -> None:
        make = link.sender if link.rank == 0 else link.receiver
        make(1 - link.rank, 0, DeviceArray(driver, 64, driver.stream())).start()

    with pytest.raises(RuntimeError, match=r"send 0 -> 1 \(tag 0, 64 bytes\) was started before"):
        Ranks(2, "nccl").run(early)

    def wrong(link: Any, driver: Any) -> None:
        if link.rank == 0:
            link.sender(1, 5, DeviceArray(driver, 64, driver.stream()))
        else:
            link.receiver(0, 5, DeviceArray(driver, 128, driver.stream()))
        link.connect()

    with pytest.raises(ValueError, match=r"rank 0 sends messages of 64 bytes \(tag 5\), rank 1 does not expect them"):
        Ranks(2, "nccl").run(wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_fails_is_no_hang(kind):
    programs, evaluations = drawn(1)

    def tried(fail_at: int) -> HostDriver:
        ranks = Ranks(len(programs), kind, patience=0.5)
        ranks.drivers[1].fail_at(fail_at)
        ranks.run(lambda link, d: walk(link, Device(d), programs, evaluations, False, kind == "staged"))
        return ranks.drivers[1]

    verbs = sum(tried(0).counts.values())
    for quarter in (1, 2, 3):
        with pytest.raises(UserError, match="it was told to"):
            tried(quarter * verbs // 4)


@pytest.mark.parametrize("kind", ["staged", "nccl"])
def test_a_message_has_room_for_its_stamp(kind):
    ranks = Ranks(1, kind)
    driver = ranks.drivers[0]
    with pytest.raises(ValueError, match="4 bytes has no room for its stamp of 8"):
        ranks.link(ranks.world.links[0]).sender(0, 0, DeviceArray(driver, 4, driver.stream()))


# ---- collectives -----------------------------------------------------------------------------------------------------


def exchanges(link: Any, driver: Any, n: int) -> None:
    """Each collective once: after what the stream was given before, and before what it is given then."""
    compute, rng, size = driver.stream(), np.random.default_rng(n), link.size
    data = rng.integers(0, 255, (4, size, size, n), np.uint8)  # round, from, to
    a, b = DeviceArray(driver, size * n, compute), DeviceArray(driver, size * n, compute)
    mine, first = DeviceArray(driver, n, compute, a.address), DeviceArray(driver, n, compute, b.address)
    got: list[np.ndarray] = []

    def given(array: DeviceArray, values: np.ndarray) -> None:
        driver.call(lambda: array.view[:].fill(0xA5), compute)
        driver.call(lambda: np.copyto(array.view, values.ravel()), compute)

    def taken(array: DeviceArray) -> None:
        driver.call(lambda: got.append(array.view.copy()), compute)
        driver.call(lambda: array.view[:].fill(0xA5), compute)

    given(a, data[0, link.rank])
    link.alltoall(a, b)
    taken(b)
    given(mine, data[1, link.rank, 0])
    link.allgather(mine, b)
    taken(b)
    given(DeviceArray(driver, n, compute, b.address + link.rank * n), data[2, link.rank, 0])
    link.allgather(None, b)
    taken(b)
    if link.rank < 2:
        given(mine, data[3, link.rank, 0])
        link.sendrecv(mine, first, 1 - link.rank)
        taken(first)
    driver.synchronize(compute)
    assert (got[0] == data[0, :, link.rank].ravel()).all()
    assert (got[1] == data[1, :, 0].ravel()).all() and (got[2] == data[2, :, 0].ravel()).all()
    assert link.rank >= 2 or (got[3] == data[3, 1 - link.rank, 0]).all()


@pytest.mark.parametrize("n", [0, 1, 24, 200, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_go_where_they_belong(kind, n):
    """In pieces where they are staged: 256 bytes are room for 64 from each of three ranks."""
    for seed in range(3):
        Ranks(3, kind, seed).run(lambda link, driver: exchanges(link, driver, n))


@pytest.mark.parametrize(
    ("kind", "verb"), [("staged", "wait"), ("staged", "synchronize"), ("nccl", "wait"), ("aware", "synchronize")]
)
def test_a_wait_left_out_of_a_collective_shows(kind, verb):
    failed = 0
    for seed in range(3):
        try:
            Ranks(3, kind, seed, broken=verb).run(lambda link, driver: exchanges(link, driver, 200))
        except AssertionError:
            failed += 1
    assert failed


@pytest.mark.parametrize("kind", KINDS)
def test_groups_exchange_among_themselves(kind):
    def rank(link: Any, driver: Any) -> None:
        compute = driver.stream()
        for members in ((0, 2), (1, 3), (3, 2, 1, 0)):
            group = link.group(members)
            assert (group is None) == (link.rank not in members)
            if group is None:
                continue
            group.connect()
            array, got = DeviceArray(driver, 8 * group.size, compute), []
            own = array.view[8 * group.rank : 8 * group.rank + 8]
            driver.call(lambda own=own: own.fill(link.rank + 1), compute)
            group.allgather(None, array)
            driver.call(lambda got=got, array=array: got.append(array.view[::8].copy()), compute)
            driver.synchronize(compute)
            assert got[0].tolist() == [m + 1 for m in members]
        link.close()

    Ranks(4, kind).run(rank)


def test_chunks_must_be_equal():
    ranks = Ranks(1, "nccl")
    driver = ranks.drivers[0]
    a, b = DeviceArray(driver, 16, driver.stream()), DeviceArray(driver, 24, driver.stream())
    with pytest.raises(ValueError, match="16 and 24 bytes"):
        ranks.link(ranks.world.links[0]).alltoall(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_host_memory_is_left_to_the_link_below(kind):
    """All checks of every link, with arrays of numpy."""
    for check in CHECKS:
        Ranks(3, kind).run(lambda link, driver, check=check: check(link))


# ---- NCCL's ways to fail ---------------------------------------------------------------------------------------------


def test_without_a_group_two_sends_wait_for_each_other():
    """Of the fake: it would find the deadlock that ``sendrecv`` avoids."""

    def rank(link: Any, driver: Any) -> None:
        other, library = 1 - link.rank, link.library
        communicator = library.NcclCommunicator(2, (99).to_bytes(128, "little"), link.rank)
        stream, memory = driver.stream(), driver.allocate(16)
        library.groupStart()  # both ways are set up
        communicator.send(memory, 8, 0, other, stream)
        communicator.recv(memory + 8, 8, 0, other, stream)
        library.groupEnd()
        driver.synchronize(stream)
        communicator.send(memory, 8, 0, other, stream)
        communicator.recv(memory + 8, 8, 0, other, stream)
        driver.synchronize(stream)

    with pytest.raises(RuntimeError, match=r"in vain: .*send \d -> \d"):
        Ranks(2, "nccl", patience=0.3).run(rank)


@pytest.mark.parametrize("call", ["init", "get_unique_id", "send", "async"])
def test_a_failure_of_nccl_is_a_sentence(call):
    ranks = Ranks(2, "nccl")
    ranks.libraries[0].fails[call] = "NCCL_ERROR_SYSTEM_ERROR: unhandled system error"

    def rank(link: Any, driver: Any) -> None:
        make = link.sender if link.rank == 0 else link.receiver
        channel = make(1 - link.rank, 0, DeviceArray(driver, 64, driver.stream()))
        link.connect()
        channel.start()
        link.progress()

    with pytest.raises(UserError, match=r"NCCL failed while .*unhandled system error.*NCCL_DEBUG=WARN"):
        ranks.run(rank)


def test_the_end_of_a_failed_job_ends_its_communicators(capsys):
    ranks = Ranks(2, "nccl")

    def rank(link: Any, driver: Any) -> None:
        link.connect()
        link.barrier()
        if link.rank == 0:
            link.abort("the disk is full")
        link.barrier()

    with pytest.raises(SystemExit):
        ranks.run(rank)
    assert [c.ended for c in ranks.libraries[0].communicators] == ["aborted"]
    assert "rank 0: the disk is full" in capsys.readouterr().err


def test_closing_ends_every_communicator_and_those_with_messages_that_never_come():
    ranks = Ranks(2, "nccl")

    def rank(link: Any, driver: Any) -> None:
        channels = [
            (link.sender if link.rank == tag else link.receiver)(1 - link.rank, tag, DeviceArray(driver, 64, s))
            for tag, s in ((0, driver.stream()), (1, driver.stream()))
        ]
        link.connect()
        link.barrier()
        if link.rank == 0:
            channels[1].start()  # what rank 1 never sends
        link.close()

    ranks.run(rank)
    assert [c.ended for c in ranks.libraries[0].communicators] == ["aborted"] * 2
    assert [c.ended for c in ranks.libraries[1].communicators] == ["destroyed"] * 2


def test_streams_have_hardware_queues_and_lanes_leave_room(monkeypatch):
    assert nccl.settings({}) == {nccl.QUEUES: "32"} and nccl.settings({nccl.QUEUES: "8"}) == {}
    for multiprocessors in (1, 20, 132, 148):
        for lanes in range(1, 27):
            n = nccl.channels(multiprocessors, lanes)
            assert n & (n - 1) == 0 and (n == 1 or 4 * n * lanes <= multiprocessors)

    def rank(link: Any, driver: Any, tags: int) -> None:
        for tag in range(tags):
            array = DeviceArray(driver, 64, driver.stream())
            (link.sender if link.rank == 0 else link.receiver)(1 - link.rank, tag, array)
        link.connect()

    Ranks(2, "nccl", properties=HOPPER._replace(multiprocessors=132)).run(lambda link, d: rank(link, d, 4))
    assert os.environ[nccl.CHANNELS] == "8"  # of 132 multiprocessors 4 x 8
    with pytest.raises(UserError, match="fewer stages per rank"):
        Ranks(2, "nccl").run(lambda link, driver: rank(link, driver, 27))
    monkeypatch.delenv(nccl.QUEUES)
    with pytest.raises(UserError, match="need 10 streams, CUDA has 8: set CUDA_DEVICE_MAX_CONNECTIONS=32"):
        Ranks(2, "nccl").run(lambda link, driver: rank(link, driver, 4))


# ---- the choice ------------------------------------------------------------------------------------------------------


class Told(Addressed):
    """A link whose MPI says something of itself."""

    def __init__(self, link: Any, version: str, kinds: str) -> None:
        super().__init__(link)
        self.library = lambda: (version, kinds)


def chosen(
    wanted: str, gpus: Any = OWN_GPUS, lacks: Any = (), version: str = "", kinds: str = ""
) -> tuple[set[type], set[str]]:
    """The links and lines of four ranks; ``lacks``: ranks without NCCL."""
    ranks = Ranks(4, "")

    def rank(link: Any) -> Any:
        def library() -> Any:
            if link.rank in lacks:
                raise UserError("there is no cupy")
            return ranks.libraries[link.rank]

        told = Told(link, version, kinds)
        return choose(told, ranks.drivers[link.rank], wanted, gpus, PERIOD, library)

    found = ranks.world.run(rank)
    return {type(link) for link, _ in found}, {line for _, line in found}


ONE_SHARED = (*OWN_GPUS[:3], OWN_GPUS[1])


@pytest.mark.parametrize(
    ("wanted", "given", "kind", "line"),
    [
        ("auto", {}, NcclLink, "transport: NCCL 2.32.3 (every rank has a GPU of its own)"),
        ("nccl", {}, NcclLink, 'transport: NCCL 2.32.3 (device.transport = "nccl")'),
        ("staged", {}, StagedLink, 'transport: staged through pinned host memory (device.transport = "staged")'),
        (
            "auto", {"gpus": ONE_SHARED}, StagedLink,
            ("transport: staged through pinned host memory (no NCCL: ranks 1 and 3 share the GPU node1 0000:3b:00.0; "
             "no MPI from device memory: the ranks are not joined by MPI)"),
        ),
        (
            "auto", {"lacks": (2,), "version": "Open MPI v6.0", "kinds": "system,cuda:device"}, AwareLink,
            ("transport: MPI from device memory (Open MPI v6.0 has cuda among its memory kinds; "
             "no NCCL: on rank 2, there is no cupy)"),
        ),
        (
            "mpi", {"version": "Open MPI v6.0", "kinds": "system,cuda:device"}, AwareLink,
            ("transport: MPI from device memory (Open MPI v6.0 has cuda among its memory kinds; "
             'device.transport = "mpi")'),
        ),
    ],
)  # fmt: skip
def test_the_choice_and_its_reason(wanted, given, kind, line):
    assert chosen(wanted, **given) == ({kind}, {line})


@pytest.mark.parametrize(
    ("wanted", "given", "reason"),
    [
        ("nccl", {"gpus": ONE_SHARED}, "ranks 1 and 3 share the GPU node1 0000:3b:00.0"),
        ("nccl", {"lacks": (0, 1, 2, 3)}, "there is no cupy"),
        ("mpi", {"version": "Open MPI v5.0.8"}, "Open MPI v5.0.8 does not say that it takes device memory"),
    ],
)
def test_what_cannot_be_is_refused_on_every_rank(wanted, given, reason):
    with pytest.raises(JobError) as error:
        chosen(wanted, **given)
    assert str(error.value) == (
        f'device.transport = "{wanted}" is impossible: {reason}; use device.transport = "staged"'
    )


def test_one_rank_needs_no_transport():
    link, line = choose(LocalWorld(1).links[0], HostDriver(), "auto", ["node1 0000:19:00.0"])
    assert isinstance(link, StagedLink) and line == "transport: none is needed by one rank"
    with pytest.raises(UserError, match="use one of auto, nccl, mpi, staged"):
        choose(LocalWorld(1).links[0], HostDriver(), "verbs", ["node1 0000:19:00.0"])


MPICH = "MPICH Version:      4.3.0\nMPICH Device:       ch4:ucx\nMPICH configure:    --with-cuda=/usr/local/cuda\n"
CRAY = "MPI VERSION    : CRAY MPICH version 8.1.30.8 (ANL base 3.4a2)"


@pytest.mark.parametrize(
    ("library", "kinds", "environment", "yes"),
    [
        ("", "cuda", {}, False),
        ("Open MPI v5.0.8, package: x", "", {}, False),
        ("Open MPI v5.0.8, package: x", "", {"OMPI_MCA_opal_cuda_support": "true"}, True),
        ("Open MPI v5.0.8, package: x", "", {"OMPI_MCA_opal_cuda_support": "0"}, False),
        ("Open MPI v5.0.8, package: x", "", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, False),
        ("Open MPI v6.0.0", "system, mpi, cuda:device:managed", {}, True),
        ("Open MPI v6.0.0", "system,mpi,rocm", {}, False),
        (MPICH, "", {}, True),
        (MPICH, "", {"MPIR_CVAR_ENABLE_GPU": "0"}, False),
        (MPICH.replace("--with-cuda=/usr/local/cuda", ""), "", {"MPIR_CVAR_ENABLE_GPU": "1"}, False),
        (CRAY, "", {"MPICH_GPU_SUPPORT_ENABLED": "1"}, True),
        (CRAY, "", {}, False),
    ],
)
def test_an_mpi_must_say_that_it_takes_device_memory(library, kinds, environment, yes):
    assert support(library, kinds, environment).yes == yes


def test_no_cupy_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"NCCL is used through CuPy.*install cupy-cuda13x"):
        nccl.library()


# ---- between processes -----------------------------------------------------------------------------------------------


@pytest.mark.mpi
@pytest.mark.parametrize("which", [launch.first, launch.second], ids=["first", "mpich"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_walks_agree_between_processes(which, ranks):
    done = launch.run(which(), ranks, ("-m", "tests.gpu.walk"))
    assert done.status == 0 and done.out.count("agrees StagedLink") == done.out.count("agrees AwareLink") == 4, done.out
