"""The parts of ``benchmarks.gpu``: what each does in its process, and the lines that it leaves.

In: what the parts before it found. Out: an ``Answer``. A part that cannot do its work raises, and the others go on.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from benchmarks import gpu_curves, gpu_kernels, gpu_steps
from hpcpipe.backends.cuda import modules, opening, peaks

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cupy-cuda13x", "cupy-cuda12x", "nvmath-python", "nvidia-cudnn-frontend", "torch", "jax", "mpi4py")
TESTS = ("tests/gpu/test_on_device.py", "tests/gpu/test_driver.py")
FEW, MANY = 3, 5  # rounds
LOOK = 25  # seconds in which a library says that it sees the GPU
PEERS = {  # libraries and what says that they see the GPU
    "jax": "import os; os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'; import jax; jax.devices('cuda')",
    "torch": "import torch; assert torch.cuda.is_available(), 'it sees no GPU'",
}


class Answer(NamedTuple):
    """What a part found, and its table."""

    values: dict[str, Any]
    lines: list[str]


class Task(NamedTuple):
    """What a part is given: ``found`` are the values of the parts before it, ``limit`` its seconds."""

    found: Mapping[str, Any]
    limit: float
    quick: bool = False
    toy: bool = False  # a rehearsal: no GPU, tiny shapes, no numbers
    peers: Mapping[str, str] | None = None  # library -> interpreter; None: look for them


class Part(NamedTuple):
    """``limit``: seconds that it may take."""

    name: str
    what: str
    limit: float
    work: Callable[[Task], Answer]


def device(task: Task) -> Answer:
    """Which GPU, which libraries, which peers; UserError, a sentence, where there is no GPU."""
    told = opening.connect(0).properties
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    values = {**told._asdict(), "arch": told.arch, "versions": versions, "peak": peaks.peak(told.name, "bfloat16")}
    values["toy"], values["peers"], lines = task.toy, {}, []
    if task.peers is not None:
        values["peers"] = dict(task.peers)
    elif not task.toy:
        values["peers"], lines = _peers()
    known = f"dense bfloat16 peak {values['peak'] / 1e12:.0f} TFLOP/s" if values["peak"] else "its peak is not known"
    head = f"{told.name} ({told.arch}), {told.memory / 2**30:.0f} GiB, driver for CUDA {told.driver // 1000}; {known}"
    return Answer(values, [head, ", ".join(f"{name} {version}" for name, version in versions.items()), *lines])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _peers() -> tuple[dict[str, str], list[str]]:
    """Library -> interpreter that has it and sees the GPU; a loud line for each that is missing."""
    found, lines = {}, []
    candidates = [sys.executable, str(ROOT / ".venv-peers/bin/python")]
    for name, program in PEERS.items():
        said = ""
        for python in filter(os.path.exists, candidates):
            try:
                done = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=LOOK)
            except subprocess.TimeoutExpired:
                said = f"no answer within {LOOK} s"
                continue
            if done.returncode == 0:
                found[name] = python
                break
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        else:
            lines.append(f"SKIPPED: {name} does not run on this GPU and is not compared with ({said})")
    return found, lines


def build(task: Task) -> Answer:
    """Cubins for this device, made or found."""
    arch, begin = task.found["device"]["arch"], perf_counter()
    images = modules.images(arch)
    seconds, entries = perf_counter() - begin, sum(len(image.entries) for image in images.values())
    compiler = next((c.name for c in (modules.nvcc(), modules.nvrtc()) if c), "none")
    values = {"files": len(images), "entries": entries, "seconds": seconds, "compiler": compiler}
    told = "" if task.toy else f" in {seconds:.1f} s, compiler: {compiler} (what was made before is kept)"
    return Answer(values, [f"{entries} kernels of {len(images)} files{told}"])


def tests(task: Task, chosen: str, rehearsed: str = "") -> Answer:
    """The tests on the device; in a rehearsal those that stand for them on the emulator, if there are such."""
    if task.toy and not rehearsed:
        return Answer({"tests": {}, "outcome": "skipped"}, ["needs a GPU"])
    marker = ["-k", f"host and ({rehearsed})"] if task.toy else ["-m", "gpu", "-k", chosen]
    with tempfile.TemporaryDirectory(prefix="hpcpipe-gpu-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        if find_spec("xdist") and not task.toy:  # the definitions take longer than the device
            command += ["-n", str(max(1, min(8, len(os.sched_getaffinity(0)) // 2)))]
        done = subprocess.run(
            [*command, *marker, f"--junitxml={report}"], cwd=ROOT, capture_output=True, text=True, errors="replace"
        )
        outcomes = _outcomes(report) if report.exists() else {}
    tail = (done.stdout + done.stderr).strip().splitlines()
    if not outcomes:
        raise RuntimeError(f"pytest ran no test: {tail[-1] if tail else 'it said nothing'}")
    counts = Counter(outcomes.values())
    lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))]
    lines += [f"  {line}" for line in tail if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    worst = next((outcome for outcome in ("failed", "skipped") if counts[outcome]), "passed")
    return Answer({"tests": outcomes, "outcome": "passed" if counts["passed"] and worst != "failed" else worst}, lines)


def _outcomes(report: Path) -> dict[str, str]:
    """Test -> passed, failed or skipped, from a JUnit file."""
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        bad = kinds & {"failure", "error"}
        found[case.attrib["name"]] = "failed" if bad else "skipped" if "skipped" in kinds else "passed"
    return found


def curves(task: Task) -> Answer:
    """Loss curves in all types."""
    found = gpu_curves.curves(task.toy)
    lines = gpu_curves.table(found) if not task.toy else [f"rehearsed: {', '.join(found['losses'])}"]
    return Answer(found, lines)


def kernels(task: Task) -> Answer:
    """The roofline of every kernel."""
    found = gpu_kernels.roofline("bfloat16", task.quick, task.toy)
    return Answer(found, gpu_kernels.table(found, task.found["device"]["peak"], task.toy))


def steps(name: str, task: Task) -> Answer:
    """Whole steps of one shape beside the peers."""
    told = dict(task.found["device"])
    product = task.found.get("kernels", {}).get("product")
    if told["peak"] is None and product and not task.toy:  # a device nobody knows is measured, never guessed
        told["peak"] = product["flops"] / product["seconds"]
    rounds = 1 if task.toy else FEW if task.quick else MANY
    found = gpu_steps.contest(name, rounds, told["peers"], told, task.limit, task.toy)
    lines = gpu_steps.table(name, found, task.toy)
    if gpu_steps.OURS not in found["runs"]:
        raise RuntimeError("; ".join(f"{who}: {why}" for who, why in found["failures"].items()))
    return Answer(found, lines)


def selected(parts: Sequence[Part], names: Sequence[str]) -> list[Part]:
    """The parts of these names, and the device, which all need; ValueError for a name that is none."""
    known = [part.name for part in parts]
    for name in names:
        if name not in known:
            raise ValueError(f"there is no part {name!r}; there are {', '.join(known)}")
    return [part for part in parts if not names or part.name in names or part.name == "device"]


# What matters most comes first: when the time is over, the rest is reported as not run.
PARTS = (
    Part("device", "what is here", 120, device),
    Part("build", "kernels compiled for this device", 150, build),
    Part("check", "tests on the device", 200, partial(tests, chosen="not sanitizer", rehearsed="bits and n7")),
    Part("curves", "loss curves in every type", 60, curves),
    Part("kernels", "every kernel beside what bounds it", 90, kernels),
    *(
        Part(name, f"whole steps, {name}", limit, partial(steps, name))
        for name, limit in (("gpt2-124M", 130), ("gpt2-1.5B", 260), ("llama-1B", 150), ("gpt2-350M", 130))
    ),
    Part("sanitizer", "compute-sanitizer over a few tests", 120, partial(tests, chosen="sanitizer")),
)
QUICK = ("device", "build", "check", "curves", "kernels", "gpt2-124M")
