"""Who gets what on a node: rank -> GPU -> NIC -> cores, and the map as text.

In: the node's description and what each rank on it sees (``Seat``: the cores that the launcher left it, the GPUs that
CUDA will show it). Out: a ``Place`` for each. Pure, and the same on every rank: seats are exchanged, places are not.
GPUs and NICs are paired for the whole node, whoever runs on it: rail k serves GPU k in every job and on every node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from itertools import groupby
from math import inf
from typing import NamedTuple

from hpcpipe.config import UserError
from hpcpipe.placement.devices import Gpu, Nic, Node, PciPath, cores_of
from hpcpipe.placement.matching import match

# (local rank, ranks on the node); a launcher inside a batch job before the batch system's own words for the script.
LAUNCHERS = (
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    ("FLUX_TASK_LOCAL_ID", "FLUX_TASK_LOCAL_SIZE"),
    ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)
HOSTS_SHOWN = 8


class Distance(IntEnum):
    """How far a NIC is from a GPU (what `nvidia-smi topo -m` calls PIX/PXB, PHB, NODE, SYS)."""

    SWITCH = 0
    ROOT = 1
    NUMA = 2
    FAR = 3

    @property
    def text(self) -> str:
        return ("same switch", "same root complex", "same NUMA node", "elsewhere in the node")[self]


class Card(NamedTuple):
    """The ports of one network card that are up, which one GPU uses together."""

    ports: tuple[Nic, ...]

    @property
    def name(self) -> str:
        return "+".join(nic.name for nic in self.ports)

    @property
    def rate(self) -> float:
        return sum(nic.rate for nic in self.ports)


class Seen(NamedTuple):
    """A device as a rank sees it: CUDA's index there, the GPU's address, the name of the part of it (MIG) if any."""

    device: int
    bus: str
    mig: str = ""


class Seat(NamedTuple):
    """What a rank tells the others of its node."""

    host: str
    local: int
    cores: tuple[int, ...]  # that the launcher left it
    seen: tuple[Seen, ...]


class Place(NamedTuple):
    """What a rank works with. Ports are written "mlx5_3:1"."""

    host: str
    local: int
    device: int  # cudaSetDevice takes it; CUDA_VISIBLE_DEVICES stays as it is
    gpu: Gpu
    mig: str
    card: Card | None
    distance: Distance | None  # of card and GPU
    numa: int  # the node of the cores; -1 where the GPU has no home among them
    cores: tuple[int, ...]
    rails: tuple[str, ...]  # the ports of all cards that serve this node's GPUs, the same for all ranks of the node
    near: tuple[str, ...]  # those among them that are as near to this GPU as any
    strangers: tuple[str, ...]  # ports that are up and serve none: storage, management
    inner: tuple[str, ...]  # network interfaces that lead to no other node
    mixed: bool  # the GPUs are of several kinds, so that CUDA may order them otherwise than by address
    imex: bool
    remarks: tuple[str, ...] = ()


# ---- what a rank knows of itself -------------------------------------------------------------------------------------


def local(environment: Mapping[str, str]) -> tuple[int, int | None]:
    """(number among the ranks of this node, how many they are if the launcher says); (0, None) for a process alone."""
    for rank, size in LAUNCHERS:
        if environment.get(rank, "").isdigit():
            return int(environment[rank]), _size(environment.get(size, ""), environment.get("SLURM_NODEID", ""))
    return 0, None


def _size(text: str, node: str) -> int | None:
    """A number, or this node's entry of Slurm's "8(x2),4"."""
    counts = [
        int(many)
        for many, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
        for _ in range(int(repeat or 1))
    ]  # fmt: skip
    position = int(node) if len(counts) > 1 and node.isdigit() else 0
    return counts[position] if position < len(counts) else None


def seen(node: Node, environment: Mapping[str, str]) -> tuple[Seen, ...]:
    """The GPUs that CUDA will show to a process with this environment, by its index.

    CUDA_VISIBLE_DEVICES as the CUDA programming guide has it (appendix "CUDA Environment Variables"): indices, the
    beginnings of UUIDs or MIG names, up to the first that is not here. Without it, SLURM_STEP_GPUS chooses among all.
    """
    usable = [gpu for gpu in node.gpus if gpu.usable]
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        every = tuple(Seen(i, gpu.bus) for i, gpu in enumerate(usable))
        step = environment.get("SLURM_STEP_GPUS", "")
        # Slurm counts the node's GPUs; where a cgroup hides some already, what is left is the step's.
        if len(usable) < len(node.gpus) or not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", step):
            return every
        return tuple(one for one in every if one.device in cores_of(step)) or every
    found: list[Seen] = []
    for entry in (part.strip() for part in text.split(",")):
        one = _named(entry, len(found), usable)
        if one is None or any((o.bus, o.mig) == (one.bus, one.mig) for o in found):
            break
        found.append(one)
    return tuple(found)


def _named(entry: str, index: int, usable: Sequence[Gpu]) -> Seen | None:
    """The device that one entry of CUDA_VISIBLE_DEVICES names."""
    if re.fullmatch(r"\d+", entry):
        return Seen(index, usable[int(entry)].bus) if int(entry) < len(usable) else None
    if not entry.startswith(("GPU-", "MIG-")):
        return None
    plain = entry.removeprefix("MIG-").partition("/")[0] if entry.startswith("MIG-GPU-") else entry
    mig = entry if entry.startswith("MIG-") else ""
    hits = [gpu for gpu in usable if any(name.startswith(plain) for name in (gpu.uuid, *gpu.migs) if name)]
    if not hits and len(usable) == 1 and not any((*usable[0].migs, usable[0].uuid)):
        hits = list(usable)
    if not hits and not all(gpu.uuid for gpu in usable):
        raise UserError(
            f"placement: CUDA_VISIBLE_DEVICES names {entry}, but nothing here tells the UUIDs of the "
            f"{_count(usable, 'GPU')} that can be opened; install nvidia-ml-py or name them by index"
        )
    return Seen(index, hits[0].bus, mig) if len(hits) == 1 else None


def seat(node: Node, environment: Mapping[str, str], host: str, number: int, cores: Sequence[int]) -> Seat:
    """What this rank tells the others; ``number`` is its own among the ranks of the host."""
    return Seat(host, number, tuple(cores), seen(node, environment))


# ---- the map ---------------------------------------------------------------------------------------------------------


def assign(node: Node, seats: Sequence[Seat], sharing: bool = True) -> list[Place]:
    """A place for each rank of one node, in the order of the seats.

    One GPU each: the one that the launcher bound, otherwise the one near the rank's cores; in order. Where there are
    more ranks than GPUs they share, if they may, and say so. UserError where a rank has none.
    """
    gpus = {gpu.bus: gpu for gpu in node.gpus}
    devices = _devices(node, seats, sharing)
    rail = rails(node)
    cards = list(dict.fromkeys(rail.values()))
    serving = _ports(cards)
    strangers = tuple(port for nic in node.nics if nic.usable and (port := f"{nic.name}:{nic.port}") not in serving)
    mixed = len({gpu.name for gpu in node.gpus if gpu.usable}) > 1
    homes = [home(node, gpus[device.bus].numa) for device in devices]
    shares, complaints = _cores(node, seats, homes)
    places = []
    for i, (one, device) in enumerate(zip(seats, devices, strict=True)):
        gpu, card = gpus[device.bus], rail.get(device.bus)
        far = {other: nearest(node, gpu, other) for other in cards}
        near = _ports([other for other in cards if far[other] == min(far.values())])
        others = [s.local for s, d in zip(seats, devices, strict=True) if d[1:] == device[1:] and s is not one]
        sharer = f"shares its GPU with {_ranks(others)}: {len(seats)} ranks see {_count(_visible(seats), 'GPU')}"
        remarks = [sharer] if others else []
        place = Place(
            one.host, one.local, device.device, gpu, device.mig, card, far[card][0] if card else None, homes[i],
            shares[i], serving, near, strangers, node.inner, mixed, node.imex, (*remarks, *complaints[i]),
        )  # fmt: skip
        places.append(place)
    return places


def _devices(node: Node, seats: Sequence[Seat], sharing: bool) -> list[Seen]:
    """The device of each seat."""
    host, every = seats[0].host, _visible(seats)
    blind = [one.local for one in seats if not one.seen]
    if blind:
        there, open_ = _count(node.gpus, "GPU"), sum(gpu.usable for gpu in node.gpus)
        raise UserError(
            f"placement: {_ranks(blind)} of {len(seats)} on {host} {'sees' if len(blind) == 1 else 'see'} no GPU "
            f"({there} in the node, {open_} of them can be opened); "
            "ask the launcher for GPUs (--gpus-per-node), check CUDA_VISIBLE_DEVICES and the driver, "
            'or set device.backend = "cpu"'
        )
    near = {gpu.bus: home(node, gpu.numa) for gpu in node.gpus}
    cores = {numa.number: set(numa.cores) for numa in node.numas}

    def cost(one: Seat, device: tuple[str, str]) -> int | None:
        if not any((s.bus, s.mig) == device for s in one.seen):
            return None
        return 0 if cores.get(near[device[0]], set(one.cores)) & set(one.cores) else 1

    table = [[cost(one, device) for device in every] for one in seats]
    for capacity in range(1, len(seats) + 1):
        chosen = match(table, capacity)
        if chosen is not None:
            break
        if not sharing:
            raise UserError(
                f"placement: {len(seats)} ranks on {host} see {_count(every, 'GPU')} between them, so not each has its "
                f"own; start at most {_count(every, 'rank')} per node, each seeing its own, or let them share"
            )
    picks = [every[column] for column in chosen or ()]
    return [next(s for s in one.seen if (s.bus, s.mig) == pick) for one, pick in zip(seats, picks, strict=True)]


def rails(node: Node) -> dict[str, Card]:
    """GPU -> its card, for all GPUs of the node, also those that are not ours: their cards are not ours either.

    Among the cards of the rate that carries most in all (a fast storage port does not outvote eight NICs).
    """
    up = [nic for nic in node.nics if nic.usable]
    cards = [Card(tuple(nics)) for _, nics in groupby(up, key=lambda nic: nic.slot)]
    if not cards or not node.gpus:
        return {}
    rates = [card.rate for card in cards]
    rate = max(sorted(set(rates)), key=lambda r: (r * rates.count(r), rates.count(r)))
    cards = [card for card in cards if card.rate == rate]
    chosen = match(
        [[nearest(node, gpu, card) for card in cards] for gpu in node.gpus], -(-len(node.gpus) // len(cards))
    )
    return {gpu.bus: cards[column] for gpu, column in zip(node.gpus, chosen or (), strict=True)}


def nearest(node: Node, gpu: Gpu, card: Card) -> tuple[Distance, int]:
    """(how far, and minus the length of the path that both share): less is nearer."""
    found = [_between(gpu.path, path) for nic in card.ports for path in nic.paths]
    mine = home(node, gpu.numa)
    beside = mine >= 0 and any(home(node, nic.numa) == mine for nic in card.ports if nic.paths)
    return min([*found, (Distance.NUMA if beside else Distance.FAR, 0)])


def _between(a: PciPath, b: PciPath) -> tuple[Distance, int]:
    common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    # A shared host bridge is the root complex; a shared root port has a switch, or several functions, below it.
    return (Distance.FAR if common == 0 else Distance.ROOT if common == 1 else Distance.SWITCH), -common


def home(node: Node, numa: int) -> int:
    """The NUMA node with cores that is nearest to a device's; -1 where neither system nor distances say."""
    own = next((n for n in node.numas if n.number == numa), None)
    within = [n.number for n in node.numas if n.cores]
    if len(within) == 1:
        return within[0]
    if own is None or not within:
        return -1
    return numa if own.cores else min(within, key=lambda n: (own.distance.get(n, inf), n))


def _cores(
    node: Node, seats: Sequence[Seat], homes: Sequence[int]
) -> tuple[list[tuple[int, ...]], list[tuple[str, ...]]]:
    """Each seat's cores, and its complaints: those of its home that the launcher left, whole cores, shared evenly."""
    of = {numa.number: set(numa.cores) for numa in node.numas}
    pools: list[tuple[int, ...]] = []
    complaints: list[tuple[str, ...]] = []
    for one, number in zip(seats, homes, strict=True):
        near = tuple(core for core in one.cores if core in of.get(number, one.cores))
        pools.append(near or one.cores)
        complaints.append(() if near else (f"none of its cores is on NUMA node {number}, where its GPU is",))
    shares = []
    for i, pool in enumerate(pools):
        peers = [j for j, other in enumerate(pools) if other == pool]
        whole = _whole(node, pool)
        place, each = peers.index(i), len(whole) // len(peers)
        mine = whole[place * each : (place + 1) * each] if each else [(pool[place % len(pool)],)]
        shares.append(tuple(sorted(thread for core in mine for thread in core)))
    return shares, complaints


def _whole(node: Node, pool: Sequence[int]) -> list[tuple[int, ...]]:
    """The pool by cores, each with those of its hardware threads that are in it."""
    of = {thread: threads for threads in node.siblings for thread in threads}
    groups = dict.fromkeys(tuple(t for t in of.get(core, (core,)) if t in pool) for core in pool)
    return sorted(groups)


# ---- the map as text -------------------------------------------------------------------------------------------------


def pattern(places: Iterable[Place]) -> tuple[str, ...]:
    """One node's part of the map, without its name: equal for nodes of one kind. Remarks follow the lines."""
    ordered = sorted(places, key=lambda p: p.local)
    rows = [("rank", "GPU", "NIC", "NUMA", "cores", "GPU to NIC"), *(_row(p) for p in ordered)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return (*lines, *(f"rank {p.local} {remark}" for p in ordered for remark in p.remarks))


def _row(place: Place) -> tuple[str, ...]:
    part = f" {place.mig.partition('/')[0][:12]}" if place.mig else ""
    card = f"{place.card.name} {place.card.rate:g} Gb/s" if place.card else "-"
    numa = str(place.numa) if place.numa >= 0 else "-"
    far = place.distance.text if place.distance is not None else "-"
    return (str(place.local), f"{place.gpu.name} {place.gpu.bus}{part}", card, numa, ranges(place.cores), far)


def survey(patterns: Mapping[str, Sequence[str]]) -> list[str]:
    """The map of a cluster from (host, its pattern): each kind of node once, the commonest first, with who is of it."""
    kinds: dict[tuple[str, ...], list[str]] = {}
    for host in sorted(patterns):
        kinds.setdefault(tuple(patterns[host]), []).append(host)
    lines: list[str] = []
    for kind, hosts in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[1])):
        more = f" and {len(hosts) - HOSTS_SHOWN} more" if len(hosts) > HOSTS_SHOWN else ""
        names = ", ".join(hosts[:HOSTS_SHOWN]) + more
        lines += [f"{len(hosts)} nodes like this: {names}" if len(hosts) > 1 else names, *(f"  {x}" for x in kind)]
    return lines


def table(places: Iterable[Place]) -> list[str]:
    """The map of these places, for rank 0 to print; of a large job gather ``pattern`` of each node for ``survey``."""
    nodes: dict[str, list[Place]] = {}
    for place in places:
        nodes.setdefault(place.host, []).append(place)
    return survey({host: pattern(of) for host, of in nodes.items()})


def ranges(numbers: Sequence[int]) -> str:
    """ "0-3,8" of (0, 1, 2, 3, 8)."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ",".join(f"{r[0][1]}-{r[-1][1]}" if len(r) > 1 else str(r[0][1]) for r in runs)


def _ports(cards: Iterable[Card]) -> tuple[str, ...]:
    return tuple(f"{nic.name}:{nic.port}" for card in cards for nic in card.ports)


def _visible(seats: Sequence[Seat]) -> list[tuple[str, str]]:
    return sorted({(s.bus, s.mig) for one in seats for s in one.seen})


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {ranges(numbers)}"


def _count(things: Sequence[object], noun: str) -> str:
    return f"{len(things)} {noun}{'s' if len(things) != 1 else ''}"
