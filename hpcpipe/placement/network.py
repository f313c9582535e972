"""What NCCL and UCX must be told of a node before they start, and no more: both choose well among what is right to use.

In: a ``Place`` and the environment. Out: variables that nobody has set, each with its reason, and sentences on what is
set badly. Sources: "Environment Variables" (NCCL documentation, read at 2.32), "Frequently Asked Questions" (UCX
documentation), "CUDA Environment Variables" (CUDA programming guide).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from hpcpipe.placement.mapping import Distance, Place


class Setting(NamedTuple):
    """A variable, and why."""

    name: str
    value: str
    reason: str


def settings(place: Place, environment: Mapping[str, str], configured: Collection[str] = ()) -> dict[str, str]:
    """The variables to set; ``configured``: names that a file of the site sets already, which a variable would undo."""
    return {s.name: s.value for s in wanted(place) if s.name not in environment and s.name not in configured}


def wanted(place: Place) -> list[Setting]:
    """All that this node needs, set already or not.

    Left alone on purpose, because the libraries decide better: NCCL_NET_GDR_LEVEL (forcing it sends peer traffic
    through CPUs that may be slow at it), NCCL_DMABUF_ENABLE (on wherever kernel and drivers have it), NCCL_MNNVL_ENABLE
    (ranks must agree, which one node cannot see to, and NCCL compares them all), UCX_TLS (a list shuts out the rest).
    """
    found = [*_nccl(place), *_ucx(place)]
    if place.mixed:
        reason = "the GPUs are of several kinds: CUDA would put the fastest first, here they are counted by PCI address"
        found.append(Setting("CUDA_DEVICE_ORDER", "PCI_BUS_ID", reason))
    return found


def _nccl(place: Place) -> list[Setting]:
    found = []
    if place.rails and place.strangers and _verbs(place):
        # One list for all ranks of a node, never a rank's own port: NCCL plans with one topology per node and picks the
        # nearest by itself ("You should not set NCCL_IB_HCA differently on each rank", NVIDIA/nccl issue 1478).
        reason = f"{_list(place.strangers)} are up too, but serve no GPU"
        found.append(Setting("NCCL_IB_HCA", "=" + ",".join(place.rails), reason))
    if place.gpu.c2c:
        reason = "GPU and CPU are one by NVLink-C2C, so NICs at the CPU reach GPU memory; off by default in NCCL 2.26"
        found.append(Setting("NCCL_NET_GDR_C2C", "1", reason))
    if any(not name.startswith(("lo", "docker")) for name in place.inner):  # NCCL leaves these out by itself
        reason = "these interfaces lead to no other node, and NCCL would try them"
        found.append(Setting("NCCL_SOCKET_IFNAME", "^=" + ",".join(place.inner), reason))
    return found


def _ucx(place: Place) -> list[Setting]:
    if place.card is None or not _verbs(place) or len(place.rails) + len(place.strangers) <= len(place.card.ports):
        return []
    if place.distance in (Distance.SWITCH, Distance.ROOT):
        value = tuple(f"{nic.name}:{nic.port}" for nic in place.card.ports)
        reason = f"its NIC ({place.distance.text} as its GPU); UCX would add a neighbour's"
    elif place.strangers:
        value = place.near
        reason = f"the nearest that serve GPUs, of which none is nearer; {_list(place.strangers)} serve none"
    else:
        return []
    return [Setting("UCX_NET_DEVICES", ",".join(value), reason)]


def _list(names: Collection[str]) -> str:
    return ", ".join(names)


def _verbs(place: Place) -> bool:
    """Whether these are RDMA verbs devices, which both libraries open; Slingshot comes with libraries of its own."""
    return place.card is not None and all(nic.kind != "cxi" for nic in place.card.ports)


def notes(place: Place, environment: Mapping[str, str]) -> list[str]:
    """Sentences about what is set, or missing, against what the node has."""
    found = []
    names = sorted({port.partition(":")[0] for port in (*place.rails, *place.strangers)})
    chosen = environment.get("NCCL_IB_HCA", "")
    if chosen and "=" not in chosen[:2]:
        for entry in chosen.lstrip("^").split(","):
            prefix = entry.partition(":")[0]
            more = [name for name in names if name.startswith(prefix) and name != prefix]
            if prefix in names and more:
                found.append(f'NCCL_IB_HCA={chosen} also means {", ".join(more)}; write "=" before the names')
    transports = environment.get("UCX_TLS", "all")
    if not transports.startswith("^") and not any(t == "all" or t.startswith("cuda") for t in transports.split(",")):
        found.append(f"UCX_TLS={transports} leaves out CUDA memory, which MPI needs for arrays on a GPU; add cuda")
    if place.gpu.fabric and not place.imex:
        found.append(
            "this GPU is part of a multi-node NVLink, but no IMEX channel is open here, so NCCL will use the network "
            "between nodes; ask the site for the IMEX service (nvidia-caps-imex-channels)"
        )
    return found


def configured(environment: Mapping[str, str], etc: Path = Path("/etc")) -> frozenset[str]:
    """The names that NCCL's files set: the site's nccl.conf, and the user's (NCCL_CONF_FILE or .nccl.conf at home)."""
    own = environment.get("NCCL_CONF_FILE") or f"{environment.get('HOME', '')}/.nccl.conf"
    names = set()
    for file in (etc / "nccl.conf", Path(own)):
        try:
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        names |= {line.partition("=")[0].strip() for line in lines if "=" in line and not line.lstrip().startswith("#")}
    return frozenset(names)
