"""What a node has, and what a rank sees of it, from trees of sysfs as real machines have them."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpcpipe.config import UserError
from hpcpipe.placement import devices, mapping
from hpcpipe.placement.devices import Fact, Nic, Node
from tests.pure import trees
from tests.pure.trees import cores, describe, facts_of

# ---- what a node has -------------------------------------------------------------------------------------------------


def test_a_dgx_h100_is_read(tmp_path: Path) -> None:
    node = describe(trees.dgx_h100, tmp_path)
    assert [gpu.bus for gpu in node.gpus] == list(trees.H100) and all(gpu.usable for gpu in node.gpus)
    assert node.gpus[0].path == ("pci0000:15", "0000:15:01.0", "0000:16:00.0", "0000:17:02.0", "0000:1b:00.0")
    assert node.gpus[0].uuid == "GPU-00000002-d72c-4106-c12f-20bd9faed9f6"
    assert [gpu.numa for gpu in node.gpus] == [0] * 4 + [1] * 4
    names = ["mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3"]
    assert [nic.name for nic in node.nics[:4]] == names and len(node.nics) == 12
    assert (node.nics[0].rate, node.nics[0].kind, node.nics[0].slot) == (400.0, "InfiniBand", "0000:18:00")
    assert (node.nics[1].rate, node.nics[1].kind, node.nics[1].slot) == (200.0, "Ethernet", "0000:29:00")
    assert node.numas[1].cores == (*range(56, 112), *range(168, 224)) and node.numas[1].distance == {0: 21, 1: 10}
    assert node.siblings[3] == (3, 115) and node.inner == ("docker0", "lo") and not node.imex


def test_other_display_devices_and_functions_are_no_gpus(tmp_path: Path) -> None:
    assert [gpu.bus for gpu in describe(trees.laptop, tmp_path).gpus] == ["0000:01:00.0"]


def test_a_container_has_what_its_device_nodes_say(tmp_path: Path) -> None:
    node = describe(trees.container, tmp_path)
    assert [gpu.usable for gpu in node.gpus] == [False] * 4 + [True] * 4
    assert [nic.name for nic in node.nics if not nic.usable] == list(trees.H100_NICS[:4])


def test_without_the_drivers_procfs_device_nodes_count_by_address(tmp_path: Path) -> None:
    tree = trees.hgx_b300(tmp_path)
    (tree.dev / "nvidia2").unlink()
    sys_, dev, _ = tree.roots
    assert [g.usable for g in devices.describe(sys_, dev, tmp_path / "none").gpus] == [i != 2 for i in range(8)]


def test_nvml_adds_and_knows_better(tmp_path: Path) -> None:
    seen = facts_of(describe(trees.dgx_h100, tmp_path / "a"), fabric="ab/7", c2c=True)[2:4]
    node = describe(trees.dgx_h100, tmp_path / "b", seen)
    assert [gpu.usable for gpu in node.gpus] == [False, False, True, True, False, False, False, False]
    assert (node.gpus[2].fabric, node.gpus[2].c2c, node.gpus[2].numa, node.gpus[0].fabric) == ("ab/7", True, 0, "")


def test_a_card_that_is_down_and_virtual_functions_do_not_count(tmp_path: Path) -> None:
    tree = trees.bare(tmp_path)
    tree.nic("mlx5_1", "pci0000:80/0000:80:01.0/0000:81:00.1", 0, "200 Gb/sec (4X HDR)", up=False)
    virtual = tree.nic("mlx5_2", "pci0000:80/0000:80:01.0/0000:81:00.2", 0, "200 Gb/sec (4X HDR)")
    (virtual / "physfn").symlink_to("../0000:81:00.0")
    node = devices.describe(*tree.roots)
    assert [(nic.name, nic.usable) for nic in node.nics] == [("mlx5_0", True), ("mlx5_1", False)]


def test_slingshot_is_read(tmp_path: Path) -> None:
    tree = trees.bare(tmp_path)
    folder = tree.function("pci0000:20/0000:20:01.1/0000:21:00.0", "0x17db", "0x0501", "0x020000", 1)
    for file, text in (("speed", "BS_200G"), ("link", "up")):
        tree.file(folder / "port" / file, text)
    (tree.sys / "class/cxi/cxi0").mkdir(parents=True)
    (tree.sys / "class/cxi/cxi0/device").symlink_to(folder)
    nic = devices.describe(*tree.roots).nics[-1]
    path = ("pci0000:20", "0000:20:01.1", "0000:21:00.0")
    assert nic == Nic("cxi0", 1, 200.0, "cxi", 1, (path,), True)


def test_an_empty_tree_is_an_empty_node(tmp_path: Path) -> None:
    assert devices.describe(tmp_path / "sys", tmp_path / "dev", tmp_path / "proc") == Node()


def test_this_machine_can_be_described() -> None:
    node = devices.describe()
    assert set(cores(node)) <= set(range(100_000)) and all(gpu.path for gpu in node.gpus)


@pytest.mark.parametrize(
    ("text", "expected"), [("0-2,7", (0, 1, 2, 7)), ("", ()), ("4", (4,)), ("8-9,0-1", (0, 1, 8, 9))]
)
def test_lists_of_cores_are_read_and_written(text: str, expected: tuple[int, ...]) -> None:
    assert devices.cores_of(text) == expected == devices.cores_of(mapping.ranges(expected))


class Error(Exception):
    pass


def binding(**more: object) -> SimpleNamespace:
    """nvidia-ml-py as far as it is used, with two GPUs: one in a fabric and cut in two (MIG), one plain and older."""

    class Info(ctypes.Structure):
        _fields_ = [("clusterUuid", ctypes.c_uint8 * 16), ("cliqueId", ctypes.c_uint32), ("state", ctypes.c_uint32)]

    def fabric(handle: object, reference: object) -> None:
        if handle != 0:
            raise Error
        info = reference._obj  # type: ignore[attr-defined]
        info.clusterUuid[15], info.cliqueId, info.state = 5, 7, 3

    def part(handle: object, i: int) -> str:
        if i > 1:
            raise Error
        return f"part{i}"

    names = {
        "NVMLError": Error, "byref": ctypes.byref, "c_nvmlGpuFabricInfoV_t": Info, "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None, "nvmlDeviceGetCount": lambda: 2, "nvmlDeviceGetHandleByIndex": lambda i: i,
        "nvmlDeviceGetPciInfo": lambda h: SimpleNamespace(busId=(b"00000008:06:00.0", b"00010000:1B:00.0")[h]),
        "nvmlDeviceGetName": lambda h: "NVIDIA GB300",
        "nvmlDeviceGetUUID": lambda h: f"MIG-{h}" if h in ("part0", "part1") else f"GPU-{h}",
        "nvmlDeviceGetMaxMigDeviceCount": lambda h: 7 if h == 0 else 0,
        "nvmlDeviceGetMigDeviceHandleByIndex": part, "nvmlDeviceGetGpuFabricInfoV": fabric,
    }  # fmt: skip
    return SimpleNamespace(**names | more)


def test_nvml_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", binding())
    first, second = devices.nvml()
    assert first == Fact("0008:06:00.0", "NVIDIA GB300", "GPU-0", ("MIG-part0", "MIG-part1"), False, f"{5:032x}/7")
    assert second == Fact("10000:1b:00.0", "NVIDIA GB300", "GPU-1")


def test_no_nvml_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Error

    monkeypatch.setitem(sys.modules, "pynvml", binding(nvmlInit=fail))
    assert devices.nvml() == ()
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert devices.nvml() == ()


# ---- what a rank knows of itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, None)),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, (3, 8)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x3),2", "SLURM_NODEID": "3"}, (2, 2)),
        ({"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "4(x3),2", "SLURM_NODEID": "1"}, (2, 4)),
        ({"SLURM_LOCALID": "1"}, (1, None)),
        ({"MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}, (1, 2)),
        # mpirun in a batch script, whose own words for itself every rank inherits
        ({"SLURM_LOCALID": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "5", "OMPI_COMM_WORLD_LOCAL_SIZE": "8"}, (5, 8)),
    ],
)
def test_the_local_rank_under_each_launcher(environment: dict[str, str], expected: tuple[int, int | None]) -> None:
    assert mapping.local(environment) == expected


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({"CUDA_VISIBLE_DEVICES": "2,1"}, [2, 1]),
        ({"CUDA_VISIBLE_DEVICES": "0,2,-1,1"}, [0, 2]),
        ({"CUDA_VISIBLE_DEVICES": "3,9,1"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-00000000,GPU-00000006-d72c"}, [2, 4]),  # minors 0 and 6
        ({"CUDA_VISIBLE_DEVICES": "GPU-0000000"}, []),  # the beginning of eight
        ({"CUDA_VISIBLE_DEVICES": "MIG-GPU-00000001-d72c-4106-c12f-20bd9faed9f6/1/0"}, [3]),
        ({"SLURM_STEP_GPUS": "4,6-7"}, [4, 6, 7]),
        ({"SLURM_STEP_GPUS": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, [0, 1]),
    ],
)
def test_what_cuda_will_show(tmp_path: Path, environment: dict[str, str], gpus: list[int]) -> None:
    seen = mapping.seen(describe(trees.dgx_h100, tmp_path), environment)
    assert [one.bus for one in seen] == [trees.H100[i] for i in gpus]
    # Without CUDA_VISIBLE_DEVICES all can be opened, so that a choice among them keeps its index.
    expected = list(range(len(gpus))) if "CUDA_VISIBLE_DEVICES" in environment else gpus
    assert [one.device for one in seen] == expected


def test_in_a_container_indices_count_what_is_there(tmp_path: Path) -> None:
    node = describe(trees.container, tmp_path)
    seen = mapping.seen(node, {"CUDA_VISIBLE_DEVICES": "1,3", "SLURM_STEP_GPUS": "4,5"})
    assert [(one.device, one.bus) for one in seen] == [(0, trees.H100[5]), (1, trees.H100[7])]


def test_mig_names_need_nvml(tmp_path: Path) -> None:
    node = describe(trees.hgx_b300, tmp_path / "a")
    plain = node._replace(gpus=tuple(gpu._replace(uuid="") for gpu in node.gpus))
    with pytest.raises(UserError, match="names MIG-aa, but nothing here tells the UUIDs of the 8 GPUs"):
        mapping.seen(plain, {"CUDA_VISIBLE_DEVICES": "MIG-aa"})
    parts = node._replace(gpus=tuple(g._replace(migs=(f"MIG-{i}a", f"MIG-{i}b")) for i, g in enumerate(node.gpus)))
    seats = [
        mapping.seat(parts, {"CUDA_VISIBLE_DEVICES": m}, "n0", i, (i,)) for i, m in enumerate(("MIG-3a", "MIG-3b"))
    ]
    first, second = mapping.assign(parts, seats)
    assert (first.gpu.bus, first.mig, second.mig) == (node.gpus[3].bus, "MIG-3a", "MIG-3b")
    assert first.gpu == second.gpu and first.remarks == ()  # two parts are not one GPU shared
