"""What a recording costs: the roofline of a device applied to each recorded kernel call."""

from __future__ import annotations

from typing import NamedTuple

from hpcpipe.backends.null import PASSES, Recording


class Device(NamedTuple):
    """What a roofline needs: FLOP/s of float32 products, bytes/s of memory; of a message bytes/s and seconds."""

    flops: float
    bandwidth: float
    link: float = 4.0e9
    latency: float = 5.0e-6


# One AVX2 core of a shared server, as a start; a run measures its own product peak and reports against that.
CORE = Device(flops=1.0e11, bandwidth=1.0e10)
# An H200 by what its products (bfloat16) and its memory are known to reach, and a 400 Gb/s NIC: a start, too.
GPU = Device(flops=7.9e14, bandwidth=4.2e12, link=4.5e10, latency=1.0e-5)


class Cost(NamedTuple):
    """Seconds per microbatch of the three passes of one stage or slot."""

    F: float
    B: float
    W: float

    @property
    def total(self) -> float:
        return self.F + self.B + self.W


def price(recording: Recording, device: Device) -> Cost:
    """Seconds of each pass: a call takes the longer of its arithmetic and its memory traffic (Williams et al. 2009)."""
    return Cost(
        *(
            sum(max(call.flops / device.flops, call.nbytes / device.bandwidth) for call in recording.passes[name])
            for name in PASSES
        )
    )
