"""What every ``Driver`` keeps to, asked of the one that poses in host memory and, where there is a GPU, of CuPy's.

Each test makes a result that depends on the verb under test and reads it back by copies alone.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from hpcpipe.backends.cuda.cupy_driver import STICKY, CupyDriver, Guard, no_device, no_driver
from hpcpipe.backends.cuda.modules import images
from hpcpipe.config import UserError
from tests.gpu.host import build
from tests.gpu.host_driver import HostDriver

N = 1000


@pytest.fixture(scope="module", params=["host", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request):
    """A driver, and acc += x loaded on it."""
    if request.param == "cupy":
        driver = CupyDriver(0)
        image, _ = images(driver.properties.arch)["optimizer"]
    elif build.compiler() is None:
        pytest.skip("needs g++: kernels are compiled for the host with it")
    else:
        driver = HostDriver(seed=1)
        image = build.MAGIC + str(build.build(build.SOURCES / "optimizer.cu")).encode()
    return driver, driver.load(image, ["hp_accumulate"])["hp_accumulate"]


def pinned(driver, values):
    host = driver.pinned(4 * N).view(np.float32)
    host[:] = values
    return host


def put(driver, values, stream):
    """Device memory that holds these."""
    host, address = pinned(driver, values), driver.allocate(4 * N)
    driver.copy(address, host.ctypes.data, 4 * N, stream)
    driver.synchronize(stream)
    return address


def get(driver, address, stream):
    host = pinned(driver, -1)
    driver.copy(host.ctypes.data, address, 4 * N, stream)
    driver.synchronize(stream)
    return host


def add(device, acc, x, stream):
    driver, function = device
    driver.launch(function, (4, 1, 1), (256, 1, 1), (acc, x, N), 0, stream)


def test_it_says_what_it_is(device):
    told = device[0].properties
    assert told.name and told.multiprocessors > 0 and 0 < told.free <= told.memory
    assert told.capability >= (8, 0) and told.arch.startswith("sm_") and told.shared >= 99 << 10
    assert told.driver >= 12000 and len(told.bus.split(":")) == 3


def test_memory_is_zeroed_and_aligned(device):
    driver = device[0]
    stream = driver.stream()
    for _ in range(3):  # what was given back may come again
        address = driver.allocate(4 * N)
        assert address % 512 == 0 and (get(driver, address, stream) == 0).all()
        driver.fill(address, 0xFF, 4 * N, stream)
        assert np.isnan(get(driver, address, stream)).all()
        driver.release(address)


def test_too_much_memory_is_a_sentence(device):
    driver = device[0]
    with pytest.raises(UserError, match=r"GiB free, [\d.]+ GiB are needed"):
        driver.allocate(driver.properties.memory + (1 << 30))
    driver.release(driver.allocate(8))


def test_kernels_and_copies_of_a_stream_come_in_order(device):
    driver, stream = device[0], device[0].stream(urgent=True)
    acc, x = put(driver, 1, stream), put(driver, 2, stream)
    add(device, acc, x, stream)
    add(device, x, acc, stream)
    assert (get(driver, acc, stream) == 3).all() and (get(driver, x, stream) == 5).all()


def test_events_order_streams(device):
    driver, first, second = device[0], device[0].stream(), device[0].stream()
    acc, x = put(driver, 0, first), put(driver, 1, first)
    for _ in range(20):  # each turn needs the other's last
        for one, other in ((first, second), (second, first)):
            add(device, acc, x, one)
            add(device, x, acc, one)
            event = driver.event()
            driver.record(event, one)
            driver.wait(other, event)
    a, b = np.float32(0), np.float32(1)
    for _ in range(40):
        a += b
        b += a
    assert (get(driver, acc, first) == a).all()


def test_events_are_asked_waited_for_and_timed(device):
    driver, stream = device[0], device[0].stream()
    before, after = driver.event(timing=True), driver.event(timing=True)
    assert driver.done(before)
    x = put(driver, 1, stream)
    driver.record(before, stream)
    add(device, x, x, stream)
    driver.record(after, stream)
    while not driver.done(after):
        pass
    driver.synchronize(after)
    assert driver.seconds(before, after) > 0
    assert (get(driver, x, stream) == 2).all()


def test_a_graph_replays_what_was_captured_with_its_arguments(device):
    driver, stream, side = device[0], device[0].stream(), device[0].stream()
    acc, x = put(driver, 0, stream), put(driver, 1, stream)
    fork, join = driver.event(), driver.event()
    driver.begin_capture(stream)
    add(device, acc, x, stream)
    driver.record(fork, stream)
    driver.wait(side, fork)
    add(device, acc, acc, side)
    driver.record(join, side)
    driver.wait(stream, join)
    add(device, acc, x, stream)
    graph = driver.end_capture(stream)
    assert (get(driver, acc, stream) == 0).all()
    value = 0
    for where in (stream, side, stream):
        driver.launch_graph(graph, where)
        driver.synchronize(where)
        value = 2 * (value + 1) + 1
    assert (get(driver, acc, stream) == value).all()


def test_named_ranges_open_and_close(device):
    device[0].push_range("outer")
    device[0].push_range("inner")
    device[0].pop_range()
    device[0].pop_range()


# ---- the sentences of the real one, which need none


def test_sentences_say_what_and_how_much():
    assert "knows CUDA 13 (on Linux 580.65.06 or newer), the one here knows CUDA 12.4" in no_driver(13020, 12040)
    assert "and here is none" in no_driver(13020, 0)
    assert "wants GPU 3, but this process sees 1" in no_device(3, 1)


def test_without_cupy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UserError, match=r"needs CuPy: install cupy-cuda13x or"):
        CupyDriver(0)


class Cuda:
    """As much of cupy.cuda as stands around a verb."""

    def __init__(self):
        self.runtime, self.at = self, []

    def setDevice(self, index):
        self.at.append((threading.get_ident(), index))


class CudaError(RuntimeError):
    def __init__(self, status):
        super().__init__("cudaErrorIllegalAddress: an illegal memory access was encountered")
        self.status = status


def test_errors_that_end_a_device_are_sentences_and_others_stay_what_they_are():
    guard = Guard(Cuda(), 0)
    guard.bus = "0000:19:00.0"
    for status in sorted(STICKY):
        with pytest.raises(UserError, match=r"the GPU 0000:19:00\.0 failed: cudaErrorIllegalAddress"), guard:
            raise CudaError(status)
    with pytest.raises(UserError, match=r"GPU 0000:19:00\.0: CUDA got no memory"), guard:
        raise CudaError(2)
    for status in (1, 9, 400, 600, 900):  # a mistake of ours
        with pytest.raises(CudaError), guard:
            raise CudaError(status)


def test_each_thread_goes_to_the_device_once():
    cuda = Cuda()
    guard = Guard(cuda, 3)

    def verbs():
        for _ in range(3):
            with guard:
                pass

    thread = threading.Thread(target=verbs)
    thread.start(), thread.join(30)
    verbs()
    assert [index for _, index in cuda.at] == [3, 3] and len(dict(cuda.at)) == 2
