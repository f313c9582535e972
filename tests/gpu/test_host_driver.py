"""The driver that poses in host memory, held to what CUDA promises and to what it does not promise.

Work that nothing orders must come in another order under some seed, work that events order never; what a real device
refuses must be refused.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest

from hpcpipe.config import UserError
from tests.gpu.host import build
from tests.gpu.host.build import KernelError
from tests.gpu.host.work import CaptureError
from tests.gpu.host_driver import HOPPER, HostDriver

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++: kernels are compiled for the host with it")

PLANTED = build.HERE / "planted.cu"
SEEDS = range(12)


def at(array):
    return array.ctypes.data


class Device:
    """A driver with one float buffer of n elements and the planted kernels."""

    def __init__(self, seed=0, n=4, **options):
        self.driver = HostDriver(seed=seed, **options)
        image = build.MAGIC + str(build.build(PLANTED)).encode()
        self.add = self.driver.load(image, ["hp_add"])["hp_add"]
        self.n, self.y = n, self.driver.allocate(4 * n)

    def plus(self, stream, value):
        self.driver.launch(self.add, (1, 1, 1), (32, 1, 1), (self.y, self.n, value), 0, stream)

    def read(self):
        return np.frombuffer(self.driver.peek(self.y, 4 * self.n), np.float32)


def test_nothing_is_done_before_somebody_waits():
    device = Device()
    stream = device.driver.stream()
    device.plus(stream, 1.0)
    assert (device.read() == 0).all()
    device.driver.synchronize(stream)
    assert (device.read() == 1).all()


def ordered(seed, by_event):
    """Which of two functions on two streams ran first."""
    driver = HostDriver(seed=seed)
    first, second, event, seen = driver.stream(), driver.stream(), driver.event(), []
    driver.call(lambda: seen.append("first"), first)
    driver.record(event, first)
    if by_event:
        driver.wait(second, event)
    driver.call(lambda: seen.append("second"), second)
    driver.synchronize(second), driver.synchronize(first)
    return tuple(seen)


def test_streams_are_ordered_by_events_and_by_nothing_else():
    assert {ordered(seed, True) for seed in SEEDS} == {("first", "second")}
    assert {ordered(seed, False) for seed in SEEDS} == {("first", "second"), ("second", "first")}
    assert ordered(5, False) == ordered(5, False)


def test_a_wait_is_for_the_record_before_it():
    driver = HostDriver()
    stream, other, event, seen = driver.stream(), driver.stream(), driver.event(), []
    driver.wait(other, event)  # never recorded: done
    driver.call(lambda: seen.append(0), other)
    driver.synchronize(other)
    driver.record(event, stream)
    driver.wait(other, event)
    driver.call(lambda: False, stream)  # never done
    driver.record(event, stream)  # later than the wait: not waited for
    driver.call(lambda: seen.append(1), other)
    driver.synchronize(other)
    assert seen == [0, 1] and not driver.done(event)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_reads_when_it_is_done(seed):
    device = Device(seed)
    driver, stream = device.driver, device.driver.stream()
    host = driver.pinned(16).view(np.float32)
    host[:] = 1
    driver.copy(device.y, at(host), 16, stream)
    host[:] = 2  # too early
    driver.synchronize(stream)
    assert (device.read() == 2).all()


def test_copies_and_fills_stay_inside_of_memory_that_is_there():
    device = Device()
    driver, stream = device.driver, device.driver.stream()
    host = driver.pinned(16)
    for to, source, n in ((device.y, at(host), 17), (device.y + 4, at(host), 16), (device.y, at(np.zeros(4)), 16)):
        with pytest.raises(RuntimeError, match="not inside one allocation or pinned buffer"):
            driver.copy(to, source, n, stream)
    with pytest.raises(RuntimeError, match="not inside"):
        driver.fill(device.y, 0, 20, stream)
    driver.copy(device.y, at(host), 16, stream)
    del host  # and its memory is gone before the copy is done
    with pytest.raises(RuntimeError, match="still there"):
        driver.synchronize(stream)


def test_memory_is_zeroed_aligned_and_limited():
    driver = HostDriver(limit=3 << 30)
    address = driver.allocate(1000)
    assert address % 512 == 0 and driver.peek(address, 1000) == bytes(1000)
    driver.poke(address, b"abc")
    driver.release(address)
    with pytest.raises(UserError, match=r"has 3\.0 of 64\.0 GiB free, 4\.0 GiB are needed"):
        driver.allocate(4 << 30)
    again = driver.allocate(1000)
    assert driver.peek(again, 3) == bytes(3)
    with pytest.raises(RuntimeError, match="was not allocated"):
        driver.release(again + 512)


def test_memory_that_was_given_back_faults():
    device = Device()
    stream = device.driver.stream()
    device.driver.release(device.y)
    device.plus(stream, 1.0)
    with pytest.raises(KernelError, match="touched address"):
        device.driver.synchronize(stream)
    with pytest.raises(KernelError):  # and stays so
        device.driver.stream()


def test_a_kernel_that_runs_over_the_end_faults():
    device = Device(n=128)
    stream = device.driver.stream()
    device.driver.launch(device.add, (9, 1, 1), (32, 1, 1), (device.y, 129, 1.0), 0, stream)
    with pytest.raises(KernelError, match=r"thread \(0,0,0\) of block \(4,0,0\) touched"):
        device.driver.synchronize(stream)


def test_locked_memory_works_for_the_device_only():
    planted, device = build.library(build.build(PLANTED)), Device(locked=True)
    stream = device.driver.stream()
    with pytest.raises(KernelError, match="touched address"):  # the host, which may not; through a kernel to survive it
        planted.run("hp_add", (1, 1, 1), (1, 1, 1), (device.y, 1, 1.0))
    device.plus(stream, 1.0)
    device.driver.synchronize(stream)
    assert (device.read() == 1).all()


# ---- captures


def test_a_capture_is_not_done_and_replays_with_its_arguments():
    device = Device()
    driver, stream, other = device.driver, device.driver.stream(), device.driver.stream()
    driver.begin_capture(stream)
    for value in (1.0, 2.0):
        device.plus(stream, value)
    graph = driver.end_capture(stream)
    driver.synchronize(stream)
    assert (device.read() == 0).all()
    for where in (stream, other, stream):
        driver.launch_graph(graph, where)
    driver.synchronize(stream), driver.synchronize(other)
    assert (device.read() == 9).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_capture_spreads_by_events_and_keeps_their_order(seed):
    driver = HostDriver(seed=seed)
    stream, side, fork, join, seen = driver.stream(), driver.stream(), driver.event(), driver.event(), []
    driver.begin_capture(stream)
    driver.call(lambda: seen.append("begin"), stream)
    driver.record(fork, stream)
    driver.wait(side, fork)
    driver.call(lambda: seen.append("side"), side)
    driver.record(join, side)
    driver.call(lambda: seen.append("main"), stream)
    driver.wait(stream, join)
    driver.call(lambda: seen.append("end"), stream)
    graph = driver.end_capture(stream)
    driver.launch_graph(graph, side), driver.launch_graph(graph, stream)  # one after the other, on whatever streams
    driver.synchronize(stream), driver.synchronize(side)
    assert len(seen) == 8
    for half in (seen[:4], seen[4:]):
        assert (half[0], sorted(half[1:3]), half[3]) == ("begin", ["main", "side"], "end")


def test_in_a_capture_an_event_that_was_never_recorded_is_done():
    driver = HostDriver()
    stream, event, seen = driver.stream(), driver.event(), []
    driver.begin_capture(stream)
    driver.wait(stream, event)
    driver.call(lambda: seen.append(1), stream)
    driver.launch_graph(driver.end_capture(stream), stream)
    driver.synchronize(stream)
    assert seen == [1]


def test_a_capture_binds_the_thread_that_captures():
    driver = HostDriver()
    stream, other, event, seen = driver.stream(), driver.stream(), driver.event(), []
    driver.call(lambda: seen.append(1), other)
    driver.record(event, other)
    driver.begin_capture(stream)
    thread = threading.Thread(target=driver.synchronize, args=(event,))
    thread.start(), thread.join(30)
    assert seen == [1]
    with pytest.raises(CaptureError):
        driver.synchronize(other)


def test_what_a_capture_forbids():
    driver = HostDriver()
    stream, side, event, before = driver.stream(), driver.stream(), driver.event(), driver.event()
    driver.call(lambda: None, side)
    driver.record(before, side)
    driver.begin_capture(stream)
    for forbidden in (
        lambda: driver.allocate(8), lambda: driver.pinned(8), lambda: driver.synchronize(side),
        lambda: driver.done(event), lambda: driver.begin_capture(stream), lambda: driver.wait(stream, before),
        lambda: driver.end_capture(side),
    ):  # fmt: skip
        with pytest.raises(CaptureError):
            forbidden()
    driver.record(event, stream)
    driver.wait(side, event)
    driver.call(lambda: None, side)
    with pytest.raises(CaptureError, match="work on stream 1 was not joined"):
        driver.end_capture(stream)
    with pytest.raises(CaptureError):  # the event belongs to a capture that is over
        driver.wait(side, event)
    with pytest.raises(CaptureError):
        driver.synchronize(event)


# ---- events, failures, functions


def test_times_of_events_increase():
    driver = HostDriver()
    stream, first, second = driver.stream(), driver.event(timing=True), driver.event(timing=True)
    driver.record(first, stream)
    driver.call(lambda: None, stream)
    driver.record(second, stream)
    with pytest.raises(RuntimeError, match="seconds between events"):
        driver.seconds(first, second)
    driver.synchronize(second)
    assert driver.seconds(first, second) > 0 > driver.seconds(second, first)
    plain = driver.event()
    driver.record(plain, stream), driver.synchronize(plain)
    with pytest.raises(RuntimeError, match="seconds between events"):
        driver.seconds(first, plain)


def test_asking_for_an_event_lets_work_go_on():
    driver = HostDriver()
    stream, event, seen = driver.stream(), driver.event(), []
    assert driver.done(event)
    for i in range(20):
        driver.call(lambda i=i: seen.append(i), stream)
    driver.record(event, stream)
    asked = 1
    while not driver.done(event):
        asked += 1
    assert asked > 3 and seen == list(range(20)) and driver.counts["done"] == 1 + asked


def test_it_fails_when_told_to_and_stays_so():
    device = Device()
    stream = device.driver.stream()
    device.driver.fail_at(2)
    device.plus(stream, 1.0)
    for verb in (lambda: device.driver.synchronize(stream), lambda: device.plus(stream, 1.0), device.driver.stream):
        with pytest.raises(UserError, match=r"the GPU 0000:00:00\.0 failed: it was told to, at synchronize"):
            verb()
    device.driver.release(device.y)


def test_an_error_on_a_stream_reaches_who_waits():
    driver = HostDriver()
    stream = driver.stream()
    driver.call(lambda: 1 // 0, stream)
    with pytest.raises(ZeroDivisionError):
        driver.synchronize(stream)


def test_launches_that_no_device_takes():
    device = Device()
    stream, launch = device.driver.stream(), device.driver.launch
    args = (device.y, 4, 1.0)
    for grid, block, shared in (
        ((0, 1, 1), (32, 1, 1), 0), ((1, 65536, 1), (32, 1, 1), 0), ((1, 1, 1), (1025, 1, 1), 0),
        ((1, 1, 1), (1, 1, 65), 0), ((1, 1, 1), (32, 1, 1), HOPPER.shared + 1),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="hp_add: "):
            launch(device.add, grid, block, args, shared, stream)
    bounded = device.driver.load(build.MAGIC + str(build.build(PLANTED)).encode(), ["hp_reversed"])["hp_reversed"]
    with pytest.raises(RuntimeError, match="more than its 256 threads"):
        launch(bounded, (1, 1, 1), (257, 1, 1), (device.y, device.y), 0, stream)
    with pytest.raises(TypeError):
        launch(device.add, (1, 1, 1), (32, 1, 1), (device.y, 4), 0, stream)


def test_one_driver_waits_for_another():
    """Rank 0 gives work and does something else; rank 1 waits for it, and must not wait for ever."""
    world, mail = [], []
    zero, one = HostDriver(peers=world), HostDriver(peers=world)
    sending, receiving, got = zero.stream(), one.stream(), []
    zero.call(lambda: mail.append("hello"), sending)
    one.call(lambda: got.append(mail.pop()) if mail else False, receiving)
    one.synchronize(receiving)
    assert got == ["hello"]


def test_two_threads_wait_for_each_other():
    world, boxes = [], ([], [])
    drivers = [HostDriver(seed=i, peers=world) for i in range(2)]

    def rank(me):
        driver, stream = drivers[me], drivers[me].stream()
        for i in range(20):
            driver.call(lambda i=i: boxes[me].append(i), stream)
            driver.call(lambda i=i: len(boxes[1 - me]) > i, stream, "a receive")
        driver.synchronize(stream)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert boxes == ([*range(20)], [*range(20)])


def test_waiting_in_vain_ends_with_a_sentence():
    driver = HostDriver(patience=0.05)
    stream = driver.stream()
    driver.call(lambda: False, stream, "a receive from rank 3")
    with pytest.raises(RuntimeError, match="waits for stream 0 in vain: stream 0 is at a receive from rank 3"):
        driver.synchronize(stream)
