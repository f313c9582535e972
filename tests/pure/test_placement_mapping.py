"""Rank to GPU to NIC to cores on the nodes that matter: by the switch, by the socket, and nobody would rather swap."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcpipe.config import UserError
from hpcpipe.placement import devices, mapping
from hpcpipe.placement.devices import Gpu, Nic, Node
from hpcpipe.placement.mapping import Distance, Seat
from hpcpipe.placement.matching import match
from tests.pure import trees
from tests.pure.trees import cards, cores, describe, places

# ---- the map ---------------------------------------------------------------------------------------------------------


def test_dgx_h100_pairs_by_switch_and_shares_sockets(tmp_path: Path) -> None:
    node = describe(trees.dgx_h100, tmp_path)
    found = places(node, 8)
    assert [place.gpu.bus for place in found] == list(trees.H100) and [p.device for p in found] == list(range(8))
    assert cards(found) == list(trees.H100_NICS) and {place.distance for place in found} == {Distance.SWITCH}
    assert found[5].cores == (*range(70, 84), *range(182, 196))  # whole cores, of its socket
    assert sorted(core for place in found for core in place.cores) == cores(node)
    assert all(place.strangers == ("mlx5_1:1", "mlx5_2:1", "mlx5_7:1", "mlx5_8:1") for place in found)


def test_a_fast_storage_card_does_not_outvote_eight_nics(tmp_path: Path) -> None:
    node = describe(trees.dgx_h100, tmp_path)
    fast = tuple(nic._replace(rate=800.0) if nic.kind == "Ethernet" else nic for nic in node.nics)
    assert cards(places(node._replace(nics=fast), 8)) == list(trees.H100_NICS)


def test_b300_pairs_across_bridges(tmp_path: Path) -> None:
    found = places(describe(trees.hgx_b300, tmp_path), 8)
    assert cards(found) == [f"mlx5_{i}" for i in range(8)] and {p.distance for p in found} == {Distance.SWITCH}


def test_gb300_pairs_by_the_dma_function(tmp_path: Path) -> None:
    """mlx5_0's network function is on domain 0000, its DMA function is beside the GPU of domain 0009."""
    found = places(describe(trees.gb300, tmp_path), 4)
    assert cards(found) == ["mlx5_1", "mlx5_0", "mlx5_4", "mlx5_3"] and found[0].distance == Distance.SWITCH
    assert [place.cores for place in found] == [tuple(range(i, i + 36)) for i in (0, 36, 72, 108)]


def test_gb300_where_vital_product_data_is_roots_alone(tmp_path: Path) -> None:
    found = places(describe(trees.gb300, tmp_path, root=False), 4)
    assert cards(found) == ["mlx5_0", "mlx5_1", "mlx5_3", "mlx5_4"] and found[0].distance == Distance.NUMA
    assert found[3].near == ("mlx5_3:1", "mlx5_4:1")


@pytest.mark.parametrize(
    ("path", "numa", "expected"),
    [
        (("pci0000:00", "0000:00:01.0", "0000:01:00.0", "0000:02:01.0", "0000:04:00.0"), 0, (Distance.SWITCH, -3)),
        (("pci0000:00", "0000:00:01.0", "0000:01:00.1"), 0, (Distance.SWITCH, -2)),  # another function on the port
        (("pci0000:00", "0000:00:02.0", "0000:05:00.0"), 0, (Distance.ROOT, -1)),
        (("pci0000:80", "0000:80:01.0", "0000:81:00.0"), 0, (Distance.NUMA, 0)),
        (("pci0000:80", "0000:80:01.0", "0000:81:00.0"), 1, (Distance.FAR, 0)),
        (("pci0000:80", "0000:80:01.0", "0000:81:00.0"), -1, (Distance.FAR, 0)),  # not said: not claimed
    ],
)
def test_distances(path: tuple[str, ...], numa: int, expected: tuple[Distance, int]) -> None:
    node = Node(numas=(devices.Numa(0, (0, 1), {0: 10, 1: 20}), devices.Numa(1, (2, 3), {0: 20, 1: 10})))
    gpu = Gpu("0000:03:00.0", ("pci0000:00", "0000:00:01.0", "0000:01:00.0", "0000:02:00.0", "0000:03:00.0"), 0)
    nic = Nic("mlx5_0", 1, 400.0, "InfiniBand", numa, (path,), True)
    assert mapping.nearest(node, gpu, mapping.Card((nic,))) == expected


def test_a_gpus_own_memory_is_no_home(tmp_path: Path) -> None:
    node = describe(trees.gb300, tmp_path)
    assert [mapping.home(node, numa) for numa in (0, 1, *trees.GRACE_MEMORY, -1)] == [0, 1, 0, 0, 1, 1, -1]
    moved = node._replace(gpus=tuple(g._replace(numa=n) for g, n in zip(node.gpus, trees.GRACE_MEMORY, strict=True)))
    assert [place.numa for place in places(moved, 4)] == [0, 0, 1, 1]


def test_two_ports_of_a_card_go_together(tmp_path: Path) -> None:
    tree = trees.laptop(tmp_path)
    for function in (0, 1):
        tree.nic(f"mlx5_{function}", f"pci0000:00/0000:00:02.1/0000:05:00.{function}", -1, "400 Gb/sec (4X NDR)")
    (place,) = places(devices.describe(*tree.roots), 1)
    assert place.card is not None and (place.card.name, place.card.rate) == ("mlx5_0+mlx5_1", 800.0)
    assert place.distance == Distance.ROOT


def test_laptop_container_and_a_node_without(tmp_path: Path) -> None:
    (place,) = places(describe(trees.laptop, tmp_path / "a"), 1)
    assert (place.card, place.distance, place.cores, place.rails) == (None, None, tuple(range(16)), ())
    found = places(describe(trees.container, tmp_path / "b"), 4)
    assert cards(found) == list(trees.H100_NICS[4:]) and [place.device for place in found] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"rank 0 of 1 on n0 sees no GPU \(0 GPUs in the node, 0 of them can be opened"):
        places(describe(trees.bare, tmp_path / "c"), 1)


def test_what_the_launcher_bound_stays(tmp_path: Path) -> None:
    """One GPU each, not in the order of the ranks, and cores of the sockets."""
    node = describe(trees.dgx_h100, tmp_path)
    bound = (7, 2, 5)
    seats = [
        mapping.seat(node, {"CUDA_VISIBLE_DEVICES": str(gpu)}, "n0", i, node.numas[gpu // 4].cores)
        for i, gpu in enumerate(bound)
    ]
    found = mapping.assign(node, seats)
    assert [place.gpu.bus for place in found] == [trees.H100[gpu] for gpu in bound]
    assert [place.device for place in found] == [0, 0, 0] and cards(found) == [trees.H100_NICS[gpu] for gpu in bound]
    assert set(found[0].cores) | set(found[2].cores) == set(node.numas[1].cores)
    assert not set(found[0].cores) & set(found[2].cores)


def test_ranks_bound_to_a_socket_take_its_gpus(tmp_path: Path) -> None:
    """All GPUs are visible; the launcher went round the sockets."""
    node = describe(trees.dgx_h100, tmp_path)
    seats = [mapping.seat(node, {}, "n0", i, node.numas[i % 2].cores) for i in range(4)]
    assert [p.gpu.bus for p in mapping.assign(node, seats)] == [trees.H100[i] for i in (0, 4, 1, 5)]


def test_cores_off_the_gpus_socket_are_kept_and_said(tmp_path: Path) -> None:
    node = describe(trees.dgx_h100, tmp_path)
    (place,) = mapping.assign(node, [mapping.seat(node, {"CUDA_VISIBLE_DEVICES": "6"}, "n0", 0, (4, 5))])
    assert place.cores == (4, 5) and place.remarks == ("none of its cores is on NUMA node 1, where its GPU is",)


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    node = describe(trees.gb300, tmp_path)
    found = places(node, 8)
    assert [place.device for place in found] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert found[5].remarks == ("shares its GPU with rank 1: 8 ranks see 4 GPUs",)
    assert sorted(core for place in found for core in place.cores) == list(range(144))
    with pytest.raises(
        UserError, match="8 ranks on n0 see 4 GPUs between them, so not each has its own; start at most 4"
    ):
        places(node, 8, sharing=False)
    with pytest.raises(UserError, match="2 ranks on n0 see 1 GPU between them"):
        places(node, 2, {"CUDA_VISIBLE_DEVICES": "0"}, sharing=False)


def test_ranks_that_see_nothing_are_named(tmp_path: Path) -> None:
    node = describe(trees.dgx_h100, tmp_path)
    seats = [mapping.seat(node, {"CUDA_VISIBLE_DEVICES": v}, "n0", i, (i,)) for i, v in enumerate(("0", "", "1", ""))]
    with pytest.raises(
        UserError, match=r"ranks 1,3 of 4 on n0 see no GPU \(8 GPUs in the node, 8 of them can be opened"
    ):
        mapping.assign(node, seats)


@given(st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True), st.integers(1, 224))
def test_cores_are_disjoint_and_allowed(gpus: list[int], many: int) -> None:
    numas = (
        devices.Numa(0, (*range(56), *range(112, 168)), {}),
        devices.Numa(1, (*range(56, 112), *range(168, 224)), {}),
    )
    node = Node(
        gpus=tuple(Gpu(bus, (), i // 4) for i, bus in enumerate(trees.H100)),
        numas=numas,
        siblings=tuple((c, c + 112) for c in range(112)),
    )
    mask = tuple(range(many))
    seats = [Seat("n0", i, mask, mapping.seen(node, {"CUDA_VISIBLE_DEVICES": str(g)})) for i, g in enumerate(gpus)]
    found = mapping.assign(node, seats)
    assert all(place.cores and set(place.cores) <= set(mask) for place in found)
    if many >= 2 * 56 + 8:  # both sockets have at least a core for each rank
        taken = [core for place in found for core in place.cores]
        assert len(taken) == len(set(taken))
        assert all(set(place.cores) <= set(numas[gpu // 4].cores) for place, gpu in zip(found, gpus, strict=True))


# ---- matching --------------------------------------------------------------------------------------------------------


TABLES = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 2), min_size=n, max_size=n), min_size=1, max_size=4)
)


def profile(costs: list[list[int]], columns: tuple[int, ...]) -> list[int]:
    """How many rows have each cost, fewer being better at the end and more at the start."""
    paid = [costs[i][column] for i, column in enumerate(columns)]
    return [-paid.count(cost) for cost in range(3)]


@given(TABLES, st.integers(1, 3))
def test_matching_is_rank_maximal_and_nobody_would_rather_swap(costs: list[list[int]], capacity: int) -> None:
    rows, columns = range(len(costs)), range(len(costs[0]))
    every = [c for c in product(columns, repeat=len(costs)) if all(c.count(x) <= capacity for x in columns)]
    found = match(costs, capacity)
    if found is None:
        assert not every
        return
    assert profile(costs, tuple(found)) == min(profile(costs, c) for c in every)
    if capacity == 1:  # rows that mind the same keep their order
        assert all(found[i] < found[k] for i, k in combinations(rows, 2) if costs[i] == costs[k])
    for i, c in product(rows, columns):
        if costs[i][c] < costs[i][found[i]]:
            there = [costs[j][c] for j in rows if found[j] == c]
            assert len(there) == capacity and max(there) <= costs[i][c]


def test_greedy_theft_does_not_happen() -> None:
    """The first row is near both, the second near the first column only: taking in turn would send it far away."""
    assert match([[0, 0], [0, 3]]) == [1, 0]
    assert match([[1, 1, 1], [1, 1, 0]]) == [0, 2]


def test_equals_keep_their_order_and_the_forbidden_is_not_taken() -> None:
    assert match([[5] * 6] * 4) == [0, 1, 2, 3]
    assert match([[5] * 2] * 4, 2) == [0, 1, 0, 1]
    assert match([[None, 1], [None, 1]], 1) is None and match([[None, 1], [None, 1]], 2) == [1, 1]
