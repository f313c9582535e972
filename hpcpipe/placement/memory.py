"""The memory that a process may still take on this node."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def free_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What the system calls available, or what the container's limit leaves if that is less; None if neither tells."""
    found: list[int] = []
    with suppress(OSError, StopIteration, ValueError):
        lines = meminfo.read_text(encoding="ascii").splitlines()
        found.append(int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max" is no number: no limit
        limit, used = (int((cgroup / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        found.append(max(0, limit - used))
    return min(found, default=None)
