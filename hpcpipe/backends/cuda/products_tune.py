"""Which algorithm a product takes: measured once per machine and library, kept in a file, the same on every rank.

cuBLASLt's heuristics order their proposals by a model; here the first few are timed on scratch of the real shapes, and
the fastest of those whose bits never change is kept. ``table`` is what a rank found, ``adopt`` takes another rank's:
equal products must run equal algorithms, or replicas would round differently. Nothing here runs in a capture.

The file is JSON, ``products-<digest>.json`` in the user's cache folder, one for each device, driver and library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hpcpipe.backends.cuda.driver import Properties
from hpcpipe.backends.cuda.products_cublaslt import BITS, Choice, CublasLt, Plan, Pointers
from hpcpipe.config import UserError

PROPOSALS = 8  # algorithms that are timed
ROUNDS = 3  # times that each is timed, in turn; the best counts
RUNS = 10  # products per timing, at most
SPAN = 0.01  # seconds per timing, about
BETTER = 0.98  # a later proposal must take at most this part of the time of an earlier one
PATTERN = 4 << 20  # bytes of noise that scratch is filled with again and again
ONES = {"VEC16_UE4M3": 0x38, "VEC32_UE8M0": 0x7F}  # the byte of a scale of 1; a float32 of bytes 0x3F is about 0.75
SCALES = 1 << 16  # bytes of scratch that stand for the scales of an operand, if each had one per 32 elements


def cache_folder(environment: Mapping[str, str]) -> Path:
    """Where files live that can be made again."""
    root = environment.get("XDG_CACHE_HOME", "")
    return (Path(root) if root else Path.home() / ".cache") / "hpcpipe"


def wanted(environment: Mapping[str, str]) -> bool:
    """HPCPIPE_TUNE: on (the default) or off."""
    said = environment.get("HPCPIPE_TUNE", "on").lower()
    if said not in ("on", "off"):
        raise UserError(f"HPCPIPE_TUNE is {said!r}; set it to on, or to off to take cuBLASLt's first proposals")
    return said == "on"


def identity(properties: Properties, version: int) -> dict[str, Any]:
    """What a choice is good for."""
    return {"device": properties.name, "multiprocessors": properties.multiprocessors,
            "driver": properties.driver, "cublaslt": version}  # fmt: skip


def read(path: Path, of: Mapping[str, Any]) -> dict[str, Choice]:
    """The choices in a file; none of a file that is broken, missing or about something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["identity"] != dict(of):
            return {}
        return {str(key): _choice(value) for key, value in found["choices"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write(path: Path, of: Mapping[str, Any], choices: Mapping[str, Choice]) -> None:
    """Adds choices to a file, whole or not at all. A folder that cannot be written costs the next run its time only."""
    both = {**read(path, of), **choices}
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = {key: _row(both[key]) for key in sorted(both)}
        part.write_text(json.dumps({"identity": dict(of), "choices": rows}, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()


def _row(choice: Choice) -> dict[str, Any]:
    return {"algorithm": choice.algorithm.hex(), "workspace": choice.workspace}


def _choice(row: Any) -> Choice:
    choice = Choice(bytes.fromhex(row["algorithm"]), int(row["workspace"]))
    if len(choice.algorithm) != 64:
        raise ValueError("an algorithm of cuBLASLt has 64 bytes")
    return choice


class Tuner:
    """Chooses algorithms. ``environment`` is os.environ: HPCPIPE_TUNE and where the cache folder is."""

    def __init__(self, library: CublasLt, properties: Properties, environment: Mapping[str, str]) -> None:
        self.library, self.driver = library, library.driver
        self.identity = identity(properties, library.version)
        self.timing = wanted(environment)
        digest = hashlib.blake2b(json.dumps(self.identity, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.path = cache_folder(environment) / f"products-{digest}.json"
        self._kept = read(self.path, self.identity) if self.timing else {}
        self._given: dict[str, Choice | None] = {}
        self._plans: dict[str, Plan] = {}
        self.timed = 0  # products measured in this run

    def choose(self, plan: Plan) -> Choice | None:
        """Sets ``plan.choice``: another rank's, the file's, the fastest here, or None where no algorithm does it."""
        key = plan.product.key
        self._plans[key] = plan
        if key in self._given:
            plan.choice = self._checked(plan, self._given[key])
        elif key in self._kept and self.library.fits(plan, self._kept[key]):
            plan.choice = self._kept[key]
        else:
            found = self.library.candidates(plan, 2 * PROPOSALS)[:PROPOSALS]
            plan.choice = found[0] if found else None
            if self.timing and len(found) > 1:
                self._time(plan, found)
        return plan.choice

    def table(self) -> dict[str, dict[str, Any] | None]:
        """What was chosen so far, by device and product, ready for JSON or pickle: to be sent to other ranks."""
        return {self._name(key): None if p.choice is None else _row(p.choice) for key, p in sorted(self._plans.items())}

    def adopt(self, table: Mapping[str, Any]) -> None:
        """Takes over ranks' common choices, for plans that there are and that will be; before anything is captured.

        Rows of other devices and libraries are theirs. UserError where an algorithm does not run here.
        """
        for name, row in table.items():
            key = name.removeprefix(self._name(""))
            if key == name:
                continue
            self._given[key] = None if row is None else _choice(row)
            if key in self._plans:
                self._plans[key].choice = self._checked(self._plans[key], self._given[key])
        common = {key: choice for key, choice in self._given.items() if choice is not None}
        if self.timing and any(self._kept.get(key) != choice for key, choice in common.items()):
            write(self.path, self.identity, common)  # what ranks timed differently is settled for later runs, too
            self._kept |= common

    def _name(self, key: str) -> str:
        """A product's name among those of all ranks."""
        return f"{', '.join(f'{name} {value}' for name, value in self.identity.items())}: {key}"

    def _checked(self, plan: Plan, choice: Choice | None) -> Choice | None:
        if choice is None and plan.choice is not None:
            refused = "another rank's cuBLAS refuses"
        elif choice is not None and not self.library.fits(plan, choice):
            refused = "another rank's algorithm does not run here for"
        else:
            return choice
        raise UserError(f"{refused} the product {plan.product.key}; give all ranks the same device, driver and cuBLAS")

    def _time(self, plan: Plan, found: Sequence[Choice]) -> None:
        """Times the proposals in turn and keeps the fastest."""
        sizes = _scratch(plan)
        nbytes = sum(sizes.values())
        try:
            block = self.driver.allocate(nbytes + self.library.size)
        except UserError:
            return  # no room beside the arena: the first proposal stays
        try:
            at = self._place(plan, block, sizes)
            seconds = self._measure(plan, at, found, block + nbytes)
        finally:
            self.driver.release(block)
        best, least = -1, math.inf
        for i, spent in enumerate(seconds):
            if spent is not None and spent < BETTER * least:
                best, least = i, spent
        if best >= 0:
            plan.choice = found[best]
            self.timed += 1
            write(self.path, self.identity, {plan.product.key: found[best]})

    def _measure(self, plan: Plan, at: Pointers, found: Sequence[Choice], workspace: int) -> list[float | None]:
        """Seconds per product for each proposal; None for one that does not run after all."""
        stream = self.driver.stream()
        first, last = self.driver.event(timing=True), self.driver.event(timing=True)
        best: list[float | None] = [None] * len(found)
        for i, choice in enumerate(found):  # once for nothing: what is loaded at first use
            try:
                self.library.run(plan, at, stream, choice, workspace)
                self.driver.synchronize(stream)
                best[i] = float("inf")
            except self.library.lt.cuBLASLtError:
                continue
        for turn in range(ROUNDS):
            for i, choice in enumerate(found):
                known = best[i]
                if known is None:
                    continue
                runs = 1 if turn == 0 else max(1, min(RUNS, int(SPAN / max(known, 1e-6))))
                self.driver.record(first, stream)
                for _ in range(runs):
                    self.library.run(plan, at, stream, choice, workspace)
                self.driver.record(last, stream)
                self.driver.synchronize(last)
                best[i] = min(known, self.driver.seconds(first, last) / runs)
        return best

    def _place(self, plan: Plan, block: int, sizes: Mapping[str, int]) -> Pointers:
        """Addresses in scratch, filled with noise: a device's clock, and so its speed, depends on the numbers."""
        pattern = self.driver.pinned(PATTERN)
        stream, at, places = self.driver.stream(), block, {}
        for name, size in sizes.items():
            places[name] = at
            if name.endswith(("scale", "alpha")):
                self.driver.fill(at, ONES.get(plan.product.scales[0], 0x3F), size, stream)
            else:
                types = dict(zip(("a", "b", "d"), plan.product.types, strict=True))
                pattern[:] = noise(types.get(name, plan.product.types[2]), PATTERN)
                for offset in range(0, size, PATTERN):
                    count = min(PATTERN, size - offset)
                    self.driver.copy(at + offset, pattern.ctypes.data, count, stream)
                self.driver.synchronize(stream)
            at += size
        self.driver.synchronize(stream)
        return Pointers(**places)


def _scratch(plan: Plan) -> dict[str, int]:
    """Bytes for each address of a product, multiples of 512."""
    product = plan.product
    counts = {name: ld * shape[1] for name, ld, shape in zip("abd", product.ld, product.stored, strict=True)}
    bits = dict(zip("abd", (BITS[t] for t in product.types), strict=True))
    sizes = {name: counts[name] * bits[name] // 8 for name in "abd"}
    if "BIAS" in product.epilogue:
        sizes["bias"] = product.m * 4
    if "AUX" in product.epilogue or product.epilogue.startswith("DGELU"):
        sizes["aux"] = sizes["d"]
    for name, mode in zip("ab", product.scales, strict=True):
        if mode:
            sizes[f"{name}_scale"] = SCALES + counts[name] // 8
    if product.device_alpha:
        sizes["alpha"] = 4
    return {name: -(-size // 512) * 512 for name, size in sizes.items()}


def noise(type: str, nbytes: int) -> npt.NDArray[np.uint8]:
    """Finite numbers of an element type, as bytes: normal ones, or any for the types of a byte or less."""
    rng = np.random.default_rng(0)
    if type in ("r", "h"):
        values = rng.standard_normal(nbytes // 4).astype(np.float32)
        if type == "r":
            return values.view(np.uint8)
        halves = (values.view(np.uint32) >> 16).astype(np.uint16)
        return np.concatenate([halves, halves]).view(np.uint8)
    found = rng.integers(0, 256, nbytes, dtype=np.uint8)
    return found & np.uint8({"e4m3": 0xBF, "e5m2": 0xBF, "e2m1": 0xFF}[type])  # without infinities and NaN
