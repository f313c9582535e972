"""What is published of NVIDIA's GPUs: dense FLOP/s of products and bytes per second of memory, by the device's name.

In: the name that the driver gives ("NVIDIA H200"). Out: the peaks of that model, or None: a model that is not here, a
part of a GPU (MIG), or a name that only begins like one of these is measured by the caller, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple


class Peaks(NamedTuple):
    """FLOP/s without sparsity by the type of the operands (float32: without tensor cores); memory in bytes per second.

    A type that the model does not multiply, or of which sources disagree, is absent.
    """

    model: str
    flops: Mapping[str, float]
    bandwidth: float


TYPES = ("float32", "tf32", "bfloat16", "fp8", "fp4")
# The whole name after "NVIDIA ", the model, TFLOP/s of TYPES (dense: half of what data sheets print with sparsity; 0:
# absent), GB/s. SXM and PCIe parts differ in units and clocks, so each has its own row.
# A100: data sheet "NVIDIA A100 Tensor Core GPU". H100, H200, GH200: data sheets of those names.
# B200, B300, GB200, GB300: glennklockwood.com/garden/processors/B200 and /B300 (tf32, fp8, fp4 of the HGX and the
# superchip parts); stas00/ml-engineering compute/accelerator/README.md (bfloat16, fp8, memory);
# developer.nvidia.com/blog/inside-nvidia-blackwell-ultra-the-chip-powering-the-ai-factory-era (GB300: 15 PFLOP/s fp4,
# 8 TB/s); float32 of the B200, B300 and GB200 from hmc-tech.com's tables (75.0 and, for two GPUs, 160.0). Of the B300's
# fp4 sources say 13 to 14 PFLOP/s, and of the GB300's float32 nothing.
ROWS = (
    (r"A100-SXM4-40GB", "A100 SXM 40 GB", (19.5, 156, 312, 0, 0), 1555),
    (r"A100-SXM4-80GB", "A100 SXM 80 GB", (19.5, 156, 312, 0, 0), 2039),
    (r"A100-PCIE-40GB", "A100 PCIe 40 GB", (19.5, 156, 312, 0, 0), 1555),
    (r"A100 80GB PCIe", "A100 PCIe 80 GB", (19.5, 156, 312, 0, 0), 1935),
    (r"H100 80GB HBM3", "H100 SXM", (67, 494.5, 989, 1979, 0), 3350),
    (r"H100 PCIe", "H100 PCIe", (51, 378, 756, 1513, 0), 2000),
    (r"H100 NVL", "H100 NVL", (60, 417.5, 835, 1671, 0), 3900),
    (r"GH200 480GB", "GH200 96 GB", (67, 494.5, 989, 1979, 0), 4000),
    (r"H200", "H200 SXM", (67, 494.5, 989, 1979, 0), 4800),
    (r"H200 NVL", "H200 NVL", (60, 417.5, 835, 1671, 0), 4800),
    (r"B200", "B200", (75, 1125, 2250, 4500, 9000), 7700),
    (r"B300( SXM6 AC)?", "B300", (75, 1125, 2250, 4500, 0), 8000),
    (r"GB200", "GB200", (80, 1250, 2500, 5000, 10000), 8000),
    (r"GB300", "GB300", (0, 1250, 2500, 5000, 15000), 8000),
)


def peaks(name: str) -> Peaks | None:
    """The published peaks of the model with this name, None for any other name."""
    for pattern, model, teraflops, gigabytes in ROWS:
        if re.fullmatch(rf"(NVIDIA )?{pattern}", name.strip()):
            flops = {kind: each * 1e12 for kind, each in zip(TYPES, teraflops, strict=True) if each}
            return Peaks(model, flops, gigabytes * 1e9)
    return None


def peak(name: str, kind: str) -> float | None:
    """FLOP/s of products of one of ``TYPES``; None where it must be measured."""
    found = peaks(name)
    return found.flops.get(kind) if found else None


def mfu(flops_per_second: float, peak: float | None) -> float | None:
    """Model FLOP/s of one device as a share of its peak (Chowdhery et al. 2022, PaLM, appendix B): 0.4 is 40 %."""
    return flops_per_second / peak if peak else None
