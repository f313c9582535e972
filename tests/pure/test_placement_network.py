"""The map as text, and what NCCL and UCX are told: what they need, what nobody has set, and no more."""

from __future__ import annotations

from pathlib import Path

from hpcpipe.placement import devices, mapping, network
from tests.pure import trees
from tests.pure.trees import describe, facts_of, places


def test_the_table(tmp_path: Path) -> None:
    found = places(describe(trees.gb300, tmp_path), 4)
    lines = mapping.table([*found, *(place._replace(host="n1") for place in found)])
    assert lines == [
        "2 nodes like this: n0, n1",
        "  rank  GPU                        NIC              NUMA  cores    GPU to NIC",
        "  0     NVIDIA GB300 0008:06:00.0  mlx5_1 800 Gb/s  0     0-35     same switch",
        "  1     NVIDIA GB300 0009:06:00.0  mlx5_0 800 Gb/s  0     36-71    same switch",
        "  2     NVIDIA GB300 0018:06:00.0  mlx5_4 800 Gb/s  1     72-107   same switch",
        "  3     NVIDIA GB300 0019:06:00.0  mlx5_3 800 Gb/s  1     108-143  same switch",
    ]


def test_a_cluster_is_its_kinds_and_who_differs(tmp_path: Path) -> None:
    found = places(describe(trees.gb300, tmp_path), 4)
    usual = mapping.pattern(found)
    odd = mapping.pattern([*found[:3], found[3]._replace(cores=(9,), remarks=("is odd",))])
    lines = mapping.survey({f"n{i:05}": odd if i == 777 else usual for i in range(55_000)})
    assert lines[0].startswith("54999 nodes like this: n00000, n00001,") and lines[0].endswith("n00007 and 54991 more")
    assert lines[6] == "n00777" and lines[-1] == "  rank 3 is odd" and len(lines) == 13


def test_dgx_h100_tells_nccl_the_same_on_every_rank_and_ucx_its_own(tmp_path: Path) -> None:
    told = [network.settings(place, {}) for place in places(describe(trees.dgx_h100, tmp_path), 8)]
    assert {one["NCCL_IB_HCA"] for one in told} == {"=" + ",".join(f"{name}:1" for name in trees.H100_NICS)}
    assert [one["UCX_NET_DEVICES"] for one in told] == [f"{name}:1" for name in trees.H100_NICS]
    assert all(set(one) == {"NCCL_IB_HCA", "UCX_NET_DEVICES"} for one in told)


def test_what_somebody_set_stays(tmp_path: Path) -> None:
    place = places(describe(trees.dgx_h100, tmp_path / "a"), 8)[0]
    assert network.settings(place, {"UCX_NET_DEVICES": "all"}, {"NCCL_IB_HCA"}) == {}
    (tmp_path / "nccl.conf").write_text("# NCCL_DEBUG=INFO\nNCCL_IB_HCA==mlx5_0\n")
    (tmp_path / "own").write_text("NCCL_NVLS_ENABLE = 0\n")
    named = network.configured({"NCCL_CONF_FILE": str(tmp_path / "own")}, tmp_path)
    assert named == {"NCCL_IB_HCA", "NCCL_NVLS_ENABLE"}


def test_gb300_settings(tmp_path: Path) -> None:
    facts = facts_of(describe(trees.gb300, tmp_path / "a"), c2c=True, fabric="ab/1")
    place = places(describe(trees.gb300, tmp_path / "b", facts), 4)[0]
    assert network.settings(place, {}) == {
        "NCCL_IB_HCA": "=mlx5_1:1,mlx5_0:1,mlx5_4:1,mlx5_3:1",
        "NCCL_NET_GDR_C2C": "1",
        "NCCL_SOCKET_IFNAME": "^=lo,usb0,virbr0",
        "UCX_NET_DEVICES": "mlx5_1:1",
    }
    assert all(setting.reason for setting in network.wanted(place)) and network.notes(place, {}) == []
    blind = places(describe(trees.gb300, tmp_path / "c", root=False), 4)[3]
    assert network.settings(blind, {})["UCX_NET_DEVICES"] == "mlx5_3:1,mlx5_4:1"
    (note,) = network.notes(place._replace(imex=False), {})
    assert "no IMEX channel is open here" in note


def test_where_there_is_no_choice_nothing_is_set(tmp_path: Path) -> None:
    assert network.settings(places(describe(trees.laptop, tmp_path / "a"), 1)[0], {}) == {}
    found = places(describe(trees.hgx_b300, tmp_path / "b"), 8)
    assert [network.settings(p, {}) for p in found] == [{"UCX_NET_DEVICES": f"mlx5_{i}:1"} for i in range(8)]


def test_gpus_of_two_kinds_are_counted_by_address(tmp_path: Path) -> None:
    tree = trees.laptop(tmp_path)
    tree.gpu("pci0000:00/0000:00:03.0/0000:03:00.0", -1, 1, "NVIDIA T400", "0x1fb2")
    place = places(devices.describe(*tree.roots), 1)[0]
    assert network.settings(place, {}) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


def test_notes_on_what_is_set_badly(tmp_path: Path) -> None:
    place = places(describe(trees.dgx_h100, tmp_path), 8)[0]
    (note,) = network.notes(place, {"NCCL_IB_HCA": "mlx5_1:1", "UCX_TLS": "rc,cuda_copy"})
    assert note == 'NCCL_IB_HCA=mlx5_1:1 also means mlx5_10, mlx5_11; write "=" before the names'
    (note,) = network.notes(place, {"NCCL_IB_HCA": "=mlx5_1:1", "UCX_TLS": "rc,sm"})
    assert note.startswith("UCX_TLS=rc,sm leaves out CUDA memory")
