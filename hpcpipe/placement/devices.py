"""What a node has: GPUs, NICs, NUMA nodes and cores, read from sysfs; a plain description that any rank can compute.

In: the roots of sysfs, procfs and the device nodes, so that tests give a tree of their own. Out: ``Node``. No library
is needed; NVML, where it is installed, adds what only the driver knows (MIG, NVLink fabric, C2C, what a cgroup hides).
A ConnectX-8 beside a Grace has its network function on one PCI domain and a DMA function, the one that reaches the GPU,
behind the GPU's switch on another; both carry the same "V3" in their vital product data (rdma-core, ``rdma_topo``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

SYS, DEV, PROC = Path("/sys"), Path("/dev"), Path("/proc")
NVIDIA, MELLANOX, DATA_DIRECT = "0x10de", "0x15b3", "0x2100"  # PCI vendors, and ConnectX-8's DMA function
DISPLAY, COMPUTE = "0x0300", "0x0302"  # PCI classes: VGA controller and 3D controller, without the interface byte
BRIDGE = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}")
FUNCTION = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
LONG, READ_ONLY = 0x80, 0x90  # vital product data: the flag of a long resource, the tag of the read-only one
COMPLETED = 3  # NVML_GPU_FABRIC_STATE_COMPLETED

PciPath = tuple[str, ...]  # host bridge, root port, switch ports, device


class Gpu(NamedTuple):
    """One NVIDIA GPU. ``usable``: this process may open it; others are on the node, but not for us."""

    bus: str
    path: PciPath
    numa: int  # -1 where the system does not say
    name: str = "NVIDIA GPU"
    uuid: str = ""  # "" where neither the driver's procfs nor NVML is there
    migs: tuple[str, ...] = ()
    usable: bool = True
    c2c: bool = False  # wired to its CPU by NVLink-C2C
    fabric: str = ""  # cluster/clique of the multi-node NVLink it is part of


class Nic(NamedTuple):
    """One port of an RDMA device (verbs or Slingshot). ``usable``: the port is up and its device node is here."""

    name: str
    port: int
    rate: float  # Gb/s
    kind: str  # "InfiniBand", "Ethernet", "cxi"
    numa: int
    paths: tuple[PciPath, ...]  # its own, and that of its DMA function beside a GPU; none for a device in software
    usable: bool

    @property
    def slot(self) -> str:
        """The PCI address without the function, which is the card; the name of a device in software."""
        return self.paths[0][-1].rpartition(".")[0] if self.paths else self.name


class Numa(NamedTuple):
    """One NUMA node; a GPU's memory on Grace is one without cores."""

    number: int
    cores: tuple[int, ...]
    distance: Mapping[int, int]  # to every node, as the firmware tells it: 10 is home


class Node(NamedTuple):
    """Everything here, in the order of PCI addresses, which is CUDA's where all GPUs are of one kind."""

    gpus: tuple[Gpu, ...] = ()
    nics: tuple[Nic, ...] = ()
    numas: tuple[Numa, ...] = ()
    siblings: tuple[tuple[int, ...], ...] = ()  # the hardware threads of each core
    inner: tuple[str, ...] = ()  # network interfaces that lead to no other node: bridges of containers, a BMC's USB
    imex: bool = False  # a channel of the service behind multi-node NVLink is open to us


class Fact(NamedTuple):
    """What NVML says of a GPU that it lets us see."""

    bus: str
    name: str
    uuid: str
    migs: tuple[str, ...] = ()
    c2c: bool = False
    fabric: str = ""


def describe(root: Path = SYS, dev: Path = DEV, proc: Path = PROC, facts: Sequence[Fact] | None = None) -> Node:
    """The node below these roots; ``facts`` are NVML's, asked for here where the root is this machine's own."""
    told = nvml() if facts is None and root == SYS else tuple(facts or ())
    functions = sorted((root / "bus/pci/devices").glob("*"), key=lambda f: order(f.name))
    return Node(
        gpus=tuple(_gpus(functions, dev, proc, {fact.bus: fact for fact in told})),
        nics=(*_verbs(root, dev, _twins(functions)), *_slingshot(root)),
        numas=tuple(_numas(root / "devices/system/node")),
        siblings=_siblings(root / "devices/system/cpu"),
        inner=tuple(sorted(i.name for i in (root / "class/net").glob("*") if _is_inner(i))),
        imex=any((dev / "nvidia-caps-imex-channels").glob("channel*")),
    )


def address(text: str) -> str:
    """A PCI address as sysfs writes it: NVML's "00000000:1B:00.0" is "0000:1b:00.0"."""
    domain, _, rest = text.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def order(text: str) -> tuple[int, ...]:
    """Sort key of a PCI address."""
    return tuple(int(part, 16) for part in re.split("[:.]", text) if part)


def cores_of(text: str) -> tuple[int, ...]:
    """The numbers in a list such as "0-3,8,10-11"."""
    ends = [part.split("-") for part in text.split(",") if part.strip()]
    return tuple(sorted(n for pair in ends for n in range(int(pair[0]), int(pair[-1]) + 1)))


# ---- GPUs ------------------------------------------------------------------------------------------------------------


def _gpus(functions: Sequence[Path], dev: Path, proc: Path, facts: Mapping[str, Fact]) -> Iterator[Gpu]:
    found = [f for f in functions if _read(f / "vendor") == NVIDIA and _read(f / "class")[:6] in (DISPLAY, COMPUTE)]
    told = {f.name: _information(proc / "driver/nvidia/gpus" / f.name / "information") for f in found}
    driver = any(told.values())
    for position, function in enumerate(found):
        bus, own = function.name, told[function.name]
        gpu = Gpu(bus, _path(function), _number(function / "numa_node", -1))
        # Without the driver's procfs the device nodes are taken to be numbered as the addresses are.
        minor = own.get("Device Minor", "") if driver else str(position)
        gpu = gpu._replace(
            name=own.get("Model", gpu.name), uuid=own.get("GPU UUID", ""), usable=_opens(dev / f"nvidia{minor}")
        )
        fact = facts.get(bus)
        if fact:
            gpu = gpu._replace(**{**fact._asdict(), "usable": True})
        elif facts:  # NVML is the better witness: a cgroup hides a GPU whose device node everyone sees
            gpu = gpu._replace(usable=False)
        yield gpu
    for bus, fact in facts.items():  # a sandbox may hide the PCI bus and still lend the device
        if bus not in told:
            yield Gpu(bus, (), -1)._replace(**fact._asdict())


def _information(file: Path) -> dict[str, str]:
    """The driver's "Key: value" lines about one GPU."""
    lines = (line.partition(":") for line in _read(file).splitlines())
    return {key.strip(): value.strip() for key, _, value in lines}


def _opens(node: Path) -> bool:
    """Whether a device node opens, which a cgroup may forbid although the permissions do not."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def nvml() -> tuple[Fact, ...]:
    """What NVML (nvidia-ml-py) says of the GPUs that it shows us; nothing where it is absent or has no driver."""
    try:
        pynvml: Any = import_module("pynvml")
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(_fact(pynvml, handle) for handle in handles)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _fact(pynvml: Any, handle: Any) -> Fact:
    def ask(question: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return question()
        except (pynvml.NVMLError, AttributeError):  # an older driver or binding, or a GPU that has no such thing
            return otherwise

    def text(value: str | bytes) -> str:
        return value.decode() if isinstance(value, bytes) else value

    def fabric() -> str:
        info = pynvml.c_nvmlGpuFabricInfoV_t()
        pynvml.nvmlDeviceGetGpuFabricInfoV(handle, pynvml.byref(info))
        cluster = bytes(info.clusterUuid)
        return f"{cluster.hex()}/{info.cliqueId}" if info.state == COMPLETED and any(cluster) else ""

    def migs() -> tuple[str, ...]:
        part = partial(pynvml.nvmlDeviceGetMigDeviceHandleByIndex, handle)
        parts = (ask(partial(part, i), None) for i in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)))
        return tuple(text(pynvml.nvmlDeviceGetUUID(one)) for one in parts if one is not None)

    return Fact(
        bus=address(text(pynvml.nvmlDeviceGetPciInfo(handle).busId)),
        name=text(pynvml.nvmlDeviceGetName(handle)),
        uuid=text(pynvml.nvmlDeviceGetUUID(handle)),
        migs=ask(migs, ()),
        c2c=bool(ask(lambda: pynvml.nvmlDeviceGetC2cModeInfoV(handle).isC2cEnabled, 0)),
        fabric=ask(fabric, ""),
    )


# ---- NICs ------------------------------------------------------------------------------------------------------------


def _verbs(root: Path, dev: Path, twins: Mapping[str, PciPath]) -> Iterator[Nic]:
    """Every port of class/infiniband, physical functions only where their virtual ones are here too."""
    devices = list((root / "class/infiniband").glob("*"))
    nodes = {_read(u / "ibdev"): u.name for u in (root / "class/infiniband_verbs").glob("uverbs*")}
    slots = {_path(d / "device")[-1:] for d in devices}
    nics = []
    for device in devices:
        function = device / "device"
        if (function / "physfn").exists() and _path(function / "physfn")[-1:] in slots:
            continue
        path, twin = _path(function), twins.get(_product(function), ())
        node = nodes.get(device.name)
        open_ = node is None or (dev / "infiniband" / node).exists()
        for port in sorted((device / "ports").glob("*"), key=lambda p: int(p.name)):
            up = "ACTIVE" in _read(port / "state")
            nic = Nic(
                name=device.name,
                port=int(port.name),
                rate=_rate(_read(port / "rate")),
                kind=_read(port / "link_layer") or "InfiniBand",
                numa=_number(function / "numa_node", -1),
                paths=tuple(p for p in (path, twin) if p),
                usable=up and open_,
            )
            nics.append(nic)
    yield from sorted(nics, key=_place)


def _slingshot(root: Path) -> Iterator[Nic]:
    """HPE's Cassini NICs, class/cxi."""
    for device in sorted((root / "class/cxi").glob("cxi*")):
        function = device / "device"
        paths = tuple(p for p in (_path(function),) if p)
        rate, up = _rate(_read(function / "port/speed")), _read(function / "port/link") == "up"
        yield Nic(device.name, 1, rate, "cxi", _number(function / "numa_node", -1), paths, up)


def _place(nic: Nic) -> tuple[Any, ...]:
    return (not nic.paths, order(nic.paths[0][-1]) if nic.paths else (), nic.name, nic.port)


def _rate(text: str) -> float:
    """Gb/s of "800 Gb/sec (4X XDR)" or "BS_200G"."""
    number = re.search(r"([0-9.]+) ?G", text)
    return float(number[1]) if number else 0.0


def _twins(functions: Sequence[Path]) -> dict[str, PciPath]:
    """V3 of the vital product data -> where the DMA function of that card is."""
    found = [f for f in functions if (_read(f / "vendor"), _read(f / "device")) == (MELLANOX, DATA_DIRECT)]
    return {v3: _path(f) for f in found if (v3 := _product(f))}


def _product(function: Path) -> str:
    """The vendor's third entry in a function's vital product data; "" where only root may read it."""
    try:
        data = (function / "vpd").read_bytes()
    except OSError:
        return ""
    while len(data) >= 3 and data[0] & LONG:
        length = int.from_bytes(data[1:3], "little")
        item, tag, data = data[3 : 3 + length], data[0], data[3 + length :]
        while tag == READ_ONLY and len(item) >= 3:
            end = 3 + item[2]
            if item[:2] == b"V3":
                return item[3:end].decode("ascii", "replace")
            item = item[end:]
    return ""


def _is_inner(interface: Path) -> bool:
    """Bridges and taps of containers and virtual machines, and the link to the board's own controller (USB)."""
    if "usb" in str((interface / "device").resolve()):
        return True
    return not (interface / "device").exists() and bool(
        re.match(r"(virbr|veth|br-|cni|flannel|cali|podman|vnet|tap|docker|lo$)", interface.name)
    )


# ---- cores and memory ------------------------------------------------------------------------------------------------


def _numas(folder: Path) -> Iterator[Numa]:
    nodes = sorted((f for f in folder.glob("node[0-9]*")), key=lambda f: int(f.name[4:]))
    numbers = [int(f.name[4:]) for f in nodes]
    for number, node in zip(numbers, nodes, strict=True):
        distances = [int(d) for d in _read(node / "distance").split()]
        yield Numa(number, cores_of(_read(node / "cpulist")), dict(zip(numbers, distances, strict=False)))


def _siblings(folder: Path) -> tuple[tuple[int, ...], ...]:
    threads = (cores_of(_read(f / "topology/thread_siblings_list")) for f in folder.glob("cpu[0-9]*"))
    return tuple(sorted({pair for pair in threads if pair}))


# ---- files -----------------------------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _number(file: Path, otherwise: int) -> int:
    text = _read(file)
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else otherwise


def _path(link: Path) -> PciPath:
    """From the host bridge down to the device that a link leads to; () for what hangs on no PCI."""
    parts = link.resolve().parts
    start = next((i for i, part in enumerate(parts) if BRIDGE.fullmatch(part)), len(parts))
    below = [part for part in parts[start + 1 :] if FUNCTION.fullmatch(part)]
    return (parts[start], *below) if below else ()
