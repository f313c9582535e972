"""Where a run goes on: the newest checkpoint in which every byte is right, proven by all ranks together."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hpcpipe.checkpoint import master, mirror, read, write
from hpcpipe.checkpoint.read import Checkpoint
from hpcpipe.comm.link import Link
from hpcpipe.config import Config, UserError, loads, results_digest

MASTER = -1  # among the numbers of shards


def find(out: Path, link: Link, copies: str = "") -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, None in a new folder, and a sentence for each that had to be passed over.

    Each rank reads and sums its share of the shards; in the place of a bad one comes its copy from ``copies``
    (checkpoint.mirror), if that is good. A folder whose checkpoints are all damaged, or surely were there and cannot be
    seen, is an error: starting over is for the user to decide.
    """
    folders, lost = _listed(out, link)
    warnings: list[str] = []
    for folder in folders:
        found = _problems(folder, link)
        if found and copies:
            warnings += _restore(folder, link, mirror.place(copies, link.hostname, out), sorted({n for n, _ in found}))
            found = _problems(folder, link)
        wrong = [sentence for _, sentence in found]
        if not wrong:
            return Checkpoint.open(folder), lost + warnings
        more = f" (and {len(set(wrong)) - 1} more problems)" if len(set(wrong)) > 1 else ""
        warnings.append(f"checkpoint: {folder.name} is passed over: {wrong[0]}{more}")
    if folders:
        link.agree(f"no checkpoint in {out} is good ({warnings[0]}); move its step folders away to start over")
    return None, lost


def _listed(out: Path, link: Link) -> tuple[list[Path], list[str]]:
    """The committed step folders, newest first, and a sentence for each newer one that only has shards."""
    found: tuple[list[Path], list[str]] = ([], [])
    error = None
    if link.rank == 0:
        try:
            found = _look(out)
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"out: {problem.filename or out} cannot be read ({problem.strerror or problem}), so nobody knows "
            error += "what is saved there; try again, or choose another folder"
    link.agree(error)
    return link.bcast(found)


def _look(out: Path) -> tuple[list[Path], list[str]]:
    """The same, on one rank. UserError where only the master of what was saved last is gone: the rest may be good.

    A save that was killed leaves shards without a master, too; so that it once had one must be written down.
    """
    there = read.contents(out)
    good = [folder for folder, names in there if master.FILE in names]
    after = read.number(good[-1]) if good else -1
    lost = [f for f, names in there if read.number(f) > after and any(map(write.SHARD.fullmatch, names))]
    lost = [f for f in lost if f not in good]
    saved = read.noted(out)
    if not good:
        if saved in [folder.name for folder in lost]:
            raise UserError(
                f"checkpoint: {out / saved} was saved and has its shards, but its {master.FILE} is gone, and no other "
                f"checkpoint is in {out}; put {master.FILE} back, or move {saved} away to start over"
            )
        with suppress(OSError):
            (out / read.NOTE).unlink(missing_ok=True)  # of checkpoints that were moved away
    why = {True: f"its {master.FILE} is lost", False: f"it has shards but no {master.FILE} (was its save broken off?)"}
    return good[::-1], [f"checkpoint: {f.name} is passed over: {why[f.name == saved]}" for f in lost]


def _problems(folder: Path, link: Link) -> list[tuple[int, str]]:
    """(number of the shard, MASTER for the master; what is wrong with it): what all ranks have found together."""
    mine: list[tuple[int, str]] = []
    try:
        checkpoint = Checkpoint.open(folder)
    except UserError as error:
        mine.append((MASTER, str(error)))
    else:
        for number in range(link.rank, len(checkpoint.shards), link.size):
            mine += [(number, sentence) for sentence in checkpoint.verify([number])]
    return [problem for part in link.bcast(link.gather(mine) or []) for problem in part]


def _restore(folder: Path, link: Link, place: Path, bad: list[int]) -> list[str]:
    """Puts good copies in the place of bad shards: of those who have one, the first rank does it. Says which."""
    shards = [] if MASTER in bad else Checkpoint.open(folder).shards
    files = {n: (shards[n].file, shards[n].digest) for n in bad if 0 <= n < len(shards)}
    found = {n: mirror.found(place, f"{folder.name}/{file}", digest) for n, (file, digest) in files.items()}
    have = {n: source for n, source in found.items() if source is not None}
    everybody = link.bcast(link.gather(set(have)) or [])
    mine = []
    for n, (file, digest) in files.items():
        if next((rank for rank, theirs in enumerate(everybody) if n in theirs), None) == link.rank:
            source = have[n]
            try:
                mirror.copy(source, folder / file, digest)
                mine.append(f"checkpoint: {folder / file} was bad and is again what its copy {source} is")
            except UserError as problem:
                mine.append(str(problem))
    return [sentence for part in link.bcast(link.gather(mine) or []) for sentence in part]


def check_same_model(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuses to continue a run of another model; ``shapes`` are those of this config."""
    there = {name: shape for name, (shape, _) in checkpoint.tensors.items()}
    other = [name for name in {**shapes, **there} if shapes.get(name) != there.get(name)]
    if other:
        here, before = shapes.get(other[0], "absent"), there.get(other[0], "absent")
        raise UserError(
            f"{checkpoint.path} holds another model: {other[0]} is {before} there and {here} in this config "
            f"({len(other)} tensors differ); use another out folder or the config of that run"
        )


def changes(checkpoint: Checkpoint, config: Config, data_digest: str, copies: int) -> str:
    """What is different from the run that wrote the checkpoint and changes its results; "" for nothing.

    ``copies`` of the model share a batch: replicas, and chains of a bidirectional schedule.
    """
    found = []
    try:
        before = loads(str(checkpoint.attributes["config"]))
        if results_digest(before) != results_digest(config):
            found.append("settings")
        if checkpoint.attributes.get("copies", copies) != copies:
            found.append("the number of replicas")
    except UserError:  # written by a version with other keys
        found.append("the keys of the config")
    if checkpoint.attributes.get("data_digest", data_digest) != data_digest:
        found.append("the data")
    return " and ".join(found)
