"""Nodes as trees of sysfs, device nodes and the driver's procfs, with the paths of real machines.

Where the paths come from:
* DGX H100: names and addresses of the NICs from the "NVIDIA DGX H100/H200 User Guide" (network modules) and the "DGX
  BasePOD deployment guide" (SR-IOV); each GPU is on its NIC's switch, three buses on.
* GB300 tray: GPU and DMA function below one switch from the kernel's mailing list (iommu, PASID of groups of devices);
  addresses and names of the NICs from public tables for GB200/GB300 hosts; NUMA nodes from `nvidia-smi topo -m` of a
  GB200 (sgl-project/sglang issue 11208); that mlx5_0's DMA function is on domain 0009 from NVIDIA/nccl issue 2097.
* HGX B300: addresses of the ConnectX-8 from NVIDIA's guide on VMs with Blackwell Ultra (appendix, ATS); that a GPU is
  some bridges from its NIC, and the cores, from `nvidia-smi topo -m` (deepseek-ai/DeepEP issue 590).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hpcpipe.placement import devices, mapping
from hpcpipe.placement.devices import Fact, Node
from hpcpipe.placement.mapping import Place

H100 = ("0000:1b:00.0", "0000:43:00.0", "0000:52:00.0", "0000:61:00.0")
H100 += ("0000:9d:00.0", "0000:c3:00.0", "0000:d1:00.0", "0000:df:00.0")
H100_NICS = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")  # of GPU 0 to 7
B300_NICS = (0x17, 0x39, 0x5F, 0x70, 0x97, 0xB9, 0xDC, 0xED)
GRACE = {"0008": 0, "0009": 0, "0018": 1, "0019": 1}  # domains of the GPUs, and their NUMA nodes
GRACE_NICS = {
    "0000": ("mlx5_0", "0009"),
    "0002": ("mlx5_1", "0008"),
    "0010": ("mlx5_3", "0019"),
    "0012": ("mlx5_4", "0018"),
}
GRACE_MEMORY = (2, 10, 18, 26)  # NUMA nodes of the GPUs' memory


class Tree:
    """A node being built below a folder; ``roots`` go to devices.describe."""

    def __init__(self, folder: Path):
        self.sys, self.dev, self.proc = (folder / name for name in ("sys", "dev", "proc"))
        for path in (self.sys / "bus/pci/devices", self.dev, self.proc, self.sys / "devices/system/node"):
            path.mkdir(parents=True)

    @property
    def roots(self) -> tuple[Path, Path, Path]:
        return self.sys, self.dev, self.proc

    def file(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")

    def function(self, path: str, vendor: str, device: str, kind: str, numa: int) -> Path:
        """A PCI function at a path below devices, and its link in bus/pci/devices."""
        folder = self.sys / "devices" / path
        for name, text in (("vendor", vendor), ("device", device), ("class", kind), ("numa_node", str(numa))):
            self.file(folder / name, text)
        (self.sys / "bus/pci/devices" / folder.name).symlink_to(Path("../../../devices") / path)
        return folder

    def gpu(self, path: str, numa: int, minor: int, name: str, device: str = "0x2330", kind: str = "0x030200") -> None:
        bus = path.rpartition("/")[2]
        self.function(path, "0x10de", device, kind, numa)
        self.file(self.dev / f"nvidia{minor}", "")
        uuid = f"GPU-{minor:08x}-d72c-4106-c12f-20bd9faed9f6"
        lines = (f"Model: \t\t {name}", "IRQ:   \t\t 10", f"GPU UUID: \t {uuid}", f"Device Minor: \t {minor}")
        self.file(self.proc / "driver/nvidia/gpus" / bus / "information", "\n".join(lines))

    def nic(self, name: str, path: str, numa: int, rate: str, link: str = "InfiniBand", up: bool = True) -> Path:
        kind = "0x020700" if link == "InfiniBand" else "0x020000"
        folder = self.sys / "devices" / path
        if not folder.exists():
            self.function(path, "0x15b3", "0x1021", kind, numa)
        own = folder / "infiniband" / name
        state = "4: ACTIVE" if up else "1: DOWN"
        for file, text in (("state", state), ("rate", rate), ("link_layer", link)):
            self.file(own / "ports/1" / file, text)
        (own / "device").symlink_to("../..")
        number = len(list((self.sys / "class/infiniband").glob("*")))
        verbs = self.sys / "class/infiniband_verbs" / f"uverbs{number}"
        self.file(verbs / "ibdev", name)
        self.file(self.dev / "infiniband" / verbs.name, "")
        (self.sys / "class/infiniband").mkdir(parents=True, exist_ok=True)
        (self.sys / "class/infiniband" / name).symlink_to(Path("../../devices") / path / "infiniband" / name)
        return folder

    def memory(self, cores: Sequence[str], distances: Sequence[Sequence[int]]) -> None:
        for i, (text, row) in enumerate(zip(cores, distances, strict=True)):
            node = self.sys / f"devices/system/node/node{i}"
            self.file(node / "cpulist", text)
            self.file(node / "distance", " ".join(map(str, row)))

    def threads(self, groups: Iterable[Sequence[int]]) -> None:
        for group in groups:
            for thread in group:
                file = self.sys / f"devices/system/cpu/cpu{thread}/topology/thread_siblings_list"
                self.file(file, ",".join(map(str, group)))

    def interface(self, name: str, device: str = "") -> None:
        folder = self.sys / "class/net" / name
        folder.mkdir(parents=True)
        if device:
            (self.sys / "devices" / device).mkdir(parents=True, exist_ok=True)
            (folder / "device").symlink_to(Path("../../../devices") / device)


def vpd(product: str) -> bytes:
    """Vital product data: a name, then the read-only part with a part number and V3."""

    def item(tag: int, data: bytes) -> bytes:
        return bytes([tag]) + len(data).to_bytes(2, "little") + data

    def word(name: bytes, data: bytes) -> bytes:
        return name + bytes([len(data)]) + data

    inner = word(b"PN", b"900-9X86E-00CX-ST0") + word(b"V3", product.encode()) + word(b"RV", b"\x5a")
    return item(0x82, b"ConnectX-8 mezzanine") + item(0x90, inner) + b"\x78"


def dgx_h100(folder: Path) -> Tree:
    tree = Tree(folder)
    minors = (2, 3, 0, 1, 6, 7, 4, 5)  # the driver does not number as the bus does
    for i, (bus, name) in enumerate(zip(H100, H100_NICS, strict=True)):
        nic = int(bus[5:7], 16) - 3
        port = f"pci0000:{nic - 3:02x}/0000:{nic - 3:02x}:01.0/0000:{nic - 2:02x}:00.0"
        tree.gpu(f"{port}/0000:{nic - 1:02x}:02.0/{bus}", i // 4, minors[i], "NVIDIA H100 80GB HBM3")
        tree.nic(name, f"{port}/0000:{nic - 1:02x}:00.0/0000:{nic:02x}:00.0", i // 4, "400 Gb/sec (4X NDR)")
    for numa, (bus, names) in enumerate((("29", ("mlx5_1", "mlx5_2")), ("aa", ("mlx5_7", "mlx5_8")))):
        for function, name in enumerate(names):
            path = f"pci0000:{int(bus, 16) - 1:02x}/0000:{int(bus, 16) - 1:02x}:01.0/0000:{bus}:00.{function}"
            tree.nic(name, path, numa, "200 Gb/sec (4X HDR)", "Ethernet")
    tree.memory(["0-55,112-167", "56-111,168-223"], [[10, 21], [21, 10]])
    tree.threads((c, c + 112) for c in range(112))
    for name in ("lo", "docker0"):
        tree.interface(name)
    tree.interface("ens6f0", "pci0000:00/0000:00:1c.0/0000:0b:00.0")
    return tree


def hgx_b300(folder: Path) -> Tree:
    tree = Tree(folder)
    for i, nic in enumerate(B300_NICS):
        port = f"pci0000:{nic - 3:02x}/0000:{nic - 3:02x}:01.0/0000:{nic - 2:02x}:00.0"
        inner = f"0000:{nic - 1:02x}:02.0/0000:{nic + 1:02x}:00.0/0000:{nic + 2:02x}:00.0/0000:{nic + 3:02x}:00.0"
        tree.gpu(f"{port}/{inner}", i // 4, i, "NVIDIA B300 SXM6 AC")
        tree.nic(f"mlx5_{i}", f"{port}/0000:{nic - 1:02x}:00.0/0000:{nic:02x}:00.0", i // 4, "800 Gb/sec (4X XDR)")
    tree.memory(["0-63,128-191", "64-127,192-255"], [[10, 21], [21, 10]])
    tree.threads((c, c + 128) for c in range(128))
    return tree


def gb300(folder: Path, root: bool = True) -> Tree:
    """A tray; only ``root`` may read vital product data."""
    tree = Tree(folder)
    for minor, (domain, numa) in enumerate(GRACE.items()):
        port = f"pci{domain}:00/{domain}:00:00.0/{domain}:01:00.0"
        gpu = f"{port}/{domain}:02:03.0/{domain}:04:00.0/{domain}:05:00.0/{domain}:06:00.0"
        tree.gpu(gpu, numa, minor, "NVIDIA GB300", "0x31c2")
        dma = tree.function(f"{port}/{domain}:02:00.0/{domain}:03:00.0", "0x15b3", "0x2100", "0x088000", numa)
        if root:
            (dma / "vpd").write_bytes(vpd(f"card{domain}"))
    for domain, (name, beside) in GRACE_NICS.items():
        path = f"pci{domain}:00/{domain}:00:00.0/{domain}:01:00.0/{domain}:02:00.0/{domain}:03:00.0"
        nic = tree.nic(name, path, GRACE[beside], "800 Gb/sec (4X XDR)")
        if root:
            (nic / "vpd").write_bytes(vpd(f"card{beside}"))
    for domain, bus, name, numa in (("0006", "09", "mlx5_2", 0), ("0016", "0b", "mlx5_5", 1)):  # BlueField-3, storage
        tree.nic(name, f"pci{domain}:00/{domain}:00:00.0/{domain}:{bus}:00.0", numa, "200 Gb/sec (4X HDR)", "Ethernet")
    cores = ["0-71", "72-143", *[""] * 32]

    def distance(a: int, b: int) -> int:
        home = [n if n < 2 else (n - 2) // 16 for n in (a, b)]
        if a == b:
            return 10
        return 40 if a < 2 and b < 2 else 80 if home[0] == home[1] else 120

    tree.memory(cores, [[distance(a, b) for b in range(34)] for a in range(34)])
    tree.threads((c,) for c in range(144))
    tree.file(tree.dev / "nvidia-caps-imex-channels/channel0", "")
    for name in ("lo", "virbr0"):
        tree.interface(name)
    tree.interface("usb0", "pci0006:00/0006:00:00.0/usb1/1-1/1-1:2.0")
    return tree


def laptop(folder: Path) -> Tree:
    tree = Tree(folder)
    tree.function("pci0000:00/0000:00:02.0", "0x8086", "0xa7a0", "0x030000", -1)
    name = "NVIDIA GeForce RTX 4070 Laptop GPU"
    tree.gpu("pci0000:00/0000:00:01.0/0000:01:00.0", -1, 0, name, "0x2860", "0x030000")
    tree.function("pci0000:00/0000:00:01.0/0000:01:00.1", "0x10de", "0x22bd", "0x040300", -1)  # its sound
    tree.memory(["0-15"], [[10]])
    tree.threads((c, c + 1) for c in range(0, 16, 2))
    return tree


def bare(folder: Path) -> Tree:
    tree = Tree(folder)
    tree.nic("mlx5_0", "pci0000:80/0000:80:01.0/0000:81:00.0", 0, "200 Gb/sec (4X HDR)")
    tree.memory(["0-31", "32-63"], [[10, 32], [32, 10]])
    return tree


def container(folder: Path) -> Tree:
    """A DGX H100 of which half is ours: sysfs shows all, device nodes and procfs the second socket's."""
    tree = dgx_h100(folder)
    for bus, minor in zip(H100[:4], (2, 3, 0, 1), strict=True):
        (tree.dev / f"nvidia{minor}").unlink()
        (tree.proc / "driver/nvidia/gpus" / bus / "information").unlink()
    for verbs in (tree.sys / "class/infiniband_verbs").glob("*"):
        if (verbs / "ibdev").read_text().strip() in H100_NICS[:4]:
            (tree.dev / "infiniband" / verbs.name).unlink()
    return tree


# ---- trees described and mapped -----------------------------------------------------------------------------------


def describe(build: Callable[..., Tree], folder: Path, facts: tuple[Fact, ...] = (), **options: bool) -> Node:
    return devices.describe(*build(folder, **options).roots, facts=facts)


def cores(node: Node) -> list[int]:
    return sorted(core for numa in node.numas for core in numa.cores)


def places(node: Node, ranks: int, environment: dict[str, str] | None = None, sharing: bool = True) -> list[Place]:
    """Every rank with the whole node's cores and the same environment."""
    seats = [mapping.seat(node, environment or {}, "n0", i, cores(node)) for i in range(ranks)]
    return mapping.assign(node, seats, sharing)


def cards(found: list[Place]) -> list[str]:
    return [place.card.name if place.card else "-" for place in found]


def facts_of(node: Node, **more: object) -> tuple[Fact, ...]:
    return tuple(Fact(gpu.bus, gpu.name, gpu.uuid)._replace(**more) for gpu in node.gpus)  # type: ignore[arg-type]
