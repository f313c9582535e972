"""A checkpoint says what it comes from: program, machines, MPI, units; and nothing that is compared depends on it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hpcpipe.checkpoint import inspect, origin
from hpcpipe.checkpoint.origin import Place, commit, first_words, hardware, processor, sources
from hpcpipe.checkpoint.read import Checkpoint
from small_run import run, write_tokens
from tests.runtime.checkpoint_state import unsynced  # noqa: F401

ROOT = Path(__file__).parents[2]
ONE, OTHER = "1" * 40, "a2" * 32


def repository(folder: Path, head: str, **files: str) -> Path:
    """A ``.git`` with a HEAD and other files."""
    git = folder / ".git"
    for name, text in {"HEAD": head, **files}.items():
        file = git / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return git


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    branch = "ref: refs/heads/main"
    assert commit(repository(tmp_path / "a", branch, refs__heads__main=ONE)) == ONE
    packed = f"# pack-refs\n{OTHER} refs/heads/mainly\n{ONE} refs/heads/main"
    assert commit(repository(tmp_path / "b", branch, **{"packed-refs": packed})) == ONE
    assert commit(repository(tmp_path / "c", OTHER)) == OTHER  # detached, SHA-256
    assert commit(repository(tmp_path / "d", branch)) == ""  # no commit yet
    assert commit(repository(tmp_path / "e", "nonsense")) == "" and commit(tmp_path / "f" / ".git") == ""
    main = repository(tmp_path / "g", branch, refs__heads__main=ONE, refs__heads__side=OTHER)
    own = main / "worktrees" / "h"
    own.mkdir(parents=True)
    (own / "HEAD").write_text("ref: refs/heads/side\n")
    (own / "commondir").write_text("../..\n")
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / ".git").write_text("gitdir: ../g/.git/worktrees/h\n")
    assert commit(tmp_path / "h" / ".git") == OTHER


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a checkout")
def test_the_commit_of_this_checkout_is_what_git_says() -> None:
    told = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if told.returncode:
        pytest.skip(f"git does not tell: {told.stderr.strip()}")
    assert commit(ROOT / ".git") == told.stdout.strip()


def test_the_digest_of_the_sources_sees_every_change(tmp_path: Path) -> None:
    def package(name: str, **files: str) -> str:
        for file, text in files.items():
            path = tmp_path / name / file.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(text)
        return sources(tmp_path / name)

    first = package("a", x="1", sub__y="2")
    assert first == package("b", sub__y="2", x="1") and len(first) == 32
    others = [package("c", x="1", sub__y="3"), package("d", x="1", y="2"), package("e", x="12", sub__y="")]
    assert len({first, *others}) == 4
    (tmp_path / "a" / "notes.txt").write_text("not a source")
    assert sources(tmp_path / "a") == first


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel name\t: AMD EPYC 7763  64-Core\nmodel name\t: x\n", "AMD EPYC 7763 64-Core"),
        ("processor\t: 0\ncpu\t\t: POWER9, altivec supported\n", "POWER9, altivec supported"),
    ],
)  # fmt: skip
def test_the_processor_as_the_system_tells_it(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert processor(tmp_path / "cpuinfo") == name


def test_a_processor_without_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("CPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")  # Arm
    assert processor(tmp_path / "cpuinfo") == processor(tmp_path / "absent") != ""


def test_hardware_in_words() -> None:
    one = Place("n0", "EPYC", 64)
    assert hardware([one]) == "n0: 1 rank on EPYC, 64 cores"
    gpus = [Place(f"n{i // 4}", "Grace", 72, "H100", f"0:{i % 4}") for i in range(24)]
    assert hardware(gpus) == (
        "6 hosts (n0, n1, n2, n3 and 2 more), each: 4 ranks on Grace, 72 cores, 4 x H100"
    )  # fmt: skip
    shared = [Place("a", "EPYC", 1, "A100", "0:1"), Place("a", "EPYC", 1, "A100", "0:1"), Place("b", "Xeon", 2)]
    assert hardware(shared) == "a: 2 ranks on EPYC, 1 core, 1 x A100; b: 1 rank on Xeon, 2 cores"


def test_the_name_of_a_library() -> None:
    assert first_words("Open MPI v5.0.8, package: Open MPI x\0") == "Open MPI v5.0.8"
    assert first_words("MPICH Version:      4.3.1\nMPICH ABI: 17") == "MPICH Version: 4.3.1"


def test_what_a_run_says_changes_no_byte_of_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_tokens(tmp_path / "data")

    def train(name: str) -> tuple[Checkpoint, list[bytes]]:
        run(data, tmp_path / "run", 2, train__steps=2)
        (tmp_path / "run").rename(tmp_path / name)  # where it is written is part of the plan
        found = Checkpoint.open(tmp_path / name)
        return found, [(found.path / shard.file).read_bytes() for shard in found.shards]

    plain, shards = train("plain")
    told = plain.attributes
    assert told["hardware"] == hardware([origin.place(str(told["host"]))] * 2)
    assert str(told["kernels"]).startswith("cpu: ") and told["units.loss"] == origin.MEANING["units.loss"]
    assert told["version.sources"] == sources(ROOT / "hpcpipe")
    assert told.get("version.git", "") == commit(ROOT / ".git") and "row-major" in str(told["layout"])
    said = inspect.describe(plain.path)
    assert f"hardware     {told['hardware']}\n" in said and f"sources {told['version.sources']}" in said
    monkeypatch.setattr(origin, "processor", lambda: "another machine with a very long name " * 9)
    monkeypatch.setattr(origin, "sources", lambda _: "of another program")
    other, others = train("other")
    assert "another machine" in str(other.attributes["hardware"]) and shards == others
    for key in ("plan_digest", "data_digest"):
        assert told[key] == other.attributes[key]
