"""Where a checkpoint comes from: the program's commit and sources, the machines, the MPI library; and in what units.

In: the package's folder, the system's own files, what each rank says of its place. Out: texts for the attributes of
``master.h5``. Files are read and no process is started, which MPI would not like. No digest that tells results apart
depends on any of it, and no byte of a tensor does.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]
PROCESSORS = Path("/proc/cpuinfo")
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
NAMED = 4  # hosts of one kind that are called by their names

# What the numbers of a checkpoint mean, beside them.
MEANING = {
    "units.step": "optimizer steps done",
    "units.tokens": "tokens of training text seen, all replicas together",
    "units.loss": "nats per token, mean over the batch of the last step",
    "units.parameters": "pure numbers",
    "units.moment1": "nats per token, for one unit of the parameter",
    "units.moment2": "the square of that",
    "layout": "row-major, little-endian; y = x @ weight.T, so a linear weight is [outputs, inputs]",
}


class Place(NamedTuple):
    """What one rank says of where it works; ``device`` and ``bus`` are its GPU's, "" without one."""

    host: str
    processor: str
    cores: int  # of the whole host, hardware threads counted
    device: str = ""
    bus: str = ""


def program(package: Path = PACKAGE) -> dict[str, str]:
    """The commit that is checked out, where the program runs from a checkout, and the digest of its Python files.

    The commit says nothing of changes since; the digest does: equal digests are equal sources.
    """
    found = {}
    with suppress(OSError):  # replaced while it runs
        found["version.sources"] = sources(package)
    if checked_out := commit(package.parent / ".git"):
        found["version.git"] = checked_out
    return found


def sources(package: Path) -> str:
    """BLAKE2b-128 of the names and texts of all Python files below a folder."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
        digest.update(hashlib.blake2b(file.read_bytes()).digest())
    return digest.hexdigest()


def commit(git: Path) -> str:
    """The commit of HEAD by a ``.git`` folder, or the file that a worktree has in its place; "" where there is none."""
    try:
        if git.is_file():
            git = git.parent / git.read_text(encoding="utf-8").partition(":")[2].strip()
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref:"):
            head = _reference(head[4:].strip(), (git, common))
    except (OSError, UnicodeDecodeError):
        return ""
    return head if COMMIT.fullmatch(head) else ""


def _reference(name: str, folders: Iterable[Path]) -> str:
    """What a branch points to: a file of its own, or a line among the packed ones."""
    for folder in folders:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8").strip()
        packed = folder / "packed-refs"
        lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
        for line in lines:
            if line.endswith(f" {name}"):
                return line.split()[0]
    return ""


def processor(file: Path = PROCESSORS) -> str:
    """The processor's name as the system tells it; on Arm, which tells no name, the architecture."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|cpu model|cpu)\s*:\s*(\S.*)$", text, re.M)
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine() or "unknown"


def first_words(library: str) -> str:
    """Of what an MPI library says of itself, which may be pages, its name and version."""
    return " ".join(library.strip("\0 \n").partition("\n")[0].split()).partition(",")[0]


def place(host: str, device: str = "", bus: str = "") -> Place:
    """That of this process."""
    return Place(host, processor(), os.cpu_count() or 1, device, bus)


def hardware(places: Sequence[Place]) -> str:
    """All ranks' places in words; hosts that are alike are told together."""
    hosts: dict[str, list[Place]] = {}
    for each in places:
        hosts.setdefault(each.host, []).append(each)
    kinds: dict[str, list[str]] = {}
    for host, here in hosts.items():
        kinds.setdefault(_host(here), []).append(host)
    return "; ".join(f"{_hosts(names)}: {kind}" for kind, names in kinds.items())


def _host(here: Sequence[Place]) -> str:
    """One host: its ranks, its processor, the GPUs that they use."""
    ranks = f"{len(here)} rank{'s' * (len(here) > 1)}"
    cores = f"{here[0].cores} core{'s' * (here[0].cores > 1)}"
    gpus: dict[str, set[str]] = {}
    for each in here:
        if each.device:
            gpus.setdefault(each.device, set()).add(each.bus)
    devices = [f"{len(buses)} x {name}" for name, buses in gpus.items()]
    return ", ".join([f"{ranks} on {here[0].processor}", cores, *devices])


def _hosts(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
    return shown if len(names) == 1 else f"{len(names)} hosts ({shown}), each"
